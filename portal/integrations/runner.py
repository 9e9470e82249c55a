"""ansible-runner, in a process of its own for each run: start it, hear it, keep it alive, end it.

The program itself is worker/executor.py. It is started with an environment that we write, so that no secret of the
portal reaches a playbook, and under a parent-death signal: the kernel ends it with the worker.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from portal.integrations import processes, ssh_masters
from portal.integrations.processes import ENDED_WITH_WORKER, LEASH, STOP_GRACE_S, VARIABLE, Process

SOURCE = Path(__file__).parents[2]
LINE_BYTES = 1024 * 1024


class Runner:
    """One executor. `directory` is the run's private directory, complete; `mark` marks every process of the run.

    Must be started by a thread that stays until the end: the parent-death signal is sent when that thread ends.
    """

    def __init__(self, directory: Path, mark: str) -> None:
        self.mark, self.directory = mark, directory
        self.child: Process | None = None
        self._rest = b""
        self._process = subprocess.Popen(
            [*LEASH, sys.executable, "-m", "portal.worker.executor", str(directory)],
            cwd=directory,
            env=_environment(mark),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def messages(self, wait_s: float) -> list[dict[str, Any]] | None:
        """What it has said since the last call, waiting up to `wait_s` for something. None: it will say no more."""
        assert self._process.stdout is not None  # noqa: S101 - it was started with a pipe
        readable, _, _ = select.select([self._process.stdout], [], [], wait_s)
        if not readable:
            return []
        data = os.read(self._process.stdout.fileno(), LINE_BYTES)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        said = [json.loads(line) for line in lines]
        for message in said:
            if message["type"] == "child":
                self.child = Process(message["pid"], message["started_ticks"], message["boot_id"])
        return said

    def keep_alive(self) -> None:
        """Say that the lock was renewed. Not saying it in time ends the run."""
        assert self._process.stdin is not None  # noqa: S101 - it was started with a pipe
        try:
            os.write(self._process.stdin.fileno(), b"\n")
        except OSError:
            return  # it has ended; `messages` will tell

    @property
    def was_let_down(self) -> bool:
        """After `close`: whether the executor ended the run itself, since `keep_alive` came too late."""
        return self._process.returncode == ENDED_WITH_WORKER

    def end(self, *, grace_s: float = STOP_GRACE_S) -> list[int]:
        """End every process of the run on this machine. Returns the pids that could not be ended: normally none."""
        left = processes.end(self.mark, self.child, grace_s=grace_s, spare=[self._process.pid])
        ssh_masters.end(self.directory)
        return left

    def close(self) -> list[int]:
        """Let the executor go, and make sure that nothing of the run is left. Returns the pids that could not be ended.

        Afterwards the private directory may be gone: what is wanted from it must be read before.
        """
        if self._process.returncode is not None:
            return []
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self.end(grace_s=0)


def _environment(mark: str) -> dict[str, str]:
    """All that a playbook may know of this process: where programs lie, and which run it belongs to."""
    kept = {name: os.environ[name] for name in ("HOME", "TZ") if name in os.environ}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "LANG": "C.UTF-8", "PYTHONPATH": str(SOURCE), VARIABLE: mark}


def end_leftovers(mark: str, child: dict[str, Any] | None, directory: Path) -> list[int]:
    """End what a dead worker's run left on this machine. Returns the pids that could not be ended."""
    main = None
    if child and "pid" in child:
        main = Process(child["pid"], child["started_ticks"], child["boot_id"])
        main = main if processes.is_alive(main) else None
    left = processes.end(mark, main, grace_s=STOP_GRACE_S)
    ssh_masters.end(directory)
    return left
