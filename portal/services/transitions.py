"""The one way to move a row from a state to the next.

`move` is a conditional UPDATE: the database decides who was first, not the copy in our hand. The arrows themselves are
in models/states.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portal.db import db, utcnow
from portal.errors import Conflict
from portal.models import Alert, AlertSilence, Attempt, Command, Lease, Machine, Reclaim, Run, Table
from portal.models.states import ALERT, ALERT_SILENCE, ATTEMPT, COMMAND, LEASE, MACHINE, RECLAIM, RUN, Transitions

TABLES: Mapping[type[Table], Transitions] = {
    Machine: MACHINE,
    Lease: LEASE,
    Run: RUN,
    Attempt: ATTEMPT,
    Reclaim: RECLAIM,
    Command: COMMAND,
    Alert: ALERT,
    AlertSilence: ALERT_SILENCE,
}


class WrongState(Conflict):
    """Somebody was first, or it was never possible."""

    code = "wrong_state"


def move(row: Table, *, leave: str | list[str], enter: str, where: Any = None, **changes: Any) -> None:
    """Move `row` from one of the states `leave` to `enter`, writing `changes` with it, and bring `row` up to date.

    Must be called inside a transaction. `where` narrows it further (a lock token). Raises WrongState, with the state
    that the row really has, if it is in none of `leave` by now; ValueError if models/states.py has no such arrow.
    """
    table = type(row)
    leaving = [leave] if isinstance(leave, str) else list(leave)
    for state in leaving:
        if enter not in TABLES[table][state]:
            raise ValueError(f"{table.__name__} has no way from {state} to {enter}")
    if not db.in_transaction():
        raise RuntimeError(f"{table.__name__} {row.id} → {enter}: outside a transaction")
    changes["state"] = enter
    if table is Machine:
        changes.setdefault("state_reason", None)
        changes["state_changed_at"] = utcnow()
    columns: Any = table
    condition = (columns.id == row.id) & (columns.state << leaving)
    if where is not None:
        condition &= where
    if table.update(**changes).where(condition).execute() != 1:
        now = columns.get_or_none(columns.id == row.id)
        seen = "gone" if now is None else now.state
        noun = table.__name__.lower()
        raise WrongState(f"The {noun} is {seen} by now, so it cannot become {enter}.", state=seen, wanted=enter)
    for name, value in changes.items():
        setattr(row, name, value)
    # A later save() must not write these again. `dirty_fields` only hands out a copy of this set.
    row._dirty.difference_update(changes)  # type: ignore[attr-defined]  # Peewee names it in its source alone
