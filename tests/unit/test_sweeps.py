"""Sweeps: each stands alone, and of several processes one sweeps at a time."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import peewee
import psycopg2
import pytest

from portal import db
from portal.services import locks, sweeps
from portal.services.sweeps import Round, Sweep
from portal.settings import Settings
from portal.worker.sweeper import sweep_until
from tests.support.waiting import until


def fail() -> None:
    raise RuntimeError("broken")


def test_a_sweep_that_fails_is_named_and_does_not_stop_the_rest(
    database: Any, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []
    sweeping = Round((Sweep("first", fail), Sweep("second", lambda: done.append("second"))))
    assert sweeping.go(0) == ["first"]
    assert done == ["second"]
    assert "the sweep first failed" in caplog.text


def test_a_sweep_rests_as_long_as_it_says(database: Any) -> None:
    done: list[str] = []
    sweeping = Round((Sweep("often", lambda: done.append("o")), Sweep("seldom", lambda: done.append("s"), every_s=60)))
    for now in (0, 1, 59, 60):
        sweeping.go(now)
    assert "".join(done) == "osooos"


def test_while_another_process_sweeps_this_one_does_not(database: Any) -> None:
    done: list[str] = []
    sweeping = Round((Sweep("one", lambda: done.append("one")),))
    with locks.held("sweeper", life_s=30) as ours:
        assert ours
        sweeping.go(0)
    assert done == []
    sweeping.go(1)
    assert done == ["one"]


def test_when_a_round_went_well_is_known_and_one_with_a_failure_is_none(database: Any) -> None:
    assert sweeps.swept_at() is None
    Round((Sweep("well", lambda: None), Sweep("broken", fail))).go(0)
    assert sweeps.swept_at() is None
    began = db.utcnow()
    sweeping = Round((Sweep("well", lambda: None),))
    sweeping.go(0)
    first = sweeps.swept_at()
    assert first is not None
    assert began <= first <= db.utcnow()
    sweeping.go(sweeps.NOTE_S - 1)
    assert sweeps.swept_at() == first, "not a write a second"
    sweeping.go(sweeps.NOTE_S)
    later = sweeps.swept_at()
    assert later is not None
    assert first < later < first + timedelta(minutes=1)


@contextmanager
def sweeper() -> Iterator[threading.Thread]:
    """The worker's thread, for as long as the block lasts."""
    stopping = threading.Event()
    thread = threading.Thread(target=sweep_until, args=(stopping, 0.01))
    thread.start()
    try:
        yield thread
    finally:
        stopping.set()
        thread.join(10)
    assert not thread.is_alive(), "it ends when it is told to"


FAULTS = (peewee.InternalError("cannot execute"), peewee.OperationalError("down"), ZeroDivisionError("ours"), OSError())


def test_no_fault_of_a_round_ends_the_rounds(
    database: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults, done = iter(FAULTS), threading.Event()

    def go(_round: Round, _now: float) -> list[str]:
        for fault in faults:
            raise fault
        done.set()
        return []

    monkeypatch.setattr(Round, "go", go)
    with sweeper() as thread:
        assert done.wait(10)
        assert thread.is_alive()
    told = [record for record in caplog.records if record.name == "portal.worker.sweeper"]
    assert [record.exc_info[1] for record in told if record.exc_info] == list(FAULTS), "each with its traceback"


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_a_server_that_only_reads_for_a_moment_ends_no_rounds(
    database: Any, database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a failover, when a standby answers: sessions with it never write, those after it do."""
    other = psycopg2.connect(database_url)
    other.autocommit = True
    name = database_url.rpartition("/")[2]
    other.cursor().execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    database.close_all()
    monkeypatch.setattr(sweeps, "all_sweeps", lambda: (Sweep("one", lambda: None),))
    with sweeper() as thread:
        until(lambda: "sweeping goes on when it does" in caplog.text, "a round to be refused")
        other.cursor().execute("SET default_transaction_read_only = off")
        other.cursor().execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        other.close()

        def is_swept() -> bool:
            with db.connection():
                return sweeps.swept_at() is not None

        until(is_swept, "a round to end well")
        assert thread.is_alive()


def test_every_sweep_of_the_portal_can_be_made_on_an_empty_database(app: Any) -> None:
    assert Round(sweeps.all_sweeps()).go(0) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", [sweep.name for sweep in sweeps.all_sweeps()])
def test_no_sweep_fails_because_somebody_else_writes_at_this_moment(
    app: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SQLite has one writer; who comes second waits, letting the other threads of the process run."""
    other = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(db, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _s: end(other)))
    (sweep,) = [each for each in sweeps.all_sweeps() if each.name == name]
    sweep.act()
    other.close()


def end(connection: sqlite3.Connection) -> None:
    """The writer's work is done: just when somebody begins to wait for it."""
    if connection.in_transaction:
        connection.execute("COMMIT")
