"""What a host says of itself fills no disk: a record's detail, a machine's records and their age have bounds."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from flask import Flask

from portal.db import utcnow
from portal.models import JournalRecord, Machine
from portal.services import journal, sweeps
from tests.api.fake_agent import FakeAgent, agent_of, journal_record
from tests.factories import make_machine


@pytest.fixture
def machine(app: Flask) -> Machine:
    return make_machine()


@pytest.fixture
def agent(app: Flask, machine: Machine) -> FakeAgent:
    return agent_of(app, machine)


def kept_ids(machine: Machine) -> list[str]:
    rows = JournalRecord.select().where(JournalRecord.machine == machine).order_by(JournalRecord.id)
    return [row.record_id for row in rows]


def test_a_record_is_kept_as_it_is_and_once(agent: FakeAgent, machine: Machine) -> None:
    record = journal_record("agent.frozen", detail={"reason": "中" * 10})
    for _ in range(2):
        assert agent.report(journal=[record])["acks"]["journal"] == [record["id"]]
    (row,) = JournalRecord.select()
    assert (row.event, row.detail, row.machine_id) == ("agent.frozen", record["detail"], machine.id)


def test_a_detail_that_is_too_large_is_left_out_and_its_size_told(
    agent: FakeAgent, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    around = len(json.dumps({"text": ""}))
    fits = journal_record(detail={"text": "x" * (journal.MOST_DETAIL_BYTES - around)})
    over = journal_record(detail={"text": "x" * (journal.MOST_DETAIL_BYTES - around + 1)})
    wide = journal_record(detail={"text": "中" * (journal.MOST_DETAIL_BYTES // 3)})
    ids = [record["id"] for record in (fits, over, wide)]
    assert agent.report(journal=[fits, over, wide])["acks"]["journal"] == ids, "none of it is sent again"
    kept = {row.record_id: row.detail for row in JournalRecord.select()}
    assert kept == {
        fits["id"]: fits["detail"],
        over["id"]: {"left_out_bytes": 8193},
        wide["id"]: {"left_out_bytes": 8190 + around},
    }
    assert f"{machine.name}: the detail of lease.closed was left out of its journal: 8193 bytes" in caplog.text


def test_of_a_machine_only_the_newest_records_are_kept(
    app: Flask, agent: FakeAgent, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_A_MACHINE", 3)
    other = make_machine()
    theirs = journal_record()
    agent_of(app, other).report(journal=[theirs])
    records = [journal_record() for _ in range(5)]
    agent.report(journal=records[:2])
    assert kept_ids(machine) == [record["id"] for record in records[:2]]
    acks = agent.report(journal=records[2:])["acks"]
    assert acks["journal"] == [record["id"] for record in records[2:]]
    assert kept_ids(machine) == [record["id"] for record in records[2:]]
    assert kept_ids(other) == [theirs["id"]]


def test_the_sweep_forgets_what_is_old_and_what_is_too_much(
    agent: FakeAgent, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [journal_record() for _ in range(5)]
    agent.report(journal=records)
    now = utcnow()
    old = JournalRecord.record_id == records[4]["id"]
    JournalRecord.update(received_at=now - journal.KEPT_FOR + timedelta(minutes=1)).where(old).execute()
    assert journal.prune(now) == 0
    JournalRecord.update(received_at=now - journal.KEPT_FOR - timedelta(seconds=1)).where(old).execute()
    assert journal.prune(now) == 1
    assert kept_ids(machine) == [record["id"] for record in records[:4]]
    monkeypatch.setattr(journal, "MOST_A_MACHINE", 3)
    assert journal.prune(now) == 1
    assert kept_ids(machine) == [record["id"] for record in records[1:4]]
    assert journal.prune(now) == 0
    assert journal.prune in [sweep.act for sweep in sweeps.all_sweeps()]
