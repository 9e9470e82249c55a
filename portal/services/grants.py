"""Grants: what a lease opens, one row for each thing: what we want, and what was last seen of it.

`keys` is the login with its keys, `tasks` the right to run tasks; `firewall` and `forward` are what agents open,
`security_group` and `name` what the stacks make: a lease has only those of what it opens. It has ended when every grant
is observed closed, or was written off by an operator. Who decides that it shall open or close is leases.py, what it
opens in the network network_switch.py; how the host does it is the agent's.
"""

from __future__ import annotations

from typing import Any

from portal.db import utcnow
from portal.models import Grant, Lease
from portal.models.states import GRANTS_OF_EVERY_LEASE
from portal.services.actors import Actor


def open_all(lease: Lease) -> None:
    """Ask for everything that every lease opens."""
    for kind in GRANTS_OF_EVERY_LEASE:
        Grant.create(lease=lease, kind=kind, desired="open")


def open_one(lease: Lease, kind: str, *, generation: int, **detail: Any) -> Grant:
    """Ask for something that this lease opens besides, as of this generation of the network."""
    grant: Grant = Grant.create(lease=lease, kind=kind, desired="open", generation=generation, detail=detail)
    return grant


def want(grant: Grant, desired: str, *, generation: int, parts: list[str]) -> None:
    """Something else is wanted from now on; what was written off before is waited for again."""
    grant.desired, grant.desired_at, grant.generation = desired, utcnow(), generation
    grant.detail = {**grant.detail, "parts": parts}
    grant.written_off_at = grant.written_off_by = grant.written_off_reason = None
    grant.save()


def want_all_closed(lease: Lease) -> None:
    """The door: what is open in the network is closed by its own rows."""
    of_lease = (Grant.lease == lease) & (Grant.desired == "open") & (Grant.kind << GRANTS_OF_EVERY_LEASE)
    Grant.update(desired="closed", desired_at=utcnow()).where(of_lease).execute()


def observe(lease: Lease, kind: str, observed: str, **detail: Any) -> bool:
    """Note what the host has; True when that is news."""
    return note(get(lease, kind), observed, **detail)


def note(grant: Grant, observed: str, **detail: Any) -> bool:
    """The same, of the row. `observed_at` says since when it has been so."""
    if grant.observed == observed and grant.detail == detail and grant.observed_at is not None:
        return False
    since = grant.observed_at if grant.observed == observed and grant.observed_at else utcnow()
    Grant.update(observed=observed, observed_at=since, detail=detail).where(Grant.id == grant.id).execute()
    return True


def write_off(grant: Grant, *, by: Actor, reason: str) -> None:
    """Nobody waits for it any more. What was last seen of it stays to be read."""
    off = {"written_off_at": utcnow(), "written_off_by": by.user, "written_off_reason": reason}
    Grant.update(off).where(Grant.id == grant.id).execute()


def get(lease: Lease, kind: str) -> Grant:
    grant: Grant = Grant.get(Grant.lease == lease, Grant.kind == kind)
    return grant


def find(lease: Lease, kind: str) -> Grant | None:
    """None where the lease opens nothing of the kind."""
    grant: Grant | None = Grant.get_or_none(Grant.lease == lease, Grant.kind == kind)
    return grant


def of_lease(lease: Lease) -> list[Grant]:
    """The grants of a lease, in a stable order."""
    return list(Grant.select().where(Grant.lease == lease).order_by(Grant.id))


def are_all_closed(lease: Lease) -> bool:
    """Whether nothing of it is waited for any more."""
    open_still = (Grant.observed != "closed") & Grant.written_off_at.is_null()
    return not Grant.select().where(Grant.lease == lease, open_still).exists()
