"""SSH connections that outlive the process which opened them (ControlPersist), of one run.

OpenSSH writes its title over a master's environment, so that the run's mark is not seen there: masters are found by
their sockets, which lie in the run's private directory. Processes with a mark are in processes.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

FOLDER = "cp"
MAX_SOCKET_BYTES = 108 - 1 - 17  # sun_path, its final zero, and the suffix ssh binds under before it renames
NAME_BYTES = 1 + 10  # what Ansible calls a socket


def folder(directory: Path) -> Path | None:
    """Where the sockets of a run lie, or None if its path is too long for a socket: then no connection is shared."""
    wanted = directory / FOLDER
    return wanted if len(str(wanted).encode()) + NAME_BYTES <= MAX_SOCKET_BYTES else None


def end(directory: Path) -> None:
    """End every master of the run in `directory`, and with it what still talks through it. Never raises."""
    for socket in (directory / FOLDER).glob("*"):
        argv = ["ssh", "-F", "none", "-o", f"ControlPath={socket}", "-O", "exit", "remotegpu"]
        try:
            subprocess.run(argv, capture_output=True, timeout=3, check=False, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            continue
