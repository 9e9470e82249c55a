"""Shared memory, semaphores and message queues: they belong to no file system and outlive every process."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from remotegpu_agent.cleaning import remove
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding
from remotegpu_agent.observe import mounts
from remotegpu_agent.observe.tools import ToolFailed, read_text, run

_KINDS = {
    "shm": ("shmid", "-m", "shared memory"),
    "sem": ("semid", "-s", "semaphores"),
    "msg": ("msqid", "-q", "message queue"),
}
_QUEUES, _OWN_QUEUES = "/dev/mqueue", "/run/remotegpu-mqueue"


def look_for_sysv(scope: Scope) -> Iterator[Finding]:
    """System V objects that the tenant owns or made."""
    for kind, (id_column, option, words) in _KINDS.items():
        text = read_text(f"/proc/sysvipc/{kind}")
        if text is None:
            raise OSError(f"/proc/sysvipc/{kind} cannot be read")
        header, *rows = (line.split() for line in text.splitlines())
        for row in rows:
            values = dict(zip(header, row, strict=False))
            owner, maker = int(values["uid"]), int(values["cuid"])
            if scope.owns(owner) or scope.owns(maker):
                yield Finding(
                    (option, values[id_column]), f"{words} {values[id_column]} (key {values['key']}) of uid {owner}"
                )


def remove_sysv(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Remove each by its id."""
    for finding in found:
        option, number = finding.subject
        try:
            run(["ipcrm", option, number])
            yield f"removed {finding.text}"
        except ToolFailed as error:
            yield str(error)


def look_for_queues(scope: Scope) -> Iterator[Finding]:
    """POSIX message queues of the tenant."""
    with _queues() as folder:
        for name in sorted(os.listdir(folder)):
            with contextlib.suppress(FileNotFoundError):  # its maker has just removed it
                owner = os.lstat(f"{folder}/{name}").st_uid
                if scope.owns(owner):
                    yield Finding(name, f"POSIX queue /{name} of uid {owner}")


def remove_queues(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Remove each by its name."""
    with _queues() as folder:
        for finding in found:
            yield from remove.remove(f"{folder}/{finding.subject}")


@contextlib.contextmanager
def _queues() -> Iterator[str]:
    """Where the queues can be seen: systemd mounts them; where nobody has, we do for a moment."""
    if any(m.target == _QUEUES and m.fstype == "mqueue" for m in mounts.listed()):
        yield _QUEUES
        return
    libc = ctypes.CDLL(None, use_errno=True)
    os.makedirs(_OWN_QUEUES, mode=0o700, exist_ok=True)
    if libc.mount(b"none", _OWN_QUEUES.encode(), b"mqueue", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "the file system of POSIX queues cannot be mounted")
    try:
        yield _OWN_QUEUES
    finally:
        libc.umount2(_OWN_QUEUES.encode(), 0)
        os.rmdir(_OWN_QUEUES)
