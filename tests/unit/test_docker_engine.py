"""The one Docker engine of a machine ends when the last checkout that needs it is done, and not before.

molecule/image/dockerd counts; the engine behind it is a process that sleeps here, and `docker` asks whether it does.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.owner import started_at
from tests.support.waiting import until

SCRIPT = Path(__file__).parents[2] / "molecule" / "image" / "dockerd"
PROGRAMS = {
    "dockerd": 'echo $$ >"$ENGINE/pid"; exec sleep 600',
    "docker": """
case $1 in
    info) [ -s "$ENGINE/pid" ] && kill -0 "$(cat "$ENGINE/pid")" ;;
    ps) cat "$ENGINE/containers" 2>/dev/null || true ;;
esac""",
    "iptables": "exit 0",
    "mountpoint": "exit 0",  # this machine's own cgroups are left as they are
    "id": "echo 0",
}


class Engine:
    """The script, in a world of its own, and checkouts that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name, body in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/sh\n{body}\n")
            (programs / name).chmod(0o755)
        self._environ = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "ENGINE": str(folder),
            "REMOTEGPU_DOCKER_STATE": str(folder / "state"),
        }
        self._checkouts: list[subprocess.Popen[bytes]] = []

    def checkout(self) -> subprocess.Popen[bytes]:
        self._checkouts.append(subprocess.Popen(["sleep", "600"]))
        return self._checkouts[-1]

    def start(self, *whose: subprocess.Popen[bytes]) -> None:
        self._say("start", *whose)
        assert self.runs

    def stop(self, *whose: subprocess.Popen[bytes]) -> None:
        self._say("stop", *whose)

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    @property
    def runs(self) -> bool:
        return started_at(self.pid) is not None

    def end(self) -> None:
        for process in self._checkouts:
            process.kill()
            process.wait()
        if (self.folder / "pid").exists() and self.runs:
            os.kill(self.pid, 9)

    def _say(self, what: str, *whose: subprocess.Popen[bytes]) -> None:
        argv = [str(SCRIPT), what, *(str(process.pid) for process in whose)]
        subprocess.run(argv, env=self._environ, check=True, timeout=60)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.end()


def test_the_checkout_that_ends_first_leaves_the_engine_to_the_other(engine: Engine) -> None:
    one, other = engine.checkout(), engine.checkout()
    engine.start(one)
    engine.start(other)
    first = engine.pid
    engine.stop(one)
    assert engine.runs
    assert engine.pid == first
    engine.stop(other)
    assert not engine.runs


def test_a_killed_run_does_not_hold_the_engine_for_ever(engine: Engine) -> None:
    one, killed = engine.checkout(), engine.checkout()
    engine.start(one)
    engine.start(killed)
    killed.kill()
    until(lambda: killed.poll() is not None, "it to be dead")
    engine.stop(one)
    assert not engine.runs


def test_somebody_who_never_asked_for_it_does_not_end_it(engine: Engine) -> None:
    one = engine.checkout()
    engine.start(one)
    engine.stop(engine.checkout())
    assert engine.runs


def test_an_engine_that_was_started_by_hand_is_ended_by_hand(engine: Engine) -> None:
    one = engine.checkout()
    engine.start()
    engine.start(one)
    engine.stop(one)
    assert engine.runs
    engine.stop()
    assert not engine.runs


def test_no_engine_is_ended_below_a_container_that_runs(engine: Engine) -> None:
    one = engine.checkout()
    engine.start(one)
    (engine.folder / "containers").write_text("3f2a\n")  # a demo, or hosts of somebody who writes a role
    engine.stop(one)
    assert engine.runs
