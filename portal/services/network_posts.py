"""A stack was applied: what it told opens and closes the grants of leases, and ends those that waited for it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from portal.models import AppliedNetwork, Lease, Machine
from portal.services import batch, leases, network_applied, network_names, network_switch
from portal.services.actors import Actor

AT_ONCE = 200  # leases that one request looks at

_settled: int | None = None  # the newest word of a stack that this process has looked at
_served: int | None = None  # the zone of leases when it last looked; 0 is none


def take(
    stack: str,
    outputs: Mapping[str, Any],
    *,
    by: Actor,
    outcome: str = "applied",
    reason: str | None = None,
    now: datetime | None = None,
) -> AppliedNetwork:
    """Keep the word, then look at the leases that it may concern, each in a transaction of its own.

    Of very many the sweep does the rest, as it does if this process dies between the two. Raises Invalid, and Conflict
    for an apply that came late.
    """
    row, _is_news = network_applied.note(stack, outputs, by=by, outcome=outcome, reason=reason, now=now)
    if outcome == "applied":
        settle(at_most=AT_ONCE)
    return row


def sweep() -> int:
    """Look at what a request did not come to, and at every active lease when another zone serves them; for the sweep.

    Nothing new was told and no zone was changed: nothing is read but that.
    """
    global _settled, _served
    newest, zone = network_applied.newest_id(), network_names.find_zone(of="leases")
    done = 0
    if newest != _settled:
        done += settle()
        _settled = newest
    served = zone.id if zone is not None else 0
    if served != _served:
        active = Lease.select(Lease, Machine).join(Machine).where(Lease.state == "active").order_by(Lease.id)
        done += batch.each(active, lambda lease: leases.names_changed(lease))
        _served = served
    return done


def settle(at_most: int | None = None) -> int:
    """Compare the leases that wait with what the stacks applied last; returns for how many that was news."""
    views = network_applied.views()
    waiting = network_switch.leases_to_refresh(views)[:at_most]
    return batch.each(waiting, lambda lease: leases.network_seen(lease, views=views))
