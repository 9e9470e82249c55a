"""Sweeps: each stands alone, and of several processes one sweeps at a time."""

from __future__ import annotations

import sqlite3
import time
from types import SimpleNamespace
from typing import Any

import pytest

from portal import db
from portal.services import locks, sweeps
from portal.services.sweeps import Round, Sweep
from portal.settings import Settings


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
