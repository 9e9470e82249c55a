"""How an agent is let in: once for each token, as the machine that the token says, and out again at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from portal import db
from portal.db import utcnow
from portal.models import AgentCredential, AuditEntry, Command, EnrollToken, Gpu, Machine
from portal.services import agents
from portal.services.actors import SYSTEM
from tests.api.fake_agent import FACTS, LATER, NO_GPUS, FakeAgent, agent_of, command_result, enroll, gpu
from tests.factories import make_machine


def states_of(machine: Machine) -> list[str]:
    return [
        row.state
        for row in AgentCredential.select().where(AgentCredential.machine == machine).order_by(AgentCredential.id)
    ]


@pytest.fixture
def machine(database: Any) -> Machine:
    return make_machine(state="provisioning")


@pytest.fixture
def token(machine: Machine) -> str:
    return agents.new_enroll_token(machine, by=SYSTEM)


def test_an_agent_gets_a_credential_of_its_own_and_its_facts_are_kept(
    client: FlaskClient, machine: Machine, token: str
) -> None:
    response = enroll(client, token, gpu={**NO_GPUS, "state": "ok", "gpus": [gpu("GPU-a"), gpu("GPU-b", 1)]})
    answer = response.get_json()
    machine = Machine.get_by_id(machine.id)
    assert (answer["machine_id"], answer["epoch"]) == (machine.id, machine.epoch)
    assert machine.facts == FACTS
    assert [row.uuid for row in Gpu.select().where(Gpu.machine == machine).order_by(Gpu.slot)] == ["GPU-a", "GPU-b"]
    assert FakeAgent(client, answer["credential"]).hold()["desired"]["machine_id"] == machine.id


def test_neither_token_nor_credential_is_stored_or_audited(client: FlaskClient, token: str, database: Any) -> None:
    credential = enroll(client, token).get_json()["credential"]
    for table in (EnrollToken, AgentCredential, AuditEntry):
        for row in table.select().dicts():
            assert token not in str(row)
            assert credential not in str(row)


def test_a_token_lets_in_one_agent_even_if_many_come_at_once(app: Flask, machine: Machine, token: str) -> None:
    def try_it(_: int) -> int:
        try:
            return enroll(app.test_client(), token).status_code
        finally:
            db.db.close()

    with ThreadPoolExecutor(6) as pool:
        statuses = sorted(pool.map(try_it, range(6)))
    assert statuses == [200, 401, 401, 401, 401, 401]
    assert states_of(machine) == ["pending"]


def test_an_unknown_a_used_and_an_old_token_are_refused_alike(
    client: FlaskClient, machine: Machine, token: str
) -> None:
    EnrollToken.update(expires_at=utcnow() - LATER).execute()
    answers = [enroll(client, token), enroll(client, "no such token")]
    again = agents.new_enroll_token(machine, by=SYSTEM)
    assert enroll(client, again).status_code == 200
    answers.append(enroll(client, again))
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.get_json()["detail"] for answer in answers} == {answers[0].get_json()["detail"]}
    assert AuditEntry.select().where(AuditEntry.action == "agent.enrol_refused").count() == 2


def test_a_new_token_ends_those_before_it(client: FlaskClient, machine: Machine, token: str) -> None:
    newer = agents.new_enroll_token(machine, by=SYSTEM)
    assert enroll(client, token).status_code == 401
    assert enroll(client, newer).status_code == 200


def test_a_machine_with_an_agent_lets_in_a_second_one_only_when_an_operator_asks(
    app: Flask, client: FlaskClient, machine: Machine, token: str
) -> None:
    first = agent_of(app, machine)
    EnrollToken.update(expires_at=utcnow() + LATER).where(EnrollToken.used_at.is_null()).execute()
    refused = enroll(client, token)  # given out before the agent that is there now
    assert (refused.status_code, refused.get_json()["code"]) == (409, "already_enrolled")
    assert first.hold()["generation"] > 0

    invited = agents.new_enroll_token(machine, by=SYSTEM)
    second = FakeAgent(client, enroll(client, invited).get_json()["credential"])
    assert first.hold()["generation"] > 0, "until the new one has called, the old one goes on"
    second.hold()
    assert first.say(first.message(report=None)).status_code == 401
    assert states_of(machine) == ["ended", "current"]


def test_what_a_host_says_about_itself_never_makes_it_another_machine(app: Flask, machine: Machine) -> None:
    agent_of(app, machine)
    other = make_machine(state="provisioning")
    answer = enroll(app.test_client(), agents.new_enroll_token(other, by=SYSTEM)).get_json()
    assert answer["machine_id"] == other.id
    assert states_of(machine) == ["current"]


def test_a_rotation_takes_effect_at_the_first_use_of_the_new_credential(app: Flask, machine: Machine) -> None:
    agent = agent_of(app, machine)
    asked = agents.rotate(machine, by=SYSTEM)
    assert agents.rotate(machine, by=SYSTEM).id == asked.id, "one at a time"
    sent = agent.await_order()["commands"][0]
    assert agent.report(command_results=[command_result(sent["command_id"])])["acks"]["command_results"] == [asked.id]

    old, agent.credential = agent.credential, sent["args"]["credential"]
    agent.report()
    refused = agent.say(agent.message(report=None), credential=old)
    assert (refused.status_code, refused.get_json()["code"]) == (401, "credential_refused")
    assert states_of(machine) == ["ended", "current"]
    assert "sealed" not in Command.get_by_id(asked.id).args


def test_a_rotation_that_failed_leaves_the_old_credential(app: Flask, machine: Machine) -> None:
    agent = agent_of(app, machine)
    command = agents.rotate(machine, by=SYSTEM)
    new = agent.await_order()["commands"][0]["args"]["credential"]
    agent.report(command_results=[command_result(command.id, ok=False, message="the disk is full")])
    assert agent.say(agent.message(report=None), credential=new).status_code == 401
    agent.report()
    assert states_of(machine) == ["current", "ended"]


@pytest.mark.parametrize("how", ["ended", "retired"])
def test_a_machine_that_is_out_of_service_is_refused_at_once(app: Flask, machine: Machine, how: str) -> None:
    agent = agent_of(app, machine)
    agent.report()
    if how == "ended":
        agents.end_credentials(machine, by=SYSTEM)
    else:
        Machine.update(state="retired").where(Machine.id == machine.id).execute()
        agents._agents.clear()  # retiring ends the credentials too; here the state alone must do
    assert agent.say(agent.message()).status_code == 401


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Basic abc", "Bearer nonsense", "bearer \udcff"])
def test_nobody_is_let_in_without_a_credential(client: FlaskClient, database: Any, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("utf-8", "surrogateescape").decode("latin-1")}
    for path in ("sync", "enroll"):
        response = client.post(f"/api/v1/agent/{path}", json={}, headers=headers)
        assert response.status_code == 401
        assert response.mimetype == "application/problem+json"


def test_a_person_is_no_agent_and_an_agent_no_person(app: Flask, machine: Machine, sign_in: Any, operator: Any) -> None:
    agent = agent_of(app, machine)
    person = sign_in(operator)
    assert person.post("/agent/sync", agent.message()).status_code == 401
    response = app.test_client().get("/api/v1/admin/tasks", headers={"Authorization": f"Bearer {agent.credential}"})
    assert response.status_code == 401
