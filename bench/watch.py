"""Somebody who looks, on the host and every few milliseconds, for what must go away, and says when it was gone.

The host's clock is this machine's (the kernel is the same), so that no `docker exec` and no SSH connection is in a
figure: they are made before anything is measured.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hosts import Host

EVERY_S = 0.005

# One order a line: `processes` of a user, in whose cgroup a text stands ("" is any), or a `text` in a file. Zombies are
# dead. It answers "watching" once it has seen what it is to watch, then the moment at which it was gone.
LOOK = """
import json, os, sys, time

def processes(uid, unit):
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid != uid:
                    continue
                dead = open(f"/proc/{name}/stat", errors="replace").read().rpartition(")")[2].split()[0] in "ZX"
                if not dead and unit in open(f"/proc/{name}/cgroup").read():
                    return True
            except OSError:
                pass
    return False

def text(path, wanted):
    try:
        return wanted in open(path).read()
    except OSError:
        return False

for line in sys.stdin:
    look, arguments, every_s = json.loads(line)
    is_there = {"processes": processes, "text": text}[look]
    while not is_there(*arguments):
        time.sleep(every_s)
    print("watching", flush=True)
    while is_there(*arguments):
        time.sleep(every_s)
    print(time.time(), flush=True)
"""


class Watcher:
    """`watch` something that is there, let it end, and ask `gone_at`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def watch_processes(self, uid: int, *, unit: str = "") -> None:
        """Every process of this user, or those of one unit. Returns once there is one."""
        self._order("processes", uid, unit)

    def watch_text(self, path: str, wanted: str) -> None:
        """A text in a file. Returns once it stands there."""
        self._order("text", path, wanted)

    def gone_at(self) -> float:
        """Seconds since the epoch; waits until it is gone."""
        return float(self._say())

    def _order(self, look: str, *arguments: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([look, arguments, EVERY_S]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._is_gone() from None
        said = self._say()
        assert said == "watching", said

    def _say(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._is_gone()
        return line.strip()

    def _is_gone(self) -> RuntimeError:
        return RuntimeError(f"the watcher on the host ended with status {self._process.wait(5)}")


@contextmanager
def watcher(host: Host) -> Iterator[Watcher]:
    argv = ["docker", "exec", "--interactive", host.id, "python3", "-I", "-c", LOOK]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Watcher(process)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]  # given as a pipe; its end is the end of the program
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # still waiting for what did not go away
            process.kill()
            process.wait()
