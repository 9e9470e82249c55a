"""Evidence: what a reclaim report says, gathered from what the agent and the run left in the tables.

It is judged in reclaims.py and signed in reports.py. A step's own words stand in it as they came: before, what was
done, after. Unknown is null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from portal import __version__
from portal.models import Command, Lease, Machine, MachineReport, Reclaim, Run
from portal.services import machines


def of_reclaim(reclaim: Reclaim, *, result: str, reasons: Sequence[str], ended_at: datetime) -> dict[str, Any]:
    """The whole report, ready to be signed. `result` is passed or failed."""
    machine, lease = Machine.get_by_id(reclaim.machine_id), reclaim.lease
    return {
        "schema": 1,
        "kind": "reclaim",
        "result": result,
        "reasons": list(reasons),
        "level": "reimage" if lease.root else "tidy",
        "portal_version": __version__,
        "machine": {"id": machine.id, "name": machine.name},
        "tenant": {"id": lease.tenant_id},
        "lease": _lease(lease),
        "reclaim": _reclaim(reclaim, ended_at),
        "baseline": _baseline(machine),
        "cleaning": _cleaning(reclaim),
        "verification": _verification(reclaim, machine),
        "gpus": _gpus(machine),
        "previous_report_sha256": _previous(reclaim),
    }


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _lease(lease: Lease) -> dict[str, Any]:
    return {
        "id": lease.id,
        "login": lease.login,
        "uid": lease.uid,
        "root": lease.root,
        "starts_at": _time(lease.starts_at),
        "ends_at": _time(lease.ends_at),
        "ended_at": _time(lease.ended_at),
        "retain_s": lease.retain_s,
    }


def _reclaim(reclaim: Reclaim, ended_at: datetime) -> dict[str, Any]:
    return {
        "id": reclaim.id,
        "number": reclaim.number,
        "requested_by": None if reclaim.requested_by is None else reclaim.requested_by.username,
        "reason": reclaim.reason,
        "forced": reclaim.force,
        "due_at": _time(reclaim.due_at),
        "started_at": _time(reclaim.started_at),
        "ended_at": _time(ended_at),
    }


def _baseline(machine: Machine) -> dict[str, Any] | None:
    baseline = machines.find_baseline(machine)
    return None if baseline is None else {"sha256": baseline.digest, "taken_at": _time(baseline.taken_at)}


def _cleaning(reclaim: Reclaim) -> dict[str, Any] | None:
    command = Command.get_or_none(Command.id == reclaim.command_id)
    if command is None:
        return None
    return {"command_id": command.id, "state": command.state, "message": command.message, "result": command.result}


def _verification(reclaim: Reclaim, machine: Machine) -> dict[str, Any] | None:
    run = Run.get_or_none(Run.id == reclaim.run_id)
    if run is None:
        return None
    return {"run_id": run.id, "state": run.state, "verdict": (run.verdicts or {}).get(machine.name)}


def _gpus(machine: Machine) -> list[dict[str, Any]]:
    """Every expected GPU as the last report had it; nothing reported is null."""
    report = MachineReport.get_or_none(MachineReport.machine == machine)
    said = (report.gpu if report else None) or {"driver_version": None, "gpus": []}
    seen = {gpu["uuid"]: gpu for gpu in said["gpus"]}
    table = []
    for gpu in machines.expected_gpus(machine):
        now = seen.get(gpu.uuid, {})
        row = {"uuid": gpu.uuid, "serial": gpu.serial, "name": gpu.name, "driver_version": said["driver_version"]}
        row |= {field: now.get(field) for field in ("state", "memory_used_bytes", "processes", "ecc_uncorrected")}
        table.append(row)
    return table


def _previous(reclaim: Reclaim) -> str | None:
    """The hash of the machine's report before this one: none can be left out of the chain unseen."""
    before = Reclaim.select(Reclaim.report).where(
        Reclaim.machine == reclaim.machine_id, Reclaim.id < reclaim.id, Reclaim.report.is_null(False)
    )
    text: str | None = before.order_by(Reclaim.id.desc()).limit(1).scalar()
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
