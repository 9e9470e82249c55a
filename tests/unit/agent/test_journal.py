"""The journal: each record once, whatever dies in between."""

from __future__ import annotations

import errno
import multiprocessing
from pathlib import Path

import pytest

from remotegpu_agent import journal as journal_module
from remotegpu_agent.journal import Journal


def test_a_record_waits_until_it_is_acknowledged_and_never_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("lease.opened", lease_id=3, detail={"a": 1})
    journal.record("lease.closed", lease_id=3)
    first, second = journal.pending()
    assert (first["event"], second["event"]) == ("lease.opened", "lease.closed")
    journal.acknowledge([first["id"]])
    assert journal.pending() == [second]
    assert Journal(tmp_path / "journal.jsonl").pending() == [second]
    journal.acknowledge([first["id"], second["id"], "never seen"])
    assert Journal(tmp_path / "journal.jsonl").pending() == []


def test_another_process_may_append_between_two_looks(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    mine = Journal(path)
    mine.record("agent.enrolled")
    assert len(mine.pending()) == 1
    process = multiprocessing.get_context("spawn").Process(target=_record_in_another_process, args=(path,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert [record["event"] for record in mine.pending()] == ["agent.enrolled", "lease.closed"]
    mine.acknowledge([record["id"] for record in mine.pending()])
    Journal(path).record("lease.opened")
    assert [record["event"] for record in mine.pending()] == ["lease.opened"]


def _record_in_another_process(path: Path) -> None:
    Journal(path).record("lease.closed", lease_id=4)


def test_a_line_torn_by_a_power_cut_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).record("lease.opened", lease_id=1)
    with path.open("ab") as file:
        file.write(b'{"id":"12345678-torn","at":"2026')
    Journal(path).record("lease.closed", lease_id=1)
    assert [record["event"] for record in Journal(path).pending()] == ["lease.opened", "lease.closed"]


def test_the_file_shrinks_once_it_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_AT_BYTES", 4000)
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in range(40):
        journal.record("attempt.started", attempt_id=number + 1)
    waiting = journal.pending()
    journal.acknowledge([record["id"] for record in waiting[:-1]])
    assert journal.pending() == waiting[-1:]
    assert path.stat().st_size < 4000
    journal.acknowledge([waiting[-1]["id"]])
    assert path.stat().st_size == 0


def test_what_happens_is_not_stopped_by_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("lease.opened", lease_id=3)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "_append", no_room)
    journal.record("lease.closed", lease_id=3)
    assert [record["event"] for record in journal.pending()] == ["lease.opened"]
