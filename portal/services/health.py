"""Reachability and health of a machine: computed from its last report, never stored, never mixed into its state.

Pure: machine, expected GPUs, last report and the time in; the answer out. What follows from it (no allocation) is in
availability.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from portal.models import Gpu, Machine, MachineReport
from portal.services import gpus

GIB = 1024**3
MIN_AGENT_VERSION = (0, 1, 0)


@dataclass(frozen=True)
class Limits:
    """Where healthy ends. A slow network is not an unhealthy host: five seconds of latency pass as clock offset."""

    report_interval_s: float = 15.0
    offline_after_s: float = 60.0
    clock_offset_s: float = 10.0
    disk_free_bytes: int = 2 * GIB
    disk_small_bytes: int = 16 * GIB  # /boot and its like fill up without harm

    @property
    def silence_s(self) -> float:
        """How long a host may be silent: at least two reports have then been missed."""
        return max(self.offline_after_s, 2.5 * self.report_interval_s)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a stable code for programs, a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Health:
    """`reachability` is online, offline or never. The problems of an offline machine are those last reported."""

    reachability: str
    last_seen_at: datetime | None
    problems: tuple[Problem, ...]

    @property
    def is_online(self) -> bool:
        return self.reachability == "online"

    @property
    def is_healthy(self) -> bool:
        """Nothing is known to be wrong, and something is known at all."""
        return self.last_seen_at is not None and not self.problems


def of(
    machine: Machine, expected: Sequence[Gpu], report: MachineReport | None, now: datetime, limits: Limits
) -> Health:
    """How the machine is, by its last report."""
    if report is None:
        return Health("never", None, ())
    silent = now - report.received_at > timedelta(seconds=limits.silence_s)
    problems = (
        *_frozen(machine, report),
        *_agent_version(report),
        *_clock(report, limits),
        *(() if machine.is_gateway else _gpus(expected, report.gpu)),
        *_disks(report.metrics, limits),
    )
    return Health("offline" if silent else "online", report.received_at, problems)


def _frozen(machine: Machine, report: MachineReport) -> Iterable[Problem]:
    if machine.frozen_generation is not None and not report.frozen:
        yield Problem("unheard", f"{machine.frozen_reason} Nothing is sent until the host has said what it knows.")
    elif report.frozen or machine.frozen_reason:
        why = machine.frozen_reason or "the portal is older than what the host was last told"
        yield Problem(
            "frozen", f"The host is frozen: {why.rstrip('.')}. Check the portal's data, then thaw the machine."
        )


def _agent_version(report: MachineReport) -> Iterable[Problem]:
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", report.agent_version)
    if numbers is None or tuple(map(int, numbers.groups())) < MIN_AGENT_VERSION:
        least = ".".join(map(str, MIN_AGENT_VERSION))
        yield Problem(
            "agent_version",
            f"The agent's version is {report.agent_version}, {least} is needed; provision the machine again.",
        )


def _clock(report: MachineReport, limits: Limits) -> Iterable[Problem]:
    offset = report.clock_offset_s
    if offset is not None and abs(offset) > limits.clock_offset_s:
        yield Problem("clock", f"The host's clock is {offset:+.0f} s off; leases would end at the wrong time.")


def _gpus(expected: Sequence[Gpu], report: dict[str, Any] | None) -> Iterable[Problem]:
    said = f": {report['message']}" if report is not None and report["message"] else ""
    if not expected and report is not None and report["state"] == "no_library":
        # Where no GPU should be, the driver that is not there does not fail. Leased to anybody the machine is not.
        yield Problem("gpus_unknown", f"No GPU of this machine is known, and there is no NVML{said}.")
        return
    if not expected:
        yield Problem("gpus_unknown", "No GPU of this machine is known yet; see what the agent says about NVML.")
    if report is None:
        yield Problem("gpu_report", "The agent has not reported any GPU data yet.")
        return
    if report["state"] != "ok":
        yield Problem("nvml", f"NVML does not answer ({report['state']}){said}.")
        return
    seen = {gpu["uuid"]: gpu for gpu in report["gpus"]}
    for gpu in expected:
        if gpu.uuid not in seen:
            yield Problem("gpu_missing", f"GPU {gpu.uuid} is expected and not there.")
        elif seen[gpu.uuid]["state"] != "ok":
            yield Problem(f"gpu_{seen[gpu.uuid]['state']}", _gpu_trouble(seen[gpu.uuid]))
        elif blocking := sorted(gpus.BLOCKING_XIDS & gpus.xids(seen[gpu.uuid]).keys()):
            xids = ", ".join(map(str, blocking))
            yield Problem("gpu_xid", f"GPU {gpu.uuid} has reported XID {xids}; reset it or restart the machine.")
    for uuid in sorted(seen.keys() - {gpu.uuid for gpu in expected}):
        yield Problem("gpu_unexpected", f"GPU {uuid} is new; provision the machine again to take it in.")


def _gpu_trouble(gpu: dict[str, Any]) -> str:
    said = "; ".join(error["message"] for error in gpu["errors"])
    what = "has fallen off the bus" if gpu["state"] == "lost" else "answers with errors"
    return f"GPU {gpu['uuid']} {what}" + (f": {said}." if said else ".")


def _disks(metrics: dict[str, Any] | None, limits: Limits) -> Iterable[Problem]:
    if metrics is None:
        yield Problem("metrics", "The agent has not reported any measurements yet.")
        return
    for disk in metrics["disks"]:
        total, free = disk["total_bytes"], disk["free_bytes"]
        if disk["mount"] != "/" and (total is None or total < limits.disk_small_bytes):
            continue
        if free is None:
            yield Problem("disk", f"How much is free on {disk['mount']} is unknown.")
        elif free < limits.disk_free_bytes:
            yield Problem(
                "disk", f"{disk['mount']} has {free / GIB:.1f} GiB free, {limits.disk_free_bytes / GIB:.0f} are needed."
            )
