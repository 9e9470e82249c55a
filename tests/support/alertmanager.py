"""A real Alertmanager for tests: Debian's package, on a free port of loopback, in a folder that is gone afterwards."""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.portal import free_port
from tests.support.waiting import until

LEASH = ("setpriv", "--pdeathsig", "KILL")  # killed tests leave no server behind


@dataclass
class Server:
    """A folder with a configuration, and the process that serves it."""

    folder: Path
    config: Mapping[str, Any]
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        self.port = self.port or free_port("127.0.0.1")
        (self.folder / "alertmanager.yml").write_text(json.dumps(self.config))  # JSON is YAML
        argv = [
            *LEASH, "prometheus-alertmanager",
            f"--config.file={self.folder / 'alertmanager.yml'}",
            f"--storage.path={self.folder / 'data'}",
            f"--web.listen-address={self.address}",
            "--cluster.listen-address=",
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        until(self._is_ready, "Alertmanager to be ready", timeout_s=60, also=self.tail)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Its API, version 2."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - our own address
            f"{self.url}/api/v2/{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - our own address
            content = answer.read()
        return json.loads(content) if content else None

    def tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.tail()
        try:
            return bool(self.ask("GET", "status"))
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def server(config: Mapping[str, Any]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="remotegpu-alertmanager-") as folder:
        made = Server(Path(folder), config)
        try:
            yield made
        finally:
            made.stop()
