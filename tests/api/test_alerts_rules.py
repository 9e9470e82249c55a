"""Rules of one's own: data that can be written, tried against the past, switched on, and read by Prometheus."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from portal.integrations.prometheus import Series
from portal.models import AlertRule, AuditEntry, User
from portal.services import alerts_rules
from portal.services.alerts_rules import METRICS
from tests.conftest import SignedIn

SignIn = Callable[[User], SignedIn]
RULE = {
    "name": "GpuIdle",
    "metric": "gpu_utilization_percent",
    "condition": "<",
    "threshold": 5,
    "duration_s": 3600,
    "severity": "info",
    "summary": "A leased GPU does nothing.",
}


@pytest.fixture
def staff(sign_in: SignIn, operator: User) -> SignedIn:
    return sign_in(operator)


def rules_file(staff: SignedIn) -> list[dict[str, Any]]:
    """What Prometheus reads; JSON is YAML."""
    groups = json.loads(staff.get("/prometheus/rules").data)["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_a_rule_is_off_until_it_is_switched_on_and_gone_when_it_is_removed(staff: SignedIn) -> None:
    made = staff.post("/admin/alerts/rules", RULE)
    assert (made.status_code, made.json["is_on"]) == (201, False)
    assert rules_file(staff) == []
    staff.patch(f"/admin/alerts/rules/{made.json['id']}", {"is_on": True, "threshold": 7.5})
    (rule,) = rules_file(staff)
    assert (rule["alert"], rule["for"], rule["labels"]) == ("GpuIdle", "3600s", {"severity": "info"})
    assert "< 7.5" in rule["expr"]
    assert staff.delete(f"/admin/alerts/rules/{made.json['id']}").status_code == 204
    assert rules_file(staff) == []
    told = [entry.action for entry in AuditEntry.select().where(AuditEntry.action.startswith("alert_rule"))]
    assert told == ["alert_rule.created", "alert_rule.changed", "alert_rule.removed"]


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ({}, None),
        ({"region": 'north "1"'}, 'remotegpu_machine_info{region="north \\"1\\""}'),
        ({"machines": ["gpu-2", "gpu-1.site"]}, 'remotegpu_machine_info{host=~"gpu-1\\\\.site|gpu-2"}'),
    ],
)
def test_a_rule_is_for_every_machine_a_region_or_some(staff: SignedIn, scope: dict[str, Any], part: str | None) -> None:
    made = staff.post("/admin/alerts/rules", {**RULE, "scope": scope, "is_on": True})
    assert made.status_code == 201, made.text
    (rule,) = rules_file(staff)
    assert (part in rule["expr"]) if part else ("remotegpu_machine_info" not in rule["expr"])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "gpuIdle"}, "name"),
        ({"name": "Gpu-Idle"}, "name"),
        ({"name": "GpuLost"}, "name"),
        ({"name": "Watchdog"}, "name"),
        ({"name": "MachineOffline"}, "name"),
        ({"name": "MonitoringSilent"}, "name"),
        ({"metric": "up) or vector(1"}, "metric"),
        ({"condition": "=="}, "condition"),
        ({"threshold": "many"}, "threshold"),
        ({"duration_s": -1}, "duration_s"),
        ({"severity": "page"}, "severity"),
        ({"summary": " "}, "summary"),
        ({"summary": "{{ query `up` }}"}, "summary"),
        ({"way_out": "line\nline"}, "way_out"),
        ({"scope": {"region": "a", "machines": ["b"]}}, "scope"),
        ({"scope": {"machines": ["gpu.*|.*"]}}, "scope"),
        ({"scope": {"expr": "1"}}, "scope.expr"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_field(staff: SignedIn, changes: dict[str, Any], field: str) -> None:
    answer = staff.post("/admin/alerts/rules", {**RULE, **changes})
    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])
    assert not AlertRule.select().exists()


def test_a_name_is_there_once(staff: SignedIn) -> None:
    staff.post("/admin/alerts/rules", RULE)
    assert staff.post("/admin/alerts/rules", RULE).status_code == 409
    other = staff.post("/admin/alerts/rules", {**RULE, "name": "Other"}).json
    assert staff.patch(f"/admin/alerts/rules/{other['id']}", {"name": "GpuIdle"}).status_code == 409


def test_a_file_that_promtool_refuses_is_not_saved(staff: SignedIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts_rules, "find_trouble", lambda _text: "group remotegpu-own: bad")
    answer = staff.post("/admin/alerts/rules", RULE)
    assert answer.json["errors"] == {"name": ["Prometheus would not take it: group remotegpu-own: bad"]}


def test_without_prometheus_a_trial_says_so(staff: SignedIn) -> None:
    answer = staff.post("/admin/alerts/rules/try", RULE)
    assert (answer.status_code, answer.json["code"]) == (503, "no_prometheus")
    assert not AlertRule.select().exists()


def test_only_prometheus_and_staff_read_the_file(client: FlaskClient, sign_in: SignIn, customer: User) -> None:
    assert client.get("/api/v1/prometheus/rules").status_code == 401
    assert sign_in(customer).get("/prometheus/rules").status_code == 403
    assert sign_in(customer).get("/admin/alerts/rules").status_code == 403


# When it would have fired


def times(points: list[tuple[float, float | None]], *, duration_s: int = 60, condition: str = ">") -> list[Any]:
    found = alerts_rules.times_of(Series({"host": "gpu-1"}, tuple(points)), duration_s, 30, condition)
    return [(time.starts_at.timestamp(), time.ends_at.timestamp(), time.worst) for time in found]


def test_what_lasts_shorter_than_the_rule_waits_does_not_fire() -> None:
    assert times([(0, 9), (30, 9)]) == []
    assert times([]) == []


def test_what_lasts_longer_fires_after_that_time_with_its_worst_value() -> None:
    assert times([(0, 99), (30, 5), (60, 6), (90, 9), (120, 7)]) == [(60, 150, 9)]
    assert times([(0, 1), (30, 5), (60, 6), (90, 4)], condition="<") == [(60, 120, 4)]


def test_a_gap_begins_the_wait_anew() -> None:
    assert times([(0, 9), (30, 9), (60, 9), (120, 9), (150, 9), (180, 9)]) == [(60, 90, 9), (180, 210, 9)]


def test_a_rule_that_waits_for_nothing_fires_at_once() -> None:
    assert times([(0, 9)], duration_s=0) == [(0, 30, 9)]


def test_every_metric_has_a_word_and_is_an_expression_by_host() -> None:
    from portal.web.alerts import METRIC_WORDS

    assert set(METRIC_WORDS) == set(METRICS)
    assert all("by (host" in metric.expression for metric in METRICS.values())
