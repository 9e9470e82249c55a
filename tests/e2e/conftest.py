"""A portal as processes, and hosts that were onboarded through it: once a module for each kind of database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests import postgresql
from tests.e2e.world import INSTALLER_PASSWORD, World
from tests.hosts import Host
from tests.hosts.docker import boot, gateway_address, unique
from tests.hosts.fixtures import operator_key
from tests.support import redis
from tests.support.portal import Portal, running

__all__ = ["operator_key"]

SUITES = ("bookworm", "trixie")
POISON = "{{ lookup('pipe', 'touch %s') }}"


@dataclass
class House:
    """A world and its hosts, by suite."""

    world: World
    hosts: dict[str, Host]
    poisoned: Path  # exists once anything was taken for a template; short, since a name has 100 characters


# Which hosts stand beside a portal of that kind. `make test` has both releases on SQLite, and one on PostgreSQL.
SUITES_OF = {"sqlite": SUITES, "postgresql": ("trixie",), "postgresql-bookworm": ("bookworm",), "bare": SUITES}
KINDS = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.postgresql),
    pytest.param("postgresql-bookworm", marks=[pytest.mark.postgresql, pytest.mark.slow]),
    pytest.param("bare", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=KINDS)
def house(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, operator_key: Path
) -> Iterator[House]:
    """Web and worker as separate processes, and hosts beside them.

    Each has the packages that the roles install, and nothing is configured: downloads would take most of the time. Of
    the kind `bare` (on SQLite) it has nothing but what an installation of Debian leaves, and `at`: no role installs
    that, and a tenant may leave something in it.
    """
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        environ = {"REPORT_INTERVAL_S": "1", "OFFLINE_AFTER_S": "10"}
        if request.param.startswith("postgresql"):
            environ["DATABASE_URL"] = stack.enter_context(a_database())
            environ["REDIS_URL"] = stack.enter_context(redis.server(folder)).url
        suites = SUITES_OF[request.param]
        hosts = {suite: stack.enter_context(booted(suite, request.param, operator_key)) for suite in suites}
        portal = Portal(folder / "instance", address=gateway_address(), environ=environ)
        stack.enter_context(running(portal))
        admin = portal.set_up()
        portal.start("worker")
        poisoned = Path(stack.enter_context(TemporaryDirectory())) / "poisoned"
        yield House(World(portal, admin, folder), hosts, poisoned)


@contextmanager
def booted(suite: str, kind: str, operator_key: Path) -> Iterator[Host]:
    name = unique(f"rental-{kind[:4]}-{suite}")
    host = boot(name, suite, prepared=kind != "bare", password=INSTALLER_PASSWORD)
    try:
        host.authorize("ops", operator_key.with_suffix(".pub").read_text())
        if kind == "bare":
            host.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends at", timeout_s=300)
        yield host
    finally:
        host.destroy()


@contextmanager
def a_database() -> Iterator[str]:
    """An empty PostgreSQL database of a server of its own."""
    with postgresql.server() as url:
        postgresql.execute(url, "CREATE DATABASE rental")
        yield f"{url}/rental"
