"""The end of a run is told to whoever wanted it, in the transaction that writes it; nobody is stuck if it is not."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from portal import db
from portal.errors import Conflict
from portal.models import AuditEntry, Machine, Run, RunHost
from portal.services import machines, provisioning, runs
from portal.services.actors import SYSTEM
from portal.services.runs import Outcome
from tests.support import rental

Hears = Callable[[Callable[[Run], None]], None]


@pytest.fixture
def hears(monkeypatch: pytest.MonkeyPatch) -> Hears:
    """`hears(f)`: f is told of the end of a provisioning run, in the place of the module that is."""
    return lambda hearer: monkeypatch.setitem(runs.when_ended.by_kind, "provision", hearer)


@pytest.fixture
def machine(database: Any) -> Machine:
    return rental.confirm(rental.register("gpu-1"))


def started(machine: Machine) -> tuple[Run, str]:
    """A provisioning run that a worker holds."""
    provisioning.provision(machine, by=SYSTEM)
    run = runs.claim(token := str(uuid.uuid4()), lock_s=60)
    assert run is not None
    return run, token


def test_a_database_that_cannot_answer_takes_no_end_of_a_run_without_its_result(machine: Machine, hears: Hears) -> None:
    run, token = started(machine)
    away = iter(db.AWAY)

    def hearer(told: Run) -> None:
        for kind in away:
            raise kind("not now")
        provisioning.run_finished(told)

    hears(hearer)
    for kind in db.AWAY:
        with pytest.raises(kind):
            runs.finish(run, token, Outcome("failed", reason="it went wrong"))
        assert runs.get_run(run.id).state == "running"
        assert RunHost.get(RunHost.run == run).active, "its host is nobody else's yet"
    runs.finish(run, token, Outcome("failed", reason="it went wrong"))
    assert (runs.get_run(run.id).state, machines.get(machine.id).state) == ("failed", "failed")


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_a_machine_that_somebody_holds_hears_of_the_end_when_it_is_free(
    machine: Machine, database: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, token = started(machine)
    database.close_all()
    monkeypatch.setattr(db, "LOCK_WAIT_S", 0.2)
    db.connect(database_url)
    holder = psycopg2.connect(database_url)
    holder.cursor().execute("UPDATE machine SET remark = 'mine'")
    with pytest.raises(db.AWAY, match="lock timeout"):
        runs.finish(run, token, Outcome("failed", reason="it went wrong"))
    assert runs.get_run(run.id).state == "running"
    holder.close()
    runs.finish(run, token, Outcome("failed", reason="it went wrong"))
    assert machines.get(machine.id).state == "failed"


def object_to(_run: Run) -> None:
    raise ZeroDivisionError("division by zero")


def test_an_objection_that_nobody_foresaw_is_told_by_its_incident_and_in_full_by_the_log(
    machine: Machine, hears: Hears, caplog: pytest.LogCaptureFixture
) -> None:
    hears(object_to)
    run = rental.finish_run(provisioning.provision(machine, by=SYSTEM), "failed")
    told = re.fullmatch(
        r"it went wrong Its result was not taken: the log has why, as incident (\w{12})\. Mend that and run it again\.",
        str(run.reason),
    )
    assert told is not None
    assert f"incident {told[1]}: run {run.id} ended" in caplog.text
    assert "ZeroDivisionError: division by zero" in caplog.text
    assert AuditEntry.get(AuditEntry.action == "run.unheard").detail == {"incident": told[1]}


def test_an_objection_in_words_for_people_is_told_in_them(machine: Machine, hears: Hears) -> None:
    def refuse(_run: Run) -> None:
        raise Conflict("The machine is somebody's.")

    hears(refuse)
    run = rental.finish_run(provisioning.provision(machine, by=SYSTEM))
    assert run.reason == "Its result was not taken: The machine is somebody's. Mend that and run it again."


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_machine_that_did_not_hear_of_the_end_is_failed_and_can_be_provisioned_again(
    machine: Machine, hears: Hears, state: str
) -> None:
    hears(object_to)
    run = rental.finish_run(provisioning.provision(machine, by=SYSTEM), state)
    assert (run.state, machines.get(machine.id).state) == (state, "provisioning")
    assert provisioning.fail_overdue() == 1
    failed = machines.get(machine.id)
    assert failed.state == "failed"
    assert str(failed.state_reason).startswith(f"The provisioning run {run.id} is {state}: it went wrong")
    again = provisioning.provision(failed, by=SYSTEM)
    assert provisioning.fail_overdue() == 0, "the newest run counts"
    assert runs.get_run(again.id).state == "queued"
