"""The delivered alerts: promtool tests their real values, and each is told in words and rests on series that exist."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from portal.errors import Invalid
from portal.services import alerts_own, alerts_rules, alerts_samples, alerts_tenants, monitoring_samples
from portal.services.actors import SYSTEM
from portal.web import alerts_words
from tests.support.rendering import variables_of

ROOT = Path(__file__).parents[2]
RULES = ROOT / "roles" / "prometheus" / "files" / "remotegpu.alerting.rules.yml"
BY_PROGRAMS_OF_ROLES = ("postgresql/templates/backup.sh.j2", "harbor/files/robots.py")
TESTS = sorted((ROOT / "tests" / "roles" / "rules").glob("*.yml"))
EXPORTER = ROOT / "roles" / "nvidia_gpu_exporter" / "defaults" / "main.yml"
# How nvidia_gpu_exporter calls a field of nvidia-smi: by its unit. What it tells besides is of itself; of XIDs only its
# build with NVML tells, which the role does not install and a site may.
UNITS = {
    r"(utilization|fan)\.\w+": "_ratio",
    r"memory\.\w+": "_bytes",
    r"clocks\.current\.\w+": "_clock_hz",
    r"(enforced\.)?power\.\w+": "_watts",
}
OF_ITSELF = {"nvidia_smi_gpu_info", "nvidia_smi_command_exit_code", "nvidia_smi_last_collect_success"}
WITH_NVML = {"nvidia_smi_xid_last_timestamp_seconds"}
OF_SITES = {"DCGM_FI_DEV_XID_ERRORS", "probe_ssl_earliest_cert_expiry", "up"}
LOOKED_BACK_AT = re.compile(r"\b(?:(?:last|max)_over_time|rate)\([^()\[\]]+\[\w+\]\)")
METRIC = re.compile(r"\bremotegpu:\w+\b|\b(?:remotegpu|node|nvidia_smi|DCGM|probe)_\w+\b|\bup\b")


@cache
def every_rule() -> list[dict[str, Any]]:
    return rules_of(RULES)


def rules_of(file: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def rules() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in every_rule() if "alert" in rule}


def checks() -> list[tuple[str, bool]]:
    """(alert, whether it is expected to fire) for each check of each promtool test."""
    files = [yaml.safe_load(file.read_text()) for file in TESTS]
    told = [check for file in files for test in file["tests"] for check in test["alert_rule_test"]]
    return [(check["alertname"], bool(check["exp_alerts"])) for check in told]


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_shall_and_not_before(file: Path, tmp_path: Path) -> None:
    asked = one_test_a_file(yaml.safe_load(file.read_text()), tmp_path)
    done = subprocess.run(["promtool", "test", "rules", *asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SUCCESS") == len(asked)


def one_test_a_file(told: dict[str, Any], folder: Path) -> list[Path]:
    """Each test beside the rules that it asks of and what they rest on: the others would be reckoned through for
    nothing, nine tenths of the time."""
    files = []
    for number, test in enumerate(told["tests"]):
        asked = {check["alertname"] for check in test["alert_rule_test"]}
        assert asked <= rules().keys(), f"{test['name']}: there is no {asked - rules().keys()}"
        exprs = [rules()[name]["expr"] for name in asked]
        needed = [rule for rule in every_rule() if rule.get("alert") in asked or is_asked_for(rule, exprs)]
        (folder / f"{number}.rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": needed}]}))
        files.append(folder / f"{number}.yml")
        files[-1].write_text(yaml.safe_dump({**told, "rule_files": [f"{number}.rules.yml"], "tests": [test]}))
    return files


def is_asked_for(rule: dict[str, Any], exprs: list[str]) -> bool:
    return "record" in rule and any(rule["record"] in expr for expr in exprs)


def test_every_alert_is_seen_firing_and_seen_at_rest() -> None:
    seen = set(checks())
    assert {name for name in rules() if (name, True) not in seen} == set()
    assert {name for name in rules() if (name, False) not in seen} == set()


def test_every_alert_says_how_bad_it_is_what_is_wrong_and_the_way_out() -> None:
    for name, rule in rules().items():
        assert set(rule["labels"]) == {"severity"}, name
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), name
        assert set(rule["annotations"]) == {"summary", "way_out"}, name
        assert rule["annotations"]["summary"].endswith("."), name
        assert "{{" not in rule["annotations"]["way_out"], f"{name}: it is translated as it stands"


def of_exporters() -> set[str]:
    """The series of the exporters that the roles install, and of those that a site may have besides."""
    fields = yaml.safe_load(EXPORTER.read_text())["nvidia_gpu_exporter_fields"]
    of_node = re.findall(r"(?m)^node_\w+$", (ROOT / "tests" / "roles" / "rules" / "node_exporter.txt").read_text())
    return {*map(exported, fields), *of_node, *OF_ITSELF, *WITH_NVML, *OF_SITES}


def exported(field: str) -> str:
    unit = next((unit for fields, unit in UNITS.items() if re.fullmatch(fields, field)), "")
    return f"nvidia_smi_{field.replace('.', '_')}{unit}"


def test_every_series_that_an_alert_rests_on_is_made_by_somebody() -> None:
    ours = {*monitoring_samples.FAMILIES, *alerts_samples.FAMILIES, "remotegpu_http_requests_total"}
    for program in BY_PROGRAMS_OF_ROLES:
        ours.update(re.findall(r"remotegpu_\w+_seconds", (ROOT / "roles" / program).read_text()))
    recorded = {rule["record"] for rule in every_rule() if "record" in rule}
    asked = {metric for rule in every_rule() for metric in METRIC.findall(rule["expr"])} - recorded
    assert asked - ours - of_exporters() == set()
    assert len(asked) > 25


def test_of_a_host_nothing_is_taken_that_speaks_of_others() -> None:
    """Whoever is root there says at its exporters' ports what he likes; every other label than the host's is free."""
    theirs = re.compile(variables_of("prometheus", "trixie")["__prometheus_names_of_others"])
    asked = {metric for rule in every_rule() for metric in METRIC.findall(rule["expr"])}
    recorded = {rule["record"] for file in RULES.parent.glob("*.yml") for rule in rules_of(file) if "record" in rule}
    of_portal = {metric for metric in asked if metric.startswith("remotegpu")}
    assert len(of_portal) > 25
    for name in {*of_portal, *recorded, "up", "ALERTS", "ALERTS_FOR_STATE", "probe_ssl_earliest_cert_expiry"}:
        assert theirs.fullmatch(name), name
    for name in {*of_exporters() - {"up", "probe_ssl_earliest_cert_expiry"}, "go_goroutines", "smartmon_temperature"}:
        assert not theirs.fullmatch(name), name


@pytest.mark.parametrize("name", ["node_memory_MemAvailable", "nvidia_smi_temperature_gpu_celsius", "nvidia_smi_xid"])
def test_a_series_of_no_exporter_is_none(name: str) -> None:
    assert name not in of_exporters()


def test_every_class_of_xids_is_tried_with_what_the_agent_tells() -> None:
    """Its series are the ones that every host has; no exporter that the roles install tells of XIDs."""
    tests = yaml.safe_load((ROOT / "tests" / "roles" / "rules" / "xid.yml").read_text())["tests"]
    by_the_agent = [test for test in tests if all("remotegpu_" in each["series"] for each in test["input_series"])]
    fired = {check["alertname"] for test in by_the_agent for check in test["alert_rule_test"] if check["exp_alerts"]}
    assert fired == {name for name in rules() if name.startswith("GpuXid")}


def test_what_is_said_of_a_host_is_said_of_the_control_planes_own_too() -> None:
    """By the name of its job in the site's settings, and with the labels that say what it is to tell of."""
    given = yaml.safe_load((ROOT / "inventory" / "group_vars" / "control_plane.yml").read_text())
    (scraped,) = given["prometheus_scrape_configs_extra"]
    assert {"host", "dumps", "registry"} == set(scraped["static_configs"][0]["labels"])
    asked = [selector for rule in every_rule() for selector in re.findall(r"\bnode_\w+\{([^}]*)\}", rule["expr"])]
    assert len(asked) > 7
    assert {selector for selector in asked if f'job=~"node|{scraped["job_name"]}"' not in selector} == set()
    for name in ("MachineOffline", "BackupMissing", "HarborRobotsUnknown"):
        assert scraped["job_name"] in rules()[name]["expr"], name


def test_nothing_is_told_of_a_machine_in_maintenance() -> None:
    of_machines = [rule for rule in rules().values() if "host" in rule["expr"] and "backup" not in rule["expr"]]
    told_all_the_same = {rule["alert"] for rule in of_machines if "remotegpu_machine_maintenance" not in rule["expr"]}
    assert told_all_the_same == {"MachineQuarantined", "LeaseEnding", "GrantStillOpen"}
    guide = " ".join((ROOT / "docs" / "operator.md").read_text().split())
    (said,) = re.findall(r"Nothing is told of a machine in maintenance but ([^.]*)\.", guide)
    assert {word for word in re.findall(r"\w+", said) if word in rules()} == told_all_the_same, "as the guide says"


def test_a_scrape_that_fails_is_no_news() -> None:
    """With it the series of that target end. An alert that rests on one as it stands is over then, and fires anew."""
    for rule in every_rule():
        rest = LOOKED_BACK_AT.sub("", rule["expr"])
        bare = {metric for metric in METRIC.findall(rest) if metric.startswith("remotegpu_")}
        assert bare == set(), rule
        assert not re.search(r"up\{[^}]*\}\)? *== 1", rest), rule
        assert "remotegpu_machine_maintenance" not in rule["expr"] or "maintenance[1h]" in rule["expr"], rule


def test_what_the_portal_raises_by_itself_is_delivered_as_a_rule_with_the_same_severity() -> None:
    """The same name and severity on the same labels: one fingerprint, whoever raises it."""
    own = {name: severity for name, severity in alerts_own.NAMES.items() if name != "MonitoringSilent"}
    assert {name: rules()[name]["labels"]["severity"] for name in own} == own


def test_no_rule_of_ones_own_can_have_the_name_of_a_delivered_alert() -> None:
    """Else both would have one fingerprint on the same labels, and the end of one would be the end of the other."""
    assert {*rules(), "MonitoringSilent"} == alerts_own.DELIVERED
    for name in alerts_own.DELIVERED:
        with pytest.raises(Invalid) as refused:
            alerts_rules.create(name=name, by=SYSTEM)
        assert refused.value.fields["name"] == ["One of the delivered alerts has this name."], name


def test_what_customers_are_told_of_is_delivered() -> None:
    assert set(alerts_tenants.TOLD) <= set(rules())


def test_every_sentence_of_an_alert_is_in_the_catalogue_of_translations() -> None:
    said = {text for rule in rules().values() for text in rule["annotations"].values()}
    assert {with_placeholders(text) for text in said} == set(alerts_words.SENTENCES)


def with_placeholders(text: str) -> str:
    """As the catalogue has it: `{{ $labels.host }}` is %(host)s, a plain % is doubled."""
    pieces = re.split(r"\{\{ (.*?) \}\}", text)
    pieces[::2] = [piece.replace("%", "%%") for piece in pieces[::2]]
    pieces[1::2] = [f"%({re.findall(r'[a-z]+', piece.removeprefix('$labels.'))[0]})s" for piece in pieces[1::2]]
    return "".join(pieces)
