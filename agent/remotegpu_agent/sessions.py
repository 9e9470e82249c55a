"""SSH sessions of a login that many share: which key opened each, and ending those whose key opens nothing any more.

sshd says it once, in the journal, when it lets somebody in; which process said so is the journal's own word, not a
text's. Where nothing is found any more (whoever is in can fill the journal), the session counts as opened by a key that
is gone: better somebody signs in anew than that somebody stays. The lease's end needs none of this: see killing.py.
"""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from remotegpu_agent import killing
from remotegpu_agent.observe.tools import ToolFailed, run

ACCEPTED = re.compile(r"Accepted publickey for (\S+) from \S+ port \d+ ssh2: \S+ (SHA256:\S+)")
SIGNING_IN_S = 1.0  # how long somebody who is just signing in may take to be known
PAUSE_S = 0.1


def end_all_but(login: str, fingerprints: Collection[str]) -> int:
    """End every session of the login, with what it started, that none of these keys opened; how many there were.

    To be called when no other key opens one any more. What a session has left in the background is nobody's by then.
    """
    found = _sessions_of(login)
    openers = _openers(login, found)
    deadline = time.monotonic() + SIGNING_IN_S
    while found.keys() - openers.keys() and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
        openers = _openers(login, found)
    still = _sessions_of(login)
    gone = [pid for pid in found if openers.get(pid) not in fingerprints and still.get(pid) == found[pid]]
    for pid in _with_descendants(gone):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(gone)


def _sessions_of(login: str) -> dict[int, float]:
    """sshd's own process of each connection → when it began, in seconds since the boot."""
    processes = _processes()
    ours = killing.sshd_of(login) & processes.keys()
    return {pid: processes[pid][1] for pid in ours if processes[pid][0] not in ours}


def _openers(login: str, sessions: Mapping[int, float]) -> dict[int, str]:
    """The fingerprint of the key that opened each session, of those that the journal still knows."""
    if not sessions:
        return {}
    said_by = [f"_PID={pid}" for pid in sessions]
    fields = "--output-fields=MESSAGE,_PID"
    try:
        printed = run(["journalctl", "--boot", "--quiet", "--no-pager", "--output=json", fields, "_UID=0", *said_by])
    except ToolFailed:
        return {}
    return read_openers(printed.splitlines(), login, sessions)


def read_openers(records: Iterable[str], login: str, sessions: Mapping[int, float]) -> dict[int, str]:
    """What the journal's records say. One from before a session's beginning is of another that had its number."""
    openers = {}
    for line in records:
        record = json.loads(line)
        pid, message = int(record["_PID"]), record.get("MESSAGE")
        said = ACCEPTED.match(message) if isinstance(message, str) else None
        at = int(record["__MONOTONIC_TIMESTAMP"]) / 1e6
        if said and said[1] == login and at >= sessions.get(pid, at + 1):
            openers[pid] = said[2]
    return openers


def _with_descendants(pids: Iterable[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in _processes().items():
        children.setdefault(parent, []).append(pid)
    found, waiting = set(), list(pids)
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += children.get(pid, [])
    return found


def _processes() -> dict[int, tuple[int, float]]:
    """Every process → its parent, and when it began, in seconds since the boot."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(name)] = int(fields[1]), int(fields[19]) / ticks
    return found
