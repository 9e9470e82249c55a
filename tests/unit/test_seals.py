"""The chain over the audit trail: it notices what was changed, removed, slipped in or swapped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from portal.cli import main
from portal.db import atomic, connection, utcnow
from portal.models import AuditEntry, NamedLock
from portal.services import audit, locks, seals
from portal.services.actors import SYSTEM


def record(count):
    with atomic():
        for number in range(count):
            audit.record("tenant.created", None, by=SYSTEM, name=f"Tenant {number} 德", ratio=0.1)


def test_what_is_committed_gets_sealed_once(database):
    record(5)
    assert seals.seal() == 5
    assert seals.seal() == 0
    verdict = seals.verify()
    assert (verdict.is_whole, verdict.sealed, verdict.unsealed) == (True, 5, 0)


def test_the_tail_that_is_not_sealed_yet_is_named(database):
    record(2)
    seals.seal()
    record(3)
    verdict = seals.verify()
    assert (verdict.is_whole, verdict.sealed, verdict.unsealed) == (True, 2, 3)


def test_an_empty_trail_is_whole(database):
    assert seals.verify() == seals.Verdict(0, 0, seals.FIRST)


def test_more_entries_than_one_batch_make_one_chain(database, monkeypatch):
    monkeypatch.setattr(seals, "BATCH", 3)
    record(10)
    assert seals.seal() == 10
    assert seals.verify().sealed == 10


def test_an_entry_that_commits_late_is_chained_where_it_appears(database):
    """Ids are given before the commit: a smaller one may come after a larger one was sealed."""
    record(3)
    late = AuditEntry.select().order_by(AuditEntry.id).first()
    late.delete_instance()
    seals.seal()
    AuditEntry.insert(**late.__data__).execute()
    assert seals.seal() == 1
    assert AuditEntry.get_by_id(late.id).seal_seq == 3
    assert seals.verify().is_whole


def change(entry, **fields):
    AuditEntry.update(**fields).where(AuditEntry.id == entry.id).execute()


def swap(entries):
    first, second = entries[1], entries[2]
    change(first, seal_seq=99)
    change(second, seal_seq=first.seal_seq)
    change(first, seal_seq=second.seal_seq)


def slip_in(entries):
    AuditEntry.create(**{**entries[2].__data__, "id": None, "seal_seq": 99, "seal": "f" * 64})


TAMPERING = {
    "the action": lambda rows: change(rows[2], action="tenant.removed"),
    "the detail": lambda rows: change(rows[2], detail={"name": "other"}),
    "the time": lambda rows: change(rows[2], at=rows[2].at + timedelta(microseconds=1)),
    "who it was": lambda rows: change(rows[2], actor_name="somebody"),
    "where from": lambda rows: change(rows[2], address="192.0.2.1"),
    "what it was about": lambda rows: change(rows[2], resource_id=7),
    "the outcome": lambda rows: change(rows[2], outcome="refused"),
    "the seal": lambda rows: change(rows[2], seal="0" * 64),
    "an entry removed": lambda rows: rows[2].delete_instance(),
    "the first one removed": lambda rows: rows[0].delete_instance(),
    "two swapped": swap,
    "one slipped in": slip_in,
}


@pytest.mark.parametrize("tamper", TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_noticed_and_the_place_is_named(database, tamper):
    record(5)
    seals.seal()
    tamper(list(AuditEntry.select().order_by(AuditEntry.id)))
    verdict = seals.verify()
    assert not verdict.is_whole
    assert verdict.broken_id
    assert verdict.reason


def test_every_column_that_says_something_is_covered():
    assert set(AuditEntry._meta.fields) - set(seals._COVERED) == {"seal_seq", "seal"}


def test_a_chain_cut_off_at_its_end_no_longer_holds_the_head_that_was_noted(database):
    record(3)
    seals.seal()
    head = seals.verify().head
    AuditEntry.delete().where(AuditEntry.seal_seq == 3).execute()
    assert seals.verify().is_whole
    assert not seals.holds(head)


def test_many_sealers_at_once_make_one_chain(database):
    record(50)

    def work(_number):
        with connection():
            return seals.seal()

    with ThreadPoolExecutor(4) as pool:
        sealed = list(pool.map(work, range(8)))
    assert sum(sealed) == 50
    assert seals.verify().sealed == 50


def test_a_lock_is_held_by_one_until_it_lets_go_or_its_time_is_up(database):
    with locks.held("sealer", life_s=60) as first:
        with locks.held("sealer", life_s=60) as second, locks.held("other", life_s=60) as other:
            assert (first, second, other) == (True, False, True)
        NamedLock.update(expires_at=utcnow() - timedelta(seconds=1)).execute()
        with locks.held("sealer", life_s=60) as third:
            assert third
    with locks.held("sealer", life_s=60) as again:
        assert again
    assert not NamedLock.select().exists()


@pytest.fixture
def command(settings, database, monkeypatch):
    """`python -m portal …` against this test's database."""
    monkeypatch.setattr("portal.cli.load", lambda: settings)
    return lambda *argv: main(argv)


def test_the_command_prints_the_head_and_takes_it_again(command, capsys):
    record(3)
    seals.seal()
    record(1)
    assert command("audit", "verify") == 0
    told = capsys.readouterr().out
    assert "3 entries" in told
    assert "Not sealed yet: 1" in told
    assert command("audit", "verify", "--head", seals.verify().head) == 0
    AuditEntry.delete().where(AuditEntry.seal_seq == 3).execute()
    assert command("audit", "verify", "--head", told.split("head ")[1].split(".")[0]) == 1


def test_the_command_names_the_first_broken_entry(command, capsys):
    record(3)
    seals.seal()
    change(AuditEntry.get(AuditEntry.seal_seq == 2), action="nothing.happened")
    broken = AuditEntry.get(AuditEntry.seal_seq == 2).id
    assert command("audit", "verify") == 1
    assert f"entry {broken}" in capsys.readouterr().out
