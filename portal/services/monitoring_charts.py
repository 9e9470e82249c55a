"""Charts: how a measure went over an hour to 30 days, for the fleet, a machine, a GPU, or a customer's lease.

Prometheus has the history; without one there is none, and that is said. A moment without a value is a gap, never 0, and
the gaps of a machine carry their cause. What a customer sees lies wholly within the own lease: every value covers a
window before it, so the first one stands a window after the lease's beginning. What is measured, in PromQL, is in
monitoring_measures.py; what the fleet does now in monitoring_live.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from portal.errors import Invalid, NotFound, Unavailable
from portal.integrations import prometheus
from portal.integrations.prometheus import MAX_POINTS, Prometheus, Series
from portal.models import Gpu, Lease, Machine
from portal.services import config, machines, monitoring_cache
from portal.services.monitoring_measures import MEASURES, RECORDED_S, Measure, matching
from portal.services.monitoring_samples import normalised

log = logging.getLogger(__name__)

KEEP_S = 30.0
WINDOW_S = 90  # at least: three samples of a Prometheus that asks every 30 s


class NoPrometheus(Unavailable):
    """This portal has no Prometheus, so there is no history."""

    code = "no_prometheus"


@dataclass(frozen=True)
class Span:
    """How far back a chart goes, and how far apart its points are. The recording rules serve the long ones."""

    name: str
    length_s: int
    step_s: int
    is_recorded: bool = False

    @property
    def window_s(self) -> int:
        """What each point covers: never less than the step, or values between two points would be lost."""
        return max(self.step_s, 2 * RECORDED_S if self.is_recorded else WINDOW_S)

    @property
    def reach_s(self) -> int:
        """How far before its own time a point looks, the window of what was recorded included."""
        return self.window_s + (RECORDED_S if self.is_recorded else 0)


SPANS: Mapping[str, Span] = {
    span.name: span
    for span in (
        Span("1h", 3600, 15),
        Span("6h", 6 * 3600, 30),
        Span("1d", 24 * 3600, 120),
        Span("7d", 7 * 24 * 3600, 900, is_recorded=True),
        Span("30d", 30 * 24 * 3600, 3600, is_recorded=True),
    )
}
# A fleet is summed up from thousands of GPUs: only its last hour is drawn from the samples themselves.
FLEET_SPANS: Mapping[str, Span] = {
    **SPANS,
    "6h": Span("6h", 6 * 3600, RECORDED_S, is_recorded=True),
    "1d": Span("1d", 24 * 3600, RECORDED_S, is_recorded=True),
}
assert all(span.length_s / span.step_s < MAX_POINTS for span in (*SPANS.values(), *FLEET_SPANS.values()))  # noqa: S101 - a mistake of ours


@dataclass(frozen=True)
class Grid:
    """The moments of a chart: from `start` to `end`, both multiples of the step, so that two charts line up."""

    start: float
    end: float
    span: Span

    @property
    def times(self) -> list[int]:
        return list(range(int(self.start), int(self.end) + 1, self.span.step_s)) if self.end >= self.start else []

    def values(self, series: Series) -> list[float | None]:
        """One for each moment; None where Prometheus has none."""
        found: list[float | None] = [None] * len(self.times)
        for at, value in series.points:
            found[round((at - self.start) / self.span.step_s)] = None if value is None else float(f"{value:.6g}")
        return found


def of_fleet(measure: str, span: str, now: datetime) -> dict[str, Any]:
    """One line for the whole fleet (network: two). Raises Invalid, or Unavailable without history."""
    chosen, grid = _measure(measure), _grid(_span(span, FLEET_SPANS), now)

    def compute() -> dict[str, Any]:
        asking, recorded = _prometheus(), False
        found: list[Series] = []
        if grid.span.is_recorded:
            found, recorded = _ask(asking, chosen.fleet_recorded(grid.span.window_s), grid), True
        if not found and grid.span.length_s <= SPANS["1d"].length_s:
            found, recorded = _ask(asking, chosen.fleet_raw(grid.span.window_s), grid), False
        lines = [_line(series, grid, series.labels.get("direction", "fleet")) for series in found]
        for line in lines:
            line["gaps"] = gaps_of(line["values"], Facts({}), None, chosen, grid)  # of a whole fleet there is no cause
        return _chart(chosen, grid, lines, is_recorded=recorded)

    return _shared(f"fleet:{measure}", grid, compute)


def of_machine(
    machine: Machine, measure: str, span: str, now: datetime, *, gpu_uuid: str | None = None
) -> dict[str, Any]:
    """A line for each GPU (or of one), of the host, or of each of its file systems; for staff.

    Raises Invalid, NotFound for a GPU that is not this machine's, Unavailable without history.
    """
    return _of_host(machine, _measure(measure), _grid(_span(span, SPANS), now), gpu_uuid)


def of_lease(lease: Lease, measure: str, span: str, now: datetime) -> dict[str, Any]:
    """The same for the people of a lease, from its beginning to its end and not a moment more.

    Where the history cannot be had, they are not told about machines that are ours.
    """
    if lease.activated_at is None:
        raise NotFound("The lease has not begun yet.")
    asked = _span(span, SPANS)
    until = min(now, lease.ending_at or now)
    fitting = _finest(min(asked.length_s, (until - lease.activated_at).total_seconds()))
    whole = _grid(fitting, until, length_s=asked.length_s)
    first = _up(lease.activated_at.timestamp() + fitting.reach_s, fitting.step_s)
    grid = Grid(max(whole.start, first), whole.end, fitting)
    try:
        return _of_host(lease.machine, _measure(measure), grid, None)
    except Unavailable:
        log.warning("a customer's chart of %s cannot be drawn", lease.machine.name, exc_info=True)
        raise Unavailable("The history of this machine cannot be shown now.", code="history_unavailable") from None


def _measure(name: str) -> Measure:
    measure = MEASURES.get(name)
    if measure is None:
        raise Invalid({"measure": [f"Choose from {', '.join(MEASURES)}."]})
    return measure


def _span(name: str, spans: Mapping[str, Span]) -> Span:
    span = spans.get(name)
    if span is None:
        raise Invalid({"range": [f"Choose from {', '.join(spans)}."]})
    return span


def _finest(length_s: float) -> Span:
    """The span with the most points that still covers so long: a lease of an hour is not drawn in one dot."""
    return next((span for span in SPANS.values() if span.length_s >= length_s), SPANS["30d"])


def _grid(span: Span, now: datetime, *, length_s: int | None = None) -> Grid:
    end = math.floor(now.timestamp() / span.step_s) * span.step_s
    length = min(span.length_s, length_s or span.length_s)
    return Grid(end - math.floor(length / span.step_s) * span.step_s, end, span)


def _up(moment: float, step_s: int) -> int:
    return math.ceil(moment / step_s) * step_s


def _prometheus() -> Prometheus:
    asking = prometheus.of_settings(config.current())
    if asking is None:
        raise NoPrometheus("No Prometheus is set up, so there is no history; PROMETHEUS_URL names one.")
    return asking


def _shared(what: str, grid: Grid, compute: Any) -> dict[str, Any]:
    """Computed once for all who look at the same moment."""
    _prometheus()  # whoever has none is told so before anything is looked up
    key = f"chart:{what}:{grid.start:.0f}:{grid.end:.0f}:{grid.span.step_s}"
    chart: dict[str, Any] = monitoring_cache.current().get(key, compute, keep_s=min(KEEP_S, grid.span.step_s))
    return chart


def _ask(asking: Prometheus, expression: str, grid: Grid) -> list[Series]:
    return asking.query_range(expression, start=grid.start, end=grid.end, step_s=grid.span.step_s)


# A machine


def _of_host(machine: Machine, measure: Measure, grid: Grid, gpu_uuid: str | None) -> dict[str, Any]:
    expected = machines.expected_gpus(machine) if measure.is_of_gpus else []
    matchers = {"host": machine.name}
    if gpu_uuid is not None:
        expected = [gpu for gpu in expected if normalised(gpu.uuid) == normalised(gpu_uuid)]
        if not expected:
            raise NotFound(f"{machine.name} is not expected to have such a GPU, or this is measured of hosts alone.")
        matchers["uuid"] = normalised(gpu_uuid)

    def compute() -> dict[str, Any]:
        if not grid.times:
            return _chart(measure, grid, [], is_recorded=False)
        asking = _prometheus()
        found, recorded = _of_lines(asking, measure, matchers, grid)
        lines = _lines(measure, found, expected, grid)
        if any(None in line["values"] for line in lines):
            facts = Facts.of(_ask(asking, _facts_expression(machine.name, grid.span.window_s), grid), grid)
            for line in lines:
                line["gaps"] = gaps_of(line["values"], facts, line["uuid"], measure, grid)
        return _chart(measure, grid, lines, is_recorded=recorded)

    return _shared(f"{machine.id}:{measure.name}:{matchers.get('uuid', '')}", grid, compute)


def _of_lines(
    asking: Prometheus, measure: Measure, matchers: Mapping[str, str], grid: Grid
) -> tuple[list[Series], bool]:
    """From the recording rules where they serve this span and have something, else from the samples."""
    if grid.span.is_recorded:
        found = _ask(asking, measure.recorded(matchers, grid.span.window_s), grid)
        if found:
            return found, True
    return _ask(asking, measure.raw(matchers, grid.span.window_s), grid), False


def _lines(measure: Measure, found: Sequence[Series], expected: Sequence[Gpu], grid: Grid) -> list[dict[str, Any]]:
    """Every expected GPU has a line, also one of which nothing is known; then what was found besides."""
    if not measure.is_of_gpus:
        ordered = sorted(found, key=lambda series: series.labels.get("mount") or series.labels.get("direction") or "")
        names = [series.labels.get("mount") or series.labels.get("direction") or measure.name for series in ordered]
        lines = [_line(series, grid, name) for series, name in zip(ordered, names, strict=True)]
        return lines or [_line(Series({}, ()), grid, measure.name)]
    by_uuid = {series.labels.get("uuid", ""): series for series in found}
    lines = [_line(by_uuid.pop(normalised(gpu.uuid), _nothing(gpu)), grid, _name_of(gpu)) for gpu in expected]
    return lines + [_line(series, grid, uuid[:13] or "GPU") for uuid, series in sorted(by_uuid.items())]


def _nothing(gpu: Gpu) -> Series:
    return Series({"uuid": normalised(gpu.uuid)}, ())


def _name_of(gpu: Gpu) -> str:
    return f"{'?' if gpu.slot is None else gpu.slot} {gpu.name or ''}".strip()


def _line(series: Series, grid: Grid, name: str) -> dict[str, Any]:
    return {"name": name, "uuid": series.labels.get("uuid"), "values": grid.values(series), "gaps": []}


def _chart(measure: Measure, grid: Grid, lines: Iterable[dict[str, Any]], *, is_recorded: bool) -> dict[str, Any]:
    return {
        "measure": measure.name,
        "unit": measure.unit,
        "range": grid.span.name,
        "step_s": grid.span.step_s,
        "source": "recorded" if is_recorded else "samples",
        "times": grid.times,
        "lines": list(lines),
    }


# Why there is no value

CAUSES = ("host_down", "exporter_failing", "gpu_gone", "mig", "not_reported", "no_data")
ANSWERED_S = 86400  # an exporter that has not answered for so long may never have been let in


def _facts_expression(host: str, window_s: int) -> str:
    """What tells causes apart, in one question: each part carries its name in the label `fact`."""
    only, window = matching({"host": host}), f"[{window_s}s]"
    mig = " or ".join(
        f"max by (uuid) (last_over_time({series}{{{only}}}{window}))"
        for series in ("remotegpu_gpu_mig", "nvidia_smi_mig_mode_current")
    )
    parts = {
        "node": f'max(max_over_time(up{{job="node",{only}}}{window}))',
        "exporter": f'max(max_over_time(up{{job="nvidia_gpu",{only}}}{window}))',
        "exit_code": f"max(last_over_time(nvidia_smi_command_exit_code{{{only}}}{window}))",
        "collected": f"min(last_over_time(nvidia_smi_last_collect_success{{{only}}}{window}))",
        "answered": f'max(max_over_time(up{{job="node",{only}}}[{ANSWERED_S}s]))',
        "agent": f"max(last_over_time(remotegpu_agent_online{{{only}}}{window}))",
        "portal": f'max(max_over_time(up{{job="portal"}}{window}))',
        "trouble": f'max(last_over_time(remotegpu_agent_nvml{{state!="ok",{only}}}{window}))',
        "answers": f"max by (uuid) (last_over_time(remotegpu_gpu_up{{{only}}}{window}))",
        "seen": f"max by (uuid) (last_over_time(nvidia_smi_gpu_info{{{only}}}{window}))",
        "mig": mig,
    }
    return " or ".join(f'label_replace({part}, "fact", "{fact}", "", "")' for fact, part in parts.items())


@dataclass(frozen=True)
class Facts:
    """What was known of a host at each moment of a grid, by fact and, of GPUs, UUID."""

    by_name: Mapping[tuple[str, str], Sequence[float | None]]

    @classmethod
    def of(cls, found: Iterable[Series], grid: Grid) -> Facts:
        return cls({(each.labels["fact"], each.labels.get("uuid", "")): grid.values(each) for each in found})

    def at(self, moment: int, fact: str, uuid: str = "") -> float | None:
        values = self.by_name.get((fact, uuid))
        return None if values is None else values[moment]


def cause_of(facts: Facts, moment: int, uuid: str | None, measure: Measure) -> str:
    """Why there is no value at this moment: one of CAUSES. A cause that is nearer to the GPU comes first."""
    node, exporter, agent = (facts.at(moment, fact) for fact in ("node", "exporter", "agent"))
    if not any((node, exporter, agent)):  # nobody there has answered
        is_asked = (node, exporter, agent) != (None, None, None)
        return "host_down" if is_asked and _would_be_heard(facts, moment) else "no_data"
    if not measure.is_of_gpus or uuid is None:
        return "not_reported" if node else "exporter_failing"
    if measure.name == "utilization" and facts.at(moment, "mig", uuid) == 1:
        return "mig"
    if facts.at(moment, "answers", uuid) == 0:
        return "gpu_gone"
    failing = facts.at(moment, "exit_code") not in (None, 0) or facts.at(moment, "collected") == 0
    if facts.at(moment, "answers", uuid) == 1 or facts.at(moment, "seen", uuid) == 1:
        # The card is there: what it does not tell the agent, only the exporter could have told.
        return "exporter_failing" if failing or exporter == 0 else "not_reported"
    if failing or not exporter or facts.at(moment, "trouble") == 1:
        return "exporter_failing"
    return "gpu_gone"


def _would_be_heard(facts: Facts, moment: int) -> bool:
    """Whether a host that is up would not be silent. While the portal is down nobody has the agent's word, and an
    exporter that has never answered may not have been let in. The rule MachineOffline goes by the same.
    """
    is_agent_told = facts.at(moment, "agent") is not None or facts.at(moment, "portal") == 1
    return is_agent_told or facts.at(moment, "answered") == 1


def gaps_of(
    values: Sequence[float | None], facts: Facts, uuid: str | None, measure: Measure, grid: Grid
) -> list[dict[str, Any]]:
    """The gaps of a line with their causes: from the first moment without a value to the last one, both included."""
    gaps: list[dict[str, Any]] = []
    before = -2
    for moment, (at, value) in enumerate(zip(grid.times, values, strict=True)):
        if value is not None:
            continue
        cause = cause_of(facts, moment, uuid, measure)
        if gaps and before == moment - 1 and gaps[-1]["cause"] == cause:
            gaps[-1]["to"] = at
        else:
            gaps.append({"from": at, "to": at, "cause": cause})
        before = moment
    return gaps
