"""The comparison of tests/gpu, tried with fake cards: it finds nothing where all is the same, and every difference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.gpu import Scenario
from tests.support.gpu_quirks import TOTAL, busy
from tests.support.real_card import MIB, MOVING, SAME, Look, ask_nvidia_smi, ask_the_agent, differences

GPU_DIR = Path(__file__).parents[2] / "molecule" / "image" / "gpu"
Compare = Callable[..., list[str]]


@pytest.fixture
def compare(libraries: Path, tmp_path: Path) -> Compare:
    """What differs between the agent under one scenario and nvidia-smi under others."""
    file = tmp_path / "scenario.ini"
    with_fakes = ("env", f"LD_LIBRARY_PATH={libraries / 'current'}", f"FAKE_GPU_SCENARIO={file}")

    def smi(scenario: Scenario) -> Look:
        scenario.write(file)
        return ask_nvidia_smi(*with_fakes, sys.executable, str(GPU_DIR / "nvidia_smi.py"))

    def of(agents: Scenario, before: Scenario, after: Scenario | None = None) -> list[str]:
        looks = smi(before), smi(after or before)
        agents.write(file)
        return differences(ask_the_agent(*with_fakes), *looks)

    return of


CARDS = busy("cards")


def test_nothing_differs_where_all_is_the_same(compare: Compare) -> None:
    lacking = CARDS.lacking("gpu0", "serial", "power_draw_mw", "temperature_gpu").having("gpu1", mig_mode_current="1")
    lacking = lacking.lacking("gpu1", "utilization_gpu", "utilization_memory")
    for scenario in (CARDS, lacking):
        assert compare(scenario, scenario) == []


def test_what_moves_may_lie_between(compare: Compare) -> None:
    cold, hot = (CARDS.having("gpu0", temperature_gpu=value, power_draw_mw=value + "000") for value in ("40", "600"))
    assert compare(CARDS.having("gpu0", temperature_gpu="99", power_draw_mw="400000"), cold, hot) == []


DIFFERENT: dict[str, dict[str, str]] = {
    "name": {"name": "NVIDIA H200"},
    "serial": {"serial": "1"},
    "pci.bus_id": {"pci_bus_id": "00000000:19:00.0"},
    "memory.total": {"memory_total": str(TOTAL + MIB)},
    "enforced.power.limit": {"enforced_power_limit_mw": "699990"},
    "ecc.errors.uncorrected.volatile.total": {"ecc_uncorrected_volatile": "1"},
    "mig.mode.current": {"mig_mode_current": "1"},
    "memory.used": {"memory_used": "0"},
    "memory.reserved": {"memory_reserved": str(700 * MIB)},
    "temperature.gpu": {"temperature_gpu": "70"},
    "power.draw": {"power_draw_mw": "69000"},
    "utilization.gpu": {"utilization_gpu": "!UNKNOWN"},
    "utilization.memory": {"utilization_memory": "!UNKNOWN"},
}


@pytest.mark.parametrize("field", [*SAME, *MOVING])
def test_every_difference_is_found(compare: Compare, field: str) -> None:
    found = compare(CARDS, CARDS.having("gpu1", **DIFFERENT[field]))
    assert [each.split(" is ")[0] for each in found] == [f"{CARDS.uuids[1]}: {field}"]


@pytest.mark.parametrize(
    ("agents", "words"),
    [
        (CARDS.without_driver(), "the agent says driver_not_loaded"),
        (CARDS.having("system", driver_version="1"), "the driver is 570.133.20, the agent says 1"),
        (Scenario.two_h100(seed="others"), "nvidia-smi has"),
    ],
)
def test_another_driver_or_other_cards_are_found(compare: Compare, agents: Scenario, words: str) -> None:
    assert compare(agents, CARDS)[0].startswith(words)


def test_a_process_that_the_agent_does_not_see_is_found(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Any = lambda pid: pid == 4711  # noqa: E731 - it holds a card open, as nothing here can
    monkeypatch.setattr("tests.support.real_card.holds_gpu", seen)
    computing = CARDS.having("gpu0", compute_processes="4711:1024 4712:1024")
    assert compare(CARDS, computing) == [f"{CARDS.uuids[0]}: processes [4711] compute on it, and the agent has []"]
