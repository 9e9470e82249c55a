"""The parts of a task that need no host: what is launched, and what its end means."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import systemd
from remotegpu_agent.config import Config
from remotegpu_agent.facts import boot_id
from remotegpu_agent.journal import Journal
from remotegpu_agent.protocol import DesiredAttempt
from remotegpu_agent.tasks import Attempt, CannotStart, Outcome, Tasks, read_outcome, render_launch, workdir_of

HOME = Path("/home/lease17")
RECORD = {"launched": True, "time_limit_s": None, "workdir": None, "started_at": "2026-01-01T00:00:00Z"}
ENDED = {
    "exit_code": "exited",
    "exit_status": "0",
    "service_result": "success",
    "boot_id": "b",
    "at": "2026-01-01T00:01:00Z",
    "host_stopping": False,
}
SOONER, LATER = "2026-01-01T00:00:59Z", "2026-01-01T00:01:01Z"


def order(**fields: Any) -> DesiredAttempt:
    values: dict[str, Any] = {
        "attempt_id": 5,
        "task_id": 3,
        "lease_id": 17,
        "is_wanted": True,
        "command": "env",
        "env": {},
        "workdir": None,
        "time_limit_s": None,
        "stop_grace_s": 30,
        "gpu_uuids": ("GPU-1", "GPU-2"),
    }
    return DesiredAttempt(**values | fields)


def outcome(
    record: dict[str, Any] | None = None, ended: dict[str, Any] | None = None, stop: str | None = None
) -> Outcome:
    asked = {"reason": "asked", "at": stop} if stop else None
    return read_outcome(RECORD | (record or {}), ENDED | ended if ended is not None else None, lambda: asked)


def test_without_an_exit_record_it_starts_or_runs() -> None:
    assert outcome({"launched": False}).state == "starting"
    assert outcome().state == "running"


def test_it_runs_from_its_first_moment_however_late_systemd_run_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "is_loaded", lambda _unit: True)
    root = tmp_path / "5" / "root"
    root.mkdir(parents=True)
    (root / "attempt.json").write_text(json.dumps(RECORD | {"launched": False}))
    attempt = Attempt(tmp_path / "5")
    assert attempt.outcome().state == "starting"
    (root / "log").touch()
    assert attempt.outcome().state == "running"


@pytest.mark.parametrize(
    ("record", "ended", "state", "exit_code", "signal"),
    [
        ({}, {}, "succeeded", 0, None),
        ({}, {"exit_status": "3", "service_result": "exit-code"}, "failed", 3, None),
        ({}, {"exit_code": "killed", "exit_status": "SEGV", "service_result": "signal"}, "failed", None, 11),
        ({}, {"exit_code": "dumped", "exit_status": "ABRT", "service_result": "core-dump"}, "failed", None, 6),
        ({}, {"exit_code": "killed", "exit_status": "KILL", "service_result": "oom-kill"}, "failed", None, 9),
        (
            {"time_limit_s": 60},
            {"exit_code": "killed", "exit_status": "TERM", "service_result": "timeout"},
            "timed_out",
            None,
            15,
        ),
        ({"time_limit_s": 600}, {"service_result": "timeout"}, "succeeded", 0, None),
        ({}, {"exit_status": "1", "service_result": "timeout"}, "failed", 1, None),
        ({}, {"host_stopping": True, "exit_code": "killed", "exit_status": "TERM"}, "lost", None, 15),
        ({}, {"exit_code": "", "exit_status": "", "service_result": "resources"}, "failed", None, None),
    ],
)
def test_every_end_has_one_name(
    record: dict[str, Any], ended: dict[str, Any], state: str, exit_code: int | None, signal: int | None
) -> None:
    found = outcome(record, ended)
    assert (found.state, found.exit_code, found.signal) == (state, exit_code, signal)


def test_a_stop_counts_only_if_it_came_before_the_end() -> None:
    assert outcome(ended={}, stop=SOONER) == Outcome("stopped", 0, None, str(ENDED["at"]), "asked")
    assert outcome(ended={}, stop=LATER).state == "succeeded"
    assert outcome(stop=SOONER).state == "running"


@pytest.mark.parametrize(
    "value", ["plain", "", " ", "a'b", '"', "$HOME `id` $(id)", "\\", "%h %%", "\n\nx\n", "\t\x1b[31m", "ünï €", "*"]
)
def test_the_environment_arrives_unchanged(tmp_path: Path, value: str) -> None:
    script = tmp_path / "it's a script"
    script.write_text('printf %s "$VALUE"')
    launch = render_launch(order(env={"VALUE": value}), script, str(tmp_path))
    done = subprocess.run(["/bin/bash", "-c", launch], capture_output=True, check=True)
    assert done.stdout.decode() == value


def test_the_gpus_are_named_by_uuid_and_in_the_order_of_the_bus(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$CUDA_VISIBLE_DEVICES|$NVIDIA_VISIBLE_DEVICES|$CUDA_DEVICE_ORDER"')
    launch = render_launch(order(), script, "/")
    done = subprocess.run(["/bin/bash", "-c", launch], capture_output=True, check=True, text=True)
    assert done.stdout == "GPU-1,GPU-2|GPU-1,GPU-2|PCI_BUS_ID\n"
    assert "VISIBLE" not in render_launch(order(gpu_uuids=None), script, "/")


def test_what_no_process_can_be_given_is_refused(tmp_path: Path) -> None:
    for fields in ({"command": "echo \0"}, {"env": {"A": "\0"}}):
        with pytest.raises(CannotStart, match="NUL"):
            render_launch(order(**fields), tmp_path, "/")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, "/home/lease17"),
        ("", "/home/lease17"),
        ("~", "/home/lease17"),
        ("~/a b", "/home/lease17/a b"),
        ("a/../b", "/home/lease17/b"),
        ("/data/x", "/data/x"),
    ],
)
def test_a_directory_is_the_home_below_it_or_absolute(given: str | None, found: str) -> None:
    assert workdir_of(order(workdir=given), HOME) == found


def test_an_attempt_has_not_ended_while_its_unit_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder runs at the end of the main process; a child that ignores TERM may live on and write."""
    root = tmp_path / "7" / "root"
    root.mkdir(parents=True)
    (root / "attempt.json").write_text(json.dumps(RECORD | {"lease_id": 1}))
    (root / "exit.json").write_text(json.dumps(ENDED))
    units = tmp_path / "units"
    units.mkdir()
    monkeypatch.setattr(systemd, "TRANSIENT_DIR", units)
    unit = units / "remotegpu-task-7.service"
    unit.touch()
    attempt = Attempt(tmp_path / "7")
    assert attempt.outcome().state == "running"
    unit.unlink()
    assert attempt.outcome().state == "succeeded"


def test_systemd_is_asked_of_a_task_only_once_it_has_unloaded_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A healthy task costs its host no process at each look; one whose unit is gone without a record is lost."""
    config = Config("https://portal.example", state_dir=tmp_path / "state", tasks_dir=tmp_path / "tasks")
    config.state_dir.mkdir()
    root = config.tasks_dir / "7" / "root"
    root.mkdir(parents=True)
    log = {"acked": 0, "is_complete": False, "base": 0, "cut_at": None}
    (root / "attempt.json").write_text(json.dumps(RECORD | {"lease_id": 1, "boot_id": boot_id(), "log": log}))
    (root / "log").touch()
    asked: list[list[str]] = []
    monkeypatch.setattr(systemd, "TRANSIENT_DIR", tmp_path)

    def nothing_is_alive(units: list[str]) -> set[str]:
        asked.append(units)
        return set()

    monkeypatch.setattr(systemd, "alive", nothing_is_alive)
    unit = tmp_path / "remotegpu-task-7.service"
    unit.touch()
    tasks = Tasks(config, Journal(config.state_dir / "journal.jsonl"))
    assert not tasks.look_for_lost()
    assert asked == [[]]
    unit.unlink()
    assert tasks.look_for_lost()
    assert asked == [[], ["remotegpu-task-7.service"]]
    assert tasks.unfinished() == []


def test_a_portal_that_was_restored_hears_again_of_what_it_had_acknowledged(tmp_path: Path) -> None:
    config = Config("https://portal.example", state_dir=tmp_path / "state", tasks_dir=tmp_path / "tasks")
    config.state_dir.mkdir()
    tasks = Tasks(config, Journal(config.state_dir / "journal.jsonl"))
    for attempt_id in (5, 6):
        tasks.end_unstarted(order(attempt_id=attempt_id), "failed", "its lease cannot be opened")
    told = [{"attempt_id": each, "state": "failed", "log_offset": 0, "log_complete": True} for each in (5, 6)]
    tasks.acknowledge(told)
    assert (tasks.reports(), tasks.news()) == ([], ())
    tasks.tell_again([5, 99])
    assert [(each["attempt_id"], each["state"]) for each in tasks.reports()] == [(5, "failed")]
    assert tasks.news() != ()
    tasks.acknowledge(told)
    assert (tasks.reports(), tasks.news()) == ([], ())
