"""The life of a task over HTTP: who may run one, what is taken from them, how it moves, ends, is tried again, lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask

from portal import db
from portal.db import utcnow
from portal.errors import Conflict, Invalid
from portal.integrations import protocol
from portal.models import Attempt, AuditEntry, Gpu, Lease, Machine, MachineReport, Task, Tenant, User
from portal.models.states import ATTEMPT, TASK_ENDED
from portal.services import frozen, heartbeats, leases, machines, tasks
from portal.services.actors import SYSTEM
from remotegpu_agent.portal import LARGEST_ANSWER_BYTES
from remotegpu_agent.protocol import read_desired
from tests.api.fake_agent import (
    FakeAgent,
    agent_of,
    attempt_report,
    command_result,
    leased_machine,
    log_range,
    make_task,
)
from tests.factories import actor_of, make_user

URL = "/customer/tasks"


@pytest.fixture
def lease(tenant: Tenant) -> Lease:
    return leased_machine(tenant)[1]


@pytest.fixture
def agent(app: Flask, lease: Lease) -> FakeAgent:
    return agent_of(app, lease.machine)


def body_for(lease: Lease, **fields: Any) -> dict[str, Any]:
    return {"machine_id": lease.machine_id, "name": "train", "command": "python train.py", **fields}


def newest(task: Task) -> Attempt:
    return tasks.newest_attempt(task)


def states_of(task: Task) -> list[str]:
    return [attempt.state for attempt in tasks.attempts_of(task)]


# Create


def test_a_task_reaches_the_host_as_it_was_written(
    sign_in: Any, customer: User, lease: Lease, agent: FakeAgent
) -> None:
    command = "#!/bin/bash\nset -e\necho \"$HOME ${X} $(id) %h\\n\" '训练' `date`\t\r\n{{ 7*7 }}\n"
    env = {"X": "$HOME 'a' \"b\" \n %n", "EMPTY": "", "名": ""}
    fields = {
        "env": {key: value for key, value in env.items() if key.isascii()},
        "workdir": "~/run 1",
        "stop_grace_s": 0,
    }
    response = sign_in(customer).post(f"{URL}/training", body_for(lease, command=command, **fields))
    assert response.status_code == 201
    task = response.get_json()
    (order,) = agent.await_order()["attempts"]
    assert order == {
        "attempt_id": task["attempt"]["id"],
        "task_id": task["id"],
        "lease_id": lease.host_id,
        "state": "run",
        "command": command,
        "env": fields["env"],
        "workdir": "~/run 1",
        "time_limit_s": 3600,
        "stop_grace_s": 0,
        "gpu_uuids": None,
    }


SERVERS = (
    "id",
    "state",
    "attempt",
    "lease_id",
    "tenant_id",
    "created_by",
    "exit_code",
    "pid",
    "owner",
    "attempts",
    "uid",
)


@pytest.mark.parametrize("field", SERVERS)
def test_what_is_the_portal_s_is_not_the_caller_s_to_set(
    sign_in: Any, customer: User, lease: Lease, field: str
) -> None:
    response = sign_in(customer).post(f"{URL}/training", body_for(lease, **{field: 1}))
    assert response.status_code == 422
    assert list(response.get_json()["errors"]) == [field]
    assert Task.select().count() == 0


@pytest.mark.parametrize(
    ("fields", "faulty"),
    [
        ({"command": " \n"}, "command"),
        ({"command": "x" * 65537}, "command"),
        ({"command": "训" * 30000}, "command"),
        ({"name": ""}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"name": "n" * 101}, "name"),
        ({"env": {"1X": "a"}}, "env"),
        ({"env": {"A-B": "a"}}, "env"),
        ({"env": {"X=Y": "a"}}, "env"),
        ({"env": {f"X{number}": "" for number in range(201)}}, "env"),
        ({"workdir": "a\nb"}, "workdir"),
        ({"gpu_uuids": ["GPU-of-somebody"]}, "gpu_uuids"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"time_limit_s": 31 * 86400}, "time_limit_s"),
        ({"time_limit_s": "60"}, "time_limit_s"),
        ({"stop_grace_s": -1}, "stop_grace_s"),
        ({"stop_grace_s": 301}, "stop_grace_s"),
        ({"retries": 11}, "retries"),
        ({"retries": True}, "retries"),
    ],
)
def test_a_faulty_field_is_named(
    sign_in: Any, customer: User, lease: Lease, fields: dict[str, Any], faulty: str
) -> None:
    response = sign_in(customer).post(f"{URL}/training", body_for(lease, **fields))
    assert response.status_code == 422
    assert faulty in {name.split(".")[0] for name in response.get_json()["errors"]}
    assert Task.select().count() == 0


@pytest.mark.parametrize("fields", [{"command": "a\0b"}, {"command": "\ud83d"}, {"env": {"X": "a\0"}}])
def test_text_that_no_host_could_be_given_is_refused_whoever_asks(
    customer: User, lease: Lease, fields: dict[str, Any]
) -> None:
    """Over HTTP such a body is refused before; a page or a command line comes another way."""
    with pytest.raises(Invalid) as refused:
        make_task(lease, customer, **fields)
    assert set(refused.value.fields) == set(fields)


def test_every_faulty_field_is_named_at_once(sign_in: Any, customer: User, lease: Lease) -> None:
    response = sign_in(customer).post(f"{URL}/training", body_for(lease, command=" ", env={"1": ""}, retries=99))
    assert set(response.get_json()["errors"]) == {"command", "env", "retries"}


def test_a_task_may_name_gpus_of_its_machine(sign_in: Any, customer: User, lease: Lease, agent: FakeAgent) -> None:
    for number in range(2):
        Gpu.create(machine=lease.machine, uuid=f"GPU-{number}")
    assert sign_in(customer).post(f"{URL}/training", body_for(lease, gpu_uuids=["GPU-1"])).status_code == 201
    assert agent.await_order()["attempts"][0]["gpu_uuids"] == ["GPU-1"]
    twice = sign_in(customer).post(f"{URL}/training", body_for(lease, gpu_uuids=["GPU-1", "GPU-1"]))
    assert twice.status_code == 422


def test_a_task_that_names_no_gpu_is_given_those_of_its_machine(
    sign_in: Any, customer: User, lease: Lease, agent: FakeAgent
) -> None:
    for number in (1, 0):
        Gpu.create(machine=lease.machine, uuid=f"GPU-{number}", slot=number)
    assert sign_in(customer).post(f"{URL}/training", body_for(lease)).status_code == 201
    assert agent.await_order()["attempts"][0]["gpu_uuids"] == ["GPU-0", "GPU-1"]


def test_a_lease_holds_a_limited_number_of_live_tasks(
    sign_in: Any, customer: User, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MOST_LIVE_A_LEASE", 2)
    person = sign_in(customer)
    statuses = [person.post(f"{URL}/training", body_for(lease)).status_code for _ in range(3)]
    assert statuses == [201, 201, 409]


LARGEST = {"command": "\x01" * tasks.MOST_COMMAND_BYTES, "env": {"X": "\x01" * (tasks.MOST_ENV_BYTES - 1)}}


def test_the_most_that_a_customer_may_order_and_stop_is_an_answer_that_its_agent_takes(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    """A control character takes six bytes in JSON. An agent that cannot read its answers hears of no end either."""
    for _ in range(20):
        tasks.stop(make_task(lease, customer, **LARGEST)[0], by=actor_of(customer))
    fields = LARGEST
    while fields["command"]:
        try:
            make_task(lease, customer, **fields)
        except Conflict:
            fields = {"command": fields["command"][: len(fields["command"]) // 2]}
    live = Task.select().where(Task.state == "queued").count()
    assert 5 < live < tasks.MOST_LIVE_A_LEASE, "what was stopped takes no room"
    answer = agent.say(agent.message(report=None, generation=0, epoch=None)).data
    assert tasks.MOST_LIVE_BYTES < len(answer) < LARGEST_ANSWER_BYTES / 2
    orders = read_desired(json.loads(answer)["desired"]).attempts
    assert [order.is_wanted for order in orders].count(True) == live
    assert len(orders) == live + 20


def test_what_is_tried_again_needs_the_room_of_a_new_task(
    customer: User, lease: Lease, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MOST_LIVE_BYTES", 1500)
    task, attempt = make_task(lease, customer, command="x" * 1000)
    agent.report(attempts=[attempt_report(attempt.id, "failed", exit_code=1)])
    make_task(lease, customer, command="y" * 1000)
    with pytest.raises(Conflict, match="more than 1500 bytes"):
        tasks.retry(tasks.get(tasks.every(), task.id), by=actor_of(customer))
    assert states_of(task) == ["failed"]


def test_a_host_that_has_lost_a_running_attempt_does_not_run_its_script_again(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    _, attempt = make_task(lease, customer, command="touch again", env={"A": "b"}, workdir="run")
    agent.report(attempts=[attempt_report(attempt.id, "starting")])
    assert agent.await_order()["attempts"][0]["command"] == "touch again"
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    (order,) = agent.await_order()["attempts"]
    assert (order["state"], order["env"], order["workdir"]) == ("run", {}, None)
    ran = subprocess.run(["bash"], input=order["command"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "not run twice" in ran.stderr


# Who


@pytest.mark.parametrize("state", ["scheduled", "ending", "ended", "active but over", "nobody's"])
def test_a_task_needs_the_caller_s_active_lease_on_that_machine(
    sign_in: Any, customer: User, lease: Lease, other_tenant: Tenant, state: str
) -> None:
    changes: dict[str, Any] = {"state": state} if state in ("scheduled", "ending", "ended") else {}
    if state == "active but over":
        changes = {"ends_at": utcnow() - timedelta(seconds=1)}
    elif state == "nobody's":
        changes = {"tenant": other_tenant.id}
    Lease.update(**changes).where(Lease.id == lease.id).execute()
    response = sign_in(customer).post(f"{URL}/training", body_for(lease))
    assert (response.status_code, response.get_json()["code"]) == (404, "no_lease")
    assert Task.select().count() == 0


@pytest.mark.parametrize("call", ["detail", "stop", "retry", "create"])
def test_a_stranger_is_told_that_there_is_no_such_task(
    sign_in: Any, customer: User, stranger: User, lease: Lease, call: str
) -> None:
    task, _ = make_task(lease, customer)
    person = sign_in(stranger)
    if call == "create":
        response = person.post(f"{URL}/training", body_for(lease))
    elif call == "detail":
        response = person.get(f"{URL}/{task.id}")
    else:
        response = person.post(f"{URL}/{task.id}/{call}")
    assert response.status_code == 404
    assert person.get(URL).get_json()["items"] == []
    assert newest(task).desired == "run"


def test_a_viewer_looks_and_does_nothing(sign_in: Any, customer: User, viewer: User, lease: Lease) -> None:
    task, _ = make_task(lease, customer)
    person = sign_in(viewer)
    assert person.get(f"{URL}/{task.id}").status_code == 200
    assert [item["id"] for item in person.get(URL).get_json()["items"]] == [task.id]
    refusals = [person.post(f"{URL}/training", body_for(lease)), person.post(f"{URL}/{task.id}/stop")]
    refusals.append(person.post(f"{URL}/{task.id}/retry"))
    assert [response.status_code for response in refusals] == [403, 403, 403]
    assert newest(task).desired == "run"


def test_a_member_stops_own_tasks_and_an_owner_those_of_all(
    sign_in: Any, customer: User, member: User, lease: Lease
) -> None:
    owners, members = make_task(lease, customer)[0], make_task(lease, member)[0]
    assert sign_in(member).post(f"{URL}/{owners.id}/stop").status_code == 403
    assert sign_in(member).post(f"{URL}/{members.id}/stop").status_code == 202
    more, _ = make_task(lease, member)
    assert sign_in(customer).post(f"{URL}/{more.id}/stop").status_code == 202
    assert states_of(owners) == ["queued"]


def test_who_leaves_the_tenant_loses_its_tasks(sign_in: Any, tenant: Tenant, lease: Lease) -> None:
    from portal.models import Membership

    leaver = make_user("customer", tenant=tenant)
    task, _ = make_task(lease, leaver)
    Membership.delete().where(Membership.user == leaver).execute()
    assert sign_in(leaver).post(f"{URL}/{task.id}/stop").status_code == 404
    assert sign_in(leaver).get(f"{URL}/{task.id}").status_code == 404


def test_no_answer_shows_another_person_s_address(sign_in: Any, customer: User, viewer: User, lease: Lease) -> None:
    User.update(email="carol@example.org", phone="+1 555 0100").where(User.id == customer.id).execute()
    task, _ = make_task(lease, customer)
    shown = sign_in(viewer).get(f"{URL}/{task.id}").get_data(as_text=True)
    assert "carol" in shown
    assert "example.org" not in shown
    assert "0100" not in shown


# Lists


def test_lists_are_filtered_and_counted(
    sign_in: Any, customer: User, stranger: User, operator: User, lease: Lease, other_tenant: Tenant
) -> None:
    other = leased_machine(other_tenant)[1]
    mine = [make_task(lease, customer, name=f"train {number}")[0] for number in range(3)]
    theirs, _ = make_task(other, stranger, name="infer", command="serve 50%_off")
    tasks.stop(mine[0], by=actor_of(customer))

    def listed(person: User, url: str) -> list[int]:
        answer = sign_in(person).get(url).get_json()
        assert answer["total"] == len(answer["items"])
        return [item["id"] for item in answer["items"]]

    assert listed(customer, URL) == [task.id for task in reversed(mine)]
    assert listed(customer, f"{URL}?state=stopped") == [mine[0].id]
    assert listed(customer, f"{URL}?keyword=train%201") == [mine[1].id]
    assert listed(customer, f"{URL}?machine_id={other.machine_id}") == []
    assert listed(operator, "/admin/tasks") == [theirs.id, *(task.id for task in reversed(mine))]
    assert listed(operator, f"/admin/tasks?tenant_id={other_tenant.id}") == [theirs.id]
    assert listed(operator, "/admin/tasks?keyword=50%25_off") == [theirs.id]
    assert listed(operator, "/admin/tasks?keyword=5%25f") == [], "what means something to SQL is only text"
    figures = sign_in(operator).get("/admin/tasks/figures").get_json()["figures"]
    assert figures == {**dict.fromkeys(ATTEMPT, 0), "queued": 3, "stopped": 1}
    assert sign_in(customer).get("/admin/tasks").status_code == 403


# Hear from the host


def test_a_task_starts_runs_and_ends_with_its_exit_code(
    sign_in: Any, customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, attempt = make_task(lease, customer)
    for state, fields in (("starting", {}), ("running", {}), ("failed", {"exit_code": 3, "reason": "exit 3"})):
        agent.report(attempts=[attempt_report(attempt.id, state, **fields)])
        assert tasks.get(tasks.every(), task.id).state == state
    shown = sign_in(customer).get(f"{URL}/{task.id}").get_json()
    assert shown["attempt"]["exit_code"] == 3
    assert shown["attempt"]["reason"] == "exit 3"
    assert shown["ended_at"] is not None
    assert shown["attempt"]["started_at"] is not None


@pytest.mark.parametrize("first", TASK_ENDED)
def test_what_has_ended_stays_as_it_ended(customer: User, lease: Lease, agent: FakeAgent, first: str) -> None:
    task, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, first, exit_code=7)])
    for late in ("starting", "running", *TASK_ENDED):
        agent.report(attempts=[attempt_report(attempt.id, late, exit_code=9)])
        kept = Attempt.get_by_id(attempt.id)
        assert (kept.state, kept.exit_code) == (first, 7)
    assert states_of(task) == [first]


def test_a_state_never_moves_back(customer: User, lease: Lease, agent: FakeAgent) -> None:
    _, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    agent.report(attempts=[attempt_report(attempt.id, "starting")])
    assert Attempt.get_by_id(attempt.id).state == "running"


# Stop


def test_a_queued_task_is_stopped_at_once_and_the_host_is_told_in_case_it_began(
    sign_in: Any, customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, attempt = make_task(lease, customer)
    agent.await_order()
    assert sign_in(customer).post(f"{URL}/{task.id}/stop").get_json()["state"] == "stopped"
    (order,) = agent.await_order()["attempts"]
    assert (order["attempt_id"], order["state"]) == (attempt.id, "stop")

    agent.report(attempts=[attempt_report(attempt.id, "running")])  # it had begun
    assert Attempt.get_by_id(attempt.id).state == "stopped", "a late start revives nothing"
    assert [order["state"] for order in agent.hold(generation=0, epoch=None)["desired"]["attempts"]] == ["stop"]
    agent.report(attempts=[attempt_report(attempt.id, "stopped")])
    assert agent.hold(generation=0, epoch=None)["desired"]["attempts"] == [], "until it has confirmed"


def test_a_host_that_runs_what_was_given_up_is_told_to_stop_it(customer: User, lease: Lease, agent: FakeAgent) -> None:
    task, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    tasks.lose_all_of(task.lease, reason="nobody heard of it")
    agent.await_order()
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    (order,) = agent.await_order()["attempts"]
    assert (order["attempt_id"], order["state"]) == (attempt.id, "stop")
    assert Attempt.get_by_id(attempt.id).state == "lost"


def test_a_running_task_stops_when_the_host_says_so_and_asking_again_changes_nothing(
    sign_in: Any, customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    person = sign_in(customer)
    assert person.post(f"{URL}/{task.id}/stop").get_json()["state"] == "running"
    generation = Machine.get_by_id(lease.machine_id).generation
    assert person.post(f"{URL}/{task.id}/stop").status_code == 202
    assert Machine.get_by_id(lease.machine_id).generation == generation
    (order,) = agent.await_order()["attempts"]
    assert order["state"] == "stop"
    agent.report(attempts=[attempt_report(attempt.id, "stopped", signal=15)])
    assert person.post(f"{URL}/{task.id}/stop").get_json()["state"] == "stopped"
    assert AuditEntry.select().where(AuditEntry.action == "task.stop_requested").count() == 1


def test_an_operator_stops_any_task(sign_in: Any, customer: User, operator: User, lease: Lease) -> None:
    task, _ = make_task(lease, customer)
    assert sign_in(operator).post(f"/admin/tasks/{task.id}/stop").get_json()["state"] == "stopped"


def test_the_end_of_a_lease_ends_its_tasks(customer: User, lease: Lease, agent: FakeAgent) -> None:
    queued, running = make_task(lease, customer)[0], make_task(lease, customer, retries=3)[0]
    agent.report(attempts=[attempt_report(newest(running).id, "running")])
    leases.end(Lease.get_by_id(lease.id), by=SYSTEM, reason="test")
    assert states_of(queued) == ["stopped"]
    told = agent.await_order()
    assert told["leases"][0]["state"] == "closed"
    assert {order["state"] for order in told["attempts"]} == {"stop"}
    agent.report(attempts=[attempt_report(newest(running).id, "failed", exit_code=1)])
    assert states_of(running) == ["failed"], "and nothing is tried again"


# Retry


def test_a_retry_is_a_new_attempt_with_an_id_and_an_outcome_of_its_own(
    sign_in: Any, customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, first = make_task(lease, customer)
    person = sign_in(customer)
    assert person.post(f"{URL}/{task.id}/retry").status_code == 409
    agent.report(attempts=[attempt_report(first.id, "failed", exit_code=1)])
    retried = person.post(f"{URL}/{task.id}/retry").get_json()
    assert (retried["state"], retried["attempt"]["number"]) == ("queued", 2)
    assert retried["attempt"]["id"] != first.id
    agent.report(attempts=[attempt_report(retried["attempt"]["id"], "succeeded", exit_code=0)])
    agent.report(attempts=[attempt_report(first.id, "failed", exit_code=1)])
    shown = person.get(f"{URL}/{task.id}").get_json()
    assert [(each["state"], each["exit_code"]) for each in shown["attempts"]] == [("failed", 1), ("succeeded", 0)]
    assert shown["state"] == "succeeded"


def test_a_task_is_where_its_newest_attempt_is_and_an_older_one_does_not_take_it_back(
    sign_in: Any, customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, first = make_task(lease, customer)

    def seen() -> tuple[str, str]:
        return Task.get_by_id(task.id).state, newest(task).state

    for state in ("starting", "running", "failed"):
        agent.report(attempts=[attempt_report(first.id, state)])
        assert seen() == (state, state)
    assert sign_in(customer).post(f"{URL}/{task.id}/retry").status_code == 202
    assert seen() == ("queued", "queued")
    with db.atomic():
        assert not tasks._mirror(task, Attempt.get_by_id(first.id))
    assert seen() == ("queued", "queued")
    assert Task.get_by_id(task.id).ended_at is None


def test_the_trail_tells_each_step_of_an_attempt_and_whose_word_it_is(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    _, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    agent.report(attempts=[attempt_report(attempt.id, "failed", exit_code=3)])
    other, waiting = make_task(lease, customer)
    tasks.stop(other, by=actor_of(customer))
    steps = [
        (entry.action, entry.detail["attempt_id"], entry.actor_kind, entry.detail["exit_code"])
        for entry in AuditEntry.select().where(AuditEntry.detail.contains("exit_code")).order_by(AuditEntry.id)
    ]
    assert steps == [
        ("task.starting", attempt.id, "agent", None),
        ("task.running", attempt.id, "agent", None),
        ("task.failed", attempt.id, "agent", 3),
        ("task.stopped", waiting.id, "user", None),
    ]


def test_each_attempt_has_an_output_of_its_own(sign_in: Any, customer: User, lease: Lease, agent: FakeAgent) -> None:
    task, first = make_task(lease, customer, retries=1)
    agent.report(
        attempts=[attempt_report(first.id, "failed", exit_code=1)], logs=[log_range(first.id, 0, b"one", end=True)]
    )
    agent.report(logs=[log_range(newest(task).id, 0, b"two", end=True)])
    person = sign_in(customer)
    assert [person.get(f"{URL}/{task.id}/log?attempt={number}").data for number in (1, 2)] == [b"one", b"two"]
    assert person.get(f"{URL}/{task.id}/log").data == b"two"
    assert person.get(f"{URL}/{task.id}/log?attempt=3").status_code == 404


@pytest.mark.parametrize(
    ("ends", "states"),
    [
        (["failed", "failed", "failed"], ["failed", "failed", "failed"]),
        (["failed", "succeeded"], ["failed", "succeeded"]),
        (["lost", "succeeded"], ["lost", "succeeded"]),
        (["timed_out"], ["timed_out"]),
        (["stopped"], ["stopped"]),
    ],
)
def test_what_failed_is_tried_again_by_itself_as_often_as_was_asked(
    customer: User, lease: Lease, agent: FakeAgent, ends: list[str], states: list[str]
) -> None:
    task, _ = make_task(lease, customer, retries=2)
    for end in ends:
        agent.report(attempts=[attempt_report(newest(task).id, end)])
    assert states_of(task) == states
    assert tasks.get(tasks.every(), task.id).state == states[-1]


def test_a_task_that_somebody_stopped_is_not_tried_again(customer: User, lease: Lease, agent: FakeAgent) -> None:
    task, attempt = make_task(lease, customer, retries=5)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    tasks.stop(task, by=actor_of(customer))
    agent.report(attempts=[attempt_report(attempt.id, "failed", exit_code=143)])
    assert states_of(task) == ["failed"]


def test_of_many_who_try_again_at_once_one_wins(customer: User, lease: Lease, agent: FakeAgent) -> None:
    task, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "failed")])

    def retry(_: int) -> bool:
        try:
            tasks.retry(tasks.get(tasks.every(), task.id), by=SYSTEM)
        except tasks.Conflict:
            return False
        finally:
            db.db.close()
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(retry, range(6))) == [False] * 5 + [True]
    assert states_of(task) == ["failed", "queued"]


def test_nothing_is_tried_again_after_the_lease(customer: User, lease: Lease, agent: FakeAgent) -> None:
    task, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "failed")])
    Lease.update(state="ending").where(Lease.id == lease.id).execute()
    with pytest.raises(tasks.Conflict, match="lease has ended"):
        tasks.retry(tasks.get(tasks.every(), task.id), by=actor_of(customer))


# Lose


def test_a_host_that_was_restarted_has_lost_its_tasks_but_not_what_it_knows_of_their_end(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    (finished, gone, waiting) = (make_task(lease, customer)[0] for _ in range(3))
    agent.report(attempts=[attempt_report(newest(task).id, "running") for task in (finished, gone)])
    heartbeats.flush()
    assert tasks.lose_gone() == 0
    agent.boot_id = "boot-2"
    agent.report(attempts=[attempt_report(newest(finished).id, "succeeded", exit_code=0)])
    heartbeats.flush()
    assert tasks.lose_gone() == 1
    assert tasks.lose_gone() == 0
    assert [states_of(task) for task in (finished, gone, waiting)] == [["succeeded"], ["lost"], ["queued"]]
    assert "restarted" in newest(gone).reason


def test_what_runs_since_a_boot_is_not_lost_before_the_boot_itself_is_kept(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, first = make_task(lease, customer, retries=1)
    agent.report(attempts=[attempt_report(first.id, "running")])
    heartbeats.flush()
    agent.boot_id = "boot-2"
    agent.report(attempts=[attempt_report(first.id, "lost")])
    agent.report(attempts=[attempt_report(newest(task).id, "running", boot_id="boot-2")])
    assert tasks.lose_gone() == 0
    assert states_of(task) == ["lost", "running"]
    assert newest(task).desired == "run"


def test_whoever_looks_while_the_first_report_after_a_boot_is_taken_loses_nothing_of_it(
    customer: User, lease: Lease, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished, gone, begun) = (make_task(lease, customer)[0] for _ in range(3))
    agent.report(attempts=[attempt_report(newest(task).id, "running") for task in (finished, gone)])
    heartbeats.flush()
    take = tasks.attempt_reported

    def take_and_look(machine: Machine, reported: Mapping[str, Any]) -> None:
        tasks.lose_gone()
        take(machine, reported)
        tasks.lose_gone()

    monkeypatch.setattr(tasks, "attempt_reported", take_and_look)
    agent.boot_id = "boot-2"
    since = attempt_report(newest(begun).id, "running", boot_id="boot-2")
    before = attempt_report(newest(finished).id, "succeeded", exit_code=0)
    agent.report(attempts=[since, before])
    assert [states_of(task) for task in (finished, gone, begun)] == [["succeeded"], ["lost"], ["running"]]


def test_nothing_is_lost_while_a_host_is_frozen_and_its_word_counts_after_that(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, attempt = make_task(lease, customer, retries=1)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    agent.generation += 5  # the portal was restored from a backup
    agent.boot_id = "boot-2"
    ended = attempt_report(attempt.id, "succeeded", exit_code=0)
    agent.report(frozen=True, attempts=[ended])
    heartbeats.flush()
    assert tasks.lose_gone(utcnow() + timedelta(days=1)) == 0
    frozen.thaw(machines.get(lease.machine_id), by=SYSTEM, reason="compared with the host")
    assert tasks.lose_gone() == 0, "the host has not spoken yet"
    (thaw,) = agent.await_order()["commands"]
    agent.report(attempts=[ended], command_results=[command_result(thaw["command_id"])])
    assert machines.get(lease.machine_id).frozen_reason is None
    assert tasks.lose_gone() == 0
    assert states_of(task) == ["succeeded"], "and it is not run twice"


def test_a_host_that_is_away_keeps_its_tasks_while_the_lease_lasts(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    heartbeats.flush()
    tomorrow = utcnow() + timedelta(days=1)
    assert tasks.lose_gone(tomorrow) == 0
    Lease.update(state="ended", ended_at=utcnow()).where(Lease.id == lease.id).execute()
    assert tasks.lose_gone(utcnow() + timedelta(minutes=4)) == 0
    assert tasks.lose_gone(utcnow() + timedelta(minutes=6)) == 1
    assert states_of(task) == ["lost"]


def test_a_host_that_is_there_and_silent_about_an_ended_lease_s_task_has_lost_it(
    customer: User, lease: Lease, agent: FakeAgent
) -> None:
    task, attempt = make_task(lease, customer)
    agent.report(attempts=[attempt_report(attempt.id, "running")])
    Lease.update(state="ended", ended_at=utcnow()).where(Lease.id == lease.id).execute()
    later = utcnow() + timedelta(minutes=11)
    heartbeats.flush()
    MachineReport.update(received_at=later).execute()
    assert tasks.lose_gone(later) == 1
    assert states_of(task) == ["lost"]


def test_every_order_is_of_the_protocol(customer: User, lease: Lease, agent: FakeAgent) -> None:
    make_task(lease, customer, env={"A": "b"}, workdir="/tmp", time_limit_s=None, gpu_uuids=[])
    tasks.stop(make_task(lease, customer)[0], by=actor_of(customer))
    orders = [protocol.check(order, "desired_attempt") for order in tasks.to_send(Machine.get_by_id(lease.machine_id))]
    assert [order["state"] for order in orders] == ["run", "stop"]
