"""The desired state: everything that the agent of one machine shall make true, whole, as the protocol writes it.

Read only, from what leases, keys, tasks, commands, openings and forwards say. When it changes, whoever changed it calls
`events.desired_changed`; how it reaches the host is in sync.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from portal.db import utcnow
from portal.integrations.protocol import format_time
from portal.models import Lease, Machine
from portal.models.states import LEASE_OPEN
from portal.services import commands, config, keys, network_forwards, network_openings, reclaims, tasks


def desired_of(machine: Machine, *, now: datetime | None = None) -> dict[str, Any]:
    """What the host shall be like now. Read the machine before: the generation is the one of the row in hand."""
    settings, now = config.current(), now or utcnow()
    return {
        "machine_id": machine.id,
        "epoch": machine.epoch,
        "generation": machine.generation,
        "leases": [_lease(lease, now) for lease in _open_leases(machine)],
        "attempts": tasks.to_send(machine),
        "commands": commands.to_send(machine),
        "report_interval_s": settings.report_interval_s,
        "log_quota_bytes": settings.log_quota_bytes,
        **(_holes(machine, now) if machine.hears_openings else {}),
    }


def _holes(machine: Machine, now: datetime) -> dict[str, Any]:
    """An agent that does not report them would refuse the whole state over a field that it does not know."""
    return {"openings": network_openings.to_send(machine, now), "forwards": network_forwards.to_send(machine, now)}


def _open_leases(machine: Machine) -> list[Lease]:
    """An ending one stays listed until the host has been seen to have closed it."""
    return list(Lease.select().where(Lease.machine == machine, Lease.state << LEASE_OPEN).order_by(Lease.id))


def _lease(lease: Lease, now: datetime) -> dict[str, Any]:
    is_open = lease.state == "active" and lease.ends_at > now
    return {
        "lease_id": lease.host_id,
        "login": lease.login,
        "uid": lease.uid,
        "state": "open" if is_open else "closed",
        "ends_at": format_time(lease.ends_at),
        "keys": _keys(lease) if is_open else [],
    }


def _keys(lease: Lease) -> list[dict[str, str]]:
    """Those of the people who may sign in, and ours, with which the reclaim will try the door."""
    lines = {key.fingerprint: key.line for key in keys.of_lease(lease)}
    probe = reclaims.probe_line(lease)
    if probe is not None:
        key = keys.parse(probe)
        lines[key.fingerprint] = key.line
    return [{"fingerprint": fingerprint, "line": line} for fingerprint, line in sorted(lines.items())]
