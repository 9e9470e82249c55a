"""Pages hear what changes as it changes: customers of their tenants, staff of everything, nobody of another's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from portal import db
from portal.api import streams
from portal.db import utcnow
from portal.integrations.wake import wake
from portal.models import Event, Membership, Tenant, User
from portal.services import events
from tests.api.test_agents_sync import wait_until

URL = "/events/stream"


@pytest.fixture(autouse=True)
def short_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr(streams, "LIFE_S", 1.5)


def write(topic: str, **about: Any) -> None:
    with db.atomic():
        events.write(topic, **about)


def events_in(text: str) -> Iterator[dict[str, Any]]:
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            yield {**fields, "data": json.loads(fields["data"])}


def topics_heard(person: Any, while_open: Any, url: str = URL, **kwargs: Any) -> list[str]:
    """What comes through a stream that is open while `while_open` is done."""

    def act() -> None:
        try:
            wait_until(lambda: wake.waiting() > 0)
            while_open()
        finally:
            db.db.close()

    other = threading.Thread(target=act)
    other.start()
    text = person.get(url, **kwargs).get_data(as_text=True)
    other.join()
    return [event["event"] for event in events_in(text)]


def test_a_customer_hears_of_own_tenants_and_of_nothing_else(
    sign_in: Any, customer: User, tenant: Tenant, other_tenant: Tenant
) -> None:
    def change() -> None:
        write("lease.active", tenant_id=tenant.id, machine_id=1, resource_id=2)
        write("lease.active.of_another", tenant_id=other_tenant.id, machine_id=1)
        write("machine.quarantined", machine_id=1)

    assert topics_heard(sign_in(customer), change) == ["lease.active"]


def test_staff_hears_of_everything_but_of_what_only_the_portal_needs(
    sign_in: Any, operator: User, tenant: Tenant
) -> None:
    def change() -> None:
        write("lease.active", tenant_id=tenant.id)
        write("machine.generation", machine_id=1)
        write("credential.ended", machine_id=1)
        write("machine.quarantined", machine_id=1)

    assert topics_heard(sign_in(operator), change) == ["lease.active", "machine.quarantined"]


def test_a_page_hears_only_the_topics_that_it_asked_for(sign_in: Any, operator: User, tenant: Tenant) -> None:
    def change() -> None:
        for topic in ("lease.active", "task.running", "machine.ready"):
            write(topic, tenant_id=tenant.id)

    heard = topics_heard(sign_in(operator), change, f"{URL}?topics=task.,machine.")
    assert heard == ["task.running", "machine.ready"]


def test_who_comes_back_is_told_what_came_meanwhile(
    sign_in: Any, customer: User, tenant: Tenant, other_tenant: Tenant
) -> None:
    write("task.queued", tenant_id=tenant.id)
    last = Event.select().order_by(-Event.id).get().id
    write("task.running", tenant_id=tenant.id)
    write("task.secret", tenant_id=other_tenant.id)
    a_while_ago()
    assert topics_heard(sign_in(customer), lambda: None, headers={"Last-Event-ID": str(last)}) == ["task.running"]


@pytest.mark.parametrize("who", ["customer", "operator"])
def test_however_much_happened_elsewhere_nothing_of_ones_own_is_missed(
    request: pytest.FixtureRequest, sign_in: Any, tenant: Tenant, other_tenant: Tenant, who: str
) -> None:
    write("task.queued", tenant_id=tenant.id)
    last = Event.select().order_by(-Event.id).get().id
    noise = {"topic": "machine.generation", "tenant_id": other_tenant.id, "data": {}}
    with db.atomic():
        for _ in range(12):
            Event.insert_many([noise] * 100).execute()
    Event.insert_many([{**noise, "topic": "task.running"}] * (2 * events.PAGE)).execute()
    write("task.succeeded", tenant_id=tenant.id)
    a_while_ago()
    person = sign_in(request.getfixturevalue(who))
    heard = topics_heard(person, lambda: None, headers={"Last-Event-ID": str(last)})
    assert heard[-1] == "task.succeeded"
    assert heard.count("task.running") == (0 if who == "customer" else 2 * events.PAGE)


def test_whoever_was_away_for_longer_than_events_are_kept_is_told_all_that_there_are(
    sign_in: Any, customer: User, tenant: Tenant
) -> None:
    write("task.queued", tenant_id=tenant.id)
    forgotten = Event.select().order_by(-Event.id).get()
    write("task.running", tenant_id=tenant.id)
    forgotten.delete_instance()
    a_while_ago()
    heard = topics_heard(sign_in(customer), lambda: None, headers={"Last-Event-ID": str(forgotten.id)})
    assert heard == ["task.running"]


def a_while_ago() -> None:
    """What is there now has happened too long ago for whoever opens a stream to hear it as it comes."""
    Event.update(at=utcnow() - timedelta(minutes=10)).execute()


def test_a_stream_ends_with_the_membership_it_was_opened_for(
    sign_in: Any, customer: User, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LIFE_S", 600)

    def leave() -> None:
        Membership.delete().where(Membership.user == customer.id).execute()

    assert topics_heard(sign_in(customer), leave) == []


def test_a_stream_ends_when_its_reader_is_disabled(
    sign_in: Any, operator: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LIFE_S", 600)

    def disable() -> None:
        User.update(disabled_at=utcnow()).where(User.id == operator.id).execute()

    assert topics_heard(sign_in(operator), disable) == []


def test_nobody_hears_without_signing_in(client: Any, database: Any) -> None:
    assert client.get(f"/api/v1{URL}").status_code == 401
