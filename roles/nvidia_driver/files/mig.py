#!/usr/bin/python3
"""Divides GPUs as they are to be: MIG mode survives a reboot, the instances that it makes do not.

    nvidia-mig --nvidia-smi=/usr/bin/nvidia-smi GPU-8f1b…=3g.40gb,3g.40gb GPU-77c0…=7g.80gb

Makes the instances of a GPU that has none. One that is divided otherwise is left as it is, since whoever uses an
instance would lose it; so is one whose MIG mode is off, since switching it wants a GPU that nobody uses. Each of them
is named with the way out, after all others were divided, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

TIMEOUT_S = 60.0
NO_INSTANCES = "No GPU instances found"


class Trouble(Exception):
    """Why a GPU is not divided as it should be, and the way out."""


class Gpu:
    """One GPU by its UUID, through nvidia-smi."""

    def __init__(self, uuid: str, nvidia_smi: str) -> None:
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
        argv = [self._nvidia_smi, *command, "-i", self.uuid, *rest]
        try:
            return subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise Trouble(f"nvidia-smi did not answer within {TIMEOUT_S:.0f} s: the driver hangs, reboot") from None
        except OSError as error:
            raise Trouble(f"{self._nvidia_smi}: {error.strerror}") from None


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What nvidia-smi could not do; it tells of what it could as well."""
    lines = [line.strip() for line in done.stdout.splitlines() if not line.startswith("Successfully")]
    return next(filter(None, lines), f"nvidia-smi ended with {done.returncode}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nvidia-mig", description="Divide GPUs as they are to be.")
    parser.add_argument("--nvidia-smi", default="/usr/bin/nvidia-smi")
    parser.add_argument("layout", nargs="+", metavar="UUID=PROFILE,PROFILE…")
    options = parser.parse_args(argv)
    status = 0
    for entry in options.layout:
        uuid, _, profiles = entry.partition("=")
        try:
            sys.stdout.write(f"{uuid} {Gpu(uuid, options.nvidia_smi).divide(profiles.split(','))}\n")
        except Trouble as trouble:
            sys.stderr.write(f"{uuid} is not divided as it should be: {trouble}\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
