"""Ending what would start again: the lease's user manager and lingering. Cron and at are files: see restored.py."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator

from remotegpu_agent.cleaning import data, remove
from remotegpu_agent.cleaning.processes import stop_unit, wait_until
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding
from remotegpu_agent.observe import files, processes
from remotegpu_agent.observe.tools import ToolFailed, read_text, run

_LINGER = "/var/lib/systemd/linger"
_USER_UNITS = (".config/systemd", ".local/share/systemd")
_MOST_UNITS = 1000  # that are told; the whole folder goes in any case


def look_for_linger(scope: Scope) -> Iterator[Finding]:
    """Whose services would be started at boot without anybody's login."""
    try:
        names = sorted(os.listdir(_LINGER))
    except FileNotFoundError:
        names = []
    for name in names:
        if name not in scope.sections["linger"]:
            yield Finding(f"{_LINGER}/{name}", f"{_LINGER}/{name}: services of {name} run without a login")


def end_linger(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Tell logind, and remove the mark where logind does not know the name any more."""
    for finding in found:
        with contextlib.suppress(ToolFailed):
            run(["loginctl", "disable-linger", os.path.basename(finding.subject)], timeout_s=10)
        yield from remove.remove(finding.subject)


def look_for_user_units(scope: Scope) -> Iterator[Finding]:
    """Unit files in the tenant's home, and the user manager that runs them (disabling linger does not end it)."""
    for folder in (f"{scope.home}/{name}" for name in _USER_UNITS):
        for path in itertools.islice(files.below(folder), _MOST_UNITS):
            yield Finding(folder, path)
    for uid in sorted(scope.uids):
        state = re.search(r"^STATE=(.*)$", read_text(f"/run/systemd/users/{uid}") or "", re.MULTILINE)
        if state and state.group(1) != "closing":  # for some seconds logind remembers whom it has let go
            yield Finding(uid, f"logind has user {uid} as {state.group(1)}")
    for process in processes.listed():
        for uid in scope.uids:
            if process.name == "systemd" and process.in_slice_of(uid):
                yield Finding(uid, f"{process} is a user manager")


def end_user_units(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """End the manager with all it runs, then take its units away."""
    for uid in sorted({finding.subject for finding in found if isinstance(finding.subject, int)}):
        with contextlib.suppress(ToolFailed):
            run(["loginctl", "terminate-user", str(uid)], timeout_s=10)
        for unit in (f"user-{uid}.slice", f"user@{uid}.service", f"user-runtime-dir@{uid}.service"):
            yield from stop_unit(unit)
    for folder in sorted({finding.subject for finding in found if isinstance(finding.subject, str)}):
        yield from data.detach_below(folder)
        yield from remove.remove(folder)
    wait_until(lambda: not list(look_for_user_units(scope)))
