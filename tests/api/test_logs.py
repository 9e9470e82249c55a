"""A task's output is kept byte for byte, whatever order, overlap or repetition it comes in, and can be followed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portal import db
from portal.api import streams
from portal.db import utcnow
from portal.integrations.wake import wake
from portal.models import Attempt, AuditEntry, Lease, LogRange, Task, Tenant, User
from portal.services import config, logs, tasks
from portal.services.actors import SYSTEM
from tests.api.fake_agent import FakeAgent, agent_of, attempt_report, leased_machine, log_range, make_task
from tests.api.test_agents_sync import wait_until
from tests.conftest import SignedIn
from tests.factories import actor_of, make_lease


@pytest.fixture
def lease(tenant: Tenant) -> Lease:
    return leased_machine(tenant)[1]


@pytest.fixture
def attempt(lease: Lease, customer: User) -> Attempt:
    return make_task(lease, customer)[1]


@pytest.fixture
def agent(app: Flask, lease: Lease) -> FakeAgent:
    return agent_of(app, lease.machine)


def text_of(attempt: Attempt) -> bytes:
    return b"".join(logs.read_all(attempt.id))


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int, bool]]]:
    """An output, and the ranges in which it is sent: again, cut otherwise, too early, and from the start anew."""
    output = draw(st.binary(max_size=60))
    size = len(output)
    pieces = draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=12))
    ranges = [(min(piece), max(piece), max(piece) == size and draw(st.booleans())) for piece in pieces]
    return output, ranges


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(delivery=deliveries())
def test_any_delivery_gives_the_output_byte_for_byte(
    delivery: tuple[bytes, list[tuple[int, int, bool]]], attempt: Attempt
) -> None:
    output, ranges = delivery
    LogRange.delete().where(LogRange.attempt == attempt).execute()
    Attempt.update(log_bytes=0, log_complete=False).where(Attempt.id == attempt.id).execute()
    model = 0
    for start, stop, end in ranges:
        held = logs.append(attempt.id, offset=start, data=output[start:stop], end=end)
        if not held.complete or end:
            model = max(model, stop) if start <= model else model
        assert held.offset == model
        assert text_of(attempt) == output[:model]
    # The agent goes on from what it is answered, as after a restart of either side.
    while not (
        held := logs.append(attempt.id, offset=model, data=output[model : model + 7], end=model + 7 >= len(output))
    ).complete:
        assert held.offset > model
        model = held.offset
    assert text_of(attempt) == output
    assert Attempt.get_by_id(attempt.id).log_bytes == len(output)


def test_a_gap_is_refused_by_answering_what_is_held(agent: FakeAgent, attempt: Attempt) -> None:
    agent.report(logs=[log_range(attempt.id, 0, b"abc")])
    (ack,) = agent.report(logs=[log_range(attempt.id, 10, b"xyz", end=True)])["acks"]["attempts"]
    assert (ack["log_offset"], ack["log_complete"]) == (3, False)
    (ack,) = agent.report(logs=[log_range(attempt.id, 1, b"bcdefghij"), log_range(attempt.id, 10, b"xyz", end=True)])[
        "acks"
    ]["attempts"]
    assert (ack["log_offset"], ack["log_complete"]) == (13, True)
    assert text_of(attempt) == b"abcdefghijxyz"


def test_parallel_deliveries_of_the_same_output_are_kept_once(attempt: Attempt) -> None:
    output = bytes(range(256)) * 8

    def deliver(size: int) -> None:
        try:
            for start in range(0, len(output), size):
                logs.append(
                    attempt.id, offset=start, data=output[start : start + size], end=start + size >= len(output)
                )
        finally:
            db.db.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(deliver, [100, 170, 256, 333]))
    assert text_of(attempt) == output
    assert Attempt.get_by_id(attempt.id).log_complete


def test_what_is_complete_takes_nothing_more(attempt: Attempt) -> None:
    logs.append(attempt.id, offset=0, data=b"all", end=True)
    assert logs.append(attempt.id, offset=3, data=b"more", end=True) == logs.Held(3, True)
    assert text_of(attempt) == b"all"


def test_an_output_beyond_the_quota_is_cut_and_says_so(attempt: Attempt, settings: Any) -> None:
    object.__setattr__(settings, "log_quota_bytes", 10)
    config.use(settings)
    most = 10 + logs.SLACK_BYTES
    held = logs.append(attempt.id, offset=0, data=b"x" * (most + 5), end=False)
    assert held.complete, "the agent stops sending"
    assert Attempt.get_by_id(attempt.id).log_truncated
    assert logs.append(attempt.id, offset=held.offset, data=b"y", end=False) == held


def test_what_is_not_base64_is_refused(agent: FakeAgent, attempt: Attempt) -> None:
    response = agent.say(agent.message(logs=[{"attempt_id": attempt.id, "offset": 0, "data": "?", "end": False}]))
    assert (response.status_code, list(response.get_json()["errors"])) == (422, ["report.logs.data"])


# Reading


def test_a_customer_reads_the_output_from_any_offset(sign_in: Any, customer: User, attempt: Attempt) -> None:
    logs.append(attempt.id, offset=0, data=b"0123456789", end=False)
    logs.append(attempt.id, offset=10, data=b"abcdef", end=True)
    reader = sign_in(customer)
    for offset in (0, 5, 10, 13, 16, 99):
        response = reader.get(f"/customer/tasks/{attempt.task_id}/log?offset={offset}")
        assert response.data == b"0123456789abcdef"[offset:]
        assert response.headers["Log-Next-Offset"] == str(offset + len(response.data))
        assert response.headers["Log-Complete"] == "true"
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_output_comes_in_pieces_and_ends_with_complete(
    sign_in: Any, customer: User, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = bytes(range(256)) * 5
    monkeypatch.setattr(logs.read, "__kwdefaults__", {"most_bytes": 300})
    for start in range(0, len(output), 77):
        logs.append(attempt.id, offset=start, data=output[start : start + 77], end=start + 77 >= len(output))
    reader, got, complete = sign_in(customer), b"", False
    while not complete:
        response = reader.get(f"/customer/tasks/{attempt.task_id}/log?offset={len(got)}")
        got += response.data
        complete = response.headers["Log-Complete"] == "true"
    assert got == output
    assert reader.get(f"/customer/tasks/{attempt.task_id}/log/download").data == output


def test_who_waits_for_output_gets_it_when_it_comes(
    app: Flask, sign_in: Any, customer: User, agent: FakeAgent, attempt: Attempt
) -> None:
    def say() -> None:
        try:
            wait_until(lambda: wake.waiting() == 1)
            agent.report(logs=[log_range(attempt.id, 0, b"here it is")])
        finally:
            db.db.close()

    other = threading.Thread(target=say)
    other.start()
    response = sign_in(customer).get(f"/customer/tasks/{attempt.task_id}/log?wait_s=15")
    other.join()
    assert (response.data, response.headers["Log-Complete"]) == (b"here it is", "false")


def events_of(response: Any) -> Iterator[dict[str, Any]]:
    """Server-sent events, as a browser reads them."""
    for block in response.get_data(as_text=True).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            yield {**fields, "data": json.loads(fields["data"])}


def test_a_page_follows_the_output_in_whole_characters(
    sign_in: Any, customer: User, agent: FakeAgent, attempt: Attempt
) -> None:
    text = "训练 épöche 1/3 ✓\n" * 3
    output = text.encode()
    for start in range(0, len(output), 5):
        logs.append(attempt.id, offset=start, data=output[start : start + 5], end=start + 5 >= len(output))
    agent.report(attempts=[attempt_report(attempt.id, "succeeded", exit_code=0)])
    reader = sign_in(customer)
    url = f"/customer/tasks/{attempt.task_id}/log/stream"
    *pieces, last = events_of(reader.get(url))
    assert "".join(piece["data"]["text"] for piece in pieces) == text
    assert (last["event"], last["data"]) == (
        "complete",
        {"state": "succeeded", "exit_code": 0, "bytes": len(output), "truncated": False},
    )
    middle = len("训练 é".encode())
    *pieces, _ = events_of(reader.get(url, headers={"Last-Event-ID": str(middle)}))
    assert "".join(piece["data"]["text"] for piece in pieces) == text.removeprefix("训练 é")


def test_bytes_that_are_no_text_end_the_stream_all_the_same(sign_in: Any, customer: User, attempt: Attempt) -> None:
    logs.append(attempt.id, offset=0, data=b"ok \xff\xfe \xe2\x9c", end=True)
    *pieces, last = events_of(sign_in(customer).get(f"/customer/tasks/{attempt.task_id}/log/stream"))
    assert "".join(piece["data"]["text"] for piece in pieces) == "ok \ufffd\ufffd \ufffd"
    assert (last["event"], last["data"]["bytes"]) == ("complete", 8)


def test_a_stream_ends_when_its_reader_is_disabled(
    sign_in: Any, customer: User, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_S", 0.05)
    reader = sign_in(customer)
    response = reader.get(f"/customer/tasks/{attempt.task_id}/log/stream", buffered=False)
    lines = iter(response.response)
    assert next(lines).startswith(b":")
    User.update(disabled_at=utcnow()).where(User.id == customer.id).execute()
    assert [line for line in lines if not line.startswith(b":")] == []


def test_an_attempt_that_never_began_has_a_complete_and_empty_output(
    sign_in: Any, customer: User, attempt: Attempt
) -> None:
    tasks.stop(Task.get_by_id(attempt.task_id), by=actor_of(customer))
    response = sign_in(customer).get(f"/customer/tasks/{attempt.task_id}/log?wait_s=5")
    assert (response.data, response.headers["Log-Complete"]) == (b"", "true")


def test_the_page_of_a_task_says_that_the_end_of_its_output_is_missing(
    sign_in: Any, customer: User, agent: FakeAgent, attempt: Attempt
) -> None:
    reader: SignedIn = sign_in(customer)

    def is_told() -> bool:
        page = reader.client.get(f"/tasks/{attempt.task_id}", headers=reader.headers)
        assert page.status_code == 200
        return "its end has not arrived" in page.get_data(as_text=True)

    agent.report(attempts=[attempt_report(attempt.id, "succeeded")], logs=[log_range(attempt.id, 0, b"some")])
    Attempt.update(ended_at=utcnow() - logs.GIVEN_UP_AFTER + timedelta(seconds=30)).execute()
    assert not is_told(), "it may still come"
    Attempt.update(ended_at=utcnow() - logs.GIVEN_UP_AFTER).execute()
    assert is_told()
    agent.report(logs=[log_range(attempt.id, 4, b" more", end=True)])
    assert not is_told()


def test_the_end_of_a_lost_output_is_not_waited_for_for_ever(agent: FakeAgent, attempt: Attempt) -> None:
    agent.report(attempts=[attempt_report(attempt.id, "running")], logs=[log_range(attempt.id, 0, b"half")])
    tasks.lose_all_of(Task.get_by_id(attempt.task_id).lease, reason="written off")
    assert not logs.look(attempt.id, offset=0).complete, "it may still come"
    later = logs.look(attempt.id, offset=0, now=utcnow() + timedelta(minutes=2))
    assert (later.data, later.complete, later.truncated) == (b"half", True, True)
    (ack,) = agent.report(logs=[log_range(attempt.id, 4, b" and half", end=True)])["acks"]["attempts"]
    assert ack["log_complete"], "and it is taken when it comes late"
    assert SYSTEM.is_staff


@pytest.mark.parametrize("path", ["log", "log/stream", "log/download"])
def test_a_stranger_reads_no_output_and_a_viewer_does(
    sign_in: Any, stranger: User, viewer: User, operator: User, attempt: Attempt, path: str
) -> None:
    logs.append(attempt.id, offset=0, data=b"secret", end=True)
    url = f"/customer/tasks/{attempt.task_id}/{path}"
    refused = sign_in(stranger).get(url)
    assert refused.status_code == 404
    assert b"secret" not in refused.data
    assert b"secret" in sign_in(viewer).get(url).data
    assert b"secret" in sign_in(operator).get(url).data


# What is kept is kept for a time


@pytest.fixture
def ended(attempt: Attempt, lease: Lease) -> Attempt:
    """An attempt with output, whose lease has ended just now."""
    logs.append(attempt.id, offset=0, data=b"0123456789", end=True)
    Attempt.update(state="succeeded", started_at=utcnow(), ended_at=utcnow()).where(Attempt.id == attempt.id).execute()
    Lease.update(state="ended", ended_at=utcnow()).where(Lease.id == lease.id).execute()
    return Attempt.get_by_id(attempt.id)


def kept_for() -> timedelta:
    return timedelta(seconds=config.current().log_retain_s)


def test_output_is_forgotten_so_long_after_the_end_of_the_lease_and_not_before(ended: Attempt) -> None:
    assert kept_for() == timedelta(days=30)
    assert logs.forget_old(utcnow() + kept_for() - timedelta(minutes=1)) == 0
    assert text_of(ended) == b"0123456789"
    assert logs.forget_old(utcnow() + kept_for()) == 1
    assert LogRange.select().count() == 0
    entry = AuditEntry.get(AuditEntry.action == "task.log_deleted")
    assert (entry.resource_id, entry.detail) == (ended.task_id, {"attempt": 1, "bytes": 10})
    assert logs.forget_old(utcnow() + kept_for()) == 0, "and once"


def test_output_of_a_lease_that_goes_on_is_never_forgotten(attempt: Attempt) -> None:
    logs.append(attempt.id, offset=0, data=b"0123456789", end=True)
    assert logs.forget_old(utcnow() + 100 * kept_for()) == 0
    assert text_of(attempt) == b"0123456789"


def test_who_follows_forgotten_output_is_told_that_nothing_comes(ended: Attempt) -> None:
    logs.forget_old(utcnow() + kept_for())
    piece = logs.wait_for(ended, offset=0, wait_s=0)
    assert (piece.data, piece.complete, piece.truncated) == (b"", True, True)
    # A host that comes back later sends what it still had, from where it stopped: that goes the same way.
    Attempt.update(log_complete=False).where(Attempt.id == ended.id).execute()
    logs.append(ended.id, offset=10, data=b"abc", end=True)
    assert logs.look(ended.id, offset=0).complete
    assert logs.forget_old(utcnow() + kept_for()) == 1
    assert LogRange.select().count() == 0


def test_the_page_and_the_api_say_until_when_it_is_kept(
    sign_in: Callable[[User], SignedIn], customer: User, ended: Attempt, lease: Lease
) -> None:
    who = sign_in(customer)

    def seen() -> tuple[str | None, str]:
        page = who.client.get(f"/tasks/{ended.task_id}", headers=who.headers).get_data(as_text=True)
        return who.get(f"/customer/tasks/{ended.task_id}").json["log_kept_until"], page

    until, page = seen()
    assert until == (Lease.get_by_id(lease.id).ended_at + kept_for()).isoformat()
    assert "Its output is kept until:" in page
    Lease.update(ended_at=utcnow() - kept_for()).where(Lease.id == lease.id).execute()
    assert "The output was deleted" in seen()[1]
    Lease.update(state="active", ended_at=None).where(Lease.id == lease.id).execute()
    until, page = seen()
    assert until is None
    assert "Output is kept for 30 days after the end of the lease." in page


# The quota of a lease


@pytest.fixture
def quota(settings: Any) -> int:
    """A small one, for all that a lease's tasks say together."""
    object.__setattr__(settings, "lease_log_quota_bytes", 1000)
    config.use(settings)
    return 1000


def stored_bytes() -> int:
    return sum(len(row.data) for row in LogRange.select())


def counted(lease: Lease) -> int:
    return int(Lease.get_by_id(lease.id).log_bytes)


NOTICE = (
    b"\n[RemoteGPU: the log quota of 1000 bytes for all tasks of this lease is used up; further output is not kept.]\n"
)


def test_the_output_of_all_attempts_of_a_lease_has_one_quota_and_each_says_where_it_was_cut(
    sign_in: Callable[[User], SignedIn], customer: User, lease: Lease, agent: FakeAgent, quota: int
) -> None:
    who = sign_in(customer)
    task, attempt = make_task(lease, customer)
    texts = []
    for _ in range(4):
        output = b"x" * 400
        report = {"attempts": [attempt_report(attempt.id, "failed", exit_code=1)]}
        (ack,) = agent.report(**report, logs=[log_range(attempt.id, 0, output, end=True)])["acks"]["attempts"]
        assert ack["log_complete"], "the agent stops sending"
        told = who.get(f"/customer/tasks/{task.id}").json
        texts.append((text_of(attempt), told["attempt"]["log_truncated"], told["log_is_kept"]))
        retried = who.post(f"/customer/tasks/{task.id}/retry", {})
        assert retried.status_code == 202, "it runs all the same"
        assert retried.json["log_is_kept"] == told["log_is_kept"]
        attempt = tasks.newest_attempt(task)
    assert texts == [
        (b"x" * 400, False, True),
        (b"x" * 400, False, True),
        (b"x" * 200 + NOTICE, True, False),
        (NOTICE, True, False),
    ]
    assert stored_bytes() == counted(lease) == quota + 2 * len(NOTICE)


def test_output_that_just_fits_the_quota_of_the_lease_is_whole(lease: Lease, customer: User, quota: int) -> None:
    first, second = (make_task(lease, customer)[1] for _ in range(2))
    assert logs.append(first.id, offset=0, data=b"x" * quota, end=True) == logs.Held(quota, True)
    assert logs.append(second.id, offset=0, data=b"", end=True) == logs.Held(0, True)
    for attempt in (first, second):
        assert not Attempt.get_by_id(attempt.id).log_truncated
    assert counted(lease) == quota


def test_a_lease_that_continues_another_goes_on_with_its_quota_and_a_new_one_has_its_own(
    lease: Lease, customer: User, other_tenant: Tenant, stranger: User, quota: int
) -> None:
    _, before = make_task(lease, customer)
    logs.append(before.id, offset=0, data=b"x" * 900, end=True)
    Lease.update(state="ended", ended_at=utcnow()).where(Lease.id == lease.id).execute()
    following = make_lease(lease.machine, lease.tenant, uid=lease.uid, login=lease.login, continues=lease)
    assert logs.is_kept(following)
    _, after = make_task(following, customer)
    logs.append(after.id, offset=0, data=b"y" * 300, end=True)
    assert text_of(after) == b"y" * 100 + NOTICE
    assert (logs.is_kept(following), logs.is_kept(lease)) == (False, False)
    assert (counted(lease), counted(following)) == (quota + len(NOTICE), 0)
    _, other = leased_machine(other_tenant)
    _, elsewhere = make_task(other, stranger)
    logs.append(elsewhere.id, offset=0, data=b"z" * 300, end=True)
    assert text_of(elsewhere) == b"z" * 300
    assert logs.is_kept(other)


def test_many_attempts_that_say_something_at_once_do_not_get_beyond_the_quota(
    lease: Lease, customer: User, quota: int
) -> None:
    attempts = [make_task(lease, customer)[1] for _ in range(6)]

    def deliver(attempt: Attempt) -> None:
        try:
            for offset in range(0, 300, 10):
                logs.append(attempt.id, offset=offset, data=b"x" * 10, end=False)
        finally:
            db.db.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(deliver, attempts))
    texts = [text_of(attempt) for attempt in attempts]
    assert sum(text.count(b"x") for text in texts) == quota
    cut = [text for text in texts if text.endswith(NOTICE)]
    assert stored_bytes() == counted(lease) == quota + len(cut) * len(NOTICE)
    assert all(text.endswith(NOTICE) or text == b"x" * 300 for text in texts)


def test_what_is_forgotten_is_given_back_to_the_quota(ended: Attempt, lease: Lease, customer: User) -> None:
    Attempt.update(log_complete=False).where(Attempt.id == ended.id).execute()
    logs.append(ended.id, offset=10, data=b"abc", end=True)
    assert counted(lease) == 13
    following = make_lease(lease.machine, lease.tenant, uid=lease.uid, login=lease.login, continues=lease)
    _, after = make_task(following, customer)
    logs.append(after.id, offset=0, data=b"12345", end=True)
    assert counted(lease) == 18
    assert logs.forget_old(utcnow() + kept_for()) == 1
    assert (counted(lease), text_of(after)) == (5, b"12345")


def test_the_pages_say_that_no_more_output_is_kept(
    sign_in: Callable[[User], SignedIn], customer: User, lease: Lease, attempt: Attempt, quota: int
) -> None:
    who = sign_in(customer)

    def pages() -> list[str]:
        paths = (f"/tasks/{attempt.task_id}", "/tasks/new")
        return [who.client.get(path, headers=who.headers).get_data(as_text=True) for path in paths]

    assert not any("no more" in page for page in pages())
    logs.append(attempt.id, offset=0, data=b"x" * quota, end=True)
    of_task, of_form = pages()
    assert "The quota of output for all tasks of this lease is used up. They run as before" in of_task
    assert f"Of tasks on {lease.machine.name} no more output is kept" in of_form
