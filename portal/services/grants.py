"""Grants: what a lease opens, one row for each thing: what we want, and what the host was last seen to do.

`keys` is the login with its keys, `tasks` the right to run tasks. A lease has ended when every grant is observed
closed. Who decides that it shall open or close is leases.py; how the host does it is the agent's.
"""

from __future__ import annotations

from typing import Any

from portal.db import utcnow
from portal.models import Grant, Lease
from portal.models.states import GRANT_KINDS


def open_all(lease: Lease) -> None:
    """Ask for everything this lease opens."""
    for kind in GRANT_KINDS:
        Grant.create(lease=lease, kind=kind, desired="open")


def want_all_closed(lease: Lease) -> None:
    Grant.update(desired="closed", desired_at=utcnow()).where(Grant.lease == lease, Grant.desired == "open").execute()


def observe(lease: Lease, kind: str, observed: str, **detail: Any) -> bool:
    """Note what the host has; True when that is news. `observed_at` says since when it has been so."""
    grant = get(lease, kind)
    if grant.observed == observed and grant.detail == detail and grant.observed_at is not None:
        return False
    since = grant.observed_at if grant.observed == observed and grant.observed_at else utcnow()
    Grant.update(observed=observed, observed_at=since, detail=detail).where(Grant.id == grant.id).execute()
    return True


def get(lease: Lease, kind: str) -> Grant:
    grant: Grant = Grant.get(Grant.lease == lease, Grant.kind == kind)
    return grant


def of_lease(lease: Lease) -> list[Grant]:
    """The grants of a lease, in a stable order."""
    return list(Grant.select().where(Grant.lease == lease).order_by(Grant.id))


def are_all_closed(lease: Lease) -> bool:
    return not Grant.select().where(Grant.lease == lease, Grant.observed != "closed").exists()
