"""What `make test` says when it closes: every lane that ran, and the one that could not."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import lanes
from tests.lanes import FAST, Result


def closing(capsys: pytest.CaptureFixture[str], without_cards: str | None) -> list[str]:
    code = lanes.report([Result(FAST, 0.1, 0, {"tests": 3})], 6.0, without_cards=without_cards)
    assert code == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of programs that is the whole PATH of somebody who is not root; apt and docker answer yes."""
    for name in ("docker", "apt-cache"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return tmp_path


@pytest.mark.parametrize("what", ["may", "test"])
@pytest.mark.parametrize(("known", "chosen"), [("freerdp2-x11", "freerdp2-x11"), ("other", "freerdp3-x11")])
def test_who_may_not_install_packages_is_told_before_anything_is_set_up_by_a_line_that_can_be_pasted(
    bare: Path, monkeypatch: pytest.MonkeyPatch, what: str, known: str, chosen: str
) -> None:
    (bare / "apt-cache").write_text(f'#!/bin/sh\ntest "$1 $2" = "show {known}"\n')
    monkeypatch.setattr(lanes, "PACKAGES", {"there": "docker", "freerdp2-x11|freerdp3-x11": "rdp2|rdp3", "xvfb": "X"})
    with pytest.raises(SystemExit) as refused:
        lanes.main([what])
    assert str(refused.value) == f"make test needs these packages: sudo apt-get install {chosen} xvfb"


def test_who_has_them_may_run_them_and_nothing_is_installed(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "rdp3").touch(mode=0o755)
    monkeypatch.setattr(lanes, "PACKAGES", {"there": "docker", "freerdp2-x11|freerdp3-x11": "rdp2|rdp3"})
    assert lanes.main(["may"]) == 0


def test_a_program_that_only_root_has_on_the_path_is_there(bare: Path) -> None:
    assert lanes.is_there("nologin"), "in /usr/sbin on every Debian"
    assert lanes.is_there("docker")
    assert not lanes.is_there("no-such-program")


def test_a_machine_without_a_card_is_told_of_and_counted_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    told = closing(capsys, "this machine has no card")
    assert [line.split() for line in told if line.startswith("gpu")] == [
        ["gpu", "–", "did", "not", "run:", "this", "machine", "has", "no", "card"]
    ]
    assert told[-1] == "3 passed, 0 failed, 0 skipped"


def test_a_machine_with_one_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any("did not run" in line for line in closing(capsys, None))


@pytest.mark.parametrize(
    ("has_card", "has_program", "words"),
    [(False, True, "has no NVIDIA card"), (True, False, "no nvidia-smi"), (True, True, None)],
)
def test_a_card_can_be_read_where_device_and_program_are(
    monkeypatch: pytest.MonkeyPatch, has_card: bool, has_program: bool, words: str | None
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" and has_card)
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/nvidia-smi" if has_program else None)
    why = lanes.why_without_cards()
    assert (words is None and why is None) or (words is not None and why is not None and words in why)


@pytest.mark.parametrize("there", [True, False])
def test_a_machine_without_pulumis_engine_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/pulumi" if there else None)
    lanes.report([Result(FAST, 0.1, 0, {"tests": 3})] * 2, 6.0)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("network-engine")]
    assert told == ([] if there else ["network-engine         –  did not run: `pulumi` is not on the PATH"])
    assert (lanes.ENGINE in lanes.lanes_of_this_machine("test")) == there


def test_what_is_left_out_and_what_is_not_are_all_lanes_together() -> None:
    test, slow, both = (lanes.lanes_of_this_machine(what) for what in ("test", "slow", "all"))
    assert [lane for lane in both if lane in test or lane in slow] == both
    assert {lane.name for lane in both if lane not in test} == {"operations", "gateway"}


def test_a_lane_that_is_not_there_is_told_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert lanes.main(["slow", "gateway", "browser"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("browser: no lane of `slow` on this machine, which are roles, ")
    assert "gateway" in told


def test_lanes_that_are_named_run_alone_and_without_a_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(lane: lanes.Lane, also: str, _scratch: Path, *, ready: object) -> Result:
        ran.append(f"{lane.name}: {also}")
        return Result(lane, 600.0, 0, {"tests": 1})

    monkeypatch.setattr(lanes, "run", run)
    for name in ("refuse_without_hosts", "refuse_without_packages", "install_packages", "build_images"):
        monkeypatch.setattr(lanes, name, lambda *_: None)
    monkeypatch.setattr(lanes, "docker_engine", nullcontext)
    assert lanes.main(["test", "desktop", "fresh"]) == 0
    assert ran == ["fresh: not slow", "desktop: not slow"]
    assert capsys.readouterr().out.endswith("2 passed, 0 failed, 0 skipped\n")


def test_no_other_lane_runs_what_needs_a_card() -> None:
    assert not any("tests/gpu" in lane.paths for lane in lanes.LANES)
    assert "not gpu" in lanes.PLAIN


def test_what_stood_in_for_the_real_thing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = tmp_path / "site.xml"
    outcome.write_text(
        '<testsuites><testsuite name="pytest" tests="2" failures="0" errors="0" skipped="0"><properties>'
        '<property name="stand-in" value="site: the GPUs are a fake"/><property name="other" value="no"/>'
        "</properties>"
        '<testcase name="a"><properties><property name="stand-in" value="grafana: a package"/></properties></testcase>'
        '<testcase name="b"><properties><property name="stand-in" value="grafana: a package"/></properties></testcase>'
        "</testsuite></testsuites>"
    )
    counts, stand_ins = lanes.told_by(outcome)
    assert (counts["tests"], stand_ins) == (2, ["site: the GPUs are a fake", "grafana: a package"]), "each once"
    assert lanes.told_by(tmp_path / "never-ran.xml") == ({}, [])
    lanes.report([Result(FAST, 0.1, 0, counts, stand_ins)], 6.0)
    assert "site: the GPUs are a fake" in capsys.readouterr().out.splitlines()
    lanes.report([Result(FAST, 0.1, 0, counts)], 6.0)
    assert "stand-ins" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("took_min", "slowness", "code"),
    [(34, 1.0, 0), (36, 1.0, 1), (60, 1.8, 0), (64, 1.8, 1), (71, 9.0, 1), (600, None, 0)],
    ids=["in time", "over", "slow, in time", "slow, over", "too slow", "no budget"],
)
def test_a_slow_machine_has_as_many_times_the_minutes_and_no_more_than_twice(
    capsys: pytest.CaptureFixture[str], took_min: float, slowness: float | None, code: int
) -> None:
    assert lanes.report([Result(FAST, 0.1, 0, {"tests": 3})], took_min * 60, slowness=slowness) == code
    told = capsys.readouterr().out
    assert told.endswith(f"3 passed, {code} failed, 0 skipped\n")
    assert ("Over the budget" in told) == bool(code)
    assert ("times as long as the one that the 35 minutes are for" in told) == (slowness not in (None, 1.0))


def test_the_machine_is_measured_by_work_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "WORK", lanes.WORK.replace("range(240)", "range(2)"))
    assert 0.01 < lanes.how_slow() < 1000
