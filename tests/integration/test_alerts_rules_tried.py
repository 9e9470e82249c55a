"""A rule is tried against a past that a real Prometheus holds, and every metric renders into a file that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
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


@pytest.fixture(scope="module")
def past() -> Iterator[tuple[str, float]]:
    """Six hours of two GPUs: one is hot for half an hour two hours ago, and for five minutes an hour ago."""
    now = time.time() // STEP_S * STEP_S
    samples = []
    for minute in reversed(range(6 * 60)):
        at = now - minute * STEP_S
        is_hot = 90 <= minute < 120 or 55 <= minute < 60
        for uuid, value in (("u0", 88 if is_hot else 50), ("u1", 50)):
            labels = {"host": "gpu-1", "uuid": uuid}
            samples.append(Sample("remotegpu_gpu_temperature_celsius", labels, at, value))
        samples.append(Sample("remotegpu_machine_info", {"host": "gpu-1", "region": "north"}, at, 1))
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
