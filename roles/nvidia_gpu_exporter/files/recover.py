#!/usr/bin/python3
"""Restart the exporter where the driver has recovered, or is another, and the exporter has not noticed.

The exporter asks nvidia-smi for the names of its fields once, when it starts. Started while the driver was broken it
goes on with names of its own, and with one that the driver does not know every later run fails, for ever. So does one
that was started under another driver. Looked at here by reading what it exports: nvidia-smi itself is run only after
the exporter has said twice that it fails, and not while one that was run before still hangs in the driver.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

UNIT = "nvidia-gpu-exporter.service"
SUCCESS = re.compile(r"^nvidia_smi_last_collect_success ([0-9.]+)$", re.MULTILINE)


def decide(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why to restart, or what to make sure of first; None to leave it alone.

    `before` and `now` are two looks: which start of the exporter it was (`invocation`), which `driver` was loaded (None
    is none), whether the exporter said that it `fails`.
    """
    if before.get("invocation") != now["invocation"]:
        return None  # it was started in between: this look is the first of that start
    if now["driver"] is not None and before.get("driver") != now["driver"]:
        return "changed"
    if before.get("fails") and now["fails"]:
        return "fails"
    return None


def main(argv: list[str]) -> int:
    options = parse(argv)
    now = look(options)
    before = read(options.state)
    why = decide(before, now)
    asked = Asked(options.state.with_name("asked.json"))
    if why == "changed" or (why == "fails" and not asked.hangs() and asked.answers(options.command, options.timeout)):
        code = subprocess.run(["systemctl", "try-restart", UNIT], check=False).returncode
        reason = "another driver is loaded" if why == "changed" else "nvidia-smi answers again"
        sys.stdout.write(f"{UNIT} was restarted, status {code}: {reason}\n")
        # What it was started under is known: a driver that is another by the next look is noticed then.
        options.state.write_text(json.dumps({**now, "invocation": invocation(), "fails": False}))
        return code
    options.state.write_text(json.dumps(now))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Restart the exporter where the driver has recovered.")
    parser.add_argument("--url", required=True, help="where the exporter answers")
    parser.add_argument("--driver", required=True, type=Path, help="the file in which the kernel names the driver")
    parser.add_argument("--state", required=True, type=Path, help="what was seen the last time")
    parser.add_argument("--timeout", required=True, type=float, help="seconds for each question")
    parser.add_argument("command", nargs="+", help="what the exporter runs")
    return parser.parse_args(argv)


def look(options: argparse.Namespace) -> dict[str, Any]:
    try:
        driver = options.driver.read_text(errors="replace").strip() or None
    except OSError:
        driver = None
    return {"invocation": invocation(), "driver": driver, "fails": fails(options.url, options.timeout)}


def invocation() -> str:
    """Which start of the exporter runs; empty while none does."""
    argv = ["systemctl", "show", UNIT, "--property=InvocationID", "--value"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()


def fails(url: str, timeout_s: float) -> bool:
    """Whether the exporter says that its last run of nvidia-smi failed. One that does not answer has not said so."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310 - the unit's own http address
            text = answer.read().decode(errors="replace")
    except OSError:
        return False
    found = SUCCESS.search(text)
    return found is not None and float(found.group(1)) == 0


class Asked:
    """The nvidia-smi that was asked last, by its process: one that hangs in the driver cannot be ended, and the next
    would hang beside it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def hangs(self) -> bool:
        """Whether it is there still."""
        known = read(self._file)
        return known.get("started") is not None and started(known.get("pid")) == known["started"]

    def answers(self, command: list[str], timeout_s: float) -> bool:
        """Whether nvidia-smi answers what the exporter asks. One that does not is told to end, and not waited for;
        never killed: a client of the driver that is can leave the GPU unusable.
        """
        quiet = subprocess.DEVNULL
        try:
            process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
        except OSError:
            return False
        self._file.write_text(json.dumps({"pid": process.pid, "started": started(process.pid)}))
        try:
            return process.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            process.terminate()
            return False


def started(pid: Any) -> str | None:
    """When the process was started, in the kernel's ticks, since its number may be another's by now; None where it is
    gone.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else rest[18]


def read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
