"""Test hosts as pytest fixtures; a conftest takes them with `from tests.hosts.fixtures import *` or by name.

`boot_host` boots hosts for one test, `prepared_host` gives one per suite for the session. What they booted is removed
by id, whatever the test did; with REMOTEGPU_KEEP_HOSTS=1 it stays, to look at. `libraries` are for tests that have the
fake GPUs without a host.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.hosts.docker import Host, boot, unique
from tests.hosts.owner import keeps_hosts

# The rental goes over both suites in `make test`; what is told in detail is told on Debian 13 there, and on both in
# `make test-all`.
EACH_SUITE = (pytest.param("bookworm", marks=pytest.mark.slow), "trixie")

__all__ = ["EACH_SUITE", "boot_host", "libraries", "operator_key", "prepared_host"]

GPU_DIR = Path(__file__).parents[2] / "molecule" / "image" / "gpu"


class BootHost(Protocol):
    def __call__(
        self, suite: str, *, prepared: bool = True, password: str | None = None, gpus: int = 2, name: str | None = None
    ) -> Host: ...


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake library in its builds: current/, old-driver/ and early-535/."""
    if not shutil.which(os.environ.get("CC", "gcc")):
        pytest.fail("the fake GPU library is written in C: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("fake-gpu")
    subprocess.run([GPU_DIR / "build", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def operator_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The private key that `ops` on every host of these fixtures accepts; the public one lies beside it (.pub)."""
    path = tmp_path_factory.mktemp("operator") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "operator", "-f", path], check=True)
    return path


@pytest.fixture
def boot_host(request: pytest.FixtureRequest, operator_key: Path) -> Iterator[BootHost]:
    """Boots hosts that live as long as the test; they are named after it."""
    with _Booted(request.node.name, operator_key) as booted:
        yield booted.boot


@pytest.fixture(scope="session")
def prepared_host(operator_key: Path) -> Iterator[Callable[[str], Host]]:
    """One prepared host of each suite for the whole session, booted when first asked for: `prepared_host("trixie")`.

    It is shared: a test leaves it as it found it, or boots its own.
    """
    hosts: dict[str, Host] = {}
    with _Booted("session", operator_key) as booted:

        def of_suite(suite: str) -> Host:
            if suite not in hosts:
                hosts[suite] = booted.boot(suite)
            return hosts[suite]

        yield of_suite


class _Booted:
    """Hosts that end together."""

    def __init__(self, what_for: str, key: Path) -> None:
        self._prefix = re.sub(r"[^a-z0-9]+", "-", what_for.lower()).strip("-")[:40].rstrip("-")
        self._public_key = key.with_suffix(".pub").read_text()
        self._hosts: list[Host] = []

    def __enter__(self) -> _Booted:
        return self

    def __exit__(self, *_: object) -> None:
        if keeps_hosts():
            return
        for host in self._hosts:
            host.destroy()

    def boot(
        self, suite: str, *, prepared: bool = True, password: str | None = None, gpus: int = 2, name: str | None = None
    ) -> Host:
        called = name or unique(f"{self._prefix}-{suite}")
        host = boot(called, suite, prepared=prepared, password=password, gpus=gpus)
        self._hosts.append(host)
        host.authorize("ops", self._public_key)
        return host
