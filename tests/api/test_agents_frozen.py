"""A portal restored from an older backup gives no orders: the host freezes, an operator is asked, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from portal.models import Attempt, AuditEntry, Lease, Machine, MachineReport, Tenant, User
from portal.services import frozen, heartbeats, machines
from portal.services.actors import SYSTEM
from tests.api.fake_agent import (
    FakeAgent,
    agent_of,
    attempt_report,
    command_result,
    leased_machine,
    make_task,
    observed,
)
from tests.factories import make_machine


@pytest.fixture
def leased(app: Flask, customer: User, tenant: Tenant) -> tuple[Machine, Lease, Attempt, FakeAgent]:
    machine, lease = leased_machine(tenant)
    _, attempt = make_task(lease, customer)
    return machine, lease, attempt, agent_of(app, machine)


def ahead(agent: FakeAgent) -> FakeAgent:
    """The host has seen more than the portal knows of now."""
    agent.generation += 5
    return agent


@pytest.mark.parametrize("through", ["hold", "report"])
def test_a_host_that_knows_more_than_the_portal_gets_no_orders(leased: Any, through: str) -> None:
    machine, _, _, agent = leased
    ours = agent.generation
    answer = ahead(agent).hold() if through == "hold" else ahead(agent).report()
    assert answer["desired"] is None
    assert answer["generation"] == ours, "from which the host sees it too, and freezes"
    assert "older backup" in machines.get(machine.id).frozen_reason
    assert AuditEntry.select().where(AuditEntry.action == "machine.frozen").count() == 1
    agent.generation = ours
    assert agent.hold()["desired"] is None
    assert agent.hold(epoch=None, generation=0)["desired"] is None, "nor to one that starts from nothing"


def test_what_a_frozen_host_says_of_leases_and_tasks_is_not_taken(leased: Any) -> None:
    machine, lease, attempt, agent = leased
    told = ahead(agent).report(
        leases=[observed(lease, "closed")],
        attempts=[attempt_report(attempt.id, "failed", exit_code=1), attempt_report(999, "running")],
    )
    assert told["acks"] == {"attempts": [], "command_results": [], "journal": []}
    assert Attempt.get_by_id(attempt.id).state == "queued"
    heartbeats.flush()
    assert MachineReport.get_by_id(machine.id).leases[0]["state"] == "closed", "but it is shown"


def test_that_a_host_has_frozen_itself_is_shown(leased: Any) -> None:
    machine, _, _, agent = leased
    agent.report(frozen=True)
    assert "frozen itself" in machines.get(machine.id).frozen_reason
    agent.report(frozen=True)
    assert AuditEntry.select().where(AuditEntry.action == "machine.frozen").count() == 1


def test_another_epoch_is_another_past(leased: Any) -> None:
    machine, _, attempt, agent = leased
    answer = agent.report(epoch="of-somebody-else", generation=1, attempts=[attempt_report(attempt.id, "failed")])
    assert answer["acks"]["attempts"] == []
    assert answer["epoch"] == machine.epoch
    assert Attempt.get_by_id(attempt.id).state == "queued"


def test_an_operator_thaws_the_host_and_it_goes_on(leased: Any) -> None:
    machine, lease, attempt, agent = leased
    ahead(agent).report(frozen=True)
    frozen.thaw(machine, by=SYSTEM, reason="compared with the host")

    told = agent.await_order()
    (command,) = [each for each in told["commands"] if each["kind"] == "thaw"]
    expected = {"machine_id": machine.id, "epoch": told["epoch"], "generation": told["generation"], "retained": []}
    assert command["args"] == expected
    assert told["epoch"] != machine.epoch
    assert [each["lease_id"] for each in told["leases"]] == [lease.id]

    agent.report(command_results=[command_result(command["command_id"])])
    assert machines.get(machine.id).frozen_reason is None
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    assert Attempt.get_by_id(attempt.id).state == "running"


def test_two_answers_that_overtake_each_other_freeze_nobody(app: Flask, database: Any) -> None:
    machine = make_machine()
    agent = agent_of(app, machine)
    for _ in range(3):
        Machine.update(generation=Machine.generation + 1).where(
            Machine.id == machine.id
        ).execute()  # heard of by nobody
        agent.hold(generation=machines.get(machine.id).generation)  # another process told the agent already
        agent.report(generation=machines.get(machine.id).generation)
    assert machines.get(machine.id).frozen_reason is None
