"""A rule is tried against a past that a real Prometheus holds, and every metric renders into a file that it takes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from portal.models import AlertRule
from portal.services import alerts_rules
from portal.services.alerts_rules import CONDITIONS, METRICS
from portal.settings import Settings
from tests.support import prometheus
from tests.support.prometheus import Sample

STEP_S = 60
GIVEN = {"metric": "gpu_temperature_c", "condition": ">", "threshold": 80, "duration_s": 600, "severity": "warning"}

BUSY = {"host": "busy", "instance": "busy"}
BY_ITS_AGENT: list[tuple[str, dict[str, str], float]] = [
    ("remotegpu_host_cpu_ratio", {}, 0.95),
    ("remotegpu_host_load1", {}, 70),
    ("remotegpu_host_memory_used_bytes", {}, 92),
    ("remotegpu_host_memory_total_bytes", {}, 100),
    ("remotegpu_host_disk_free_bytes", {"mount": "/srv"}, 3 * 2**30),
    ("remotegpu_host_disk_total_bytes", {"mount": "/srv"}, 100 * 2**30),
]


@pytest.fixture(scope="module")
def past() -> Iterator[tuple[str, float]]:
    """Six hours of two GPUs: one is hot for half an hour two hours ago, and for five minutes an hour ago.

    Beside them a busy host that only its agent tells of.
    """
    now = time.time() // STEP_S * STEP_S
    samples = []
    for minute in reversed(range(6 * 60)):
        at = now - minute * STEP_S
        is_hot = 90 <= minute < 120 or 55 <= minute < 60
        for uuid, value in (("u0", 88 if is_hot else 50), ("u1", 50)):
            labels = {"host": "gpu-1", "uuid": uuid}
            samples.append(Sample("remotegpu_gpu_temperature_celsius", labels, at, value))
        samples.append(Sample("remotegpu_machine_info", {"host": "gpu-1", "region": "north"}, at, 1))
        samples += [Sample(name, {**BUSY, **labels}, at, value) for name, labels, value in BY_ITS_AGENT]
        samples.append(Sample("up", {**BUSY, "job": "node"}, at, 0))
    with prometheus.server() as server:
        server.load(samples)
        server.start()
        yield server.url, now


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"duration_s": 0}, 2),
        ({"threshold": 90}, 0),
        ({"duration_s": 3600}, 0),
        ({"scope": {"region": "north"}}, 1),
        ({"scope": {"region": "south"}}, 0),
        ({"scope": {"machines": ["gpu-1", "gpu-2"]}}, 1),
        ({"scope": {"machines": ["gpu-2"]}}, 0),
        ({"hours": 1}, 0),
    ],
)
def test_a_trial_says_when_a_rule_would_have_fired(
    database: Any, settings: Settings, past: tuple[str, float], changes: dict[str, Any], count: int
) -> None:
    url, now = past
    object.__setattr__(settings, "prometheus_url", url)
    given = {"name": "HotGpu", "summary": "It is hot", "hours": 6, **GIVEN, **changes}
    trial = alerts_rules.try_out(now=datetime.fromtimestamp(now, UTC), **given)
    assert trial.count == count
    if changes == {}:
        (found,) = trial.times
        assert found.labels == {"host": "gpu-1", "uuid": "u0"}
        assert found.worst == 88
        assert found.starts_at.timestamp() == pytest.approx(now - 119 * STEP_S + 600, abs=2 * trial.step_s)
    assert not AlertRule.select().exists(), "nothing is saved"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("metric", "condition", "threshold", "worst"),
    [
        ("cpu_percent", ">", 90, 95),
        ("memory_percent", ">", 90, 92),
        ("disk_percent", ">", 90, 97),
        ("disk_free_gib", "<", 5, 3),
        ("load1", ">", 64, 70),
    ],
)
def test_a_host_whose_exporter_cannot_be_asked_is_looked_at_by_its_agent(
    database: Any, settings: Settings, past: tuple[str, float], metric: str, condition: str, threshold: int, worst: int
) -> None:
    url, now = past
    object.__setattr__(settings, "prometheus_url", url)
    given = {**GIVEN, "metric": metric, "condition": condition, "threshold": threshold}
    trial = alerts_rules.try_out(
        name="Busy", summary="It is busy", hours=5, now=datetime.fromtimestamp(now, UTC), **given
    )
    (found,) = trial.times
    assert found.labels == {"host": "busy"} | ({"mountpoint": "/srv"} if metric.startswith("disk") else {})
    assert found.worst == pytest.approx(worst)


def test_a_scrape_that_fails_ends_no_rule_of_ones_own_and_no_maintenance(tmp_path: Path) -> None:
    """Of two hot GPUs one is in maintenance; with the scrape that fails every series gets a marker at its end."""
    rule = AlertRule(name="Hot", metric="gpu_temperature_c", condition=">", threshold=80.0, duration_s=60, way_out=None,
                     severity="info", scope={"region": "north"}, summary="It is hot")  # fmt: skip
    (tmp_path / "own.rules.yml").write_text(alerts_rules.rendered([rule]))
    series = [
        {"series": f'{name}{{host="{host}",{labels}}}', "values": f"{value}x40 stale {value}x40"}
        for host, maintenance in (("gpu-1", 0), ("gpu-2", 1))
        for name, labels, value in (
            ("remotegpu_gpu_temperature_celsius", 'uuid="u0"', 88),
            ("remotegpu_machine_info", 'region="north"', 1),
            ("remotegpu_machine_maintenance", "", maintenance),
        )
    ]
    fired = {
        "exp_labels": {"host": "gpu-1", "uuid": "u0", "severity": "info"},
        "exp_annotations": {"summary": "It is hot (gpu-1: 88 °C)"},
    }
    checks = [{"eval_time": at, "alertname": "Hot", "exp_alerts": [fired]} for at in ("10m", "10m15s", "10m30s")]
    test = {"interval": "15s", "input_series": series, "alert_rule_test": checks}
    told = {"rule_files": ["own.rules.yml"], "evaluation_interval": "15s", "tests": [test]}
    (tmp_path / "test.yml").write_text(json.dumps(told))
    argv = ["promtool", "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("scope", [{}, {"region": 'a"b\\{{ }}'}, {"machines": ["gpu-1.x", "b"]}])
def test_every_metric_and_condition_makes_a_file_that_promtool_takes(scope: dict[str, Any]) -> None:
    rules = [
        AlertRule(
            name=f"Rule{number}{condition.replace('<', 'L').replace('>', 'G').replace('=', 'E')}",
            metric=metric, condition=condition, threshold=1e-7, duration_s=90, severity="info", scope=scope,
            summary='It "is" so: {x} 很热', way_out="Look.",
        )
        for number, metric in enumerate(METRICS)
        for condition in CONDITIONS
    ]  # fmt: skip
    assert alerts_rules.find_trouble(alerts_rules.rendered(rules)) is None


def test_promtool_is_asked() -> None:
    rule = AlertRule(name="Bad name", metric="load1", condition=">", threshold=1.0, duration_s=0, severity="info",
                     scope={}, summary="{{ nonsense", way_out=None)  # fmt: skip
    assert alerts_rules.find_trouble(alerts_rules.rendered([rule]))
