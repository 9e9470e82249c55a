"""The thread of a worker that makes the rounds of services/sweeps.py."""

from __future__ import annotations

import logging
import threading
import time

from portal.db import AWAY, connection
from portal.services import sweeps

LOG = logging.getLogger(__name__)


def sweep_until(stopping: threading.Event, interval_s: float) -> None:
    """A round every `interval_s`; of several workers, whoever comes first makes it. Nothing but `stopping` ends it."""
    sweeping = sweeps.Round(sweeps.all_sweeps())
    while not stopping.wait(interval_s):
        try:
            with connection():
                sweeping.go(time.monotonic())
        except AWAY:
            LOG.warning("the database does not answer; sweeping goes on when it does", exc_info=True)
        except Exception:  # without this thread the worker looks well, and no lease ends and no machine is cleaned
            LOG.exception("a round of sweeps failed; the next one is made all the same")
