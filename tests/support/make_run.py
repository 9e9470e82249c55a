"""`make run` in this checkout, as a person types it: start it, read what it prints, end it with Ctrl-C.

The instance is a folder of the caller's; what make sets up (packages, assets) is this checkout's own and is there
already. A bare machine and a terminal are tests/e2e/test_fresh_machine.py's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.portal import ROOT, Portal, free_port
from tests.support.waiting import until

START_S = 300.0  # a busy machine
STOP_S = 30.0
# What would decide beside the words on the command line.
OTHERS = ("DATABASE_URL", "REDIS_URL", "PUBLIC_URL", "BIND", "INSTANCE_DIR", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")


@dataclass
class Started:
    """A portal that answers, after so many seconds."""

    portal: Portal
    console: Path
    seconds: float

    @property
    def password(self) -> str | None:
        """The one-time password of the first administrator; None where none was printed."""
        shown = re.search(r"one-time password: (\S+)", self.console.read_text())
        return shown[1] if shown else None


@contextmanager
def make_run(instance: Path, *words: str) -> Iterator[Started]:
    """`make run` with these words (`DATABASE_URL=…`) until the block ends; it says where it answers by then."""
    portal = Portal(instance, port=free_port("127.0.0.1"))
    console = instance.parent / f"{instance.name}.console"
    argv = ["make", "run", f"INSTANCE_DIR={instance}", f"PUBLIC_URL={portal.url}", *words]
    environ = {name: value for name, value in os.environ.items() if name not in OTHERS}
    with console.open("wb") as file:
        began = time.monotonic()
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )

    def answers() -> bool:
        assert process.poll() is None, console.read_text()
        return f"RemoteGPU answers at {portal.url} " in console.read_text()

    try:
        until(answers, "make run to say where it answers", timeout_s=START_S, every_s=0.02, also=console.read_text)
        yield Started(portal, console, time.monotonic() - began)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to make and to what it started
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
