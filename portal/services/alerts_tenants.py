"""What the people of a lease are told of the alerts about their machine: those that may explain what their work met,
while the lease lasts. No label, no annotation and no remark: these are staff's. The alerts themselves are in alerts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import peewee

from portal.models import Alert, Lease
from portal.models.states import ALERT_OPEN

TOLD = (
    *("MachineOffline", "AgentSilent"),
    *("GpuLost", "GpuFailing", "GpuDriverFailing", "GpuHot", "GpuTooHot", "GpuEccErrors"),
    *("GpuRowRemapPending", "GpuRowRemapFailed", "GpuXidRestart", "GpuXidReset", "GpuXidHardware"),
    *("DiskNearlyFull", "DiskFull", "DiskLow"),
)
MOST = 10  # of a lease, the newest


@dataclass(frozen=True)
class Told:
    """One time that something was wrong. `until` None: it still is. Nothing of before the lease is in it."""

    name: str
    severity: str
    since: datetime
    until: datetime | None


def of_leases(leases: Sequence[Lease]) -> dict[int, list[Told]]:
    """Lease id → what was wrong with its machine since it began, newest first: for a page of open leases.

    An alert that comes and goes every minute is there thousands of times, so it is the database that finds the newest.
    A machine has one open lease at most. A lease begins when it is activated: one that was planned may have waited for
    the machine, which was somebody else's until then.
    """
    told: dict[int, list[Told]] = {lease.id: [] for lease in leases}
    by_machine: dict[int | None, Lease] = {lease.machine_id: lease for lease in leases}
    for alert in _newest(list(told)):
        lease = by_machine[alert.machine_id]
        told[lease.id].append(Told(alert.name, alert.severity, max(alert.starts_at, lease.activated_at), _end(alert)))
    return told


def _newest(lease_ids: Sequence[int]) -> peewee.ModelSelect[Alert]:
    ended_at = peewee.fn.COALESCE(Alert.ends_at, Alert.resolved_at)
    place = peewee.fn.ROW_NUMBER().over(partition_by=[Alert.machine], order_by=[Alert.id.desc()])
    placed = (
        Alert.select(Alert.id, place.alias("place"))
        .join(Lease, on=(Lease.machine == Alert.machine))
        .where(Lease.id << list(lease_ids), Alert.name << TOLD)
        .where((Alert.state << ALERT_OPEN) | (ended_at >= Lease.activated_at))
    )
    newest = placed.select_from(placed.c.id).where(placed.c.place <= MOST)
    shown = (Alert.machine, Alert.name, Alert.severity, Alert.state, Alert.starts_at, Alert.ends_at, Alert.resolved_at)
    return Alert.select(*shown).where(Alert.id << newest).order_by(Alert.id.desc())


def _end(alert: Alert) -> datetime | None:
    if alert.state in ALERT_OPEN:
        return None
    end: datetime | None = alert.ends_at or alert.resolved_at
    return end
