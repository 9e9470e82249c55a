"""Ending everything that one login has on this host. Who deserves it is decided elsewhere; here is only how.

Counting and killing go by UID, not by session or cgroup: a process may leave those, but not its UID. sshd's own part
of a session runs as root and is found by its title.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from remotegpu_agent.observe.accounts import FIRST_PERSON

SSHD_PROGRAMS = ("/usr/sbin/sshd", "/usr/lib/openssh/sshd-session", "/usr/lib/openssh/sshd-auth")
_LOOK_AGAIN_S = 0.02
_KILLER_DEADLINE_S = 5.0


def count(uids: Iterable[int]) -> dict[int, int]:
    """How many live processes run as each of these users. Cheap: one stat for each process of others."""
    found = dict.fromkeys(uids, 0)
    with os.scandir("/proc") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (uid := entry.stat().st_uid) in found:
                    state = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                    found[uid] += state not in "ZX"
    return found


def owned_by(uid: int) -> set[int]:
    """Live processes with this user as any of their four UIDs: a set-uid program counts as well."""
    return {pid for pid, status in _statuses() if str(uid) in status["Uid"].split() and status["State"][:1] not in "ZX"}


def sshd_of(login: str) -> set[int]:
    """sshd's root processes that serve this login."""
    title = re.compile(rf"sshd(-session|-auth)?: {re.escape(login)}( |@|\Z)")
    found = set()
    for pid, status in _statuses():
        if status["Name"].startswith("sshd") and status["Uid"].split()[1] == "0" and title.match(_command_line(pid)):
            found.add(pid)
    return found


def is_running(name: str) -> bool:
    """Some process has a name that begins so, whoever it belongs to."""
    return any(status["Name"].startswith(name) for _, status in _statuses())


def end_all(login: str, uid: int, *, deadline_s: float) -> set[int]:
    """Kill until nothing is left; answers what still lives at the deadline (a process in the kernel's uninterruptible
    sleep).
    """
    deadline = time.monotonic() + deadline_s
    while True:
        mine, theirs = owned_by(uid), sshd_of(login)
        if not mine and not theirs:
            return set()
        if time.monotonic() > deadline:
            return mine | theirs
        kill_at_once(uid)
        for pid in mine | theirs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_AGAIN_S)


def kill_at_once(uid: int) -> None:
    """One kill(-1) as that very user. The kernel walks all processes while none can fork, so a fork bomb does not
    outrun it. Raises nothing: whoever calls looks what is left.
    """
    if uid < FIRST_PERSON:
        raise ValueError(f"UID {uid} is no person's")
    with contextlib.suppress(OSError):  # no process number left: then one by one
        child = os.fork()
        if child == 0:
            _become_and_kill_all(uid)
        wait_for(child)


def _become_and_kill_all(uid: int) -> NoReturn:
    """In a child. No program is started: execve fails as a user who has reached the limit of processes, and that is
    the very one who has to go. Without one, nothing of ours can be traced by that user either.
    """
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.kill(-1, signal.SIGKILL)  # spares only the caller
    finally:
        os._exit(0)


def wait_for(child: int) -> None:
    """The end of a child that runs as such a user, who may stop it."""
    deadline = time.monotonic() + _KILLER_DEADLINE_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:  # stopped by those that it was to kill
            os.kill(child, signal.SIGKILL)
        time.sleep(_LOOK_AGAIN_S / 10)


def _statuses() -> Iterator[tuple[int, dict[str, str]]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/status").read_text(errors="replace")
            except OSError:
                continue
            yield int(name), dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
