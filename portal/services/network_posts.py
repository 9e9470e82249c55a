"""A stack was applied, or is gone: what was told opens and closes the grants of leases, and ends those that waited."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from portal.models import AppliedNetwork
from portal.services import batch, leases, network, network_applied, network_switch
from portal.services.actors import Actor

AT_ONCE = 200  # leases that one request looks at

_settled: int | None = None  # the newest word of a stack that this process has looked at
_followed: int | None = None  # the generation of the network when it last looked at what leases want


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


def forget(stack: str, *, by: Actor, reason: str, although_wanted: bool = False) -> AppliedNetwork:
    """It was taken down: what ended leases had there is closed. Raises what `network_applied.forget` does."""
    row = network_applied.forget(stack, by=by, reason=reason, although_wanted=although_wanted)
    settle(at_most=AT_ONCE)
    return row


def sweep() -> int:
    """Look at what a request did not come to, and at the leases whose names shall be others by now; for the sweep.

    Nothing new was told and nothing changed: nothing is read but that.
    """
    global _settled, _followed
    newest, generation = network_applied.newest_id(), network.state().generation
    done = 0
    if newest != _settled:
        done += settle()
        _settled = newest
    if generation != _followed:
        done += batch.each(network_switch.leases_to_follow(), lambda lease: leases.names_changed(lease))
        _followed = generation
    return done


def settle(at_most: int | None = None) -> int:
    """Compare the leases that wait with what the stacks applied last; returns for how many that was news."""
    views = network_applied.views()
    waiting = network_switch.leases_to_refresh(views)[:at_most]
    return batch.each(waiting, lambda lease: leases.network_seen(lease, views=views))
