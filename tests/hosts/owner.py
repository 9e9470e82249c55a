"""Whose a host is: the checkout that it was booted for, and the run of it that will remove it.

On one machine there may be several checkouts, each with runs of its own, and one Docker engine for all. A host says in
its labels where it belongs, so that everybody removes their own and nobody else's, and so that what a killed run has
left behind is known from what is in use. A run names itself in REMOTEGPU_HOSTS_OF, for all that it starts; what is
booted outside of one stays until somebody removes it. Here is no Docker (docker.py).
"""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = str(Path(__file__).parents[2].resolve())
VARIABLE = "REMOTEGPU_HOSTS_OF"


def begin_run() -> None:
    """From here on this process removes the hosts that it boots or has booted, unless it is part of a run already."""
    os.environ.setdefault(VARIABLE, str(os.getpid()))


def keeps_hosts() -> bool:
    """Whether hosts are to stay, to be looked at."""
    return bool(os.environ.get("REMOTEGPU_KEEP_HOSTS"))


def find_owner() -> str | None:
    """The process of the run that removes what is booted now, for `is_gone`; None if that stays."""
    pid = os.environ.get(VARIABLE)
    return None if pid is None or keeps_hosts() else _describe(int(pid))


def user() -> int:
    """The pid of the process that needs the engine now: of the run, or this one."""
    return int(os.environ.get(VARIABLE) or os.getpid())


def _describe(pid: int) -> str:
    return f"{pid} {started_at(pid)} {_boot_id()} {_pids()}"


def is_gone(owner: str) -> bool:
    """Whether that very process has ended. One that cannot be seen from here, in another container, has not."""
    pid, since, boot, pids = owner.split()
    if boot != _boot_id():
        return True
    return pids == _pids() and started_at(int(pid)) != since


def started_at(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat: with it a pid is that very process. None: there is no such process any more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pids() -> str:
    """The namespace in which a pid means something."""
    return str(Path("/proc/self/ns/pid").readlink())
