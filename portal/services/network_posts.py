"""A stack was applied: what it told opens and closes the grants of leases, and ends those that waited for it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from portal.models import AppliedNetwork
from portal.services import batch, leases, network_applied, network_switch
from portal.services.actors import Actor


def take(
    stack: str,
    outputs: Mapping[str, Any],
    *,
    by: Actor,
    outcome: str = "applied",
    reason: str | None = None,
    now: datetime | None = None,
) -> AppliedNetwork:
    """Keep the word, then look at each lease that it may concern, each in a transaction of its own.

    Saying it again changes nothing and looks again: whoever was cut off between the two is made good by a repetition.
    Raises Invalid, and Conflict for an apply that came late.
    """
    row, _is_news = network_applied.note(stack, outputs, by=by, outcome=outcome, reason=reason, now=now)
    if outcome == "applied":
        settle()
    return row


def settle() -> int:
    """Compare every lease that waits with what the stacks applied last; returns for how many that was news."""
    views = network_applied.views()
    return batch.each(network_switch.leases_to_refresh(), lambda lease: leases.network_seen(lease, views=views))
