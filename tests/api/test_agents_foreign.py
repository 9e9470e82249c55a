"""An agent speaks for its own machine. Whatever else it names is refused whole, noted, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from flask import Flask

from portal.integrations import protocol
from portal.models import Attempt, AuditEntry, Command, Lease, Machine, MachineReport, Tenant, User
from portal.services import commands, heartbeats
from portal.services.actors import SYSTEM
from tests.api.fake_agent import (
    FakeAgent,
    agent_of,
    attempt_report,
    command_result,
    journal_record,
    leased_machine,
    log_range,
    make_task,
    observed,
)
from tests.api.test_agents_sync import everything


@dataclass
class Host:
    machine: Machine
    lease: Lease
    attempt: Attempt
    command: Command
    agent: FakeAgent


@pytest.fixture
def hosts(app: Flask, customer: User, stranger: User, tenant: Tenant, other_tenant: Tenant) -> tuple[Host, Host]:
    """Two machines, each with a lease, a task and a command of its own; A is the tenant's, B the other tenant's."""

    def host(owner: User, company: Tenant) -> Host:
        machine, lease = leased_machine(company)
        _, attempt = make_task(lease, owner)
        command = commands.queue(machine, "baseline", by=SYSTEM)
        return Host(machine, lease, attempt, command, agent_of(app, machine))

    return host(customer, tenant), host(stranger, other_tenant)


PARTS: dict[str, Callable[[Host], dict[str, Any]]] = {
    "leases.lease_id": lambda b: {"leases": [observed(b.lease, "closed")]},
    "attempts.attempt_id": lambda b: {"attempts": [attempt_report(b.attempt.id, "failed", exit_code=1)]},
    "logs.attempt_id": lambda b: {"logs": [log_range(b.attempt.id, 0, b"forged", end=True)]},
    "command_results.command_id": lambda b: {"command_results": [command_result(b.command.id)]},
    "journal.lease_id": lambda b: {"journal": [journal_record(lease_id=b.lease.id)]},
    "journal.attempt_id": lambda b: {"journal": [journal_record(attempt_id=b.attempt.id)]},
}
BY_PART = {
    "leases": "leases",
    "attempts": "attempts",
    "logs": "attempts",
    "command_results": "command_results",
    "journal": "journal",
}


def ids_in_a_report() -> Iterator[str]:
    """Every field of a report that names something of the portal's, read from the protocol itself."""
    for part, schema in protocol.standalone("report")["properties"].items():
        for name in schema.get("items", {}).get("properties", {}):
            if name.endswith("_id") and name != "boot_id":
                yield f"{part}.{name}"


def test_every_id_of_the_protocol_is_tried_here() -> None:
    assert set(ids_in_a_report()) == set(PARTS)


@pytest.mark.parametrize("field", PARTS)
def test_the_agent_of_a_is_refused_when_it_speaks_for_b(hosts: tuple[Host, Host], field: str) -> None:
    a, b = hosts
    before = everything()
    own = {"attempts": [attempt_report(a.attempt.id, "running")], "journal": [journal_record(lease_id=a.lease.id)]}
    foreign = PARTS[field](b)
    response = a.agent.say(
        a.agent.message(**{name: own.get(name, []) + foreign.get(name, []) for name in own | foreign})
    )
    _assert_refused(response, field, before)
    heartbeats.flush()
    assert MachineReport.get_or_none(MachineReport.machine == a.machine.id) is None


@pytest.mark.parametrize("field", PARTS)
def test_what_never_existed_is_refused_too(hosts: tuple[Host, Host], field: str) -> None:
    a, b = hosts
    before = everything()
    unknown = _with_id(PARTS[field](b), field.split(".")[1], 1_000_000)
    _assert_refused(a.agent.say(a.agent.message(**unknown)), field, before)


def _with_id(parts: dict[str, Any], name: str, number: int) -> dict[str, Any]:
    ((part, (entry,)),) = parts.items()
    changed = {**entry, name: number}
    if "login" in entry:
        changed["login"] = f"lease{number}"
    return {part: [changed]}


def _assert_refused(response: Any, field: str, before: dict[str, list[dict[str, Any]]]) -> None:
    answer = response.get_json()
    assert (response.status_code, answer["code"]) == (409, "not_yours")
    named = {part for part, items in answer["info"]["items"].items() if items}
    assert named == {BY_PART[field.split(".")[0]]}, "and it says what, so that the rest can be sent again"
    after = everything()
    audit = after.pop("AuditEntry")
    assert after == {name: rows for name, rows in before.items() if name != "AuditEntry"}
    assert [entry["action"] for entry in audit[len(before["AuditEntry"]) :]] == ["report.refused"]
    assert audit[-1]["outcome"] == "refused"


def test_a_login_that_is_not_the_lease_s_own_is_refused(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    response = a.agent.say(a.agent.message(leases=[observed(a.lease, login=b.lease.login)]))
    assert response.status_code == 409


def test_an_agent_is_told_nothing_of_another_machine(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    told = a.agent.hold(epoch=None, generation=0)["desired"]
    assert {lease["lease_id"] for lease in told["leases"]} == {a.lease.id}
    assert {attempt["attempt_id"] for attempt in told["attempts"]} == {a.attempt.id}
    assert {command["command_id"] for command in told["commands"]} == {a.command.id}
    assert b.lease.login not in str(told)


def test_a_refusal_names_the_machine_for_the_operator(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.agent.say(a.agent.message(**PARTS["attempts.attempt_id"](b)))
    entry = AuditEntry.select().where(AuditEntry.action == "report.refused").get()
    assert (entry.actor_kind, entry.actor_name, entry.resource_id) == ("agent", a.machine.name, a.machine.id)
    assert entry.detail["items"]["attempts"] == [b.attempt.id]
