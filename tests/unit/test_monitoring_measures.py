"""Measures are PromQL that holds what it is given, and the recording rules are written from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from portal.services.alerts_rules import METRICS
from portal.services.monitoring_measures import MEASURES, Measure, matching, rules_file

RULES = Path(__file__).parents[2] / "roles" / "prometheus" / "files" / "remotegpu.recording.rules.yml"


def test_the_rules_of_the_role_are_those_of_the_charts() -> None:
    assert RULES.read_text() == rules_file(), "see the head of the file for how it is written"


def test_each_measure_is_recorded_of_each_line_and_of_the_fleet() -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    records = [rule["record"] for group in groups for rule in group["rules"]]
    assert len(records) == len(set(records)) == 2 * len(MEASURES)
    assert {group["interval"] for group in groups} == {"300s"}
    for measure in MEASURES.values():
        assert {measure.record, measure.fleet_record} <= set(records)


def test_what_is_asked_for_is_what_is_measured() -> None:
    assert set(MEASURES) == {"utilization", "memory", "temperature", "power", "clock", "slowdown", "ecc", "cpu",
                             "host_memory", "network", "disk"}  # fmt: skip


@pytest.mark.parametrize("measure", MEASURES.values(), ids=list(MEASURES))
def test_every_part_of_an_expression_is_about_the_one_host(measure: Measure) -> None:
    """A selector without the matcher would draw other hosts into the chart."""
    asked = measure.raw({"host": "gpu-1"}, 90)
    assert asked.count("{") == asked.count('host="gpu-1"}') > 0
    assert asked.count("[90s]") == asked.count("{")
    assert 'host="gpu-1"' in measure.recorded({"host": "gpu-1"}, 90)
    assert re.findall(r"<\w>", asked) == [], "no placeholder is left"


def test_the_control_planes_own_machine_is_no_part_of_the_fleet() -> None:
    """It has a node_exporter with a `host` as well, and another job."""
    asked = [
        selector
        for measure in MEASURES.values()
        for selector in re.findall(r"\bnode_\w+\{([^}]*)\}", measure.raw({}, 90))
    ]
    assert len(asked) == 7, "processors, memory (2), network (2), disks (2)"
    assert {selector for selector in asked if 'job="node"' not in selector.split(",")} == set()


def test_a_name_cannot_end_its_own_matcher() -> None:
    assert matching({"uuid": 'x"} or vector(1) #\\'}) == 'uuid="x\\"} or vector(1) #\\\\"'


def test_old_and_new_names_of_a_driver_stand_side_by_side() -> None:
    asked = MEASURES["slowdown"].raw({}, 90)
    assert "nvidia_smi_clocks_event_reasons_hw_slowdown" in asked
    assert "nvidia_smi_clocks_throttle_reasons_hw_slowdown" in asked
    assert "nvidia_smi_power_draw_instant_watts" in MEASURES["power"].raw({}, 90)


def test_a_mounted_image_that_is_always_full_is_no_disk_in_a_chart_or_a_rule() -> None:
    for expression in (MEASURES["disk"].raw({}, 90), METRICS["disk_percent"].expression):
        (kinds,) = set(re.findall(r'fstype!~"([^"]+)"', expression))
        told = [each for each in ("iso9660", "squashfs", "ext4", "xfs") if not re.fullmatch(kinds, each)]
        assert told == ["ext4", "xfs"]
