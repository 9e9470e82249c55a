"""What must happen by itself, and once a fleet: the list of sweeps, and a round of them.

Each sweep stands alone: one that fails is logged, and the next one runs. When rounds are made is in worker/.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from portal.db import atomic, utcnow
from portal.models import Setting
from portal.services import (
    alerts_own,
    events,
    journal,
    leases,
    locks,
    login_keys,
    logs,
    network_applied,
    network_export,
    network_posts,
    network_requests,
    network_webhook,
    provisioning,
    reclaims,
    runs,
    seals,
    sessions,
    tasks,
)

LOG = logging.getLogger(__name__)

SWEPT = "sweeps.swept"  # row of `setting`
NOTE_S = 15.0  # between two notes that a round went well; a write each second would be for nobody
LIFE_S = 30.0  # longer than any round; a sweeper that was killed keeps the others waiting for so long at most


@dataclass(frozen=True)
class Sweep:
    """One of them. `every_s` is how long it rests; 0 is each round."""

    name: str
    act: Callable[[], object]
    every_s: float = 0


class Round:
    """The sweeps of one process, and when each was last done."""

    def __init__(self, sweeps: tuple[Sweep, ...]) -> None:
        self._sweeps = sweeps
        self._due_at: dict[str, float] = {}
        self._note_at = float("-inf")

    def go(self, now: float) -> list[str]:
        """Do what is due at `now` (seconds of any steady clock), unless another process is sweeping.

        Returns the names of those that failed.
        """
        with locks.held("sweeper", life_s=LIFE_S) as ours:
            return self._go(now) if ours else []

    def _go(self, now: float) -> list[str]:
        failed = []
        for sweep in self._sweeps:
            if now < self._due_at.get(sweep.name, 0):
                continue
            self._due_at[sweep.name] = now + sweep.every_s
            try:
                sweep.act()
            except Exception:
                LOG.exception("the sweep %s failed; it is tried again in its next round", sweep.name)
                failed.append(sweep.name)
        if not failed and now >= self._note_at:
            _note_swept(utcnow())
            self._note_at = now + NOTE_S
        return failed


def _note_swept(now: datetime) -> None:
    row = {"value": {"at": now.isoformat()}, "changed_at": now}
    with atomic():
        Setting.insert(key=SWEPT, **row).on_conflict(conflict_target=[Setting.key], update=row).execute()


def swept_at() -> datetime | None:
    """When a round in which no sweep failed last ended, as of NOTE_S ago; None before the first."""
    row = Setting.get_or_none(Setting.key == SWEPT)
    return None if row is None else datetime.fromisoformat(row.value["at"])


def all_sweeps() -> tuple[Sweep, ...]:
    """In this order: a lease that ends makes room for one that begins, and a reclaim begins after both."""
    return (
        Sweep("leases.end_due", leases.end_due),
        Sweep("leases.finish_silent", leases.finish_silent, every_s=10),
        Sweep("leases.activate_due", leases.activate_due),
        Sweep("network_requests.close_due", network_requests.close_due),
        Sweep("reclaims.advance_due", reclaims.advance_due),
        Sweep("provisioning.fail_overdue", provisioning.fail_overdue, every_s=10),
        Sweep("tasks.lose_gone", tasks.lose_gone),
        Sweep("logs.forget_old", logs.forget_old, every_s=60),
        Sweep("seals.seal", seals.seal),
        Sweep("runs.sweep", runs.sweep, every_s=60),
        Sweep("login_keys.forget_previous", login_keys.forget_previous, every_s=60),
        Sweep("network_posts.sweep", network_posts.sweep, every_s=10),
        Sweep("network_webhook.start", network_webhook.start),
        Sweep("network_export.refresh", network_export.refresh, every_s=600),
        Sweep("network_export.prune", network_export.prune, every_s=3600),
        Sweep("network_applied.prune", network_applied.prune, every_s=3600),
        Sweep("events.prune", events.prune, every_s=60),
        Sweep("journal.prune", journal.prune, every_s=3600),
        Sweep("sessions.prune", sessions.prune, every_s=60),
        *(Sweep(*each) for each in alerts_own.sweeps()),
    )
