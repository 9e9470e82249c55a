"""The watch over a library that is upgraded, taken away, or tells of XIDs: the fake one of the test hosts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import facts
from remotegpu_agent import gpu as gpu_module
from remotegpu_agent.gpu import GpuProbe
from tests.hosts.gpu import Scenario
from tests.support.real_card import started_probe
from tests.support.waiting import until
from tests.unit.agent.test_protocol import conforms


@dataclass
class Card:
    """Two GPUs of a fake driver, and the agent's own watch over them; each start of it is one of the agent."""

    folder: Path
    built: Path
    probes: list[GpuProbe] = field(default_factory=list)
    well: Scenario = field(default_factory=Scenario.two_h100)

    @property
    def xids_file(self) -> Path:
        return self.folder / "xids.json"

    def upgrade(self) -> None:
        """A new file in the old one's place, as packages do it."""
        shutil.copy(self.built, self.folder / "new")
        (self.folder / "new").rename(self.folder / "libnvidia-ml.so.1")

    def show(self, scenario: Scenario) -> None:
        scenario.write(self.folder / "scenario.ini")

    def restart_agent(self) -> None:
        for probe in self.probes:
            probe.stop()
        environment = [f"LD_LIBRARY_PATH={self.folder}", f"FAKE_GPU_SCENARIO={self.folder / 'scenario.ini'}"]
        self.probes.append(started_probe("env", *environment, deadline_s=10, xids_file=self.xids_file))

    def child(self) -> subprocess.Popen[bytes]:
        child = self.probes[-1]._child
        assert child is not None
        return child

    def report(self) -> dict[str, Any]:
        report = self.probes[-1].report()
        conforms("gpu_report", report)
        return report

    def look(self) -> dict[str, Any]:
        self.probes[-1].ask(wait_s=20)
        return self.report()

    def xids(self) -> list[list[int]]:
        """What is told of each GPU at the next look."""
        return xids_in(self.look())


def xids_in(report: dict[str, Any]) -> list[list[int]]:
    return [[each["xid"] for each in gpu["xids"]] for gpu in report["gpus"]]


@pytest.fixture
def card(tmp_path: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    monkeypatch.setattr(facts, "DRIVER", "/nonexistent")  # what this machine has besides is not asked
    made = Card(tmp_path, libraries / "current" / "libnvidia-ml.so.1")
    made.upgrade()
    made.show(made.well)
    made.restart_agent()
    assert made.look()["state"] == "ok"
    yield made
    made.probes[-1].stop()


def test_a_driver_that_is_upgraded_under_a_running_agent_is_told_at_the_next_look(card: Card) -> None:
    card.show(card.well.mismatch())
    assert card.look()["state"] == "ok", "who has the old library open goes on"
    card.upgrade()
    for _ in range(2):
        report = card.look()
        assert (report["state"], report["gpus"]) == ("mismatch", []), "everybody new is refused"
    card.show(card.well)
    assert card.look()["state"] == "ok"


def test_a_library_that_was_installed_again_is_loaded_again_and_costs_no_sample(card: Card) -> None:
    card.look()
    first = card.child()
    card.look()
    assert card.child() is first
    card.upgrade()
    assert card.look()["state"] == "ok"
    second = card.child()
    assert first.wait(5) is not None
    card.look()
    assert card.child() is second


def test_a_library_that_is_taken_away_is_missed(card: Card) -> None:
    (card.folder / "libnvidia-ml.so.1").unlink()
    (card.folder / "libnvidia-ml.so.1").touch()  # none, also where this machine has one
    assert card.look()["state"] == "no_library"
    card.upgrade()
    assert card.look()["state"] == "ok"


def test_an_xid_is_remembered_whoever_has_heard_it(card: Card) -> None:
    card.show(card.well.xid(1, 48))
    assert card.xids() == [[], [48]]
    told = card.report()["gpus"][1]["xids"]
    card.child().terminate()
    until(lambda: card.child().poll() is not None, "the process that heard it to be gone")
    assert card.xids() == [[], [48]], "the driver tells the next one nothing of it"
    card.restart_agent()
    assert card.xids() == [[], [48]]
    assert card.report()["gpus"][1]["xids"] == told, "with its time"
    card.show(card.well.xid(1, 48).xid(1, 79))
    assert card.xids() == [[], [48, 79]]
    card.show(card.well.having("system", loaded="2"))
    assert card.xids() == [[], []], "the driver was loaded again"
    card.restart_agent()
    assert card.xids() == [[], []]


def test_an_xid_of_a_driver_that_then_hangs_is_told(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "PATIENCE_S", 2.0)
    monkeypatch.setattr(gpu_module, "GRACE_S", 0.2)
    card.show(card.well.xid(0, 119).hang(0))
    stale = card.look()
    assert "its process was ended" in stale["message"]
    assert (stale["state"], xids_in(stale)) == ("stale", [[119], []])
    card.show(card.well)
    assert card.look()["state"] == "ok"
    assert xids_in(card.report()) == [[119], []], "nobody has reset the card"
