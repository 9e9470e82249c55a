"""No limit and no time of a delivered alert can be a little off without a promtool test that fails.

Each is made a little less and a little more, in a rule of its own beside those that are right, and that rule is asked
what the tests ask of the alert that it was made of. Where it answers all the same, no test holds the limit.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "roles" / "prometheus" / "files" / "remotegpu.alerting.rules.yml"
TESTS = sorted((ROOT / "tests" / "roles" / "rules").glob("*.yml"))
QUOTED = re.compile(r'"[^"]*"')
COMPARISON = re.compile(r"[=!]=|[<>]=?")
LIMIT = re.compile(r"(==|[<>]=?) (\d+(?: ?[*/^] ?\d+)*)")  # no longer one that is compared with a series
TIMES = ("for", "keep_firing_for")
UNITS_S = {"s": 1, "m": 60, "h": 3600}
ASKED = re.compile(r"alertname: \w+ if (.+), time: ")

Rule = dict[str, Any]


def test_a_limit_or_a_time_that_is_a_little_off_is_seen(tmp_path: Path) -> None:
    unseen = {what for rule in every_rule() for what, _ in a_little_off(rule, step_s=1)}
    assert len(unseen) > 150
    for file in TESTS:
        told = yaml.load(file.read_text(), yaml.CSafeLoader)
        for test in told["tests"]:  # what one has shown no other need show
            unseen -= shown_by(test, unseen, tmp_path, step_s=seconds(told["evaluation_interval"]))
    assert unseen == set()


def test_every_limit_is_a_number_right_of_its_comparison() -> None:
    """As it is looked for here."""
    for rule in every_rule():
        expr = QUOTED.sub("", rule["expr"])
        assert len(COMPARISON.findall(expr)) == len(LIMIT.findall(expr)), rule


@cache
def every_rule() -> list[Rule]:
    return [rule for group in yaml.load(RULES.read_text(), yaml.CSafeLoader)["groups"] for rule in group["rules"]]


def a_little_off(rule: Rule, *, step_s: int) -> Iterator[tuple[str, Rule]]:
    """(what is off, the rule so). A time is by one evaluation, which is `step_s`."""
    name = rule.get("alert") or rule["record"]
    for number, found in enumerate(LIMIT.finditer(rule["expr"])):
        for other in others(*found.groups()):
            expr = f"{rule['expr'][: found.start()]}{other}{rule['expr'][found.end() :]}"
            yield f"limit {number} of {name}, {found[0]}, were {other}", {**rule, "expr": expr}
    for time in TIMES:
        for way, by_s in (("shorter", -step_s), ("longer", step_s)):
            if time in rule and (off_s := seconds(rule[time]) + by_s) >= 0:
                yield f"{time} of {name} were {way}", {**rule, time: f"{off_s}s"}


def others(how: str, limit: str) -> tuple[str, ...]:
    """One unit beside 0, which counts or says yes and no, and half a percent beside any other."""
    if how == "==":
        return (f"{how} {limit} + 0.5",)
    return (f"{how} -1", f"{how} 1") if limit == "0" else (f"{how} {limit} * 0.995", f"{how} {limit} * 1.005")


def seconds(text: str) -> int:
    return sum(int(number) * UNITS_S[unit] for number, unit in re.findall(r"(\d+)([smh])", text))


def shown_by(test: dict[str, Any], unseen: set[str], folder: Path, *, step_s: int) -> set[str]:
    """What of it this test shows."""
    asked = {check["alertname"] for check in test["alert_rule_test"]}
    rules = list(beside(asked, unseen, step_s=step_s))
    checks = [
        {**check, "alertname": rule["alert"]}
        for rule in rules
        for check in test["alert_rule_test"]
        if rule.get("alert", "").startswith(f"{check['alertname']} if ")
    ]
    if not checks:
        return set()
    (folder / "off.rules.yml").write_text(json.dumps({"groups": [{"name": "off", "rules": rules}]}))
    tests = [{**test, "alert_rule_test": checks}]
    told = {"rule_files": ["off.rules.yml"], "evaluation_interval": f"{step_s}s", "tests": tests}
    (folder / "off.yml").write_text(json.dumps(told))
    done = subprocess.run(
        ["promtool", "test", "rules", folder / "off.yml"], capture_output=True, text=True, timeout=300
    )
    return set(ASKED.findall(done.stderr + done.stdout))


def beside(asked: set[str], unseen: set[str], *, step_s: int) -> Iterator[Rule]:
    """The asked alerts, each once for everything that may be off of it or of what it rests on; what is recorded comes
    before those who ask for it."""
    alerts = [rule for rule in every_rule() if rule.get("alert") in asked]
    for rule in every_rule():
        resting = [alert for alert in alerts if rule.get("record", "no record") in alert["expr"]]
        if resting:
            yield rule
        for number, (what, off) in enumerate(a_little_off(rule, step_s=step_s)):
            if what in unseen and rule in alerts:
                yield {**off, "alert": f"{rule['alert']} if {what}"}
            elif what in unseen and resting:
                recorded = f"{rule['record']}_{number}"
                yield {**off, "record": recorded}
                for alert in resting:
                    expr = alert["expr"].replace(rule["record"], recorded)
                    yield {**alert, "alert": f"{alert['alert']} if {what}", "expr": expr}
