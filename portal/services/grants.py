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
    changes = {"observed": observed, "observed_at": utcnow(), "detail": detail}
    seen_already = (Grant.observed == observed) & (Grant.detail == detail) & Grant.observed_at.is_null(False)
    condition = (Grant.lease == lease) & (Grant.kind == kind) & ~seen_already
    return int(Grant.update(**changes).where(condition).execute()) == 1


def of_lease(lease: Lease) -> list[Grant]:
    """The grants of a lease, in a stable order."""
    return list(Grant.select().where(Grant.lease == lease).order_by(Grant.id))


def are_all_closed(lease: Lease) -> bool:
    return not Grant.select().where(Grant.lease == lease, Grant.observed != "closed").exists()
