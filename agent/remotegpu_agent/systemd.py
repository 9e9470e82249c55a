"""systemctl, as far as this agent needs it. Here is no decision; programs are started by `observe.tools`."""

import re
from datetime import datetime
from pathlib import Path

from remotegpu_agent.observe.tools import ToolFailed, run
from remotegpu_agent.protocol import format_time, parse_time

__all__ = ["ToolFailed", "run"]

ALIVE = ("active", "activating", "deactivating", "reloading", "refreshing")
TRANSIENT_DIR = Path("/run/systemd/transient")


def show(unit: str, *properties: str) -> dict[str, str]:
    """Properties of a unit by name. A unit that does not exist has LoadState=not-found. Raises ToolFailed."""
    printed = run(["systemctl", "show", unit, *(f"--property={name}" for name in properties)])
    return dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)


def alive(units: list[str]) -> set[str]:
    """Those of the units that run, start or are being stopped. Raises ToolFailed."""
    if not units:
        return set()
    printed = run(["systemctl", "show", "--property=Id", "--property=ActiveState", *units])
    shown = (dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in printed.split("\n\n"))
    return {unit["Id"] for unit in shown if unit.get("ActiveState") in ALIVE}


def is_loaded(unit: str) -> bool:
    """Whether a transient unit, named with its suffix, is still there. Reads systemd's record; starts no process."""
    return (TRANSIENT_DIR / unit).exists()


def stop(unit: str, *, wait: bool = False) -> None:
    """Stop the unit; no error if there is none. Raises ToolFailed."""
    run(["systemctl", "stop", *([] if wait else ["--no-block"]), unit], ok=(0, 5), timeout_s=120)


def kill(unit: str, signal: str) -> None:
    """Send a signal to every process of the unit; no error if there is none. Raises ToolFailed."""
    run(["systemctl", "kill", f"--signal={signal}", unit], ok=(0, 1, 5))


def start_timer(unit: str, at: datetime, argv: list[str], *, description: str) -> None:
    """Run a program once at this moment, as root, whatever becomes of us. Raises ToolFailed, also when it is armed
    already.
    """
    run(
        [
            "systemd-run",
            "--quiet",
            "--no-block",
            "--collect",
            f"--unit={unit}",
            f"--description={description}",
            f"--on-calendar={calendar(at)}",
            "--timer-property=AccuracySec=100ms",
            "--",
            *argv,
        ]
    )


def calendar(at: datetime) -> str:
    """A moment as systemd's calendar writes it; always in UTC, so that the host's time zone has no say."""
    return format_time(at).replace("T", " ").replace("Z", " UTC")


def find_timer(unit: str) -> datetime | None:
    """When this transient timer elapses; None when it is not loaded. Reads systemd's own record: no process is
    started.
    """
    try:
        text = (TRANSIENT_DIR / f"{unit}.timer").read_text()
    except OSError:
        return None
    found = re.search(r"^OnCalendar=(\S+) (\S+) UTC$", text, re.MULTILINE)
    return parse_time(f"{found[1]}T{found[2]}Z") if found else None
