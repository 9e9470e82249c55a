"""The network's one row: the generation that grows with every change, and whether the stacks may be given it at all.

Whoever changes what the stacks shall make calls `changed` in the same transaction, after the rows of machines: from
there on nobody else changes the network before the commit. What is wanted is in network_names.py, network_openings.py
and network_forwards.py, the document in network_export.py, the call to the pipeline in network_webhook.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid
from portal.models import AppliedNetwork, NetworkExport, NetworkState
from portal.services import audit, events
from portal.services.actors import SYSTEM, Actor

ONLY = 1  # the row's id
SET_ASIDE = 1000  # more generations than there were between a backup and its restoration


class NetworkFrozen(Conflict):
    """The portal was restored from a backup, and nobody has compared it with the clouds yet."""

    code = "network_frozen"


def state() -> NetworkState:
    """As it is now; of a portal that has no network yet, as one begins."""
    row: NetworkState | None = NetworkState.get_or_none(NetworkState.id == ONLY)
    return row or NetworkState(id=ONLY)


def changed() -> int:
    """What the stacks shall make has changed; returns the new generation. Held until the transaction ends."""
    hold()
    NetworkState.update(_counted()).where(NetworkState.id == ONLY).execute()
    events.write("network.changed")
    generation: int = state().generation
    return generation


def _counted(by: int = 1) -> dict[str, Any]:
    now = utcnow()
    first = {
        name: peewee.Case(None, [(column.is_null(), now)], column)
        for name, column in (("untold_since", NetworkState.untold_since), ("behind_since", NetworkState.behind_since))
    }
    return {"generation": NetworkState.generation + by, "changed_at": now, **first}


def applied(*, is_everything: bool, at: datetime) -> None:
    """A stack has applied something; `is_everything`: now all of them have the newest generation."""
    is_behind = NetworkState.behind_since.is_null(False)
    since = None if is_everything else at
    NetworkState.update(behind_since=since).where(NetworkState.id == ONLY, is_behind).execute()


def count_if(generation: int) -> bool:
    """Count a change that nobody counted, if it is still this generation; returns whether it was."""
    with atomic():
        same = (NetworkState.id == ONLY) & (NetworkState.generation == generation)
        if NetworkState.update(_counted()).where(same).execute() != 1:
            return False
        events.write("network.changed")
    return True


def hold() -> None:
    """Whoever changes the network waits here until this transaction ends: what was checked stays true."""
    held = NetworkState.update(generation=NetworkState.generation).where(NetworkState.id == ONLY)
    if held.execute() == 0:
        NetworkState.insert(id=ONLY).on_conflict_ignore().execute()  # the first change of all
        held.execute()


# Restored from a backup


def freeze(reason: str) -> None:
    """Give no export out: names and openings of leases that were lost with the backup would be deleted by it.

    Called inside the transaction that restored. A portal that never gave one out has nothing to compare.
    """
    if not NetworkExport.select().exists() and not AppliedNetwork.select().exists():
        return
    told = {"frozen_reason": reason, "frozen_at": utcnow()}
    NetworkState.update(told).where(NetworkState.id == ONLY).execute()
    audit.record("network.frozen", state(), by=SYSTEM, reason=reason)
    events.write("network.frozen")


def refuse_frozen(row: NetworkState) -> None:
    """Raises NetworkFrozen."""
    if row.frozen_reason is not None:
        raise NetworkFrozen(
            f"The network is frozen: {row.frozen_reason} "
            "Compare what is wanted with what the stacks have applied, and thaw it."
        )


def thaw(*, by: Actor, reason: str) -> NetworkState:
    """An operator has compared: the portal's word counts again. Its next export is later than all that were applied."""
    if not reason.strip():
        raise Invalid({"reason": ["Say what was compared; the trail keeps it."]})
    with atomic():
        hold()
        row = state()
        if row.frozen_reason is None:
            raise Conflict("The network is not frozen.", code="not_frozen")
        applied: int = AppliedNetwork.select(peewee.fn.MAX(AppliedNetwork.generation)).scalar() or 0
        later = max(applied - row.generation, 0) + SET_ASIDE
        changes = {**_counted(later), "frozen_reason": None, "frozen_at": None}
        NetworkState.update(changes).where(NetworkState.id == ONLY).execute()
        audit.record("network.thawed", row, by=by, reason=reason, before=row.frozen_reason)
        events.write("network.changed")
    return state()


def catch_up(generation: int) -> None:
    """A stack has applied a generation that we have not counted to: the next export must be later than that one."""
    behind = (NetworkState.id == ONLY) & (NetworkState.generation < generation)
    with atomic():
        hold()
        NetworkState.update({**_counted(), "generation": generation + 1}).where(behind).execute()
