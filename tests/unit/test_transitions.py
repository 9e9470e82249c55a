"""Every pair of states of every noun: the only ways are those of models/states.py; of two movers one wins."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from portal.db import atomic, utcnow
from portal.models import Alert, AlertSilence, Attempt, Command, Lease, Machine, Reclaim, Run, Table, Task
from portal.services.transitions import TABLES, WrongState, move
from tests.factories import make_machine, make_tenant, make_user


def a_machine(state: str) -> Machine:
    return make_machine(state=state)


def a_lease(state: str) -> Lease:
    now = utcnow()
    return Lease.create(machine=a_machine("leased"), tenant=make_tenant(), state=state, starts_at=now, ends_at=now)


def a_run(state: str) -> Run:
    return Run.create(playbook="gpu_hosts", purpose="operator", state=state)


def an_attempt(state: str) -> Attempt:
    task = Task.create(lease=a_lease("active"), created_by=make_user(), name="t", command="true")
    return Attempt.create(task=task, number=1, state=state)


def a_reclaim(state: str) -> Reclaim:
    lease = a_lease("ended")
    return Reclaim.create(machine=lease.machine, lease=lease, state=state, due_at=utcnow())


def a_command(state: str) -> Command:
    return Command.create(machine=a_machine("ready"), kind="baseline", state=state)


def an_alert(state: str) -> Alert:
    now = utcnow()
    return Alert.create(
        fingerprint=uuid.uuid4().hex, source="portal", name="a", severity="info", state=state, starts_at=now
    )


def an_alert_silence(state: str) -> AlertSilence:
    return AlertSilence.create(fingerprint=uuid.uuid4().hex, reason="known", ends_at=utcnow(), state=state)


MAKERS: dict[type[Table], Callable[[str], Any]] = {
    Machine: a_machine,
    Lease: a_lease,
    Run: a_run,
    Attempt: an_attempt,
    Reclaim: a_reclaim,
    Command: a_command,
    Alert: an_alert,
    AlertSilence: an_alert_silence,
}


def test_every_noun_with_states_is_walked() -> None:
    assert set(MAKERS) == set(TABLES)
    for ways in TABLES.values():
        assert {target for targets in ways.values() for target in targets} <= set(ways)


def test_a_task_has_no_way_of_its_own(database: Any) -> None:
    task = an_attempt("queued").task
    with pytest.raises(KeyError), atomic():
        move(task, leave="queued", enter="starting")
    assert Task.get_by_id(task.id).state == "queued"


@pytest.mark.parametrize("table", list(TABLES))
def test_a_row_moves_along_the_arrows_and_no_other_way(database: Any, table: type[Table]) -> None:
    ways = TABLES[table]
    walked = {(leave, enter): _can_move(MAKERS[table](leave), leave, enter) for leave in ways for enter in ways}
    assert walked == {(leave, enter): enter in ways[leave] for leave in ways for enter in ways}


def _can_move(row: Table, leave: str, enter: str) -> bool:
    """Whether it does; the row in the database must agree with the answer."""
    with suppress(ValueError), atomic():
        move(row, leave=leave, enter=enter)
    state = type(row).get_by_id(row.id).state
    assert state in (leave, enter)
    return bool(state == enter and leave != enter)


@pytest.mark.parametrize("table", list(TABLES))
def test_of_two_who_move_the_same_row_one_wins(database: Any, table: type[Table]) -> None:
    leave, targets = next((state, targets) for state, targets in TABLES[table].items() if targets)
    row = MAKERS[table](leave)
    same_row = table.get_by_id(row.id)
    with atomic():
        move(row, leave=leave, enter=targets[0])
    with atomic(), pytest.raises(WrongState, match=f"is {targets[0]} by now") as refusal:
        move(same_row, leave=leave, enter=targets[-1])
    assert refusal.value.details == {"state": targets[0], "wanted": targets[-1]}
    assert table.get_by_id(row.id).state == targets[0]


def test_a_transition_outside_a_transaction_is_a_fault_of_the_program(database: Any) -> None:
    machine = a_machine("registered")
    with pytest.raises(RuntimeError, match="outside a transaction"):
        move(machine, leave="registered", enter="provisioning")
    assert Machine.get_by_id(machine.id).state == "registered"


def test_a_move_writes_its_changes_with_the_state_and_brings_the_row_up_to_date(database: Any) -> None:
    machine = make_machine(state="provisioning", state_reason="of before")
    since = machine.state_changed_at
    with atomic():
        move(machine, leave="provisioning", enter="failed", state_reason="no route to host")
    kept = Machine.get_by_id(machine.id)
    assert (kept.state, kept.state_reason) == ("failed", "no route to host")
    assert kept.state_changed_at > since
    assert (machine.state, machine.dirty_fields) == ("failed", [])


def test_a_reason_does_not_outlive_its_state(database: Any) -> None:
    machine = make_machine(state="failed", state_reason="no route to host")
    with atomic():
        move(machine, leave="failed", enter="provisioning")
    assert Machine.get_by_id(machine.id).state_reason is None


def test_a_move_only_where_the_row_still_carries_my_token(database: Any) -> None:
    run = Run.create(playbook="gpu_hosts", purpose="operator", state="running", lock_token="theirs")
    with atomic(), pytest.raises(WrongState):
        move(run, leave="running", enter="succeeded", where=Run.lock_token == "mine")
    assert Run.get_by_id(run.id).state == "running"
