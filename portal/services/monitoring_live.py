"""What the fleet does now: counts, use by region and model, every GPU with its values; and when that was computed.

Values come from Prometheus where there is one, and from the agents' last reports where it has nothing. Computed at most
once in KEEP_S seconds for all who ask (monitoring_cache.py), and it says when. How it went before is in
monitoring_charts.py. None is unknown; a machine and a GPU are counted once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from portal.errors import Unavailable
from portal.integrations import prometheus
from portal.models import Gpu, Lease, Machine, MachineReport, Task, Tenant
from portal.models.states import LEASE_OPEN, MACHINE
from portal.services import alerts, config, gpus, health, machines, monitoring_cache
from portal.services.monitoring_charts import WINDOW_S
from portal.services.monitoring_measures import MEASURES
from portal.services.monitoring_samples import REACHABILITY, normalised

KEEP_S = 30.0
DEADLINE_S = 3.0  # of each of four questions: the agents' values are there anyway
TENTHS = 10
FIELDS = {
    "utilization": "utilization_percent",
    "memory": "memory_percent",
    "temperature": "temperature_c",
    "power": "power_w",
}
ORDERS = ("host", *FIELDS)


@dataclass(frozen=True)
class Asked:
    """What Prometheus said: a value for each (measure, host, uuid), or why there is none."""

    state: str  # ok, none, down
    message: str | None
    values: Mapping[tuple[str, str, str], float]


def overview(now: datetime) -> dict[str, Any]:
    """Counts and use of the fleet, without the single GPUs."""
    return {name: part for name, part in _whole(now).items() if name != "devices"}


def devices(now: datetime, *, order: str = "host", page: int = 1, page_size: int = 20) -> dict[str, Any]:
    """A page of the GPUs: by host, or those with the highest value first and those without one last."""
    every: list[dict[str, Any]] = _whole(now)["devices"]
    if order != "host":
        field = FIELDS[order]
        every = sorted(every, key=lambda device: (device[field] is None, -(device[field] or 0)))
    items = every[(page - 1) * page_size : page * page_size]
    return {"items": items, "page": page, "page_size": page_size, "total": len(every)}


def stats(now: datetime) -> dict[str, Any]:
    """The cards of the dashboard."""
    whole = _whole(now)
    return {name: whole[name] for name in ("computed_at", "keep_s", "machines", "customers", "tasks", "alerts", "gpus")}


def _whole(now: datetime) -> dict[str, Any]:
    whole: dict[str, Any] = monitoring_cache.current().get("live", lambda: _compute(now), keep_s=KEEP_S)
    return whole


def _compute(now: datetime) -> dict[str, Any]:
    asked = _ask()
    every = list(Machine.select().where(Machine.state != "retired").order_by(Machine.name))
    known = machines.gpus_by_machine()
    reports = {report.machine_id: report for report in MachineReport.select()}
    limits = machines.limits()
    shown, reachable, by_region = [], Counter[str](), dict[str, list[dict[str, Any]]]()
    for machine in every:
        own, report = known.get(machine.id, []), reports.get(machine.id)
        state = health.of(machine, own, report, now, limits)
        reachable[state.reachability] += 1
        of_machine = _devices(machine, own, report if state.is_online else None, asked)
        shown += of_machine
        by_region.setdefault(machine.region or "", []).extend(of_machine)
    by_model: dict[str, list[dict[str, Any]]] = {}
    for device in shown:
        by_model.setdefault(device["name"] or "", []).append(device)
    return {
        "computed_at": now.isoformat(),
        "keep_s": KEEP_S,
        "prometheus": {"state": asked.state, "message": asked.message},
        "machines": _machines(every, reachable),
        "customers": _customers(),
        "tasks": {"running": Task.select().where(Task.state == "running").count()},
        "alerts": {"open": alerts.count_open()},
        "gpus": {**_use(shown), "distribution": _distribution(shown)},
        "by_region": _groups(by_region, Counter(machine.region or "" for machine in every)),
        "by_model": _groups(by_model, Counter()),
        "devices": shown,
    }


def _ask() -> Asked:
    asking = prometheus.of_settings(config.current())
    if asking is None:
        return Asked("none", None, {})
    values: dict[tuple[str, str, str], float] = {}
    try:
        for name in FIELDS:
            for series in replace(asking, deadline_s=DEADLINE_S).query(MEASURES[name].raw({}, WINDOW_S)):
                if series.value is not None:
                    values[name, series.labels.get("host", ""), series.labels.get("uuid", "")] = series.value
    except Unavailable as error:
        return Asked("down", error.message, {})
    return Asked("ok", None, values)


def _machines(every: Sequence[Machine], reachable: Mapping[str, int]) -> dict[str, Any]:
    """Those that are retired are history and counted apart."""
    states = Counter(machine.state for machine in every)
    return {
        "total": len(every),
        "by_state": {state: states[state] for state in MACHINE if state != "retired"},
        "by_reachability": {word: reachable.get(word, 0) for word in REACHABILITY},
        "in_maintenance": sum(machine.maintenance_since is not None for machine in every),
        "retired": Machine.select().where(Machine.state == "retired").count(),
    }


def _customers() -> dict[str, int]:
    """Active are those that have a machine now."""
    holding = Lease.select(Lease.tenant).where(Lease.state << LEASE_OPEN).distinct()
    return {"total": Tenant.select().where(Tenant.archived_at.is_null()).count(), "active": holding.count()}


def _devices(
    machine: Machine, expected: Sequence[Gpu], report: MachineReport | None, asked: Asked
) -> list[dict[str, Any]]:
    live = gpus.of_now(report)
    answers = live is not None
    return [_device(machine, gpu, (live or {}).get(gpu.uuid), asked, answers=answers) for gpu in expected]


def _device(
    machine: Machine, gpu: Gpu, live: Mapping[str, Any] | None, asked: Asked, *, answers: bool
) -> dict[str, Any]:
    """`state` is the agent's word: ok, lost, error, missing; unknown while it has none."""
    history = {name: asked.values.get((name, machine.name, normalised(gpu.uuid))) for name in FIELDS}
    told = _told(live) if live else {}
    is_divided = live["mig"] if live else None
    values = {FIELDS[name]: _first(value, told.get(name)) for name, value in history.items()}
    if is_divided:
        values["utilization_percent"] = None  # whatever is said, it is not the use of the whole card
    return {
        "machine_id": machine.id,
        "host": machine.name,
        "slot": gpu.slot,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "state": live["state"] if live else "missing" if answers else "unknown",
        "mig": is_divided,
        "memory_total_bytes": (live["memory_total_bytes"] if live else None) or gpu.memory_bytes,
        **values,
        "source": "prometheus" if any(value is not None for value in history.values()) else "agent" if live else None,
    }


def _told(live: Mapping[str, Any]) -> dict[str, float | None]:
    """What the agent said, in the same units."""
    return {
        "utilization": live["utilization_percent"],
        "memory": gpus.memory_percent(live),
        "temperature": live["temperature_c"],
        "power": live["power_w"],
    }


def _first(*values: float | None) -> float | None:
    return next((round(value, 1) for value in values if value is not None), None)


def _groups(groups: Mapping[str, Sequence[Mapping[str, Any]]], counted: Mapping[str, int]) -> list[dict[str, Any]]:
    """By name; the group of those without a region or model has none."""
    names = sorted(groups.keys() | counted.keys())
    return [
        {
            "name": name or None,
            "machines": counted.get(name) if counted else len({device["host"] for device in groups[name]}),
            **_use(groups.get(name, ())),
        }
        for name in names
    ]


def _use(shown: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many GPUs are expected and how many answer, and the means of what is known; None where nothing is."""
    every = list(shown)
    return {
        "expected": len(every),
        "answering": sum(device["state"] == "ok" for device in every),
        "in_trouble": sum(device["state"] in ("lost", "error", "missing") for device in every),
        "utilization_percent": _mean(device["utilization_percent"] for device in every),
        "memory_percent": _mean(device["memory_percent"] for device in every),
        "temperature_max_c": max((d["temperature_c"] for d in every if d["temperature_c"] is not None), default=None),
        "power_w": _sum(device["power_w"] for device in every),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 1) if known else None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known), 1) if known else None


def _distribution(shown: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many GPUs are how busy, in tenths; those divided by MIG and those that are unknown are told apart."""
    tenths, mig, unknown = [0] * TENTHS, 0, 0
    for device in shown:
        use = device["utilization_percent"]
        if use is not None:
            tenths[min(int(use / 100 * TENTHS), TENTHS - 1)] += 1
        elif device["mig"]:
            mig += 1
        else:
            unknown += 1
    return {"tenths": tenths, "mig": mig, "not_known": unknown}
