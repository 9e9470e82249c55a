"""What templates are given beyond the services' own views, so that no template computes anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from portal.models import Grant, Machine
from portal.services import gpus
from portal.services.overviews import LeaseView, MachineView

GIB = 1024**3


def with_port(address: str, port: int) -> str:
    """How an address with its port is written, so that it can be read: IPv6 in brackets, 22 left out."""
    if port == 22:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def keys_in_question(machine: Machine) -> list[Mapping[str, str]]:
    """The keys that somebody has to compare: all that were offered, unless the pinned one was among them.

    A host offers one of each type, so the others say nothing by themselves.
    """
    offered: list[Mapping[str, str]] = machine.host_keys_offered or []
    is_settled = any(key["line"] == machine.host_key for key in offered)
    return [] if is_settled else offered


@dataclass(frozen=True)
class GpuRow:
    """A GPU that is expected, reported, or both. None is unknown. One is missing that the last report lacks.

    `notes` say why something is unknown, and what else the driver told.
    """

    uuid: str
    is_missing: bool
    slot: int | None
    pci_bus_id: str | None
    name: str | None
    state: str
    is_divided: bool
    notes: tuple[str, ...]
    utilization_percent: float | None
    memory_used_gib: float | None
    memory_total_gib: float | None
    temperature_c: int | None
    power_w: int | None


def gpu_rows(view: MachineView) -> list[GpuRow]:
    """Every expected GPU in its order, then those that nobody expected; a value is that of now, or none."""
    rows = [
        _row(entry.gpu.uuid, entry.gpu.__data__, entry.live or {}, is_missing=view.are_gpus_told and entry.live is None)
        for entry in view.gpus
    ]
    return rows + [_row(gpu["uuid"], {"slot": gpu["index"]}, gpu) for gpu in view.unexpected]


def _row(uuid: str, written: Mapping[str, Any], live: Mapping[str, Any], *, is_missing: bool = False) -> GpuRow:
    return GpuRow(
        uuid=uuid,
        is_missing=is_missing,
        slot=written.get("slot"),
        pci_bus_id=live.get("pci_bus_id") or written.get("pci_bus_id"),
        name=live.get("name") or written.get("name"),
        state=live.get("state", "unknown"),
        is_divided=bool(live.get("mig")),
        notes=gpus.notes(live) if live else (),
        utilization_percent=live.get("utilization_percent"),
        memory_used_gib=_gib(live.get("memory_used_bytes")),
        memory_total_gib=_gib(live.get("memory_total_bytes") or written.get("memory_bytes")),
        temperature_c=_whole(live.get("temperature_c")),
        power_w=_whole(live.get("power_w")),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _gib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / GIB, 1)


def time_left(view: LeaseView, now: datetime) -> timedelta | None:
    """How long an active lease goes on."""
    left: timedelta = view.lease.ends_at - now
    return left if view.lease.state == "active" and left > timedelta(0) else None


def still_open(view: LeaseView) -> list[Grant]:
    """What should be closed and was not seen to be, as far as anybody waits for it."""
    return [grant for grant in view.grants if grant.is_still_open]


@dataclass(frozen=True)
class Usage:
    """The few host figures that a page shows. None is unknown."""

    cpu_percent: float | None = None
    memory_used_gib: float | None = None
    memory_total_gib: float | None = None
    disks: tuple[tuple[str, float | None, float | None], ...] = ()


def usage(view: MachineView) -> Usage:
    metrics = view.metrics
    if metrics is None:
        return Usage()
    return Usage(
        cpu_percent=metrics["cpu_percent"],
        memory_used_gib=_gib(metrics["memory_used_bytes"]),
        memory_total_gib=_gib(metrics["memory_total_bytes"]),
        disks=tuple((disk["mount"], _gib(disk["free_bytes"]), _gib(disk["total_bytes"])) for disk in metrics["disks"]),
    )


@dataclass(frozen=True)
class System:
    """What the agent said of the host when it enrolled. None is unknown."""

    os: str | None = None
    kernel: str | None = None
    cpu: str | None = None
    memory_gib: float | None = None
    openssh: str | None = None


def system(machine: Machine) -> System:
    facts = machine.facts
    if not facts:
        return System()
    parts = (facts["cpu_cores"] and f"{facts['cpu_cores']} ×", facts["cpu_model"], facts["architecture"])
    return System(
        os=facts["os"],
        kernel=facts["kernel"],
        cpu=" ".join(str(part) for part in parts if part) or None,
        memory_gib=_gib(facts["memory_total_bytes"]),
        openssh=facts["openssh"],
    )


def report_parts(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The steps and checks of a reclaim report; empty lists where it did not come so far."""
    cleaning = (report.get("cleaning") or {}).get("result") or {}
    verification = (report.get("verification") or {}).get("verdict") or {}
    return {"steps": list(cleaning.get("steps", [])), "checks": list(verification.get("checks", []))}


AGENTS = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"), ("Version/", "Safari"))
SYSTEMS = (("Windows", "Windows"), ("Android", "Android"), ("iPhone", "iPhone"), ("iPad", "iPad"), ("Mac OS", "macOS"))


def browser(user_agent: str) -> str:
    """`Firefox 130, Linux`: enough to know one's own browsers apart. What is no browser is shown as it said."""
    for mark, name in AGENTS:
        before, found, after = user_agent.partition(mark)
        if found and before:
            system = next(
                (word for sign, word in SYSTEMS if sign in user_agent), "Linux" if "Linux" in user_agent else ""
            )
            return f"{name} {after.split('.')[0]}" + (f", {system}" if system else "")
    return user_agent
