"""SSH connections that outlive the process which opened them (ControlPersist), of one run.

OpenSSH writes its title over a master's environment, so that the run's mark is not seen there: masters are found by
their sockets. Those lie in a short path, since a socket's may have 108 bytes only, in a folder of the run's own: a
connection is never shared with another run, which may pin another key. Processes with a mark are in processes.py.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

PLACE = Path("/tmp")  # noqa: S108 - short, and the same for worker and executor; the name cannot be guessed, see below


def folder(directory: Path) -> Path:
    """Where the sockets of the run in `directory` lie. Derived from its name, which holds the run's random token."""
    return PLACE / f"remotegpu-{hashlib.sha256(directory.name.encode()).hexdigest()[:16]}"


def make(directory: Path) -> Path:
    """The empty folder, 0700. Raises FileExistsError if somebody was there first."""
    path = folder(directory)
    path.mkdir(mode=0o700)
    return path


def end(directory: Path) -> None:
    """End every master of the run, with it what still talks through it, and remove the folder. Never raises."""
    path = folder(directory)
    for socket in path.glob("*"):
        argv = ["ssh", "-F", "none", "-o", f"ControlPath={socket}", "-O", "exit", "remotegpu"]
        try:
            subprocess.run(argv, capture_output=True, timeout=3, check=False, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            continue
    shutil.rmtree(path, ignore_errors=True)
