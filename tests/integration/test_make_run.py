"""`make run DATABASE_URL=… REDIS_URL=… PUBLIC_URL=…`, word for word, with real servers behind it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
import requests

from tests import postgresql
from tests.support import redis
from tests.support.make_run import Started, make_run
from tests.support.portal import ROOT, Client

pytestmark = [pytest.mark.postgresql, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """An empty database and an empty Redis."""
    with postgresql.server() as url, redis.server(tmp_path) as cache:
        postgresql.execute(url, "CREATE DATABASE remotegpu")
        yield f"{url}/remotegpu", cache.url


def test_the_portal_lives_in_the_database_and_the_redis_that_it_was_given(
    servers: tuple[str, str], tmp_path: Path
) -> None:
    database, cache = servers
    words = (f"DATABASE_URL={database}", f"REDIS_URL={cache}")
    assert all(word.partition("=")[0] in (ROOT / "README.md").read_text() for word in words)
    with make_run(tmp_path / "instance", *words) as started:
        assert started.password is not None
        admin = Client(started.portal)
        admin.sign_in_first_time("admin", started.password)
        admin.post("admin/tenants", name="Quark Labs")
        assert said_by(started) == []
    assert {"user", "machine", "lease", "tenant"} <= tables(database)
    assert rows(database, "SELECT name FROM tenant") == [("Quark Labs",)]
    assert keys_of(cache) != [], "nothing went to Redis"
    assert list((tmp_path / "instance").glob("*.db*")) == [], "something went to SQLite"

    with make_run(tmp_path / "instance", *words) as again:
        assert again.password is None
        assert requests.get(again.portal.url, verify=str(again.portal.ca_file), timeout=10).status_code == 200
    assert rows(database, "SELECT name FROM tenant") == [("Quark Labs",)]


def said_by(started: Started) -> list[str]:
    """What it complained of."""
    return re.findall(r"Traceback.*|.*does not keep running.*", started.console.read_text())


def rows(database: str, query: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(database)
    try:
        with connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())
    finally:
        connection.close()


def tables(database: str) -> set[object]:
    return {name for (name,) in rows(database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def keys_of(cache: str) -> list[str]:
    return subprocess.run(
        ["redis-cli", "-u", cache, "--scan"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
