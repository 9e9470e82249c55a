"""The role prometheus, as far as it can be told without a host: what is scraped, and how rules are scaled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from roles.prometheus.filter_plugins.scale import prometheus_scale_for, prometheus_seconds, scale
from tests.support.rendering import DISTRIBUTIONS, ROLES, evaluate, render

RULES = """\
groups:
  - name: machines
    rules:
      # for: an hour, said the old one
      - alert: MachineOffline
        expr: up{job="hosts"} == 0 and on () vector(1) # for: ever
        for: 5m
        keep_firing_for: "1h30m" # flaps
        annotations: {summary: "for: 5m {{ $labels.host }}"}
      - record: host:gpus
        expr: count(up[5m:]) > last_over_time(up{job=~"a|b"}[2m]) + last_over_time(up[1h])
"""


def config(suite: str = "bookworm", **given: Any) -> dict[str, Any]:
    document = yaml.safe_load(render("prometheus", "prometheus.yml.j2", suite, **given))
    assert isinstance(document, dict)
    return document


def jobs(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["job_name"]: entry for entry in document["scrape_configs"]}


@pytest.mark.parametrize("suite", [suite for suite in DISTRIBUTIONS if suite != "jammy"])  # it refuses that one
def test_it_listens_on_loopback_and_keeps_thirty_days(suite: str) -> None:
    line = render("prometheus", "default.j2", suite).splitlines()[-1]
    assert line == 'ARGS="--web.listen-address=127.0.0.1:9090 --storage.tsdb.retention.time=30d"'


def test_an_ipv6_address_is_written_with_brackets() -> None:
    line = render("prometheus", "default.j2", "noble", prometheus_listen_address="::1", prometheus_retention_size="9GB")
    assert "--web.listen-address=[::1]:9090 " in line
    assert "--storage.tsdb.retention.size=9GB" in line


def test_hosts_come_from_the_portal_with_a_token_from_a_file() -> None:
    document = config(
        prometheus_portal_url="https://portal.example.org/",
        prometheus_portal_token="rgt_0123456789abcdef0123",
        prometheus_portal_ca_pem="-----BEGIN CERTIFICATE-----",
    )
    door = {
        "authorization": {"type": "Bearer", "credentials_file": "/etc/prometheus/portal.token"},
        "tls_config": {"ca_file": "/etc/prometheus/portal-ca.pem"},
    }
    hosts = jobs(document)["hosts"]["http_sd_configs"]
    url = "https://portal.example.org/api/v1/prometheus/targets"
    assert hosts == [{"url": url, "refresh_interval": "60s", **door}]
    assert jobs(document)["portal"] == {
        "job_name": "portal",
        "scheme": "https",
        "metrics_path": "/metrics",
        "static_configs": [{"targets": ["portal.example.org"]}],
        **door,
    }
    assert "rgt_" not in str(document)


def test_without_a_portal_it_watches_itself() -> None:
    document = config()
    assert list(jobs(document)) == ["prometheus"]
    assert document["alerting"] == {"alertmanagers": []}


def test_what_is_asked_is_asked_every_fifteen_seconds() -> None:
    told = config(prometheus_external_labels={"site": "{{ here }}"}, prometheus_alertmanagers=["127.0.0.1:9093"])
    assert told["global"]["scrape_interval"] == told["global"]["evaluation_interval"] == "15s"
    assert told["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["127.0.0.1:9093"]}]}]
    assert told["rule_files"] == [
        "/etc/prometheus/rules/*.rules.yml",
        "/etc/prometheus/rules-of-the-portal/*.rules.yml",
    ]


def test_alerts_leave_without_the_labels_of_the_server() -> None:
    """What the portal raises by itself has none of them, and labels are what an alert is known by."""
    told = config(prometheus_external_labels={"site": "here", "az": "1"}, prometheus_alertmanagers=["127.0.0.1:9093"])
    assert told["global"]["external_labels"] == {"site": "here", "az": "1"}
    assert told["alerting"]["alert_relabel_configs"] == [{"action": "labeldrop", "regex": "az|site"}]
    assert "alert_relabel_configs" not in config()["alerting"]


def test_every_distribution_has_a_prometheus_that_can_read_the_rules() -> None:
    """`keep_firing_for` came with 2.42; Ubuntu 22.04 has 2.31, which refuses the whole file."""
    assert "keep_firing_for" in (ROLES / "prometheus" / "files" / "remotegpu.alerting.rules.yml").read_text()
    told = (ROLES / "prometheus" / "vars" / "Debian.yml").read_text()
    versions = {f"{name}_{major}": minor for minor, name, major in re.findall(r"2\.(\d+) on (\w+) (\d+)", told)}
    assert set(evaluate("{{ __prometheus_supported }}", "prometheus", "trixie")) == set(versions)
    assert min(int(minor) for minor in versions.values()) >= 42


def test_no_label_of_the_server_may_be_one_by_which_alerts_are_told_apart() -> None:
    rules = (ROLES / "prometheus" / "files" / "remotegpu.alerting.rules.yml").read_text()
    named = {label for labels in re.findall(r"\bby \(([^)]+)\)", rules) for label in labels.split(", ")}
    needed = {*named - {"UUID"}, "alertname", "severity", "instance", "machine", "job"}
    assert set(evaluate("{{ __prometheus_alert_labels }}", "prometheus", "trixie")) == needed


@pytest.mark.parametrize(
    ("labels", "is_taken"),
    [({"site": "here"}, True), ({}, True), ({"host": "x"}, False), ({"severity": "x"}, False), ({"a|b": "x"}, False)],
)
def test_a_label_that_alerts_need_is_refused(labels: dict[str, str], is_taken: bool) -> None:
    tasks = yaml.safe_load((ROLES / "prometheus" / "tasks" / "assert.yml").read_text())
    (task,) = [task for task in tasks if "labels" in task["name"]]
    held = [
        evaluate("{{ " + each + " }}", "prometheus", "trixie", prometheus_external_labels=labels)
        for each in task["ansible.builtin.assert"]["that"]
    ]
    assert all(held) is is_taken


@pytest.mark.parametrize(
    ("interval_s", "scale", "is_taken"), [(15, 1, True), (60, 1, True), (61, 1, False), (100, 0.01, True)]
)
def test_an_interval_at_which_the_rules_would_see_one_scrape_is_refused(
    interval_s: int, scale: float, is_taken: bool
) -> None:
    """They look back for two minutes: past one scrape that failed there is another in them."""
    tasks = yaml.safe_load((ROLES / "prometheus" / "tasks" / "assert.yml").read_text())
    (task,) = [task for task in tasks if "times" in task["name"]]
    held = [
        evaluate(
            "{{ " + each + " }}", "prometheus", "trixie",
            prometheus_scrape_interval_s=interval_s, prometheus_time_scale=scale,
        )
        for each in task["ansible.builtin.assert"]["that"]
        if "scrape" in each
    ]  # fmt: skip
    assert all(held) is is_taken


def test_every_rule_file_of_the_role_is_installed() -> None:
    there = sorted(path.name for path in (ROLES / "prometheus" / "files").glob("*.rules.yml"))
    taken = [Path(path).name for path in evaluate("{{ __prometheus_rules }}", "prometheus", "trixie")]
    assert taken == there


@pytest.mark.parametrize(("factor", "last_word"), [(0.02, "15s"), (0.5, "60s")])
def test_the_patience_of_every_alert_is_scaled_and_nothing_else(factor: float, last_word: str) -> None:
    changed = [
        (old.strip(), new.strip())
        for old, new in zip(RULES.splitlines(), prometheus_scale_for(RULES, factor).splitlines(), strict=True)
        if old != new
    ]
    looks_back = 'expr: count(up[5m:]) > last_over_time(up{job=~"a|b"}[2m]) + last_over_time(up[1h])'
    assert changed == [
        ("for: 5m", f"for: {300 * factor:g}s"),
        ('keep_firing_for: "1h30m" # flaps', f"keep_firing_for: {5400 * factor:g}s # flaps"),
        (looks_back, looks_back.replace("2m", last_word, 1)),
    ]


def test_the_delivered_rules_are_scaled_wherever_they_wait_for_the_last_word() -> None:
    text = prometheus_scale_for((ROLES / "prometheus/files/remotegpu.alerting.rules.yml").read_text(), 0.02)
    assert text.count("[15s]") > 50
    assert not re.search(r"(last|max)_over_time\([^)]*\[2m", text)


def test_a_scale_of_one_changes_no_byte() -> None:
    assert prometheus_scale_for(RULES, 1) is RULES


@pytest.mark.parametrize(
    ("duration", "factor", "expected"),
    [
        ("5m", 0.02, "6s"),
        ("1d", 0.0001, "8640ms"),
        ("0", 3, "0s"),
        ("0s", 3, "0s"),
        ("90s", 2, "180s"),
        ("5m", 0, "0s"),
    ],
)
def test_durations_are_scaled_to_the_millisecond(duration: str, factor: float, expected: str) -> None:
    assert scale(duration, factor) == expected


@pytest.mark.parametrize("duration", ["5", "m", "5 m", "-5m", "5m3"])
def test_a_duration_that_is_none_is_refused(duration: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        scale(duration, 2)


@pytest.mark.parametrize("factor", [0, -1, float("nan")])
def test_a_scale_that_is_none_is_refused(factor: float) -> None:
    for scaled in (lambda: prometheus_scale_for(RULES, factor), lambda: prometheus_seconds(15, factor)):
        with pytest.raises(ValueError, match="above 0"):
            scaled()


def test_one_variable_scales_all_that_the_server_waits_for() -> None:
    told = config(prometheus_time_scale=0.1, prometheus_portal_url="http://127.0.0.1:8081")
    assert told["global"] == {
        "scrape_interval": "1500ms",
        "scrape_timeout": "1s",
        "evaluation_interval": "1500ms",
        "external_labels": {},
    }
    assert jobs(told)["hosts"]["http_sd_configs"][0]["refresh_interval"] == "6s"
    assert "OnUnitInactiveSec=6s\n" in render(
        "prometheus", "remotegpu-prometheus-rules.timer.j2", "trixie", prometheus_time_scale=0.1
    )
    line = render("prometheus", "default.j2", "trixie", prometheus_time_scale=0.1).splitlines()[-1]
    assert "--rules.alert.resend-delay=6s" in line


def test_on_a_site_every_alert_waits_as_long_as_promtools_tests_say() -> None:
    """They read the very files that are installed, and without a word of the site's nothing is scaled."""
    assert evaluate("{{ prometheus_time_scale }}", "prometheus", "trixie") == 1
    delivered = {path.resolve() for path in (ROLES / "prometheus" / "files").glob("*.rules.yml")}
    tests = sorted((ROLES.parent / "tests" / "roles" / "rules").glob("*.yml"))
    read = {(test.parent / file).resolve() for test in tests for file in yaml.safe_load(test.read_text())["rule_files"]}
    assert tests
    assert read <= delivered
    for path in delivered:
        assert prometheus_scale_for(path.read_text(), 1) == path.read_text()
