"""The database: one proxy, one way to open a transaction, one clock.

Every write happens inside `atomic()`. On SQLite that takes the write lock at once (BEGIN IMMEDIATE) and waits for it
without blocking the other greenlets of the process; on PostgreSQL it is an ordinary transaction. No table is defined
here (`models/`), and no rule (`services/`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import peewee
import psycopg2
from playhouse.pool import MaxConnectionsExceeded, PooledPostgresqlDatabase
from psycopg2.errors import ReadOnlySqlTransaction

LOCK_WAIT_S = 30.0  # how long a writer waits for another writer before it gives up
STALLED_S = 60.0  # after this long without a word inside a transaction, PostgreSQL takes its locks away
SYNCHRONOUS = "full"  # what was answered as kept survives a power cut; in WAL mode that is one fsync a commit
BUSY_TIMEOUT_MS = 20  # inside SQLite's C code no greenlet can run, so it gives up soon and we wait ourselves

AWAY = (peewee.OperationalError, peewee.InterfaceError, MaxConnectionsExceeded)
"""What asking raises while the database cannot answer: it is down, a standby, held by another writer, or out of
connections. It is over by itself, so asking again is worth it."""

db = peewee.DatabaseProxy()


def utcnow() -> datetime:
    """The time now, aware, in UTC."""
    return datetime.now(UTC)


def shared_now() -> datetime:
    """The time by the one clock of all processes: the server's on PostgreSQL; with SQLite they are on one machine.

    Who holds something until when is told by it: a worker whose clock is ahead must not take what is another's.
    """
    if is_sqlite():
        return utcnow()
    moment: datetime = db.execute_sql("SELECT clock_timestamp()").fetchone()[0]
    return moment.astimezone(UTC)


def connect(url: str, *, max_connections: int = 20) -> peewee.Database:
    """Bind the proxy to the database at `url` and return it.

    `sqlite:///path` (relative) or `sqlite:////path` (absolute), or `postgresql://user:password@host:port/name?sslmode=…`.
    Raises ValueError that names what is wrong with the URL.
    """
    database = _sqlite(url) if url.startswith("sqlite:") else _postgresql(url, max_connections)
    db.initialize(database)
    return database


def _sqlite(url: str) -> peewee.Database:
    path = url.removeprefix("sqlite:///")
    if path == url or not path:
        raise ValueError(f"DATABASE_URL: {url!r} names no file; write sqlite:///instance/remotegpu.db")
    Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pragmas = {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "synchronous": SYNCHRONOUS,
        "busy_timeout": BUSY_TIMEOUT_MS,
        "cache_size": -16000,
    }
    return _Sqlite(path, pragmas=pragmas)


class _Sqlite(peewee.SqliteDatabase):
    """Waits for another writer, letting other greenlets run, as PostgreSQL does: for a transaction, and for a statement
    of its own. Inside a transaction nobody waits: the lock is ours.
    """

    def begin(self, lock_type: str | None = None) -> None:
        begin: Callable[..., Any] = super().begin
        self._patiently(lambda: begin(lock_type))

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        execute: Callable[..., Any] = super().execute_sql
        if self.in_transaction():
            return execute(sql, params)
        return self._patiently(lambda: execute(sql, params))

    @staticmethod
    def _patiently(act: Callable[[], Any]) -> Any:
        give_up_at = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                return act()
            except peewee.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up_at:
                    raise
            time.sleep(random.uniform(0.002, 0.02))  # noqa: S311 - spreads the writers, protects nothing


def _postgresql(url: str, max_connections: int) -> peewee.Database:
    parts = urlsplit(url)
    name = parts.path.lstrip("/")
    if parts.scheme not in ("postgresql", "postgres") or not name:
        raise ValueError("DATABASE_URL: write postgresql://USER:PASSWORD@HOST:PORT/NAME or sqlite:///FILE")
    options = dict(pair.split("=", 1) for pair in parts.query.split("&") if "=" in pair)
    options = {key: unquote(value) for key, value in options.items()}
    pool: peewee.Database = _Postgresql(
        unquote(name),
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        host=options.pop("host", parts.hostname),
        port=parts.port or 5432,
        max_connections=max_connections,
        stale_timeout=300,
        timeout=LOCK_WAIT_S,  # for a connection: whoever holds one may be waiting for another writer
        options=f"{_session()} {options.pop('options', '')}".strip(),
        **options,
    )
    return pool


class _Postgresql(PooledPostgresqlDatabase):  # type: ignore[misc]  # playhouse has no types
    """Says that it is AWAY where peewee says something else: it has no word for a deadlock, and takes it for an error
    of ours that a standby does not write."""

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        try:
            return super().execute_sql(sql, params)
        except psycopg2.OperationalError as error:  # of a class that peewee does not know
            raise peewee.OperationalError(error, *error.args) from error
        except peewee.InternalError as error:
            if not isinstance(error.__context__, ReadOnlySqlTransaction):
                raise
            self.connection().close()  # the next one may lead to the primary; this one never will
            raise peewee.OperationalError(*error.args) from error


def _session() -> str:
    """What our transactions rely on, whatever the server's or the role's defaults are.

    Each statement sees what was committed before it: so a check made after `machines.lock` is true. Nobody waits for
    ever for a process that hangs inside a transaction.
    """
    wanted = {
        "timezone": "UTC",
        "default_transaction_isolation": r"read\ committed",
        "lock_timeout": f"{LOCK_WAIT_S * 1000:.0f}ms",
        "idle_in_transaction_session_timeout": f"{STALLED_S * 1000:.0f}ms",
    }
    return " ".join(f"-c {name}={value}" for name, value in wanted.items())


def id_above(table: type[peewee.Model], floor: int) -> dict[str, int]:
    """The id of the next row, where it has to be greater than `floor`; empty where the database counts on by itself."""
    if floor == 0:
        return {}
    if is_sqlite():  # one writer at a time; the next id is the greatest one's follower
        newest: int = table.select(peewee.fn.MAX(table._meta.primary_key)).scalar() or 0
        return {"id": floor + 1} if newest < floor else {}
    name, number, steps = table._meta.table_name, 0, 1
    while number <= floor:
        following = "SELECT MAX(nextval(pg_get_serial_sequence(%s, 'id'))) FROM generate_series(1, %s)"
        (number,) = db.execute_sql(following, (name, steps)).fetchone()
        steps = floor + 1 - number
    return {"id": number}


def is_sqlite() -> bool:
    return isinstance(db.obj, peewee.SqliteDatabase)


@contextmanager
def atomic() -> Iterator[None]:
    """A transaction, or a savepoint inside one. Nothing slow belongs in it: no host, no HTTP, no password hash."""
    lock = ["IMMEDIATE"] if is_sqlite() and not db.in_transaction() else []
    with db.atomic(*lock):
        yield


def one_at_a_time(*words: str) -> None:
    """Until this transaction ends, whoever else comes with one of these words waits here: for rules over rows that are
    counted, not changed. All who hold two name them in the same order. SQLite has one writer at a time anyway.
    """
    if not is_sqlite():
        for word in words:
            db.execute_sql("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (word,))


@contextmanager
def connection() -> Iterator[None]:
    """A connection for as long as the block lasts; nested blocks share it. Waiting belongs outside."""
    opened = db.connect(reuse_if_open=True)
    try:
        yield
    finally:
        if opened and not db.is_closed():
            db.close()


def release_connection() -> None:
    """Give this thread's connection back before it waits for somebody else; the next query opens one again.

    A process has few of them: those who wait must leave them to the others. Inside a transaction it is kept.
    """
    if db.obj is not None and not db.is_closed() and not db.in_transaction():
        db.close()
