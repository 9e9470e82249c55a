"""Ending what runs: open connections, tasks, every process of the lease, and whoever still holds a GPU."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

from remotegpu_agent import killing
from remotegpu_agent.cleaning import remove
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding
from remotegpu_agent.observe import ports, processes
from remotegpu_agent.observe.processes import Process
from remotegpu_agent.observe.tools import ToolFailed, run

TASK_FOLDERS = "/var/lib/remotegpu-tasks"
_DEADLINE_S = 10.0
_PAUSE_S = 0.02


# --- open connections


def look_for_connections(scope: Scope) -> Iterator[Finding]:
    """The sshd that serves the lease runs as root and as the tenant: both, and the connections themselves."""
    for process in processes.listed():
        if _is_its_door_keeper(process, scope):
            yield Finding(process, f"{process} serves an open connection of {scope.login}")
    for connection in ports.established_by(scope.uid):
        yield Finding(None, f"connection {connection} of {scope.login} is open")


def _is_its_door_keeper(process: Process, scope: Scope) -> bool:
    if process.name not in ("sshd", "sshd-session"):
        return False
    title = rf"sshd(-session)?: {re.escape(scope.login)}([@ ].*)?"
    return process.in_slice_of(scope.uid) or bool(re.fullmatch(title, processes.command_line(process.pid)))


def end_connections(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Kill the servers of the connections; the kernel closes what they held."""
    yield from _kill(finding.subject for finding in found if finding.subject is not None)
    wait_until(lambda: not list(look_for_connections(scope)))


# --- tasks


def look_for_tasks(scope: Scope) -> Iterator[Finding]:
    """Units of the lease's tasks, what lies there of them, what else somebody put there, and the timer of its end."""
    for unit in _units("remotegpu-task-*"):
        if unit.get("User") in (scope.login, str(scope.uid)):
            yield Finding(unit["Id"], f"task unit {unit['Id']} is {unit['ActiveState']}")
    for unit in _units(f"remotegpu-lease-end-{scope.lease_id}.*"):
        yield Finding(unit["Id"], f"{unit['Id']} is {unit['ActiveState']}")
    for entry in os.scandir(TASK_FOLDERS) if os.path.isdir(TASK_FOLDERS) else ():
        if scope.is_its_group(entry.stat(follow_symlinks=False).st_gid):
            yield Finding(entry.path, f"{entry.path} is left of a task")
        elif not entry.name.isdigit():
            yield Finding(entry.path, f"{entry.path} is of no task")


def _units(pattern: str) -> list[dict[str, str]]:
    shown = run(["systemctl", "show", "--property=Id,User,ActiveState", pattern])
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in shown.split("\n\n")]
    return [block for block in blocks if block.get("Id")]


def end_tasks(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Kill each task's cgroup, let systemd forget the unit, then remove command, environment and log."""
    for finding in found:
        is_folder = finding.subject.startswith("/")
        yield from remove.remove(finding.subject) if is_folder else stop_unit(finding.subject)
    wait_until(lambda: not list(look_for_tasks(scope)))


def stop_unit(name: str) -> Iterator[str]:
    """Kill first: stopping alone waits as long as the unit's own settings say."""
    for argv in (
        ["systemctl", "kill", "--signal=SIGKILL", name],
        ["systemctl", "stop", name],
        ["systemctl", "reset-failed", name],
    ):
        with contextlib.suppress(ToolFailed):  # a timer has no process to kill, and what has gone needs no reset
            run(argv, timeout_s=_DEADLINE_S)
    yield f"stopped {name}"


# --- every process


def look_for_processes(scope: Scope) -> Iterator[Finding]:
    """By any of its uids, by the login it descends from, and by systemd's books, whatever it has become since."""
    for process in processes.listed():
        why = _why_its(process, scope)
        if why:
            yield Finding(process, f"{process} {why}")


def _why_its(process: Process, scope: Scope) -> str | None:
    if any(scope.is_tenants(uid) for uid in process.uids):
        return "runs as the tenant"
    if any(scope.is_its_group(gid) for gid in process.gids):
        return "runs in the tenant's group"
    if process.login_uid is not None and scope.is_tenants(process.login_uid):
        return "descends from a login of the tenant"
    if any(process.in_slice_of(uid) for uid in scope.uids):
        return "belongs to a session of the tenant"
    return None


def end_processes(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Kill until none is left; and where none was found, too: what forks and exits without end is hard to see."""
    deadline = time.monotonic() + _DEADLINE_S
    seen = [finding.subject for finding in found]
    while True:
        for uid in sorted(scope.uids | {uid for process in seen for uid in process.uids if scope.is_tenants(uid)}):
            killing.kill_at_once(uid)
        yield from _kill(seen)
        seen = [finding.subject for finding in look_for_processes(scope)]
        if not seen or time.monotonic() > deadline:
            return
        time.sleep(_PAUSE_S)


def _kill(those: Iterable[Process]) -> Iterator[str]:
    """Kill each, if its number still means the same process."""
    for process in those:
        try:
            handle = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            now = processes.look_at(process.pid)
            if now is not None and now.started == process.started:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                yield f"killed {process}"
        except ProcessLookupError:
            continue
        finally:
            os.close(handle)


def wait_until(condition: Any, *, deadline_s: float = _DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)


# --- the GPUs


def look_for_gpu_holders(scope: Scope) -> Iterator[Finding]:
    """Whoever has a GPU open and is none of the services that had one open before the first tenant."""
    expected = {*scope.sections["gpu_holders"], "remotegpu-agent.service"}
    for process, device in processes.gpu_holders():
        if process.unit not in expected and process.pid != os.getpid():
            yield Finding(process, f"{process} holds {device}")


def end_nothing(_scope: Scope, _found: list[Finding]) -> Iterator[str]:
    """What is still there now is not ours to end: it is named, and an operator decides."""
    return iter(())
