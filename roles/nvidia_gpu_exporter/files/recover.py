#!/usr/bin/python3
"""Restart the exporter where the driver has recovered, or is another, and the exporter has not noticed.

The exporter asks nvidia-smi for the names of its fields once, when it starts. Started while the driver was broken it
goes on with names of its own, and with one that the driver does not know every later run fails, for ever. So does one
that was started under another driver. Looked at here by reading what it exports: nvidia-smi itself is run only after
the exporter has said twice that it fails.
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
    if why == "changed" or (why == "fails" and answers(options.command, options.timeout)):
        code = subprocess.run(["systemctl", "try-restart", UNIT], check=False).returncode
        reason = "another driver is loaded" if why == "changed" else "nvidia-smi answers again"
        sys.stdout.write(f"{UNIT} was restarted, status {code}: {reason}\n")
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


def answers(command: list[str], timeout_s: float) -> bool:
    """Whether nvidia-smi answers what the exporter asks."""
    quiet = subprocess.DEVNULL
    try:
        return (
            subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=timeout_s, check=False).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
