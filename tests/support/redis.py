"""A Redis of a test's own, on loopback, that keeps nothing."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.portal import free_port
from tests.support.waiting import until


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """It ends with the block, also when the test has stopped or killed it."""
    port = free_port("127.0.0.1")
    argv = ["setpriv", "--pdeathsig", "TERM", "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with (folder / "redis.log").open("wb") as log:
        process = subprocess.Popen([*argv, "--dir", str(folder)], stdout=log, stderr=log)
    try:
        until(lambda: "Ready to accept" in (folder / "redis.log").read_text(), "Redis to start")
        yield Server(f"redis://127.0.0.1:{port}/0", process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait()
