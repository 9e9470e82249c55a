"""The agent's word about cards beside nvidia-smi's: what must be the same, and what may have moved between two looks.

tests/gpu does this with the cards of this machine; tests/integration/test_real_card.py does it with fake ones, to show
that no difference goes unseen. nvidia-smi is asked before the agent and after it: a value that moves lies between.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remotegpu_agent.gpu import GpuProbe, holds_gpu

AGENT = Path(__file__).parents[2] / "agent"
CHILD = "import os, pwd; from remotegpu_agent import gpu_child; gpu_child.main(pwd.getpwuid(os.geteuid()).pw_name)"
MIB = 2**20
WAIT_S = 60.0  # without persistence mode the first look sets every card up

Cells = Mapping[str, Mapping[str, str]]

# nvidia-smi's field → the agent's, and what makes the one out of the other.
SAME: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "name": ("name", str),
    "serial": ("serial", str),
    "pci.bus_id": ("pci_bus_id", str),
    "memory.total": ("memory_total_bytes", lambda bytes_: str(bytes_ // MIB)),
    "enforced.power.limit": ("power_limit_w", lambda watts: f"{watts:.2f}"),
    "ecc.errors.uncorrected.volatile.total": ("ecc_uncorrected", str),
    "mig.mode.current": ("mig", lambda on: "Enabled" if on else "Disabled"),
}
# The same of values that move: how far beyond what nvidia-smi said before and after.
MOVING: Mapping[str, tuple[str, int, float]] = {
    "memory.used": ("memory_used_bytes", MIB, 512.0),
    "memory.reserved": ("memory_reserved_bytes", MIB, 64.0),
    "temperature.gpu": ("temperature_c", 1, 5.0),
    "power.draw": ("power_w", 1, 150.0),
    "utilization.gpu": ("utilization_percent", 1, 100.0),
    "utilization.memory": ("memory_bandwidth_percent", 1, 100.0),
}


@dataclass(frozen=True)
class Look:
    """What nvidia-smi says: the driver, a cell for each field by UUID, and the processes that compute on each GPU."""

    driver: str
    cells: Cells
    processes: Mapping[str, frozenset[int]]


def started_probe(*wrapper: str, deadline_s: float, xids_file: Path | None = None) -> GpuProbe:
    """The agent's own watch over its own NVML process. `wrapper` are words before that one's command."""
    argv = [*wrapper, "env", f"PYTHONPATH={AGENT}", sys.executable, "-c", CHILD]
    probe = GpuProbe(argv, deadline_s=deadline_s, xids_file=xids_file)
    probe.start()
    return probe


def ask_the_agent(*wrapper: str) -> dict[str, Any]:
    """Once, as the agent does it."""
    probe = started_probe(*wrapper, deadline_s=WAIT_S)
    try:
        probe.ask(wait_s=WAIT_S)
        return probe.report()
    finally:
        probe.stop()


def ask_nvidia_smi(*command: str) -> Look:
    """`command` is nvidia-smi, or how it is started. Raises CalledProcessError where it fails."""
    fields = ("uuid", "driver_version", *SAME, *MOVING)
    rows = [dict(zip(fields, row, strict=True)) for row in _query(command, "gpu", fields)]
    processes: dict[str, set[int]] = {}
    for uuid, pid in _query(command, "compute-apps", ("gpu_uuid", "pid")):
        processes.setdefault(uuid, set()).add(int(pid))
    return Look(
        rows[0]["driver_version"] if rows else "",
        {row["uuid"]: row for row in rows},
        {uuid: frozenset(pids) for uuid, pids in processes.items()},
    )


def _query(command: Sequence[str], what: str, fields: Sequence[str]) -> list[list[str]]:
    argv = [*command, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=WAIT_S)
    return [line.split(", ") for line in done.stdout.splitlines()]


def differences(report: Mapping[str, Any], before: Look, after: Look) -> list[str]:
    """Every way in which the agent says something else, as a sentence."""
    return list(_differences(report, before, after))


def _differences(report: Mapping[str, Any], before: Look, after: Look) -> Iterator[str]:
    if report["state"] != "ok":
        yield f"the agent says {report['state']}: {report['message']}"
        return
    if report["driver_version"] != before.driver:
        yield f"the driver is {before.driver}, the agent says {report['driver_version']}"
    gpus = {gpu["uuid"]: gpu for gpu in report["gpus"]}
    if gpus.keys() != before.cells.keys():
        yield f"nvidia-smi has {sorted(before.cells)}, the agent {sorted(gpus)}"
    for uuid in gpus.keys() & before.cells.keys() & after.cells.keys():
        for what in _of_one(gpus[uuid], before.cells[uuid], after.cells[uuid]):
            yield f"{uuid}: {what}"
        stayed = before.processes.get(uuid, frozenset()) & after.processes.get(uuid, frozenset())
        seen = {process["pid"] for process in gpus[uuid]["processes"] or ()}
        if unseen := {pid for pid in stayed - seen if holds_gpu(pid)}:
            yield f"{uuid}: processes {sorted(unseen)} compute on it, and the agent has {sorted(seen)}"


def _of_one(gpu: Mapping[str, Any], before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    for field, (name, written) in SAME.items():
        value, cell = gpu[name], before[field]
        if _is_unknown(cell) != (value is None) or (value is not None and written(value) != cell):
            yield f"{field} is {cell!r}, the agent says {name} {value!r}"
    for field, (name, unit, most) in MOVING.items():
        value, cells = gpu[name], (before[field], after[field])
        if any(map(_is_unknown, cells)):
            if value is not None:
                yield f"{field} is {cells}, the agent says {name} {value!r}"
            continue
        low, high = sorted(float(cell) for cell in cells)
        if value is None or not low - most <= value / unit <= high + most:
            yield f"{field} is {cells}, the agent says {name} {value!r}"


def _is_unknown(cell: str) -> bool:
    return cell == "" or cell.startswith("[") or cell == "N/A"
