"""The parts of a task that need no host: what is launched, and what its end means."""

from __future__ import annotations

import base64
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


def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: bytes = b"") -> tuple[Config, Tasks]:
    """The tasks of a host on which attempt 5, of task 3, has written this and runs."""
    config = Config("https://portal.example", state_dir=tmp_path / "state", tasks_dir=tmp_path / "tasks")
    config.state_dir.mkdir()
    units = tmp_path / "units"
    units.mkdir()
    monkeypatch.setattr(systemd, "TRANSIENT_DIR", units)
    (units / "remotegpu-task-5.service").touch()
    root = config.tasks_dir / "5" / "root"
    root.mkdir(parents=True)
    log = {"acked": 0, "is_complete": False, "base": 0, "cut_at": None}
    ids = {"attempt_id": 5, "task_id": 3, "lease_id": 17}
    (root / "attempt.json").write_text(json.dumps(RECORD | ids | {"boot_id": boot_id(), "log": log}))
    (root / "log").write_bytes(output)
    return config, restarted(config)


def restarted(config: Config) -> Tasks:
    return Tasks(config, Journal(config.state_dir / "journal.jsonl"))


def ack(state: str, offset: int, *, complete: bool = False) -> dict[str, Any]:
    return {"attempt_id": 5, "state": state, "log_offset": offset, "log_complete": complete}


def test_a_log_with_lost_bytes_says_so_and_an_agent_of_before_can_read_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tasks = running(tmp_path, monkeypatch, b"x" * 3_000_000)
    for _ in range(100):
        for each in tasks.log_ranges(quota_bytes=10_000_000):
            tasks.acknowledge([ack("running", each["offset"] + len(base64.b64decode(each["data"])))])
    assert not tasks.reports()[0]["log_truncated"]
    tasks.acknowledge([ack("running", 1000)])
    for again in (tasks, restarted(config)):
        assert again.reports()[0]["log_truncated"]
        assert again.log_ranges(quota_bytes=10_000_000)[0]["offset"] == 1000
        assert again.news() != ()
    record = json.loads((config.tasks_dir / "5" / "root" / "attempt.json").read_text())
    assert set(record["log"]) == {"acked", "is_complete", "base", "cut_at"}


def test_an_order_with_the_id_of_a_lost_attempt_ends_and_the_attempt_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The portal was restored, and gives the id a second time."""
    config, tasks = running(tmp_path, monkeypatch, b"of the old one")
    tasks.disown([5])
    assert tasks.observe()[5].is_disowned
    tasks.end_unstarted(order(task_id=4), "failed", "its id is taken")
    for again in (tasks, restarted(config)):
        [report] = again.reports()
        assert (report["attempt_id"], report["state"], report["reason"]) == (5, "failed", "its id is taken")
        assert (report["started_at"], report["log_bytes"], report["log_truncated"]) == (None, 0, False)
        assert again.unsent(17) == [5]
        assert again.log_ranges(quota_bytes=1000) == [{"attempt_id": 5, "offset": 0, "data": "", "end": True}]
        assert (again.observe()[5].has_ended, again.observe()[5].is_disowned) == (True, False)
    tasks.acknowledge([ack("failed", 0, complete=True)])
    assert (tasks.reports(), tasks.news(), restarted(config).reports()) == ([], (), [])
    assert (config.tasks_dir / "5" / "root" / "log").read_bytes() == b"of the old one"
    assert not (config.tasks_dir / "5" / "root" / "stop.json").exists()

    (tmp_path / "units" / "remotegpu-task-5.service").unlink()
    (config.tasks_dir / "5" / "root" / "exit.json").write_text(json.dumps(ENDED))
    assert 5 in tasks.observe(), "what was said to have failed is not started once the id is free"
    tasks.tell_again([5])
    assert [each["state"] for each in tasks.reports()] == ["failed"]
    tasks.disown([5])  # another restore, after which the id is nobody's
    assert (tasks.observe(), tasks.reports(), restarted(config).observe()) == ({}, [], {})
    tasks.end_unstarted(order(task_id=9), "failed", "its lease cannot be opened")
    assert [each["reason"] for each in tasks.reports()] == ["its lease cannot be opened"]
    assert tasks.forget_lease(17) == [5]
    assert list(config.tasks_dir.iterdir()) == []


def test_an_order_of_another_task_or_lease_is_not_the_attempt_that_has_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tasks = running(tmp_path, monkeypatch)
    assert not tasks.is_anothers(order())
    assert not tasks.is_anothers(order(attempt_id=6, task_id=4))
    assert tasks.is_anothers(order(task_id=4))
    assert tasks.is_anothers(order(lease_id=18))
    tasks.disown([5])
    tasks.end_unstarted(order(task_id=4), "failed", "its id is taken")
    assert not tasks.is_anothers(order(task_id=4))
    assert tasks.is_anothers(order(task_id=3))
