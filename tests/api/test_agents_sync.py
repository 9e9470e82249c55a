"""What an agent is told and what it says: the held call, the report, and that both may be repeated."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from portal import db
from portal.db import utcnow
from portal.errors import NotSignedIn
from portal.integrations.wake import wake
from portal.models import AuditEntry, Command, JournalRecord, Lease, Machine, MachineReport, Table, User
from portal.services import agents, commands, events, health, heartbeats, machines, sync
from portal.services.actors import SYSTEM
from tests.api.fake_agent import (
    FACTS,
    NO_GPUS,
    FakeAgent,
    agent_of,
    attempt_report,
    command_result,
    gpu,
    journal_record,
    leased_machine,
    log_range,
    make_task,
    observed,
    time_of,
)
from tests.factories import make_machine

METRICS = {
    "sampled_at": "2026-01-01T00:00:00Z", "cpu_percent": 12.5, "load1": None, "memory_total_bytes": 1 << 36,
    "memory_used_bytes": 0, "uptime_s": 5.0, "disks": [], "network": [],
}  # fmt: skip


def wait_until(is_so: Callable[[], bool], *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so in time"
        time.sleep(0.01)


def everything() -> dict[str, list[dict[str, Any]]]:
    """All rows that a report may write, without the heartbeat."""
    from portal.models import Attempt, LogRange, Task

    tables: list[type[Table]] = [Machine, Lease, Task, Attempt, LogRange, Command, JournalRecord, AuditEntry]
    return {table.__name__: list(table.select().order_by(table.id).dicts()) for table in tables}


@pytest.fixture
def machine(database: Any) -> Machine:
    return make_machine()


@pytest.fixture
def agent(app: Flask, machine: Machine) -> FakeAgent:
    return agent_of(app, machine)


# Held


def test_the_first_call_brings_the_whole_desired_state_and_the_next_one_nothing(app: Flask, machine: Machine) -> None:
    agent = agent_of(app, machine)
    assert agent.generation == Machine.get_by_id(machine.id).generation
    assert agent.hold()["desired"] is None
    assert agent.hold(generation=0, epoch=None)["desired"]["leases"] == []


def test_a_held_call_ends_when_its_time_is_up(agent: FakeAgent) -> None:
    began = time.monotonic()
    answer = agent.hold(wait_s=0.3)
    assert answer["desired"] is None
    assert 0.3 <= time.monotonic() - began < 5


def test_of_fifty_that_wait_the_one_that_is_meant_is_woken_and_none_holds_a_connection(
    app: Flask, database: Any
) -> None:
    hosts = [make_machine() for _ in range(50)]
    waiting = [agent_of(app, host) for host in hosts]
    answered: list[int] = []

    def hold(number: int) -> dict[str, Any]:
        try:
            answer = waiting[number].hold(wait_s=20)
            answered.append(number)
            return answer
        finally:
            db.db.close()

    def change(*numbers: int) -> None:
        with db.atomic():
            for number in numbers:
                events.desired_changed(hosts[number].id)
        db.db.close()

    with ThreadPoolExecutor(50) as pool:
        calls = [pool.submit(hold, number) for number in range(50)]
        others = [number for number in range(50) if number != 17]
        try:
            wait_until(lambda: wake.waiting() == 50, within_s=20)
            if not db.is_sqlite():
                wait_until(lambda: len(database._in_use) <= 2)  # this thread's and the poller's
            change(17)
            assert calls[17].result(timeout=10)["desired"]["machine_id"] == hosts[17].id
            assert (answered, wake.waiting()) == ([17], 49)
        finally:
            change(*others)
        assert [calls[number].result()["desired"]["machine_id"] for number in others] == [
            hosts[number].id for number in others
        ]


def test_a_credential_that_ends_while_its_call_waits_is_told_nothing_more(agent: FakeAgent, machine: Machine) -> None:
    def end() -> None:
        wait_until(lambda: wake.waiting() == 1)
        try:
            agents.end_credentials(machine, by=SYSTEM)
            with db.atomic():
                events.desired_changed(machine.id)
        finally:
            db.db.close()

    other = threading.Thread(target=end)
    other.start()
    response = agent.say(agent.message(report=None, wait_s=10))
    other.join()
    assert response.status_code == 401
    assert "desired" not in response.get_json()


def test_a_credential_that_ends_after_it_was_authenticated_is_told_nothing_more(
    agent: FakeAgent, machine: Machine
) -> None:
    caller = agents.authenticate(agent.credential)
    agents.end_credentials(machine, by=SYSTEM)
    with db.atomic():
        events.desired_changed(machine.id)
    with pytest.raises(NotSignedIn):
        sync.hold(caller, agent.message(report=None, wait_s=0, generation=0), check=lambda: caller)


# Reports


def test_a_report_is_kept_with_the_clock_of_its_host(agent: FakeAgent, machine: Machine) -> None:
    agent.report(metrics=METRICS, gpu=NO_GPUS, sent_at=time_of(utcnow() + timedelta(seconds=90)))
    heartbeats.flush()
    kept = MachineReport.get_by_id(machine.id)
    assert kept.metrics == METRICS
    assert kept.gpu == NO_GPUS
    assert kept.metrics["load1"] is None
    assert kept.metrics["memory_used_bytes"] == 0
    assert 88 < kept.clock_offset_s < 91
    assert utcnow() - kept.received_at < timedelta(seconds=30)


def test_heartbeats_are_written_by_themselves_and_the_newest_of_each_machine_stays(app: Flask, database: Any) -> None:
    hosts = [make_machine() for _ in range(3)]
    for round_ in range(3):
        for host in hosts:
            heartbeats.note(_heartbeat(host.id, seq=round_))
    wait_until(lambda: [row.seq for row in MachineReport.select()] == [2, 2, 2])
    heartbeats.note(_heartbeat(hosts[0].id, seq=1, received_at=utcnow() - timedelta(minutes=1)))
    heartbeats.flush()
    assert MachineReport.get_by_id(hosts[0].id).seq == 2, "an older report never overwrites a newer one"


def _heartbeat(machine_id: int, **fields: Any) -> heartbeats.Heartbeat:
    given = {
        "machine_id": machine_id, "received_at": utcnow(), "clock_offset_s": 0.0, "agent_version": "1", "boot_id": "b",
        "seq": 1, "frozen": False, "metrics": None, "gpu": None, "leases": [],
    }  # fmt: skip
    return heartbeats.Heartbeat(**{**given, **fields})


LAST_WORDS = """
import sys
from portal import db
from portal.db import utcnow
from portal.errors import NotSignedIn
from portal.services import heartbeats
db.connect(sys.argv[1])
heartbeats.note(heartbeats.Heartbeat(int(sys.argv[2]), utcnow(), 0.0, "1", "b", 42, False, None, None, []))
"""


def test_a_process_that_ends_writes_what_it_has_heard(database: Any, settings: Any) -> None:
    host = make_machine()
    argv = [sys.executable, "-W", "ignore", "-c", LAST_WORDS, settings.database_url, str(host.id)]
    subprocess.run(argv, cwd=Path(__file__).parents[2], check=True, timeout=60)
    assert MachineReport.get_by_id(host.id).seq == 42


def test_a_report_that_the_database_refuses_does_not_silence_the_others(database: Any) -> None:
    host = make_machine()
    heartbeats.note(_heartbeat(host.id))
    heartbeats.note(_heartbeat(999_999))
    heartbeats.flush()
    assert [row.machine_id for row in MachineReport.select()] == [host.id]


def test_a_machine_that_reports_is_online_and_one_that_does_not_is_not(agent: FakeAgent, machine: Machine) -> None:
    agent.report()
    heartbeats.flush()
    now = utcnow()
    assert machines.health_of(machine, now).is_online
    assert not machines.health_of(machine, now + timedelta(minutes=5)).is_online
    assert isinstance(machines.health_of(machine, now), health.Health)


def test_facts_and_gpus_that_change_are_kept(agent: FakeAgent, machine: Machine) -> None:
    Machine.update(state="provisioning").where(Machine.id == machine.id).execute()
    agent.report(facts={**FACTS, "kernel": "6.12.0"}, gpu={**NO_GPUS, "state": "ok", "gpus": [gpu("GPU-new")]})
    machine = machines.get(machine.id)
    assert machine.facts["kernel"] == "6.12.0"
    assert [each.uuid for each in machines.expected_gpus(machine)] == ["GPU-new"]


def test_the_generation_that_the_host_has_applied_is_kept(agent: FakeAgent, machine: Machine) -> None:
    agent.report(applied_generation=agent.generation)
    assert machines.get(machine.id).applied_generation == agent.generation


def test_a_report_that_repeats_the_last_one_touches_no_table(
    agent: FakeAgent, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"metrics": METRICS, "gpu": {**NO_GPUS, "state": "ok", "gpus": [gpu("GPU-x")]}}
    agent.hold(wait_s=0.2)  # the process listens from now on
    wait_until(lambda: not agent.report(**parts)["desired"] and sync._known.find(machine.id) is not None)
    agent.report(**parts)
    statements: list[str] = []
    this_thread = threading.get_ident()
    execute = type(db.db.obj).execute_sql

    def count(self: Any, sql: str, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == this_thread:  # not the poller's, not the writer's
            statements.append(sql)
        return execute(self, sql, *args, **kwargs)

    monkeypatch.setattr(type(db.db.obj), "execute_sql", count)
    for _ in range(5):
        agent.report(**parts)
    assert statements == []


def full_report(app: Flask, customer: User, tenant: Any) -> tuple[FakeAgent, dict[str, Any], int, int]:
    machine, lease = leased_machine(tenant)
    agent = agent_of(app, machine)
    _, attempt = make_task(lease, customer)
    command = commands.queue(machine, "baseline", by=SYSTEM)
    agent.await_order()
    parts = {
        "leases": [observed(lease)],
        "attempts": [attempt_report(attempt.id, "succeeded", exit_code=0)],
        "logs": [log_range(attempt.id, 0, b"hello\n", end=True)],
        "command_results": [command_result(command.id, ok=False, message="no")],
        "journal": [journal_record(lease_id=lease.id, attempt_id=attempt.id, detail={"text": "a\0b\ud83d"})],
    }
    return agent, parts, attempt.id, command.id


def test_a_report_is_kept_before_it_is_acknowledged_and_once(app: Flask, customer: User, tenant: Any) -> None:
    agent, parts, attempt_id, command_id = full_report(app, customer, tenant)
    acks = agent.report(**parts)["acks"]
    assert acks == {
        "attempts": [{"attempt_id": attempt_id, "state": "succeeded", "log_offset": 6, "log_complete": True}],
        "command_results": [command_id],
        "journal": [parts["journal"][0]["id"]],
    }
    kept = everything()
    assert agent.report(**parts)["acks"] == acks
    assert everything() == kept


def test_how_far_an_order_has_come_is_kept_and_a_foreign_one_is_passed_over(app: Flask, tenant: Any) -> None:
    machine, _lease = leased_machine(tenant)
    agent = agent_of(app, machine)
    mine = commands.queue(machine, "baseline", by=SYSTEM)
    foreign = commands.queue(make_machine(), "baseline", by=SYSTEM)
    for command, progress in ((mine, 5), (mine, 5), (foreign, 9), (mine, 8)):
        agent.report(command_at_work={"command_id": command.id, "progress": progress})
    seen = [commands.get(of, command.id) for of, command in ((machine, mine), (foreign.machine, foreign))]
    assert [command.result and command.result["progress"] for command in seen] == [8, None]
    assert commands.moved_at(seen[0]) is not None
    agent.report(command_results=[command_result(mine.id, ok=False, message="no")])
    ended = commands.get(machine, mine.id)
    assert (ended.result, commands.moved_at(ended)) == (None, None)


def test_the_same_report_many_times_at_once_is_kept_once(app: Flask, customer: User, tenant: Any) -> None:
    agent, parts, _, _ = full_report(app, customer, tenant)
    message = agent.message(**parts)

    def say(_: int) -> tuple[int, Any]:
        try:
            response = FakeAgent(app.test_client(), agent.credential).say(message)
            return response.status_code, response.get_json().get("acks", response.get_data(as_text=True))
        finally:
            db.db.close()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(say, range(8)))
    assert [status for status, _ in answers] == [200] * 8
    assert all(acks == answers[0][1] for _, acks in answers)
    kept = everything()
    assert len(kept["LogRange"]) == 1
    assert len(kept["JournalRecord"]) == 1
    assert [entry["action"] for entry in kept["AuditEntry"]].count("task.succeeded") == 1
    assert [entry["action"] for entry in kept["AuditEntry"]].count("command.failed") == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"wait_s": 21}, "wait_s"),
        ({"protocol": 2}, "protocol"),
        ({"generation": -1}, "generation"),
        ({"surprise": 1}, "body"),
    ],
)
def test_what_is_not_of_the_protocol_is_refused_by_name(agent: FakeAgent, change: Any, field: str) -> None:
    response = agent.say({**agent.message(), **change})
    assert response.status_code == 422
    assert list(response.get_json()["errors"]) == [field]


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"seq": 1e300}, "report.seq"),
        ({"seq": "1"}, "report.seq"),
        ({"leases": [{"lease_id": 1}]}, "report.leases.0"),
        ({"boot_id": "b" * 65}, "report.boot_id"),
        ({"sent_at": "2026-13-45T00:00:00Z"}, "time"),
    ],
)
def test_a_faulty_report_is_refused_by_name(agent: FakeAgent, parts: Any, field: str) -> None:
    response = agent.say(agent.message(**parts))
    assert response.status_code == 422
    assert list(response.get_json()["errors"]) == [field]
    assert heartbeats.buffer.newest(1) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"NaN", b'{"a": NaN}', b'"\xff"', "{}".encode("utf-16")])
def test_what_is_no_json_is_refused(agent: FakeAgent, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {agent.credential}"}
    response = agent.client.post("/api/v1/agent/sync", data=body, content_type="application/json", headers=headers)
    assert response.status_code == 422
    plain = agent.client.post("/api/v1/agent/sync", data=body, headers=headers)
    assert plain.status_code == 415


def test_the_calls_of_agents_are_not_counted_as_those_of_people(app: Flask, settings: Any, agent: FakeAgent) -> None:
    for _ in range(50):
        response = agent.say(agent.message())
        assert response.status_code == 200
        assert "X-RateLimit-Limit" not in response.headers
