"""Processes of this machine that belong to a run: found by the mark in their environment, never by name.

A pid alone is never trusted: it is held through a pidfd while start time or mark are read again, so that a signal
cannot reach a process that was given the number later. What a run is, and when it must end, is not known here.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "REMOTEGPU_RUN_ID"  # inherited by everything that a run starts on this machine
LEASH = ("setpriv", "--pdeathsig", "TERM", "--")  # before a command: the kernel tells it when its parent has ended
ENDED_WITH_WORKER = 75  # exit status of an executor that ended its run: its worker died, or was not heard of in time
STOP_GRACE_S = 5.0  # for a process of a run that was asked to end
POLL_S = 0.02


@dataclass(frozen=True)
class Process:
    """One process, for good: the pid, when it was started (clock ticks since boot), and in which boot."""

    pid: int
    started_ticks: int
    boot_id: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find(pid: int) -> Process | None:
    """The process that has this pid now, or None."""
    ticks = _started_ticks(pid)
    return None if ticks is None else Process(pid, ticks, boot_id())


def _started_ticks(pid: int) -> int | None:
    try:
        # The name in parentheses may hold spaces and parentheses itself; what follows the last one is plain.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(process: Process) -> bool:
    """Whether this very process runs: a zombie, a reused pid or another boot is not it."""
    return process.boot_id == boot_id() and _started_ticks(process.pid) == process.started_ticks


def child_of(parent: int) -> Process | None:
    """The process that the main thread of `parent` started, or None."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return None
    return find(int(children[0])) if children else None


def carriers(mark: str) -> list[int]:
    """The pids of all live processes that carry `mark`."""
    wanted = f"{VARIABLE}={mark}".encode()
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _carries(entry, wanted)]


def _carries(entry: Path, wanted: bytes) -> bool:
    try:
        return wanted in (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or it is not ours to read
        return False


def end(
    mark: str, main: Process | None, *, grace_s: float, spare: Iterable[int] = (), give_up_s: float = 10
) -> list[int]:
    """End everything that carries `mark`: ask `main` with SIGTERM, wait up to `grace_s`, then SIGKILL what is left.

    ansible-playbook passes a SIGTERM on to its workers, which have sessions of their own, so asking it first ends more
    than killing does. `spare` are pids to leave alone (the caller). Returns the pids that are still there after
    `give_up_s` of killing: none, but for a process that the kernel cannot end.
    """
    spared = set(spare)
    if main is not None and _signal(main.pid, signal.SIGTERM, ticks=main.started_ticks):
        _signal(main.pid, signal.SIGCONT, ticks=main.started_ticks)
        _wait_gone(mark, spared, grace_s)
    give_up_at = time.monotonic() + give_up_s
    while left := [pid for pid in carriers(mark) if pid not in spared]:
        if time.monotonic() > give_up_at:
            return left
        for pid in left:
            _signal(pid, signal.SIGKILL, mark=mark)
        time.sleep(POLL_S)
    return []


def _wait_gone(mark: str, spared: set[int], wait_s: float) -> None:
    give_up_at = time.monotonic() + wait_s
    while set(carriers(mark)) - spared and time.monotonic() < give_up_at:
        time.sleep(POLL_S)


def _signal(pid: int, number: signal.Signals, *, ticks: int | None = None, mark: str | None = None) -> bool:
    """Signal `pid` if it is still the process with this start time or mark; whether it was."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if ticks is not None and _started_ticks(pid) != ticks:
            return False
        if mark is not None and not _carries(Path(f"/proc/{pid}"), f"{VARIABLE}={mark}".encode()):
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
