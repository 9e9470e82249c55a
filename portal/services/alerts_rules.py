"""Rules that staff wrote: data, not code. A metric of a fixed list, a condition, a threshold, for how long, for whom.

A rule's life: written and tried against the past, switched on, changed, removed. What is switched on is rendered into
one file for Prometheus (`rendered`); nothing that somebody typed is ever an expression or a template in it. The
delivered rules are a file of the role `prometheus`, what fires arrives in alerts.py like any other alert.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peewee

from portal.db import atomic, release_connection, utcnow
from portal.errors import Conflict, Invalid, NotFound, Unavailable
from portal.integrations import prometheus
from portal.integrations.prometheus import Series
from portal.models import AlertRule
from portal.models.states import ALERT_SEVERITIES
from portal.services import alerts_own, audit, config
from portal.services.actors import Actor
from portal.services.monitoring_measures import MEASURES, NO_DISK, OF_FLEET

NAME = re.compile(r"[A-Z][A-Za-z0-9]{2,63}")
CONDITIONS = (">", ">=", "<", "<=")
LONGEST_S = 7 * 86400
LOOKS_BACK_S = 120  # as far as the delivered rules do, for the same reason
MOST_HOURS = 30 * 24
MOST_TIMES = 200  # that a trial names
POINTS = 1500  # of a trial's series, at most
LONGEST_TEXT = 300
PROMTOOL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Metric:
    """What a rule can look at. `expression` has the label `host`, and whatever else tells its series apart."""

    unit: str
    expression: str


def _last(series: str) -> str:
    """Its last sample: a scrape that fails is no news, here as in the delivered rules."""
    return f"last_over_time({series}[{LOOKS_BACK_S}s])"


def _measured(name: str, window_s: int = LOOKS_BACK_S) -> str:
    """As charts have it: from the exporter, or else from the agent, whose word there is on every host."""
    return MEASURES[name].raw({}, window_s)


def _by_mountpoint(disks: str) -> str:
    return f'max by (host, mountpoint) (label_replace({disks}, "mountpoint", "$1", "mount", "(.*)"))'


_FREE = _last(f'node_filesystem_avail_bytes{{{OF_FLEET}, fstype!~"{NO_DISK}"}}')
_USED_BY_GPUS, _OF_GPUS = _last("remotegpu_gpu_memory_used_bytes"), _last("remotegpu_gpu_memory_total_bytes")
METRICS: Mapping[str, Metric] = {
    "cpu_percent": Metric("%", _measured("cpu", 300)),
    "memory_percent": Metric("%", _measured("host_memory")),
    "disk_percent": Metric("%", _by_mountpoint(_measured("disk"))),
    "disk_free_gib": Metric(
        "GiB",
        f"(min by (host, mountpoint) ({_FREE}) or {_by_mountpoint(_last('remotegpu_host_disk_free_bytes'))}) / 2^30",
    ),
    "load1": Metric(
        "",
        f"max by (host) ({_last(f'node_load1{{{OF_FLEET}}}')}) or max by (host) ({_last('remotegpu_host_load1')})",
    ),
    "gpu_utilization_percent": Metric("%", f"100 * max by (host, uuid) ({_last('remotegpu_gpu_utilization_ratio')})"),
    "gpu_memory_percent": Metric("%", f"100 * max by (host, uuid) ({_USED_BY_GPUS} / {_OF_GPUS})"),
    "gpu_temperature_c": Metric("°C", f"max by (host, uuid) ({_last('remotegpu_gpu_temperature_celsius')})"),
    "gpu_power_w": Metric("W", f"max by (host, uuid) ({_last('remotegpu_gpu_power_watts')})"),
    "gpu_ecc_errors": Metric("", f"max by (host, uuid) ({_last('remotegpu_gpu_ecc_uncorrected_errors')})"),
    "clock_offset_s": Metric("s", f"max by (host) (abs({_last('remotegpu_agent_clock_offset_seconds')}))"),
    "agent_silence_s": Metric("s", f"max by (host) ({_last('remotegpu_agent_report_age_seconds')})"),
}


@dataclass(frozen=True)
class Time:
    """When a rule would have fired: from the moment that its duration was over, with the worst value of that time."""

    labels: Mapping[str, str]
    starts_at: datetime
    ends_at: datetime
    worst: float


@dataclass(frozen=True)
class Trial:
    """What a rule would have done. `count` is of all times, also of those that are not listed."""

    hours: int
    step_s: int
    count: int
    times: tuple[Time, ...]


# Write


def create(*, by: Actor, **given: Any) -> AlertRule:
    """Make a rule; Invalid names each field that is wrong, Conflict a name that is taken."""
    fields = _checked(given)
    with _named_once(fields["name"]), atomic():
        rule: AlertRule = AlertRule.create(**fields, changed_by=by.user)
        audit.record("alert_rule.created", rule, by=by, **fields)
    return get(rule.id)


def edit(rule: AlertRule, *, by: Actor, **given: Any) -> AlertRule:
    """Change fields; those not given stay. The name may change: what fires is then another alert."""
    fields = _checked({**_fields(rule), **given})
    with _named_once(fields["name"]), atomic():
        changes = {**fields, "changed_at": utcnow(), "changed_by": by.user}
        if not AlertRule.update(**changes).where(AlertRule.id == rule.id).execute():
            raise NotFound(f"There is no alert rule {rule.id}.")
        audit.record("alert_rule.changed", rule, by=by, before=_fields(rule), after=fields)
    return get(rule.id)


def remove(rule: AlertRule, *, by: Actor) -> None:
    with atomic():
        if AlertRule.delete().where(AlertRule.id == rule.id).execute():
            audit.record("alert_rule.removed", rule, by=by, **_fields(rule))


@contextmanager
def _named_once(name: str) -> Iterator[None]:
    """The database holds that a name is there once; this says so."""
    try:
        yield
    except peewee.IntegrityError:
        raise Conflict(f"There is an alert rule {name} already.", code="already_exists") from None


FIELDS = ("name", "metric", "condition", "threshold", "duration_s", "severity", "scope", "summary", "way_out", "is_on")


def _fields(rule: AlertRule) -> dict[str, Any]:
    return {name: getattr(rule, name) for name in FIELDS}


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every field, canonical. Raises Invalid."""
    fields = {"scope": {}, "way_out": None, "is_on": False, **given}
    faults = {name: [text] for name, text in _faults(fields)}
    if faults:
        raise Invalid(faults)
    fields["summary"] = fields["summary"].strip()
    fields["way_out"] = (fields["way_out"] or "").strip() or None
    rule = AlertRule(**fields)
    if trouble := find_trouble(rendered([rule])):
        raise Invalid({"name": [f"Prometheus would not take it: {trouble}"]})
    return fields


def _faults(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not NAME.fullmatch(str(fields.get("name", ""))):
        yield "name", "Use 3 to 64 letters and digits, and begin with a capital letter."
    elif fields["name"] in alerts_own.DELIVERED:
        yield "name", "One of the delivered alerts has this name."
    if fields.get("metric") not in METRICS:
        yield "metric", f"Choose from {', '.join(METRICS)}."
    if fields.get("condition") not in CONDITIONS:
        yield "condition", f"Choose from {' '.join(CONDITIONS)}."
    threshold = fields.get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        yield "threshold", "Write a number."
    if not isinstance(fields.get("duration_s"), int) or not 0 <= fields["duration_s"] <= LONGEST_S:
        yield "duration_s", f"Choose 0 to {LONGEST_S} seconds."
    if fields.get("severity") not in ALERT_SEVERITIES:
        yield "severity", f"Choose from {', '.join(ALERT_SEVERITIES)}."
    for name in ("summary", "way_out"):
        text = fields.get(name)
        if name == "summary" and not (text or "").strip():
            yield name, "Say what is wrong when it fires."
        elif text and ("{{" in text or "}}" in text or not text.isprintable() or len(text) > LONGEST_TEXT):
            yield name, f"Use one line of at most {LONGEST_TEXT} characters, without double braces."
    yield from _scope_faults(fields.get("scope"))


def _scope_faults(scope: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(scope, dict) or len(scope) > 1 or not set(scope) <= {"region", "machines"}:
        yield "scope", "Name a region, or machines, or neither for all of them."
    elif "region" in scope and not (isinstance(scope["region"], str) and scope["region"].strip()):
        yield "scope", "Name the region."
    elif "machines" in scope and not _are_names(scope["machines"]):
        yield "scope", "Name at least one machine, each by its name."


def _are_names(given: Any) -> bool:
    return (
        isinstance(given, list)
        and 0 < len(given) <= 1000
        and all(isinstance(name, str) and re.fullmatch(r"[a-z0-9.-]{1,63}", name) for name in given)
    )


# Look


def get(rule_id: int) -> AlertRule:
    found: AlertRule | None = AlertRule.get_or_none(AlertRule.id == rule_id)
    if found is None:
        raise NotFound(f"There is no alert rule {rule_id}.")
    return found


def search(*, is_on: bool | None = None) -> peewee.ModelSelect[AlertRule]:
    """Rules by name."""
    query = AlertRule.select().order_by(AlertRule.name)
    return query if is_on is None else query.where(AlertRule.is_on == is_on)


# Render, for Prometheus


def file_for_prometheus() -> str:
    """Every rule that is switched on, as a file of rules."""
    return rendered(list(search(is_on=True)))


def rendered(rules: Iterable[AlertRule]) -> str:
    """A rules file. It is JSON, which is YAML: nothing that is quoted can break out of it."""
    entries = [_entry(rule) for rule in rules]
    groups = [{"name": "remotegpu-own", "rules": entries}] if entries else []
    return json.dumps({"groups": groups}, ensure_ascii=False, indent=1) + "\n"


def _entry(rule: AlertRule) -> dict[str, Any]:
    unit = METRICS[rule.metric].unit
    value = '{{ $value | printf "%.4g" }}' + (f" {unit}" if unit else "")
    annotations = {"summary": f"{rule.summary.rstrip('.')} ({{{{ $labels.host }}}}: {value})"}
    if rule.way_out:
        annotations["way_out"] = rule.way_out
    return {
        "alert": rule.name,
        "expr": expression(rule),
        "for": f"{rule.duration_s}s",
        "labels": {"severity": rule.severity},
        "annotations": annotations,
    }


def expression(rule: AlertRule) -> str:
    """In PromQL. A machine in maintenance is somebody's work already, as in the delivered rules."""
    compared = f"({METRICS[rule.metric].expression}) {rule.condition} {rule.threshold!r}"
    scope = _scope(rule.scope)
    return (
        compared
        + (f" and on (host) {_last(f'remotegpu_machine_info{{{scope}}}')}" if scope else "")
        + " unless on (host) last_over_time(remotegpu_machine_maintenance[1h]) == 1"
    )


def _scope(scope: Mapping[str, Any]) -> str:
    if "region" in scope:
        return f"region={json.dumps(scope['region'], ensure_ascii=False)}"
    if "machines" in scope:
        either = "|".join(name.replace(".", "\\.") for name in sorted(scope["machines"]))
        return f"host=~{json.dumps(either)}"
    return ""


def find_trouble(text: str) -> str | None:
    """What promtool says against a file of rules; None if nothing, or where it is not at hand."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return None
    with tempfile.TemporaryDirectory(prefix="remotegpu-rules-") as folder:
        file = Path(folder) / "own.rules.yml"
        file.write_text(text)
        argv = [promtool, "check", "rules", str(file)]
        release_connection()
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=PROMTOOL_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            return None
    if done.returncode == 0:
        return None
    return " ".join((done.stderr or done.stdout).replace(str(file), "").split())[:300]


# Try, against the past


def try_out(*, hours: int, now: datetime | None = None, **given: Any) -> Trial:
    """When a rule with these fields would have fired in the last `hours`. Nothing is saved.

    Raises Invalid, and Unavailable where there is no Prometheus or it does not answer.
    """
    if not 1 <= hours <= MOST_HOURS:
        raise Invalid({"hours": [f"Choose 1 to {MOST_HOURS} hours."]})
    rule = AlertRule(**_checked(given))
    asked = prometheus.of_settings(config.current())
    if asked is None:
        raise Unavailable("There is no Prometheus to ask: set PROMETHEUS_URL.", code="no_prometheus")
    end = (now or utcnow()).timestamp()
    step_s = max(15, math.ceil(hours * 3600 / POINTS / 15) * 15)
    found = asked.query_range(expression(rule), start=end - hours * 3600, end=end, step_s=step_s)
    times = [time for series in found for time in times_of(series, rule.duration_s, step_s, rule.condition)]
    times.sort(key=lambda time: time.starts_at, reverse=True)
    return Trial(hours, step_s, len(times), tuple(times[:MOST_TIMES]))


def times_of(series: Series, duration_s: int, step_s: int, condition: str) -> Iterator[Time]:
    """Each stretch of points without a gap that lasts longer than the rule waits."""
    points = [(at, value) for at, value in series.points if value is not None]
    worst = max if condition.startswith(">") else min
    for stretch in _stretches(points, step_s):
        fires_at = stretch[0][0] + duration_s
        firing = [value for at, value in stretch if at >= fires_at]
        if firing:
            yield Time(series.labels, _moment(fires_at), _moment(stretch[-1][0] + step_s), worst(firing))


def _stretches(points: Sequence[tuple[float, float]], step_s: int) -> Iterator[list[tuple[float, float]]]:
    stretch: list[tuple[float, float]] = []
    for at, value in points:
        if stretch and at - stretch[-1][0] > step_s * 1.5:
            yield stretch
            stretch = []
        stretch.append((at, value))
    if stretch:
        yield stretch


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
