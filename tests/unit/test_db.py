"""What the portal relies on in a session of its database, and how it bears one that cannot answer."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peewee
import psycopg2
import pytest

from portal import db
from portal.db import utcnow
from portal.integrations import wake
from portal.integrations.wake import Wake
from portal.models import Machine, MachineReport
from portal.services import events, heartbeats, machines
from portal.services.heartbeats import Heartbeat
from tests.factories import make_machine
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
ON_POSTGRESQL = pytest.mark.parametrize(
    "database_url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)


def reconnect(url: str, **given: Any) -> Any:
    db.db.close_all()
    return db.connect(url, **given)


@pytest.fixture
def holder(database: Any, database_url: str) -> Iterator[Any]:
    """Another program that has begun a transaction, took the row of the only machine, and hangs."""
    make_machine("gpu-1")
    connection = psycopg2.connect(database_url)
    connection.cursor().execute("UPDATE machine SET remark = 'mine'")
    yield connection
    connection.close()


@ON_POSTGRESQL
def test_checks_see_what_was_committed_before_them_whatever_the_server_s_default_is(
    database: Any, database_url: str
) -> None:
    """In a stricter isolation every second one of two who come at once would fail with an error of the database."""
    name = database_url.rpartition("/")[2]
    database.execute_sql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    database.execute_sql(f"ALTER DATABASE {name} SET timezone = 'Asia/Shanghai'")
    fresh = reconnect(database_url)
    shown = [fresh.execute_sql(f"SHOW {setting}").fetchone()[0] for setting in ("transaction_isolation", "timezone")]
    assert shown == ["read committed", "UTC"]


@ON_POSTGRESQL
def test_options_of_the_address_are_added_to_ours(database: Any, database_url: str) -> None:
    fresh = reconnect(f"{database_url}?options=-c%20statement_timeout%3D7s&application_name=trial")
    shown = [fresh.execute_sql(f"SHOW {setting}").fetchone()[0] for setting in ("statement_timeout", "timezone")]
    assert shown == ["7s", "UTC"]


@ON_POSTGRESQL
def test_who_waits_for_a_program_that_hangs_is_told_so_in_the_end(
    database: Any, database_url: str, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "LOCK_WAIT_S", 0.2)
    reconnect(database_url)
    with pytest.raises(db.AWAY, match="lock timeout"), db.atomic():
        machines.lock(Machine.get())


@ON_POSTGRESQL
def test_of_two_who_wait_for_each_other_one_is_told_to_come_again(database: Any, database_url: str) -> None:
    first, second = make_machine("gpu-1"), make_machine("gpu-2")
    other = psycopg2.connect(database_url, options="-c deadlock_timeout=1h")
    other.cursor().execute("UPDATE machine SET remark = 'theirs' WHERE id = %s", (second.id,))
    want_first = threading.Thread(
        target=lambda: other.cursor().execute("UPDATE machine SET remark = 'theirs' WHERE id = %s", (first.id,))
    )
    try:
        _wait_for_each_other(first, second, want_first)
        want_first.join(10)
        assert not want_first.is_alive(), "the other one goes on"
    finally:
        other.close()


def _wait_for_each_other(first: Machine, second: Machine, want_first: threading.Thread) -> None:
    with db.atomic():
        machines.lock(first)
        want_first.start()
        with pytest.raises(db.AWAY, match="deadlock detected"):
            machines.lock(second)


def hold_until_another_writes(machine: Machine, other: Any) -> None:
    with db.atomic():
        machines.lock(machine)
        other.cursor().execute("UPDATE machine SET remark = 'free'")  # returns when the lock is taken away
        other.commit()
        machines.get(machine.id)


@ON_POSTGRESQL
def test_a_program_that_hangs_inside_a_transaction_loses_its_locks(
    database: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "STALLED_S", 0.3)
    machine = make_machine("gpu-1")
    reconnect(database_url)
    own = psycopg2.connect(database_url)
    try:
        with pytest.raises(db.AWAY), db.connection():
            hold_until_another_writes(machine, own)
    finally:
        own.close()
    assert machines.get(machine.id).remark == "free"


@ON_POSTGRESQL
def test_a_server_that_was_restarted_costs_no_request(client: Any, database: Any, database_url: str) -> None:
    assert client.get("/healthz").status_code == 200
    assert len(db.db.obj._connections) == 1, "one idle connection in the pool"
    other = psycopg2.connect(database_url)
    other.autocommit = True
    other.cursor().execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    other.close()
    assert client.get("/healthz").status_code == 200


@ON_POSTGRESQL
def test_who_writes_and_wakes_in_the_background_bears_a_pool_without_connections(
    database: Any, database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(db, "LOCK_WAIT_S", 0.1)
    monkeypatch.setattr(heartbeats, "FLUSH_S", 0.05)
    machine = make_machine("gpu-1")
    small = reconnect(database_url, max_connections=1)
    own, buffer = Wake(), heartbeats.Buffer()
    try:
        with own.listen(("task.log", 7)) as ear:
            with db.connection():  # the only one
                small.execute_sql("SELECT 1")
                buffer.note(_heartbeat(machine.id))
                turned_away = ("cannot be written now", "cannot be read")
                until(lambda: all(words in caplog.text for words in turned_away), "both to be turned away")
            with db.connection(), db.atomic():
                events.write("task.log", resource_id=7)
            assert ear.wait(10)

        def is_written() -> bool:
            with db.connection():
                return MachineReport.select().count() == 1

        until(is_written, "the heartbeat to be written", timeout_s=10)
    finally:
        buffer.stop()
        own.stop()


def _heartbeat(machine_id: int) -> Heartbeat:
    return Heartbeat(machine_id, utcnow(), 0.0, "0.1.0", "boot", 1, False, None, None, [])


def test_a_fault_that_nobody_foresaw_ends_neither_of_them(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are the only ones of their process: without them no host is online, and nobody is woken."""
    monkeypatch.setattr(heartbeats, "FLUSH_S", 0.05)
    machine = make_machine("gpu-1")
    real, faults = heartbeats._upsert, iter([ZeroDivisionError("once"), peewee.ProgrammingError("twice")])

    def upsert(rows: list[Heartbeat]) -> None:
        for fault in faults:
            raise fault
        real(rows)

    monkeypatch.setattr(heartbeats, "_upsert", upsert)
    buffer = heartbeats.Buffer()
    try:
        buffer.note(_heartbeat(machine.id))

        def is_written() -> bool:
            buffer.note(_heartbeat(machine.id))  # as the next report does
            return MachineReport.select().count() == 1

        until(is_written, "a later heartbeat to be written", timeout_s=10)
    finally:
        buffer.stop()


def test_a_writer_whose_round_breaks_writes_in_the_next(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would start another: it is taken to be there as long as it is remembered."""
    monkeypatch.setattr(heartbeats, "FLUSH_S", 0.05)
    real, faults = heartbeats.Buffer.flush, iter([ZeroDivisionError(), peewee.InternalError()])

    def flush(buffer: heartbeats.Buffer) -> int:
        for fault in faults:
            raise fault
        return real(buffer)

    monkeypatch.setattr(heartbeats.Buffer, "flush", flush)
    buffer = heartbeats.Buffer()
    try:
        buffer.note(_heartbeat(make_machine("gpu-1").id))
        until(lambda: MachineReport.select().count() == 1, "the heartbeat to be written", timeout_s=10)
    finally:
        buffer.stop()


def test_a_waker_that_cannot_even_let_go_of_its_connection_wakes_all_the_same(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, faults = db.release_connection, [ZeroDivisionError("letting go"), ZeroDivisionError("looking")]

    def release() -> None:
        if threading.current_thread().name == "wake" and faults:
            raise faults.pop()
        real()

    monkeypatch.setattr(wake, "release_connection", release)
    own = Wake()
    try:
        with own.listen(("task.log", 7)) as ear:
            until(lambda: not faults, "both faults")
            with db.connection(), db.atomic():
                events.write("task.log", resource_id=7)
            assert ear.wait(10)
    finally:
        own.stop()


@pytest.mark.parametrize("is_whole", [True, False], ids=["a transaction", "a statement of its own"])
def test_whoever_writes_waits_for_another_writer(tmp_path: Path, is_whole: bool) -> None:
    """SQLite itself would refuse after 20 ms: the others must run meanwhile."""
    one = db.connect(f"sqlite:///{tmp_path / 'one.db'}")
    one.execute_sql("CREATE TABLE told (word TEXT)")
    other = sqlite3.connect(tmp_path / "one.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    def write() -> None:
        with db.connection(), db.atomic() if is_whole else nullcontext():
            one.execute_sql("INSERT INTO told VALUES ('mine')")

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(10 * db.BUSY_TIMEOUT_MS / 1000)
    assert writer.is_alive(), "it waits"
    other.execute("COMMIT")
    writer.join(db.LOCK_WAIT_S)
    assert one.execute_sql("SELECT word FROM told").fetchall() == [("mine",)]
    other.close()
    one.close()


def test_what_was_committed_survives_a_power_cut(tmp_path: Path) -> None:
    """A host forgets what was acknowledged; and a generation that was told and then lost would freeze it."""
    program = (
        "import sys; from portal import db; database = db.connect(sys.argv[1]);"
        "print(*[database.execute_sql(f'PRAGMA {name}').fetchone()[0] for name in ('synchronous', 'journal_mode')])"
    )
    url = f"sqlite:///{tmp_path / 'remotegpu.db'}"
    told = subprocess.run([sys.executable, "-c", program, url], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["2", "wal"], "2 is full"
