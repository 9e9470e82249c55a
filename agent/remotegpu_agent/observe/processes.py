"""Processes as /proc tells them, whoever started them and however they call themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from remotegpu_agent.observe.tools import printable, read_text

_NO_LOGIN = 2**32 - 1
_NVIDIA_MAJOR = 195
DELETED = " (deleted)"  # behind a program's name: its file has been removed or replaced since


@dataclass(frozen=True)
class Process:
    """One process at the moment it was looked at. `started` (clock ticks since boot) tells it from a later namesake."""

    pid: int
    started: int
    state: str
    name: str
    uids: frozenset[int]
    gids: frozenset[int]
    login_uid: int | None
    cgroups: tuple[str, ...]

    def __str__(self) -> str:
        return f"process {self.pid} ({printable(self.name)}, uid {'/'.join(map(str, sorted(self.uids)))})"

    def in_slice_of(self, uid: int) -> bool:
        """Whether systemd counts it to the sessions and services of this user."""
        return any(f"/user-{uid}.slice" in path for path in self.cgroups)

    @property
    def unit(self) -> str | None:
        """The system service that holds it."""
        for path in self.cgroups:
            match = re.search(r"/system\.slice/(?:[^/]+\.slice/)*([^/]+\.service)", path)
            if match:
                return match.group(1)
        return None


def listed() -> Iterator[Process]:
    """Every live process. Zombies are left out: they hold nothing but their number."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            process = look_at(int(name))
            if process is not None and process.state not in "ZX":
                yield process


def look_at(pid: int) -> Process | None:
    """The process with this number, or None where it has gone."""
    status, stat = read_text(f"/proc/{pid}/status"), read_text(f"/proc/{pid}/stat")
    if not status or not stat:
        return None
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    after_name = stat.rpartition(")")[2].split()
    return Process(
        pid=pid,
        started=int(after_name[19]),
        state=after_name[0],
        name=fields.get("Name", "?"),
        uids=frozenset(int(each) for each in fields["Uid"].split()),
        gids=frozenset(int(each) for each in fields["Gid"].split()),
        login_uid=_login_uid(pid),
        cgroups=tuple(line.split(":", 2)[2] for line in (read_text(f"/proc/{pid}/cgroup") or "").splitlines()),
    )


def _login_uid(pid: int) -> int | None:
    text = (read_text(f"/proc/{pid}/loginuid") or "").strip()
    return int(text) if text.isdigit() and int(text) != _NO_LOGIN else None


def command_line(pid: int) -> str:
    """The process's own title, with blanks between its words."""
    return (read_text(f"/proc/{pid}/cmdline") or "").replace("\0", " ").strip()


def program(pid: int) -> str:
    """The file that it runs, or "?" where the kernel does not say."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return "?"


def gpu_holders() -> Iterator[tuple[Process, str]]:
    """Processes with an open /dev/nvidia*, and which: children adopted by init are missing from `nvidia-smi`."""
    for process in listed():
        device = _gpu_held_by(process.pid)
        if device is not None:
            yield process, device


def _gpu_held_by(pid: int) -> str | None:
    folder = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(folder)
    except OSError:
        return None
    for number in numbers:
        try:
            target = os.readlink(f"{folder}/{number}")
            if target.startswith("/dev/nvidia"):
                return target
            if target.startswith("/dev/") and os.major(os.stat(f"{folder}/{number}").st_rdev) == _NVIDIA_MAJOR:
                return target
        except OSError:
            continue
    return None
