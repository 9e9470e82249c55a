"""How cards are divided at every boot: the program over the fake nvidia-smi, and the unit's place in the boot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts.gpu import Scenario
from tests.roles.rendering import load_file
from tests.support.rendering import DISTRIBUTIONS, evaluate, render
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
# One that hangs is left behind on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
PROGRAM = ROOT / "roles" / "nvidia_driver" / "files" / "mig.py"
GPU_DIR = ROOT / "molecule" / "image" / "gpu"
CARDS = Scenario.two_h100(seed="mig")
FIRST, SECOND = CARDS.uuids
ON = {"mig_mode_current": "1", "mig_mode_pending": "1"}
DIVIDED = CARDS.having("gpu0", **ON).having("gpu1", **ON)


class Machine:
    """A machine with fake cards, from one boot to the next."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._scenario, self._instances = folder / "scenario.ini", folder / "instances"
        self._environment = {
            "PATH": "/usr/bin:/bin",
            "LD_LIBRARY_PATH": str(library),
            "FAKE_GPU_SCENARIO": str(self._scenario),
            "FAKE_GPU_INSTANCES": str(self._instances),
        }
        self._smi = folder / "nvidia-smi"
        self._smi.write_text(f'#!/bin/sh\nexec {sys.executable} {GPU_DIR / "nvidia_smi.py"} "$@"\n')
        self._smi.chmod(0o755)

    def show(self, scenario: Scenario) -> None:
        scenario.write(self._scenario)

    def boot(self) -> None:
        for file in self._instances.iterdir():
            file.unlink()

    def smi(self, *arguments: str) -> str:
        return subprocess.run([self._smi, *arguments], env=self._environment, capture_output=True, text=True).stdout

    def divide(self, *layout: str) -> tuple[int, str, str]:
        asked = self._smi.with_name("asked.json")
        argv = [sys.executable, "-I", str(PROGRAM), f"--nvidia-smi={self._smi}", f"--asked={asked}", *layout]
        done = subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    @property
    def devices(self) -> list[str]:
        """As `nvidia-smi -L` lists them, without the cards themselves."""
        return [line.split()[1] for line in self.smi("-L").splitlines() if line.startswith("  MIG")]


@pytest.fixture
def machine(tmp_path: Path, libraries: Path) -> Machine:
    made = Machine(tmp_path, libraries / "current")
    made.show(DIVIDED)
    return made


LAYOUT = (f"{FIRST}=3g.40gb,3g.40gb", f"{SECOND}=7g.80gb")


def test_instances_are_there_after_every_boot(machine: Machine) -> None:
    assert machine.divide(*LAYOUT) == (
        0,
        f"{FIRST} was divided into 3g.40gb, 3g.40gb\n{SECOND} was divided into 7g.80gb\n",
        "",
    )
    assert machine.devices == ["3g.40gb", "3g.40gb", "7g.80gb"]
    machine.boot()
    assert machine.devices == [], "they do not survive it"
    machine.divide(*LAYOUT)
    assert machine.devices == ["3g.40gb", "3g.40gb", "7g.80gb"]


def test_what_is_there_already_is_not_made_again(machine: Machine) -> None:
    machine.divide(*LAYOUT)
    status, said, _ = machine.divide(*LAYOUT)
    assert (status, said.splitlines()[0]) == (0, f"{FIRST} is divided into 3g.40gb, 3g.40gb")
    assert machine.devices == ["3g.40gb", "3g.40gb", "7g.80gb"]


def test_a_card_that_is_divided_otherwise_is_left_to_whoever_uses_it(machine: Machine) -> None:
    machine.divide(f"{FIRST}=1g.10gb,1g.10gb")
    status, said, wrong = machine.divide(*LAYOUT)
    assert status == 1
    assert "is divided into 1g.10gb, 1g.10gb, not into 3g.40gb, 3g.40gb" in wrong
    assert f"nvidia-smi mig -i {FIRST} -dci && nvidia-smi mig -i {FIRST} -dgi" in wrong
    assert said == f"{SECOND} was divided into 7g.80gb\n", "the other one is as it should be"
    assert machine.devices == ["1g.10gb", "1g.10gb", "7g.80gb"]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        (CARDS, f"its MIG mode is off: while nobody uses it, nvidia-smi -i {FIRST} -mig 1"),
        (CARDS.having("gpu0", mig_mode_pending="1"), "its MIG mode is off (it is to be on after the GPU's next reset)"),
        (CARDS.lacking("gpu0", "mig_mode_current", "mig_mode_pending"), "its MIG mode is off"),
        (DIVIDED.mismatch(), "Failed to initialize NVML: Driver/library version mismatch"),
        (DIVIDED.lost(0), "Problem with GPU 0: GPU is lost."),
        (Scenario.two_h100(seed="other cards"), "No devices were found"),
    ],
)
def test_a_card_that_cannot_be_divided_is_named_with_the_reason(
    machine: Machine, scenario: Scenario, words: str
) -> None:
    machine.show(scenario)
    status, said, wrong = machine.divide(LAYOUT[0])
    assert (status, said) == (1, "")
    assert wrong.startswith(f"{FIRST} is not divided as it should be: ")
    assert words in wrong


def test_more_than_a_card_has_is_refused_in_the_drivers_words(machine: Machine) -> None:
    status, _, wrong = machine.divide(f"{FIRST}=4g.40gb,4g.40gb")
    assert status == 1
    assert "Unable to create a GPU instance on GPU  0 using profile 5: Insufficient Resources" in wrong
    assert "Successfully" not in wrong


def test_one_nvidia_smi_that_hangs_is_left_alone_and_no_other_started_beside_it(
    hangs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mig = load_file(PROGRAM, "mig")
    monkeypatch.setattr(mig, "TIMEOUT_S", 1.0)
    program, calls = tmp_path / "nvidia-smi", tmp_path / "calls"
    program.write_text(hangs.format(calls=calls))
    program.chmod(0o755)
    argv = [f"--nvidia-smi={program}", f"--asked={tmp_path}/asked.json", *LAYOUT]
    try:
        assert mig.main(argv) == 1
        assert mig.main(argv) == 1
        (pid,) = until(lambda: find_text(calls), "the program to say who it is").split()
        os.kill(int(pid), 0)  # it was not killed either
        first, *others = capfd.readouterr().err.splitlines()
        assert first.endswith("nvidia-smi did not answer within 1 s: the driver hangs, reboot")
        assert [line.partition(": ")[2] for line in others] == [
            f"nvidia-smi (process {pid}) has not answered yet: the driver hangs, reboot"
        ] * 3
    finally:
        for each in find_text(calls).split():
            os.kill(int(each), signal.SIGKILL)
    program.write_text(f"#!/bin/sh\necho again >>{calls}\nexit 9\n")
    until(lambda: mig.main(argv) and "again" in find_text(calls), "the next to be asked, now that it is gone")


def find_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# -- the unit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_the_unit_runs_before_whoever_looks_at_the_cards(suite: str) -> None:
    text = render(
        "nvidia_driver", "mig.service.j2", suite, ansible_managed="managed", nvidia_driver_mig={FIRST: ["7g.80gb"]}
    )
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith(("#", " ")))
    assert {
        "docker.service",
        "nvidia-cdi-refresh.service",
        "remotegpu-agent.service",
        "nvidia-gpu-exporter.service",
    } == set(settings["Before"].split())
    assert {"nvidia-persistenced.service", "nvidia-fabricmanager.service"} == set(settings["After"].split())
    assert f"\n    {FIRST}=7g.80gb\n" in text
    assert (settings["KillMode"], settings["SendSIGKILL"]) == ("process", "no"), (
        "what hangs in the driver is not killed"
    )
    assert f"--asked=/run/{settings['RuntimeDirectory']}/" in text
    assert settings["RuntimeDirectoryPreserve"] == "yes"


@pytest.mark.parametrize(
    ("mig", "is_one"),
    [
        ({FIRST: ["3g.40gb", "3g.40gb"]}, True),
        ({FIRST: ["1g.10gb+me", "7g.80gb"]}, True),
        ({}, True),
        ({"0": ["3g.40gb"]}, False),
        ({FIRST: []}, False),
        ({FIRST: ["3g.40gb; reboot"]}, False),
        ({f"{FIRST} -x": ["3g.40gb"]}, False),
    ],
)
def test_a_division_that_is_none_is_refused(mig: dict[str, list[str]], is_one: bool) -> None:
    conditions = asserted("assert.yml", "Refuse a division that is none")
    said = [evaluate("{{ " + each + " }}", "nvidia_driver", "noble", nvidia_driver_mig=mig) for each in conditions]
    assert all(said) == is_one


@pytest.mark.parametrize(
    ("mig", "changes", "is_there", "allowed", "passes"),
    [
        ({FIRST: ["7g.80gb"]}, True, False, False, False),
        ({FIRST: ["7g.80gb"]}, True, True, True, True),
        ({FIRST: ["7g.80gb"]}, False, True, False, True),
        ({}, None, True, False, False),
        ({}, None, True, True, True),
        ({}, None, False, False, True),
    ],
)
def test_nothing_is_divided_otherwise_under_a_lease(
    mig: dict[str, list[str]], changes: bool | None, is_there: bool, allowed: bool, passes: bool
) -> None:
    condition = asserted("mig_ask.yml", "Refuse to divide cards, or to reload systemd, under a lease")
    said = evaluate(
        "{{ " + str(condition) + " }}",
        "nvidia_driver",
        "noble",
        nvidia_driver_mig=mig,
        nvidia_driver_disruption_allowed=allowed,
        __nvidia_driver_mig_there={"stat": {"exists": is_there}},
        __nvidia_driver_mig_change={"skipped": True, "changed": False} if changes is None else {"changed": changes},
    )
    assert bool(said) == passes


def asserted(file: str, name: str) -> Any:
    """What a task of the role asserts."""
    tasks = yaml.safe_load((ROOT / "roles" / "nvidia_driver" / "tasks" / file).read_text())
    (task,) = (task for task in tasks if task["name"] == name)
    return task["ansible.builtin.assert"]["that"]
