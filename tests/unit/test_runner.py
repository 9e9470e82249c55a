"""What is kept of an event, and how processes are found and ended: by mark, never by name or by pid alone."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from portal.integrations import faults, processes
from portal.integrations.processes import VARIABLE, Process
from portal.settings import Settings
from portal.worker import directory, executor
from tests.support.waiting import until

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def mark() -> str:
    return f"7:{uuid.uuid4()}"


@pytest.fixture
def start(mark: str) -> Iterator[Start]:
    """Start a shell command that carries the mark; all of them end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(script: str, **environment: str) -> subprocess.Popen[bytes]:
        environ = {**os.environ, VARIABLE: mark, **environment}
        process = subprocess.Popen(["bash", "-c", script], env=environ, stdout=subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    processes.end(mark, None, grace_s=0)


def test_everything_that_carries_the_mark_ends_whatever_its_session(start: Start, mark: str) -> None:
    start("setsid -f sleep 600; trap '' TERM; (sleep 601 & sleep 602) & while :; do sleep 1; done")
    until(lambda: len(processes.carriers(mark)) >= 5, "five processes")
    assert processes.end(mark, None, grace_s=0) == []
    assert processes.carriers(mark) == []


def test_a_stranger_is_left_alone(start: Start, mark: str) -> None:
    start("exec sleep 600")
    stranger = start("exec sleep 600", **{VARIABLE: mark + "0"})
    until(lambda: processes.carriers(mark + "0"), "the stranger to start")
    assert processes.end(mark, None, grace_s=0) == []
    assert stranger.poll() is None


def test_the_main_process_is_asked_first_and_may_clean_up(start: Start, mark: str) -> None:
    process = start("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert processes.end(mark, processes.find(process.pid), grace_s=10) == []
    assert process.stdout.readline() == b"bye\n"


def test_a_pid_of_another_time_or_boot_is_not_signalled(start: Start, mark: str) -> None:
    process = start("exec sleep 600")
    real = processes.find(process.pid)
    assert real is not None
    earlier = Process(real.pid, real.started_ticks - 1, real.boot_id)
    assert processes.is_alive(real)
    assert not processes.is_alive(earlier)
    assert not processes.is_alive(Process(real.pid, real.started_ticks, "another boot"))
    assert processes.end("8:of nobody", earlier, grace_s=0.2) == []
    assert process.poll() is None


def test_a_zombie_is_dead(start: Start) -> None:
    process = start("exit 0")
    until(lambda: _state(process.pid) == "Z", "a zombie")
    assert processes.find(process.pid) is None


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - /proc
        return stat.read().rpartition(")")[2].split()[0]


def test_the_child_of_a_process_is_found(start: Start) -> None:
    process = start("sleep 600 & wait")
    child = until(lambda: processes.child_of(process.pid), "the child")
    assert processes.is_alive(child)
    assert processes.child_of(child.pid) is None


# The private directory


def test_the_directory_of_an_attempt_is_its_owners_alone_and_is_never_used_twice(settings: Settings, mark: str) -> None:
    path = directory.make(settings, mark)
    directory.write(path / "env" / "settings", {"a": "secret"})
    made = [settings.runs_dir, path, path / "env", path / "env" / "settings"]
    assert [oct(each.stat().st_mode & 0o777) for each in made] == ["0o700", "0o700", "0o700", "0o600"]
    with pytest.raises(FileExistsError):
        directory.make(settings, mark)
    with pytest.raises(FileExistsError):
        directory.write(path / "env" / "settings", {"of": "another run"})


# Events


def event(kind: str, **about: Any) -> dict[str, Any]:
    return {"event": kind, "created": "2026-11-25T10:00:00+00:00", "stdout": "text\r\n", "event_data": about}


def test_results_are_dropped_and_the_message_of_a_failure_is_kept() -> None:
    kept = executor.trim(
        event("runner_on_failed", host="gpu-1", task="Install", res={"msg": "disk full", "stdout": "x" * 1000})
    )
    assert (kept["host"], kept["task"], kept["stdout"]) == ("gpu-1", "Install", "text\n")
    assert kept["data"] == {"message": "disk full"}


def test_facts_leave_no_trace() -> None:
    kept = executor.trim(
        event("runner_on_ok", host="gpu-1", task="Gather", res={"ansible_facts": {"secret": "s" * 99}})
    )
    assert "s" * 99 not in str(kept)


@pytest.mark.parametrize("odd", [{}, {"event_data": None}, {"event": "x", "event_data": {"res": "a string"}}])
def test_an_odd_event_is_kept_as_far_as_it_goes(odd: dict[str, Any]) -> None:
    assert executor.trim(odd)["type"] == "event"


def test_statistics_name_every_host_and_number() -> None:
    about = {"processed": {"b": 1, "a": 1}, "ok": {"a": 3}, "dark": {"b": 1}, "changed": {"a": 2}}
    stats = executor.stats_of(about)
    assert list(stats) == ["a", "b"]
    assert stats["a"] | {"ok": 3, "changed": 2, "unreachable": 0} == stats["a"]
    assert stats["b"]["unreachable"] == 1


# Faults


def test_a_fault_point_that_nobody_lists_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTEGPU_FAULT", "claim.committed:1")
    with pytest.raises(ValueError, match="not in the list"):
        faults.point("somewhere")


def test_without_the_variable_a_point_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REMOTEGPU_FAULT", raising=False)
    for name in faults.POINTS:
        faults.point(name)


def test_a_point_kills_at_the_time_it_was_asked_for() -> None:
    script = "from portal.integrations.faults import point\nfor n in (1, 2, 3): print(n, flush=True); point('end.seen')"
    environment = {**os.environ, "REMOTEGPU_FAULT": "end.seen:2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (-9, ["1", "2"])
