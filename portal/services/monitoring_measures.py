"""What is measured, as PromQL: each measure once, for charts of machines, GPUs and the fleet, and for recording rules.

A measure has several sources, the better one first: an exporter, then the portal's own series of what the agents say
(monitoring_samples.py); `or` takes the second where the first has nothing. All carry `host` and, of GPUs, `uuid` in one
spelling. Drivers renamed fields over the years, so old and new names stand side by side. Pure: nothing is asked here
(monitoring_charts.py does).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import wrap

RECORDED_S = 300  # how often the recording rules are evaluated, and the window that each of their values covers
OF_FLEET = 'job="node"'  # the control plane's own machine is another job with a `host`, and no part of the fleet
PLUMBING = "lo|veth.*|docker.*|br-.*|cni.*|cali.*|flannel.*|virbr.*|vnet.*|tap.*|lxc.*|ifb.*|dummy.*"
NO_DISK = (
    "tmpfs|ramfs|devtmpfs|overlay|squashfs|iso9660|nsfs|autofs|proc|sysfs|fuse.*|rpc_pipefs|efivarfs|tracefs|cgroup.*"
)


@dataclass(frozen=True)
class Measure:
    """`sources` are vectors by the labels in `by`; in them `<m>` is where matchers go, `<w>` the window.

    `over` is how several values of one line become one (avg, max), `fleet` how the lines of all hosts do.
    """

    name: str
    unit: str  # percent, celsius, watts, hertz, count, bytes_per_second
    sources: tuple[str, ...]
    by: tuple[str, ...] = ("host", "uuid")
    over: str = "avg"
    fleet: str = "avg"

    @property
    def is_of_gpus(self) -> bool:
        return "uuid" in self.by

    @property
    def record(self) -> str:
        """The recorded series of each line."""
        return f"{'gpu' if self.is_of_gpus else 'host'}:{self.name}_{self.unit}:{self.over}5m"

    @property
    def fleet_record(self) -> str:
        return f"fleet:{self.name}_{self.unit}:{self.over}5m"

    def raw(self, matchers: Mapping[str, str], window_s: int) -> str:
        """From the samples themselves: the value of each line over the window that ends at each step."""
        sources = [each.replace("<m>", matching(matchers)).replace("<w>", f"[{window_s}s]") for each in self.sources]
        return " or ".join(f"({source})" for source in sources)

    def recorded(self, matchers: Mapping[str, str], window_s: int) -> str:
        return f"{self.over}_over_time({self.record}{{{matching(matchers)}}}[{window_s}s])"

    def fleet_raw(self, window_s: int) -> str:
        return self._of_fleet(self.raw({}, window_s))

    def fleet_recorded(self, window_s: int) -> str:
        return f"{self.over}_over_time({self.fleet_record}[{window_s}s])"

    def rules(self) -> tuple[tuple[str, str], ...]:
        """Names and expressions of its recording rules, in the order in which they are evaluated."""
        return ((self.record, self.raw({}, RECORDED_S)), (self.fleet_record, self._of_fleet(self.record)))

    def _of_fleet(self, lines: str) -> str:
        kept = " by (direction)" if "direction" in self.by else ""
        return f"{self.fleet}{kept} ({lines})"


def matching(matchers: Mapping[str, str]) -> str:
    """Values are quoted as JSON quotes, which PromQL reads: a name must not end its own matcher."""
    return ",".join(f"{name}={json.dumps(value)}" for name, value in matchers.items())


def _of_gpu(series: str, over: str = "avg") -> str:
    """One series over the window; two targets that tell of the same GPU are one line."""
    return f"max by (host, uuid) ({over}_over_time({series}{{<m>}}<w>))"


def _of_host(series: str, over: str = "avg") -> str:
    return f"max by (host) ({over}_over_time({series}{{<m>}}<w>))"


def _of_node(series: str) -> str:
    return f"max by (host) (avg_over_time({series}{{{OF_FLEET},<m>}}<w>))"


def _slowed(reason: str) -> str:
    """The share of time in which clocks were held down for this reason. Drivers from 535 on say event, not throttle."""
    names = [f"nvidia_smi_clocks_{word}_reasons_{reason}" for word in ("event", "throttle")]
    return f'label_replace({" or ".join(map(_of_gpu, names))}, "reason", "{reason}", "", "")'


def _slowed_by_mask() -> str:
    """The same out of the bit mask of all reasons, at its last sample: hardware, thermal (both), power brake."""
    names = [f"nvidia_smi_clocks_{word}_reasons_active" for word in ("event", "throttle")]
    mask = " or ".join(_of_gpu(name, "last") for name in names)
    bits = " + ".join(f"floor(({mask}) / {bit}) % 2" for bit in (0x08, 0x20, 0x40, 0x80))
    return f"clamp_max({bits}, 1)"


def _traffic(node: str, agent: str, direction: str) -> str:
    exporter = f'sum by (host) (rate({node}{{{OF_FLEET},device!~"{PLUMBING}",<m>}}<w>))'
    portal = f"sum by (host) (rate({agent}{{<m>}}<w>))"
    return f'label_replace({exporter} or {portal}, "direction", "{direction}", "", "")'


def _file_system(series: str) -> str:
    selected = f'avg_over_time({series}{{{OF_FLEET},fstype!~"{NO_DISK}",<m>}}<w>)'
    return f'max by (host, mount) (label_replace({selected}, "mount", "$1", "mountpoint", "(.*)"))'


def _mounted(series: str) -> str:
    return f"max by (host, mount) (avg_over_time({series}{{<m>}}<w>))"


_RECEIVED = _traffic("node_network_receive_bytes_total", "remotegpu_host_network_received_bytes_total", "received")
_SENT = _traffic("node_network_transmit_bytes_total", "remotegpu_host_network_sent_bytes_total", "sent")

MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            "utilization",
            "percent",
            (
                # More than all is a driver's blank, and of a divided GPU nothing that is said is the use of the whole.
                f"(100 * {_of_gpu('nvidia_smi_utilization_gpu_ratio')} <= 100)"
                f" unless {_of_gpu('nvidia_smi_mig_mode_current', 'last')} == 1",
                f"100 * {_of_gpu('remotegpu_gpu_utilization_ratio')}",
            ),
        ),
        Measure(
            "memory",
            "percent",
            (
                f"100 * {_of_gpu('nvidia_smi_memory_used_bytes')} / {_of_gpu('nvidia_smi_memory_total_bytes')}",
                f"100 * {_of_gpu('remotegpu_gpu_memory_used_bytes')} / {_of_gpu('remotegpu_gpu_memory_total_bytes')}",
            ),
        ),
        Measure(
            "temperature",
            "celsius",
            (_of_gpu("nvidia_smi_temperature_gpu", "max"), _of_gpu("remotegpu_gpu_temperature_celsius", "max")),
            over="max",
            fleet="max",
        ),
        Measure(
            "power",
            "watts",
            (
                _of_gpu("nvidia_smi_power_draw_watts"),
                _of_gpu("nvidia_smi_power_draw_instant_watts"),  # where power.draw moved with driver 535
                _of_gpu("nvidia_smi_power_draw_average_watts"),
                _of_gpu("remotegpu_gpu_power_watts"),
            ),
            fleet="sum",
        ),
        Measure(
            "clock",
            "hertz",
            (_of_gpu("nvidia_smi_clocks_current_sm_clock_hz"), _of_gpu("nvidia_smi_clocks_sm_clock_hz")),
        ),
        Measure(
            "slowdown",
            "percent",
            (
                f"100 * max by (host, uuid) ({_slowed('hw_slowdown')} or {_slowed('sw_thermal_slowdown')})",
                f"100 * {_slowed_by_mask()}",
            ),
        ),
        Measure(
            "ecc",
            "count",
            (
                # More than a report can hold (the agent's bound, too) is a driver's blank.
                f"{_of_gpu('nvidia_smi_ecc_errors_uncorrected_volatile_total', 'max')} < {2**53}",
                _of_gpu("remotegpu_gpu_ecc_uncorrected_errors", "max"),
            ),
            over="max",
            fleet="sum",
        ),
        Measure(
            "cpu",
            "percent",
            (
                f'100 * (1 - avg by (host) (rate(node_cpu_seconds_total{{{OF_FLEET},mode="idle",<m>}}<w>)))',
                f"100 * {_of_host('remotegpu_host_cpu_ratio')}",
            ),
            by=("host",),
        ),
        Measure(
            "host_memory",
            "percent",
            (
                f"100 * (1 - {_of_node('node_memory_MemAvailable_bytes')} / {_of_node('node_memory_MemTotal_bytes')})",
                f"100 * {_of_host('remotegpu_host_memory_used_bytes')}"
                f" / {_of_host('remotegpu_host_memory_total_bytes')}",
            ),
            by=("host",),
        ),
        Measure(
            "network",
            "bytes_per_second",
            (f"{_RECEIVED} or {_SENT}",),
            by=("host", "direction"),
            fleet="sum",
        ),
        Measure(
            "disk",
            "percent",
            (
                f"100 * (1 - {_file_system('node_filesystem_avail_bytes')}"
                f" / {_file_system('node_filesystem_size_bytes')})",
                f"100 * (1 - {_mounted('remotegpu_host_disk_free_bytes')}"
                f" / {_mounted('remotegpu_host_disk_total_bytes')})",
            ),
            by=("host", "mount"),
            fleet="max",
        ),
    )
}


def rules_file() -> str:
    """The recording rules of every measure, as roles/prometheus/files/remotegpu.recording.rules.yml has them."""
    lines = [
        "---",
        "# What charts of weeks are drawn from: a value each 5 minutes, of each GPU and host, and of the fleet.",
        "# Written from portal/services/monitoring_measures.py (a test compares): change it there, then",
        "#   python -m portal.services.monitoring_measures > roles/prometheus/files/remotegpu.recording.rules.yml",
        "groups:",
    ]
    for measure in MEASURES.values():
        lines += [f"  - name: remotegpu_{measure.name}", f"    interval: {RECORDED_S}s", "    rules:"]
        for record, expression in measure.rules():
            lines += [f"      - record: {record}", "        expr: >-"]
            lines += [" " * 10 + part for part in wrap(expression, 100, break_long_words=False, break_on_hyphens=False)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(rules_file(), end="")  # noqa: T201 - this is how the file is written
