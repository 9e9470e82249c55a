"""Runs at the front door: who may, what is refused before anything starts, output in pages and as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from werkzeug.test import TestResponse

from portal.db import utcnow
from portal.models import AuditEntry, Machine, Run, RunHost, User
from portal.services import locks, runs
from portal.services.actors import SYSTEM
from portal.services.runs import Line, Outcome
from portal.services.transitions import WrongState
from tests.conftest import SignedIn
from tests.support.runs import make_machine

SignIn = Callable[[User], SignedIn]


def body(answer: TestResponse) -> Any:
    """The JSON of an answer."""
    return answer.json


@pytest.fixture
def olga(sign_in: SignIn, operator: User) -> SignedIn:
    return sign_in(operator)


@pytest.fixture
def machine(database: Any) -> Machine:
    return make_machine("gpu-1")


def queued(machine: Machine) -> Run:
    return runs.queue("gpu_hosts", [machine], by=SYSTEM)


def running(machine: Machine) -> tuple[Run, str]:
    """A run that a worker holds."""
    queued(machine)
    run = runs.claim("token", lock_s=30)
    assert run is not None
    return run, "token"


def test_an_operator_queues_a_run_on_named_machines(olga: SignedIn, machine: Machine) -> None:
    answer = olga.post("/admin/runs", {"playbook": "gpu_hosts", "machines": ["gpu-1"], "tags": ["base"], "check": True})
    assert answer.status_code == 201
    assert body(answer)["state"] == "queued"
    assert body(answer)["machines"] == [{"id": machine.id, "name": "gpu-1"}]
    assert body(answer)["requested_by"] == "olga"
    assert body(answer)["impact"] == {"leases": [], "tasks": []}
    assert AuditEntry.get(AuditEntry.action == "run.queued").actor_name == "olga"


NO_LISTS: tuple[list[str], ...] = (
    [], [""], [" "], [","], [":"], ["all"], ["*"], ["gpu-1,gpu-2"], ["gpu-9"], ["gpu-1", ""],
)  # fmt: skip


@pytest.mark.parametrize("names", NO_LISTS)
def test_a_host_list_that_is_blank_or_unknown_starts_nothing(
    olga: SignedIn, machine: Machine, names: list[str]
) -> None:
    answer = olga.post("/admin/runs", {"playbook": "gpu_hosts", "machines": names})
    assert answer.status_code == 422
    assert Run.select().count() == 0


@pytest.mark.parametrize(
    "told",
    [
        {"playbook": "../../etc/passwd"},
        {"playbook": "reboot"},
        {"tags": ["never"]},
        {"playbook": "verify", "tags": ["docker"]},
        {"extra_vars": {"a": 1}},
        {"purpose": "provision"},
        {"state": "succeeded"},
    ],
)
def test_what_a_run_may_be_told_is_a_closed_list(olga: SignedIn, machine: Machine, told: dict[str, Any]) -> None:
    answer = olga.post("/admin/runs", {"playbook": "gpu_hosts", "machines": ["gpu-1"], **told})
    assert answer.status_code == 422
    assert Run.select().count() == 0


def test_a_customer_sees_no_run(sign_in: SignIn, customer: User, machine: Machine) -> None:
    run = queued(machine)
    carol = sign_in(customer)
    for path in ("", f"/{run.id}", f"/{run.id}/events", f"/{run.id}/stream"):
        assert carol.get(f"/admin/runs{path}").status_code == 403
    assert carol.post(f"/admin/runs/{run.id}/cancel").status_code == 403


def test_a_machine_without_a_confirmed_host_key_is_not_run_on(olga: SignedIn, database: Any) -> None:
    make_machine("gpu-2", host_key=None)
    answer = olga.post("/admin/runs", {"playbook": "verify", "machines": ["gpu-2"]})
    assert (answer.status_code, body(answer)["code"]) == (409, "host_key_not_confirmed")


def test_a_waiting_run_is_cancelled_at_once(olga: SignedIn, machine: Machine) -> None:
    run = queued(machine)
    answer = olga.post(f"/admin/runs/{run.id}/cancel")
    assert (answer.status_code, body(answer)["state"]) == (202, "cancelled")
    assert runs.claim("token", lock_s=30) is None
    assert olga.post(f"/admin/runs/{run.id}/cancel").status_code == 409


def test_cancelling_a_running_run_asks_its_worker_and_may_be_repeated(olga: SignedIn, machine: Machine) -> None:
    run, _ = running(machine)
    for _attempt in range(2):
        answer = olga.post(f"/admin/runs/{run.id}/cancel")
        assert (answer.status_code, body(answer)["state"]) == (202, "running")
    assert AuditEntry.select().where(AuditEntry.action == "run.cancelling").count() == 1


def test_output_is_read_in_pages_until_it_is_complete(olga: SignedIn, machine: Machine) -> None:
    run, token = running(machine)
    runs.record(run, token, [Line("runner_on_ok", f"line {number}") for number in range(3)], lock_s=30)
    page = body(olga.get(f"/admin/runs/{run.id}/events?limit=2"))
    assert [event["stdout"] for event in page["items"]] == ["line 0", "line 1"]
    assert page["complete"] is False
    runs.finish(run, token, Outcome("succeeded", 0), [Line("playbook_on_stats", "the end")])
    page = body(olga.get(f"/admin/runs/{run.id}/events?after={page['next']}"))
    assert [event["stdout"] for event in page["items"]] == ["line 2", "the end"]
    assert (page["complete"], page["state"]) == (True, "succeeded")
    assert body(olga.get(f"/admin/runs/{run.id}"))["event_count"] == page["next"]


def test_a_stream_resumes_after_what_was_seen_and_says_when_it_ends(olga: SignedIn, machine: Machine) -> None:
    run, token = running(machine)
    runs.finish(run, token, Outcome("failed", 2, "gpu-1: broke"), [Line("verbose", text) for text in ("one", "two")])
    answer = olga.get(f"/admin/runs/{run.id}/stream", headers={"Last-Event-ID": "1"})
    assert answer.mimetype == "text/event-stream"
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.strip().split("\n\n")]
    assert [(block["event"], block.get("id")) for block in blocks] == [("output", "2"), ("end", None)]
    assert json.loads(blocks[0]["data"])["stdout"] == "two"
    assert json.loads(blocks[1]["data"]) == {"state": "failed", "reason": "gpu-1: broke"}


@pytest.mark.parametrize("seen", ["", "x", "-1", "1e9", "99999999999999"])
def test_a_stream_with_a_strange_last_event_id_starts_at_the_beginning(
    olga: SignedIn, machine: Machine, seen: str
) -> None:
    run, token = running(machine)
    runs.finish(run, token, Outcome("succeeded", 0), [Line("verbose", "one")])
    assert "id: 1\n" in olga.get(f"/admin/runs/{run.id}/stream", headers={"Last-Event-ID": seen}).text


def test_the_list_has_filters_and_bounds(olga: SignedIn, machine: Machine) -> None:
    other = make_machine("gpu-2")
    first, second = queued(machine), queued(other)
    runs.cancel(second, by=SYSTEM)
    assert [run["id"] for run in body(olga.get("/admin/runs"))["items"]] == [second.id, first.id]
    assert [run["id"] for run in body(olga.get("/admin/runs?state=queued"))["items"]] == [first.id]
    assert [run["id"] for run in body(olga.get(f"/admin/runs?machine_id={other.id}"))["items"]] == [second.id]
    for query in ("page=0", "page_size=201", "state=odd", "machine_id=x"):
        assert olga.get(f"/admin/runs?{query}").status_code == 422


def test_an_unknown_run_is_404(olga: SignedIn, database: Any) -> None:
    for path in ("", "/events", "/stream"):
        assert olga.get(f"/admin/runs/77{path}").status_code == 404
    assert olga.post("/admin/runs/77/cancel").status_code == 404


# What the rules promise


def test_two_runs_are_never_on_one_host(machine: Machine) -> None:
    other = make_machine("gpu-2")
    first, second = queued(machine), runs.queue("verify", [machine, other], by=SYSTEM)
    third = queued(other)
    assert runs.claim("a", lock_s=30) == first
    assert runs.claim("b", lock_s=30) is None, "the third must not overtake the second on the way to its host"
    runs.finish(first, "a", Outcome("succeeded", 0))
    assert runs.claim("b", lock_s=30) == second
    assert runs.claim("c", lock_s=30) is None
    runs.finish(second, "b", Outcome("succeeded", 0))
    assert runs.claim("c", lock_s=30) == third
    assert RunHost.select().where(RunHost.active).count() == 1


def test_a_void_token_changes_nothing(machine: Machine) -> None:
    run, token = running(machine)
    Run.update(lock_expires_at=utcnow()).execute()
    assert runs.take_over("another", lock_s=30) == run
    for act in (
        lambda: runs.record(run, token, [Line("verbose", "late")], lock_s=30),
        lambda: runs.keep(run, token, lock_s=30),
        lambda: runs.record_child(run, token, {"pid": 1}, lock_s=30),
        lambda: runs.finish(run, token, Outcome("succeeded", 0)),
        lambda: runs.lose(run, token, reason="late"),
    ):
        with pytest.raises(WrongState):
            act()
    assert runs.output_after(run.id, 0) == []
    assert Run.get().state == "running"


def test_a_lost_run_of_a_repeatable_playbook_starts_again_twice(machine: Machine) -> None:
    queued(machine)
    for attempt in (1, 2, 3):
        run = runs.claim(f"t{attempt}", lock_s=30)
        assert run is not None
        assert run.attempt == attempt
        runs.lose(run, f"t{attempt}", reason="gone")
    assert Run.get().state == "lost"
    assert runs.claim("t4", lock_s=30) is None
    assert RunHost.select().where(RunHost.active).count() == 0


def test_a_lost_run_that_may_not_be_repeated_stays_lost(machine: Machine) -> None:
    runs.queue("site", [machine], by=SYSTEM)
    run = runs.claim("t", lock_s=30)
    assert run is not None
    runs.lose(run, "t", reason="gone", remains="May still run on the host: gpu-1: Install")
    run = Run.get()
    assert (run.state, run.reason, run.remains) == ("lost", "gone", "May still run on the host: gpu-1: Install")


def test_a_lost_run_that_was_to_be_cancelled_is_cancelled(machine: Machine) -> None:
    run, token = running(machine)
    runs.cancel(run, by=SYSTEM)
    runs.lose(run, token, reason="gone")
    assert Run.get().state == "cancelled"


def test_a_run_whose_playbook_is_gone_with_an_upgrade_is_given_up_and_keeps_no_other_waiting(machine: Machine) -> None:
    gone, other = queued(machine), queued(make_machine("gpu-2"))
    Run.update(playbook="of_the_version_before").where(Run.id == gone.id).execute()
    assert runs.claim("t", lock_s=30) == other
    gone = runs.get_run(gone.id)
    assert (gone.state, "of_the_version_before" in str(gone.reason)) == ("cancelled", True)


def test_a_lost_run_whose_playbook_is_gone_stays_lost(machine: Machine) -> None:
    run, token = running(machine)
    Run.update(playbook="of_the_version_before").execute()
    runs.lose(runs.get_run(run.id), token, reason="gone")
    assert Run.get().state == "lost"


def test_a_refused_run_that_somebody_cancels_at_this_moment_is_cancelled_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queued(machine)
    Run.update(playbook="of_the_version_before").execute()
    give_up = runs._give_up

    def cancelled_first(run_id: int, refusal: Any) -> None:
        runs.cancel(run, by=SYSTEM)
        give_up(run_id, refusal)

    monkeypatch.setattr(runs, "_give_up", cancelled_first)
    assert runs.claim("t", lock_s=30) is None
    assert Run.get().reason == "Cancelled by system before it started."


def test_a_held_run_is_not_taken_over(machine: Machine) -> None:
    running(machine)
    assert runs.take_over("another", lock_s=30) is None


@pytest.mark.postgresql
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_worker_whose_clock_is_ahead_takes_nothing_that_is_held(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them at work on one host is what the lock is there to prevent."""
    run, token = running(machine)
    with locks.held("sweeper", life_s=30) as ours:
        for module in ("portal.db", "portal.services.runs", "portal.services.locks"):
            monkeypatch.setattr(f"{module}.utcnow", lambda: utcnow() + timedelta(hours=1), raising=False)
        assert ours
        assert runs.take_over("another", lock_s=30) is None
        with locks.held("sweeper", life_s=30) as theirs:
            assert not theirs
        runs.keep(run, token, lock_s=30)
    monkeypatch.undo()
    assert Run.get().lock_expires_at < utcnow() + timedelta(minutes=1)


def test_output_of_old_runs_goes_and_the_newest_stays(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "KEEP_OUTPUT_OF", 1)
    for _number in range(3):
        run, token = running(machine)
        runs.finish(run, token, Outcome("succeeded", 0), [Line("verbose", "text")])
    live, token = running(machine)
    runs.record(live, token, [Line("verbose", "text")], lock_s=30)
    assert runs.sweep() == 2
    assert [len(runs.output_after(run.id, 0)) for run in Run.select().order_by(Run.id)] == [0, 0, 1, 1]
