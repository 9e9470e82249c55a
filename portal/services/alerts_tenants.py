"""What the people of a lease are told of the alerts about their machine: those that may explain what their work met,
while the lease lasts. No label, no annotation and no remark: these are staff's. The alerts themselves are in alerts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

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
    """Lease id → what was wrong with its machine since it began, newest first: for a page of open leases."""
    told: dict[int, list[Told]] = {lease.id: [] for lease in leases}
    if not leases:
        return told
    since = min(lease.starts_at for lease in leases)
    rows = Alert.select().where(
        Alert.machine << [lease.machine_id for lease in leases],
        Alert.name << TOLD,
        Alert.resolved_at.is_null() | (Alert.resolved_at >= since),
    )
    for alert in rows.order_by(Alert.id.desc()):
        for lease in leases:
            if lease.machine_id == alert.machine_id and len(told[lease.id]) < MOST and _was_during(alert, lease):
                told[lease.id].append(
                    Told(alert.name, alert.severity, max(alert.starts_at, lease.starts_at), _end(alert))
                )
    return told


def _was_during(alert: Alert, lease: Lease) -> bool:
    end = _end(alert)
    return end is None or end >= lease.starts_at


def _end(alert: Alert) -> datetime | None:
    if alert.state in ALERT_OPEN:
        return None
    end: datetime | None = alert.ends_at or alert.resolved_at
    return end
