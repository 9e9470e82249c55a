"""Many rows, each for itself: one that fails keeps no other waiting. For the sweeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from portal.db import AWAY
from portal.errors import Conflict
from portal.models import Table

LOG = logging.getLogger(__name__)

Row = TypeVar("Row", bound=Table)


def each(rows: Iterable[Row], act: Callable[[Row], bool]) -> int:
    """Do `act` for every row; returns for how many it said that something came of it.

    A Conflict is no failure: somebody was first, or it must not be now, and the next sweep looks again. Raises
    RuntimeError that names the rows where anything else went wrong, after all the others were done.
    """
    done = 0
    failures: list[str] = []
    for row in list(rows):  # read to its end: on SQLite one that is half read keeps the loop from writing
        try:
            done += act(row)
        except Conflict as refusal:
            LOG.info("%s: not now: %s", _name(row), refusal.message)
        except AWAY:
            raise
        except Exception:
            LOG.exception("%s failed; the others go on", _name(row))
            failures.append(_name(row))
    if failures:
        raise RuntimeError(f"failed: {', '.join(failures)}")
    return done


def _name(row: Table) -> str:
    return f"{type(row).__name__.lower()} {row.id}"
