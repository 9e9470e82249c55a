"""A real Prometheus for tests: Debian's package, on a free port of loopback, in a folder that is gone afterwards.

Series come from the past by `load` (promtool writes them as blocks) or from targets that it scrapes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.portal import free_port
from tests.support.waiting import until

LEASH = ("setpriv", "--pdeathsig", "KILL")  # killed tests leave no server behind


@dataclass(frozen=True)
class Sample:
    """One value of one series; `at` in seconds since 1970."""

    name: str
    labels: Mapping[str, str]
    at: float
    value: float


def openmetrics(samples: Iterable[Sample]) -> str:
    """The text that promtool reads: metric families must stand together, so the samples are sorted by name."""
    lines = []
    for sample in sorted(samples, key=lambda each: each.name):
        labels = ",".join(f"{name}={json.dumps(value)}" for name, value in sorted(sample.labels.items()))
        lines.append(f"{sample.name}{{{labels}}} {float(sample.value)!r} {sample.at:.3f}")
    return "\n".join([*lines, "# EOF", ""])


@dataclass
class Server:
    """A folder with a configuration and blocks, and the process that serves them."""

    folder: Path
    config: Mapping[str, Any]
    flags: Sequence[str] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def load(self, samples: Iterable[Sample]) -> None:
        """Write these as blocks; before `start`."""
        text = self.folder / "samples.txt"
        text.write_text(openmetrics(samples))
        self.load_file(text)

    def load_file(self, text: Path, *flags: str) -> None:
        """promtool reads the whole file again for each block that it makes, and a block has two hours: for a long past
        give `--max-block-duration`.
        """
        argv = ["promtool", "tsdb", "create-blocks-from", *flags, "openmetrics", str(text), str(self.folder / "data")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    def start(self, *, timeout_s: float = 60.0) -> None:
        self.port = self.port or free_port("127.0.0.1")
        (self.folder / "prometheus.yml").write_text(json.dumps(self.config))  # JSON is YAML
        argv = [
            *LEASH, "prometheus",
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            "--storage.tsdb.retention.time=10y",
            f"--web.listen-address=127.0.0.1:{self.port}",
            *self.flags,
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        until(self._is_ready, "Prometheus to be ready", timeout_s=timeout_s, also=self.tail)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.tail()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:  # noqa: S310 - our own address
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def server(config: Mapping[str, Any] | None = None, *flags: str) -> Iterator[Server]:
    """A folder and a configuration (by default one that scrapes nothing); `start` it when its past is loaded."""
    with tempfile.TemporaryDirectory(prefix="remotegpu-prometheus-") as folder:
        made = Server(Path(folder), config or {}, flags)
        try:
            yield made
        finally:
            made.stop()
