"""What the portal knows, as samples for Prometheus: counts of its nouns, and what the agents last said of their hosts.

With these there is history also where no exporter runs. UUIDs are written as nvidia_gpu_exporter writes them, so that
both sources join. What is unknown has no sample, 0 is counted; values of a host that has fallen silent end with its
silence. No tenant, login or task is ever in a label. Which hosts have exporters is in monitoring_targets.py.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import peewee

from portal.models import Command, Gpu, Lease, Machine, MachineReport, Reclaim, Run, Task
from portal.models.states import ATTEMPT, LEASE, MACHINE, RECLAIM, RUN
from portal.services import gpus, health, machines, monitoring_measures
from portal.services.gpus import ratio
from portal.services.health import Health
from portal.services.monitoring_targets import labels_of

REACHABILITY = ("online", "offline", "never")
BREATH = 50  # machines between two moments in which other requests get their turn
MOST_DISKS = 32  # of one host; a host that invents names must not fill Prometheus
MOST_INTERFACES = 16
PLUMBING = re.compile(monitoring_measures.PLUMBING)

# name → type and help. The order is that of the answer.
FAMILIES: Mapping[str, tuple[str, str]] = {
    "remotegpu_machines": ("gauge", "Machines by state and reachability; each machine once"),
    "remotegpu_leases": ("gauge", "Leases by state"),
    "remotegpu_reclaims": ("gauge", "Reclaims by state"),
    "remotegpu_runs": ("gauge", "Playbook runs by state"),
    "remotegpu_tasks": ("gauge", "Tasks by state"),
    "remotegpu_queue_depth": ("gauge", "What waits: runs for a worker, commands for an agent, tasks for their host"),
    "remotegpu_machine_info": ("gauge", "Region, rack and GPU models of a machine"),
    "remotegpu_machine_state": ("gauge", "The state that a machine is in"),
    "remotegpu_machine_problem": ("gauge", "What is wrong with a machine, by its last report"),
    "remotegpu_machine_gpus_expected": ("gauge", "GPUs that a machine is expected to have"),
    "remotegpu_machine_maintenance": ("gauge", "1 while a machine is in maintenance"),
    "remotegpu_agent_info": ("gauge", "The version of a host's agent"),
    "remotegpu_agent_online": ("gauge", "1 while the agent reports, 0 once it is silent; nothing before that"),
    "remotegpu_agent_report_age_seconds": ("gauge", "Seconds since the agent's last report"),
    "remotegpu_agent_clock_offset_seconds": ("gauge", "How far the host's clock is ahead of the portal's"),
    "remotegpu_agent_nvml": ("gauge", "What the agent says of NVML; the label state is ok or the trouble"),
    "remotegpu_host_cpu_ratio": ("gauge", "Processors in use, 0 to 1"),
    "remotegpu_host_load1": ("gauge", "Load average of one minute"),
    "remotegpu_host_memory_total_bytes": ("gauge", "Memory of the host"),
    "remotegpu_host_memory_used_bytes": ("gauge", "Memory that is not available"),
    "remotegpu_host_uptime_seconds": ("gauge", "Seconds since the host was booted"),
    "remotegpu_host_disk_total_bytes": ("gauge", "Size of a file system"),
    "remotegpu_host_disk_free_bytes": ("gauge", "Free on a file system"),
    "remotegpu_host_network_received_bytes_total": ("counter", "Received by an interface"),
    "remotegpu_host_network_sent_bytes_total": ("counter", "Sent by an interface"),
    "remotegpu_gpu_info": ("gauge", "Model and slot of a GPU that is expected"),
    "remotegpu_gpu_up": ("gauge", "1 if an expected GPU answers, 0 if it is lost, cannot be opened or is not there"),
    "remotegpu_gpu_utilization_ratio": ("gauge", "Time in which a kernel ran, 0 to 1. Not available with MIG"),
    "remotegpu_gpu_memory_bandwidth_ratio": ("gauge", "Time in which memory was read or written, 0 to 1"),
    "remotegpu_gpu_memory_total_bytes": ("gauge", "Memory of the GPU"),
    "remotegpu_gpu_memory_used_bytes": ("gauge", "Memory in use, without the driver's reserve"),
    "remotegpu_gpu_temperature_celsius": ("gauge", "Temperature of the GPU"),
    "remotegpu_gpu_power_watts": ("gauge", "Power drawn"),
    "remotegpu_gpu_power_limit_watts": ("gauge", "Power limit in force"),
    "remotegpu_gpu_ecc_uncorrected_errors": ("gauge", "Uncorrected ECC errors since the driver was loaded"),
    "remotegpu_gpu_mig": ("gauge", "1 if the GPU is divided by MIG"),
    "remotegpu_gpu_xid_last_timestamp_seconds": ("gauge", "When the driver last told of this XID"),
    "remotegpu_gpu_processes": ("gauge", "Processes that hold the GPU"),
}  # fmt: skip


class Samples:
    """Samples by family, written as text at once: at 8,000 GPUs an object for each would cost a second of processor."""

    def __init__(self, families: Mapping[str, tuple[str, str]]) -> None:
        self._families = families
        self._lines: dict[str, list[str]] = {name: [] for name in families}

    def add(self, name: str, labels: str, value: float | bool | None) -> None:
        """`labels` are as `labelled` writes them. None is unknown, and no sample."""
        if value is not None:
            self._lines[name].append(f"{name}{labels} {float(value)!r}\n")

    def text(self) -> str:
        return "".join(self._parts())

    def _parts(self) -> Iterator[str]:
        for name, lines in self._lines.items():
            if lines:
                kind, about = self._families[name]
                yield f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
                yield from lines


def labelled(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def normalised(gpu_uuid: str) -> str:
    """A GPU's UUID as nvidia_gpu_exporter has it: lower case, without `GPU-`."""
    return gpu_uuid.lower().removeprefix("gpu-")


def exposition(now: datetime) -> str:
    """Everything, in the text format of Prometheus."""
    samples = Samples(FAMILIES)
    reports = {report.machine_id: report for report in MachineReport.select()}
    expected = machines.gpus_by_machine()
    limits = machines.limits()
    counted: Counter[tuple[str, str]] = Counter()
    for number, machine in enumerate(list(Machine.select().order_by(Machine.name))):
        if number % BREATH == BREATH - 1:
            time.sleep(0)  # with thousands of hosts this takes a while, and agents wait for their answers meanwhile
        report = reports.get(machine.id)
        state = health.of(machine, expected.get(machine.id, ()), report, now, limits)
        counted[machine.state, state.reachability] += 1
        if machine.state != "retired":
            _machine(samples, machine, expected.get(machine.id, ()), report, state, now)
    for word in MACHINE:
        for reachability in REACHABILITY:
            labels = labelled({"state": word, "reachability": reachability})
            samples.add("remotegpu_machines", labels, counted[word, reachability])
    _nouns(samples)
    return samples.text()


def _nouns(samples: Samples) -> None:
    for name, model, states in (
        ("remotegpu_leases", Lease, LEASE),
        ("remotegpu_reclaims", Reclaim, RECLAIM),
        ("remotegpu_runs", Run, RUN),
        ("remotegpu_tasks", Task, ATTEMPT),
    ):
        found = by_state(model)
        for state in states:
            samples.add(name, labelled({"state": state}), found.get(state, 0))
    waiting = {
        "runs": Run.select().where(Run.state == "queued").count(),
        "commands": Command.select().where(Command.state == "queued").count(),
        "tasks": Task.select().where(Task.state << ("queued", "starting")).count(),
    }
    for queue, depth in waiting.items():
        samples.add("remotegpu_queue_depth", labelled({"queue": queue}), depth)


def by_state(model: Any) -> dict[str, int]:
    """How many rows of this noun are in each state; a state without any is not in it."""
    return dict(model.select(model.state, peewee.fn.COUNT(model.id)).group_by(model.state).tuples())


def _machine(
    samples: Samples,
    machine: Machine,
    expected: Sequence[Gpu],
    report: MachineReport | None,
    state: Health,
    now: datetime,
) -> None:
    own = {"host": machine.name, "machine_id": str(machine.id)}
    labels = labelled(own)
    about = labels_of(machine, [gpu.name or "unknown" for gpu in expected])
    samples.add("remotegpu_machine_info", labelled(about), 1)
    samples.add("remotegpu_machine_state", labelled({**own, "state": machine.state}), 1)
    samples.add("remotegpu_machine_gpus_expected", labels, len(expected))
    samples.add("remotegpu_machine_maintenance", labels, machine.maintenance_since is not None)
    for code in sorted({problem.code for problem in state.problems}):
        samples.add("remotegpu_machine_problem", labelled({**own, "code": code}), 1)
    for gpu in expected:
        told = {**_of_gpu(own, gpu), "gpu_model": gpu.name or "unknown", "slot": str(gpu.slot)}
        samples.add("remotegpu_gpu_info", labelled(told), 1)
    if report is None:
        return
    samples.add("remotegpu_agent_info", labelled({**own, "version": report.agent_version}), 1)
    samples.add("remotegpu_agent_online", labels, state.is_online)
    samples.add("remotegpu_agent_report_age_seconds", labels, max(0.0, (now - report.received_at).total_seconds()))
    if state.is_online:
        samples.add("remotegpu_agent_clock_offset_seconds", labels, report.clock_offset_s)
        _host(samples, own, labels, report.metrics)
        _gpus(samples, own, expected, report)


def _host(samples: Samples, own: Mapping[str, str], labels: str, metrics: Mapping[str, Any] | None) -> None:
    if metrics is None:
        return
    samples.add("remotegpu_host_cpu_ratio", labels, ratio(metrics["cpu_percent"]))
    samples.add("remotegpu_host_load1", labels, metrics["load1"])
    samples.add("remotegpu_host_memory_total_bytes", labels, metrics["memory_total_bytes"])
    samples.add("remotegpu_host_memory_used_bytes", labels, metrics["memory_used_bytes"])
    samples.add("remotegpu_host_uptime_seconds", labels, metrics["uptime_s"])
    for mount, disk in _once(metrics["disks"], "mount", MOST_DISKS):
        at = labelled({**own, "mount": mount})
        samples.add("remotegpu_host_disk_total_bytes", at, disk["total_bytes"])
        samples.add("remotegpu_host_disk_free_bytes", at, disk["free_bytes"])
    real = [each for each in metrics["network"] if not PLUMBING.fullmatch(each["interface"])]
    for interface, counters in _once(real, "interface", MOST_INTERFACES):
        at = labelled({**own, "interface": interface})
        samples.add("remotegpu_host_network_received_bytes_total", at, counters["received_bytes"])
        samples.add("remotegpu_host_network_sent_bytes_total", at, counters["sent_bytes"])


def _once(entries: Iterable[Mapping[str, Any]], key: str, most: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Each name once: a series that comes twice makes Prometheus refuse the whole answer."""
    return list({str(entry[key]): entry for entry in entries}.items())[:most]


GPU_VALUES: Mapping[str, str] = {
    "remotegpu_gpu_memory_total_bytes": "memory_total_bytes",
    "remotegpu_gpu_memory_used_bytes": "memory_used_bytes",
    "remotegpu_gpu_temperature_celsius": "temperature_c",
    "remotegpu_gpu_power_watts": "power_w",
    "remotegpu_gpu_power_limit_watts": "power_limit_w",
    "remotegpu_gpu_ecc_uncorrected_errors": "ecc_uncorrected",
    "remotegpu_gpu_mig": "mig",
}


def _gpus(samples: Samples, own: Mapping[str, str], expected: Sequence[Gpu], report: MachineReport) -> None:
    """Only GPUs that are expected: a host cannot make up series. Stale values are those of another moment: none."""
    if report.gpu is None:
        return
    samples.add("remotegpu_agent_nvml", labelled({**own, "state": report.gpu["state"]}), 1)
    seen = gpus.of_now(report)
    if seen is None:
        return
    for gpu in expected:
        live, labels = seen.get(gpu.uuid), labelled(_of_gpu(own, gpu))
        samples.add("remotegpu_gpu_up", labels, live is not None and gpus.answers(live))
        if live is None:
            continue
        samples.add("remotegpu_gpu_utilization_ratio", labels, ratio(live["utilization_percent"]))
        samples.add("remotegpu_gpu_memory_bandwidth_ratio", labels, ratio(live["memory_bandwidth_percent"]))
        for name, field in GPU_VALUES.items():
            samples.add(name, labels, live[field])
        for xid, at in gpus.xids(live).items():
            of_xid = labelled({**_of_gpu(own, gpu), "xid": str(xid)})
            samples.add("remotegpu_gpu_xid_last_timestamp_seconds", of_xid, at.timestamp())
        processes = live["processes"]
        samples.add("remotegpu_gpu_processes", labels, None if processes is None else len(processes))


def _of_gpu(own: Mapping[str, str], gpu: Gpu) -> dict[str, str]:
    return {**own, "uuid": normalised(gpu.uuid)}
