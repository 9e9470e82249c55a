"""A PostgreSQL server for one test session: on a free port, without fsync, gone when the session is.

A test has a database to itself (`Databases`), as empty as its template and under a name that no test had before.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg2

DEADLINE_S = 60.0


def programs() -> Path:
    """The newest PostgreSQL's folder of programs. Raises RuntimeError that says what to install."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise RuntimeError("no PostgreSQL under /usr/lib/postgresql: apt-get install postgresql")
    return found[-1].parent


@contextmanager
def server() -> Iterator[str]:
    """Start a server and yield its address, `postgresql://postgres@127.0.0.1:PORT`."""
    folder = Path(tempfile.mkdtemp(prefix="remotegpu-pg-"))
    as_postgres = ["setpriv", "--pdeathsig", "INT"]  # killed tests leave no server behind
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        as_postgres[1:1] = ["--reuid=postgres", "--regid=postgres", "--init-groups"]
    data, port = folder / "data", _free_port()
    subprocess.run(
        [*as_postgres, programs() / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True, stdout=subprocess.DEVNULL, cwd=folder, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    options = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300",
               "listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": str(folder)}  # fmt: skip
    flags = [f"--{key}={value}" for key, value in options.items()]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*as_postgres, programs() / "postgres", "-D", data, *flags], stdout=log, stderr=log, cwd=folder
        )
    try:
        url = f"postgresql://postgres@127.0.0.1:{port}"
        _wait_for(url, process, folder / "log")
        yield url
    finally:
        process.send_signal(2)  # fast shutdown
        process.wait(DEADLINE_S)
        shutil.rmtree(folder, ignore_errors=True)


class Databases:
    """Copies of a template, for one test at a time.

    To copy one takes a third of a second of CPU, to empty one a tenth of that: where only its rows tell a database from
    a fresh copy, the next test has it, emptied; where a test changed its tables or settings, nobody has it again.
    """

    def __init__(self, server: str, *, template: str, prefix: str = "test") -> None:
        self._server = server
        self._template = template
        self._prefix = prefix
        self._numbers = itertools.count(1)
        self._spare: str | None = None
        self._untouched: Any = None  # what `_all_but_rows` says of the spare

    @contextmanager
    def one(self) -> Iterator[str]:
        """The address of a database, for as long as the block lasts; then whoever is still in it is thrown out."""
        name = f"{self._prefix}_{next(self._numbers)}"
        url = f"{self._server}/{name}"
        spare, self._spare = self._spare, None
        if spare:
            execute(self._server, f"ALTER DATABASE {spare} RENAME TO {name}")
        else:
            execute(self._server, f"CREATE DATABASE {name} TEMPLATE {self._template} STRATEGY FILE_COPY")
            with session(url) as cursor:
                self._untouched = _all_but_rows(cursor)
        yield url
        with session(url) as cursor:
            cursor.execute(OUT_WITH_THE_OTHERS)
            if is_like_new := _all_but_rows(cursor) == self._untouched:
                _empty(cursor)
        if is_like_new:
            self._spare = name
        else:
            execute(self._server, f"DROP DATABASE {name} WITH (FORCE)")


LEDGER = "schema_migration"  # the one table that has rows in an empty portal
OURS = "relnamespace = 'public'::regnamespace"
OUT_WITH_THE_OTHERS = """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""


def _all_but_rows(cursor: Any) -> Any:
    """Two answers differ when anything was done to a table, an index or a setting in between, or to the ledger."""
    cursor.execute(f"""
        SELECT (SELECT (count(*), max(xmin::text::bigint))::text FROM pg_class),
               (SELECT (count(*), max(xmin::text::bigint))::text FROM pg_attribute),
               (SELECT (count(*), max(xmin::text::bigint))::text FROM pg_constraint),
               (SELECT string_agg(setting::text, ' ') FROM pg_db_role_setting AS setting),
               (SELECT string_agg(row::text, ' ') FROM {LEDGER} AS row)""")  # noqa: S608 - our own names
    return cursor.fetchone()


def _empty(cursor: Any) -> None:
    """No row is left, and numbers begin at 1. A table that was never written to has no page, and is left alone."""
    cursor.execute(f"""
        SELECT quote_ident(relname) FROM pg_class
        WHERE relkind = 'r' AND {OURS} AND relname <> '{LEDGER}' AND pg_relation_size(oid) > 0""")  # noqa: S608
    written = [name for (name,) in cursor.fetchall()]
    cursor.execute("SET session_replication_role = replica")  # in any order: references are not followed
    for name in written:
        cursor.execute(f"DELETE FROM {name}")  # noqa: S608
    if written:
        cursor.execute(f"VACUUM (PROCESS_TOAST FALSE) {', '.join(written)}")  # gives the pages back
    cursor.execute(f"SELECT setval(oid, 1, false) FROM pg_class WHERE relkind = 'S' AND {OURS}")  # noqa: S608


def execute(url: str, *statements: str) -> None:
    """Run statements that no transaction may hold (CREATE and DROP DATABASE)."""
    with session(f"{url}/postgres") as cursor:
        for statement in statements:
            cursor.execute(statement)


@contextmanager
def session(url: str) -> Iterator[Any]:
    """Of a connection of its own, outside any transaction."""
    connection = psycopg2.connect(url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up_at and process.poll() is None:
        with suppress(psycopg2.OperationalError):
            return psycopg2.connect(f"{url}/postgres").close()
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
