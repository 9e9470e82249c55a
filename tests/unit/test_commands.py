"""A command is carried out once and its result kept once; a result that cannot be believed is no success."""

from __future__ import annotations

from typing import Any

import pytest

from portal.db import utcnow
from portal.errors import NotFound
from portal.models import AuditEntry, Baseline, Command, Lease, Machine, Reclaim, Run, RunHost, Tenant
from portal.services import agents, commands, machines
from portal.services.actors import SYSTEM
from portal.services.commands import NoBaseline
from portal.services.transitions import WrongState
from tests.api.fake_agent import command_result, leased_machine
from tests.factories import make_machine
from tests.unit.test_desired import BASELINE, keep_baseline


@pytest.fixture
def machine(database: Any) -> Machine:
    """A machine whose provisioning run went well and that lacks its baseline."""
    machine = make_machine(state="provisioning")
    run = Run.create(playbook="gpu_hosts", purpose="provision", state="succeeded", ended_at=utcnow())
    RunHost.create(run=run, machine=machine)
    return machine


def actions() -> list[str]:
    return [entry.action for entry in AuditEntry.select().order_by(AuditEntry.id)]


def test_queueing_a_command_changes_what_the_host_is_told(machine: Machine) -> None:
    before = machines.get(machine.id).generation
    command = commands.queue(machine, "baseline", by=SYSTEM)
    assert machines.get(machine.id).generation == before + 1
    assert [sent["command_id"] for sent in commands.to_send(machine)] == [command.id]


def test_a_baseline_makes_the_machine_ready_and_is_kept_once(machine: Machine) -> None:
    command = commands.queue(machine, "baseline", by=SYSTEM)
    for _ in range(3):
        commands.finished(machine, command_result(command.id, result=BASELINE))
    assert machines.get(machine.id).state == "ready"
    assert [row.content for row in Baseline.select()] == [BASELINE]
    assert commands.to_send(machine) == []
    assert actions().count("command.done") == 1


@pytest.mark.parametrize("result", [None, {}, {**BASELINE, "schema": 2}, {**BASELINE, "extra": 1}])
def test_a_success_whose_result_is_none_is_a_failure(machine: Machine, result: Any) -> None:
    command = commands.queue(machine, "baseline", by=SYSTEM)
    commands.finished(machine, command_result(command.id, result=result))
    kept = Command.get_by_id(command.id)
    assert kept.state == "failed"
    assert "not a baseline" in kept.message
    assert machines.get(machine.id).state == "failed"
    assert Baseline.select().count() == 0


def test_a_failure_is_told_to_who_waits_for_it(machine: Machine) -> None:
    command = commands.queue(machine, "baseline", by=SYSTEM)
    commands.finished(machine, command_result(command.id, ok=False, message="the disk is full"))
    assert "the disk is full" in machines.get(machine.id).state_reason


def test_the_first_result_stays(machine: Machine) -> None:
    command = commands.queue(machine, "baseline", by=SYSTEM)
    commands.finished(machine, command_result(command.id, ok=False, message="no"))
    commands.finished(machine, command_result(command.id, result=BASELINE))
    assert Command.get_by_id(command.id).state == "failed"
    assert Baseline.select().count() == 0


def test_a_result_of_another_machine_s_or_of_no_command_is_refused(machine: Machine) -> None:
    command = commands.queue(machine, "baseline", by=SYSTEM)
    other = make_machine()
    for speaker, command_id in ((other, command.id), (machine, 999_999)):
        with pytest.raises(NotFound):
            commands.finished(speaker, command_result(command_id, result=BASELINE))
    assert Command.get_by_id(command.id).state == "queued"


def test_a_result_that_nobody_waits_for_any_more_is_kept_and_noted(machine: Machine, tenant: Tenant) -> None:
    machine, lease = leased_machine(tenant)
    keep_baseline(machine)
    Lease.update(state="ended").where(Lease.id == lease.id).execute()
    command = commands.queue(machine, "clean", lease, by=SYSTEM)
    assert Reclaim.select().count() == 0
    commands.finished(machine, command_result(command.id, ok=False, message="refused"))
    assert Command.get_by_id(command.id).state == "failed"


def test_a_cleaning_without_a_baseline_is_refused(tenant: Tenant) -> None:
    machine, lease = leased_machine(tenant)
    with pytest.raises(NoBaseline):
        commands.queue(machine, "clean", lease, by=SYSTEM)
    assert Command.select().count() == 0


def test_a_cleaning_names_its_lease(tenant: Tenant) -> None:
    machine, _ = leased_machine(tenant)
    with pytest.raises(ValueError, match="names its lease"):
        commands.queue(machine, "clean", by=SYSTEM)


def test_a_cancelled_command_is_not_sent_and_its_late_result_changes_nothing(machine: Machine) -> None:
    command = commands.queue(machine, "baseline", by=SYSTEM)
    commands.cancel(command, by=SYSTEM, reason="test")
    assert commands.to_send(machine) == []
    commands.finished(machine, command_result(command.id, result=BASELINE))
    assert Command.get_by_id(command.id).state == "cancelled"
    assert machines.get(machine.id).state == "provisioning"
    with pytest.raises(WrongState):
        commands.cancel(command, by=SYSTEM, reason="again")


def test_a_credential_on_its_way_lies_encrypted_and_is_gone_afterwards(machine: Machine) -> None:
    command = agents.rotate(machine, by=SYSTEM)
    (sent,) = commands.to_send(machine)
    secret = sent["args"]["credential"]
    stored = Command.get_by_id(command.id)
    assert secret not in str(stored.args)
    commands.finished(machine, command_result(command.id))
    assert set(Command.get_by_id(command.id).args) == {"credential_id"}
    assert command.created_at <= utcnow()
