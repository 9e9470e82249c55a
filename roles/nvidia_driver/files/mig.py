#!/usr/bin/python3
"""Divides GPUs as they are to be: MIG mode survives a reboot, the instances that it makes do not.

    nvidia-mig --asked=/run/remotegpu-mig/asked.json GPU-8f1b…=3g.40gb,3g.40gb GPU-77c0…=7g.80gb

Makes the instances of a GPU that has none. One that is divided otherwise is left as it is, since whoever uses an
instance would lose it; so is one whose MIG mode is off, since switching it wants a GPU that nobody uses. Each of them
is named with the way out, after all others were divided, and the exit status is 1. Where nvidia-smi hangs nothing more
is asked, now and as long as that process is there: it cannot be ended, and the next would hang beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
NO_INSTANCES = "No GPU instances found"


class Trouble(Exception):
    """Why a GPU is not divided as it should be, and the way out."""


class Gpu:
    """One GPU by its UUID, through nvidia-smi."""

    def __init__(self, uuid: str, nvidia_smi: NvidiaSmi) -> None:
        self.uuid, self._nvidia_smi = uuid, nvidia_smi

    def divide(self, wanted: list[str]) -> str:
        """What is true now, as a sentence. Raises Trouble."""
        current, pending = self._ask("--query-gpu=mig.mode.current,mig.mode.pending", "--format=csv,noheader").split(
            ", "
        )
        if current != "Enabled":
            waits = " (it is to be on after the GPU's next reset)" if pending == "Enabled" else ""
            raise Trouble(f"its MIG mode is off{waits}: while nobody uses it, nvidia-smi -i {self.uuid} -mig 1")
        there = self._instances()
        if sorted(there) == sorted(wanted):
            return f"is divided into {', '.join(wanted)}"
        if there:
            raise Trouble(
                f"it is divided into {', '.join(there)}, not into {', '.join(wanted)}: while nobody uses it, "
                f"nvidia-smi mig -i {self.uuid} -dci && nvidia-smi mig -i {self.uuid} -dgi, and start this again"
            )
        self._ask("mig", "-cgi", ",".join(wanted), "-C")
        return f"was divided into {', '.join(wanted)}"

    def _instances(self) -> list[str]:
        """The profiles of its instances, from the table that nvidia-smi draws."""
        done = self._run("mig", "-lgi")
        if NO_INSTANCES in done.stdout:
            return []
        if done.returncode != 0:
            raise Trouble(_complaint(done))
        return re.findall(r"^\|\s+\d+\s+MIG (\S+)", done.stdout, re.MULTILINE)

    def _ask(self, *arguments: str) -> str:
        done = self._run(*arguments)
        if done.returncode != 0:
            raise Trouble(_complaint(done))
        return done.stdout.strip()

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command, rest = (arguments[:1], arguments[1:]) if arguments[0] == "mig" else ((), arguments)
        return self._nvidia_smi.run(*command, "-i", self.uuid, *rest)


class NvidiaSmi:
    """The program, and what is known of the process that was asked last."""

    def __init__(self, program: str, asked: Path) -> None:
        self._program, self._asked = program, asked

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One that does not answer is told to end, and not waited for; never killed: a client of the driver that is
        can leave the GPU unusable. Raises Trouble.
        """
        self._refuse_beside_one_that_hangs()
        argv, pipe = [self._program, *arguments], subprocess.PIPE
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
            )
        except OSError as error:
            raise Trouble(f"{self._program}: {error.strerror}") from None
        self._asked.write_text(json.dumps({"pid": process.pid, "started": _started(process.pid)}))
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise Trouble(f"nvidia-smi did not answer within {TIMEOUT_S:.0f} s: the driver hangs, reboot") from None
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def _refuse_beside_one_that_hangs(self) -> None:
        try:
            known = json.loads(self._asked.read_text())
            pid, started = known["pid"], known["started"]
        except (OSError, ValueError, LookupError, TypeError):
            return
        if started is not None and _started(pid) == started:
            raise Trouble(f"nvidia-smi (process {pid}) has not answered yet: the driver hangs, reboot")


def _started(pid: Any) -> str | None:
    """When the process was started, in the kernel's ticks, since its number may be another's by now; None where it is
    gone.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else rest[18]


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What nvidia-smi could not do; it tells of what it could as well."""
    lines = [line.strip() for line in done.stdout.splitlines() if not line.startswith("Successfully")]
    return next(filter(None, lines), f"nvidia-smi ended with {done.returncode}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nvidia-mig", description="Divide GPUs as they are to be.")
    parser.add_argument("--nvidia-smi", default="/usr/bin/nvidia-smi")
    parser.add_argument(
        "--asked", required=True, type=Path, help="the file that remembers which process was asked last"
    )
    parser.add_argument("layout", nargs="+", metavar="UUID=PROFILE,PROFILE…")
    options = parser.parse_args(argv)
    nvidia_smi, status = NvidiaSmi(options.nvidia_smi, options.asked), 0
    for entry in options.layout:
        uuid, _, profiles = entry.partition("=")
        try:
            sys.stdout.write(f"{uuid} {Gpu(uuid, nvidia_smi).divide(profiles.split(','))}\n")
        except Trouble as trouble:
            sys.stderr.write(f"{uuid} is not divided as it should be: {trouble}\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
