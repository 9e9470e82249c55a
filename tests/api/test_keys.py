"""My SSH keys: in and out, to every host that I may log in to, and to no other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

import pytest

from portal.db import connection, utcnow
from portal.models import AuditEntry, Event, Grant, Machine, SshKey
from portal.services import keys, tenants, users
from portal.services.actors import SYSTEM
from tests.factories import actor_of, make_lease, make_machine, make_user, ssh_key_pair


def generation_of(machine):
    return Machine.get_by_id(machine.id).generation


def lines_of(lease):
    return [key.line for key in keys.of_lease(lease)]


def give_key(user, line=None):
    return keys.add(user, name="laptop", line=line or ssh_key_pair()[0], by=actor_of(user))


@pytest.fixture
def lease(tenant):
    return make_lease(make_machine(), tenant)


@pytest.fixture
def foreign_lease(other_tenant):
    return make_lease(make_machine(), other_tenant)


def test_a_key_is_kept_without_comment_and_found_again(sign_in, customer):
    line, _ = ssh_key_pair()
    made = sign_in(customer).post("/customer/keys", {"name": "laptop", "key": f"{line} carol@laptop\n"})
    assert made.status_code == 201, made.json
    assert made.json["line"] == line
    assert made.json["fingerprint"].startswith("SHA256:")
    assert sign_in(customer).get(f"/customer/keys/{made.json['id']}").json == made.json
    assert sign_in(customer).get("/customer/keys").json["items"] == [made.json]


@pytest.mark.parametrize("key", ["", "nonsense", 'command="id" ssh-ed25519 AAAA', "a\nb", "x" * 20000])
def test_what_is_no_key_is_refused_by_field(sign_in, customer, key):
    answer = sign_in(customer).post("/customer/keys", {"name": "laptop", "key": key})
    assert (answer.status_code, list(answer.json["errors"])) == (422, ["key"])


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "two\nlines", 7])
def test_a_key_needs_a_name_of_one_line(sign_in, customer, name):
    answer = sign_in(customer).post("/customer/keys", {"name": name, "key": ssh_key_pair()[0]})
    assert (answer.status_code, list(answer.json["errors"])) == (422, ["name"])


def test_the_same_key_twice_is_refused_until_it_was_removed(sign_in, customer):
    body = {"name": "laptop", "key": ssh_key_pair()[0]}
    first = sign_in(customer).post("/customer/keys", body)
    again = sign_in(customer).post("/customer/keys", {**body, "key": body["key"] + " other comment"})
    assert (again.status_code, again.json["code"]) == (409, "key_exists")
    sign_in(customer).delete(f"/customer/keys/{first.json['id']}")
    assert sign_in(customer).post("/customer/keys", body).status_code == 201


def test_the_same_key_twice_at_once_is_kept_once(sign_in, customer):
    person, together = sign_in(customer), Barrier(6)
    body = {"name": "laptop", "key": ssh_key_pair()[0]}

    def add(_number):
        together.wait(20)
        client = person.client.application.test_client()
        return client.post("/api/v1/customer/keys", json=body, headers=person.headers).status_code

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(add, range(6))) == [201, 409, 409, 409, 409, 409]
    assert SshKey.select().count() == 1


def test_two_people_may_have_the_same_key(customer, member):
    line, _ = ssh_key_pair()
    assert give_key(customer, line).fingerprint == give_key(member, line).fingerprint


def test_nobody_sees_or_removes_the_keys_of_others(sign_in, customer, member, stranger):
    key = give_key(customer)
    for other in (member, stranger):
        assert sign_in(other).get("/customer/keys").json["total"] == 0
        assert sign_in(other).get(f"/customer/keys/{key.id}").status_code == 404
        assert sign_in(other).delete(f"/customer/keys/{key.id}").status_code == 404
    assert SshKey.get().removed_at is None


def test_a_removed_key_is_gone_for_good(sign_in, customer):
    key = give_key(customer)
    assert sign_in(customer).delete(f"/customer/keys/{key.id}").status_code == 204
    assert sign_in(customer).delete(f"/customer/keys/{key.id}").status_code == 404
    assert sign_in(customer).get("/customer/keys").json["items"] == []


def test_nobody_keeps_more_keys_than_a_host_should_carry(customer, monkeypatch):
    monkeypatch.setattr(keys, "MAX_KEYS", 2)
    give_key(customer)
    give_key(customer)
    with pytest.raises(keys.Conflict, match="remove one"):
        give_key(customer)


def test_keys_that_come_at_once_count_each_other(customer, monkeypatch):
    monkeypatch.setattr(keys, "MAX_KEYS", 1)
    together, create, lines = Barrier(4), SshKey.create, [ssh_key_pair()[0] for _ in range(4)]

    def created_by_all(**fields):
        with suppress(BrokenBarrierError):
            together.wait(timeout=1)
        return create(**fields)

    def add(line):
        try:
            with connection():
                return bool(give_key(customer, line))
        except keys.Conflict:
            return False

    monkeypatch.setattr(SshKey, "create", created_by_all)
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(add, lines)) == [False, False, False, True]
    assert keys.list_of(customer).count() == 1


def test_a_lease_opens_to_the_keys_of_owners_and_members_each_once(customer, member, viewer, stranger, lease):
    shared, _ = ssh_key_pair()
    mine, also_mine = give_key(customer), give_key(customer, shared)
    give_key(member, shared)
    theirs = give_key(member)
    give_key(viewer)
    give_key(stranger)
    assert lines_of(lease) == [mine.line, also_mine.line, theirs.line]


def test_a_shared_key_stays_until_the_last_who_has_it_goes(customer, member, lease):
    shared, _ = ssh_key_pair()
    first, second = give_key(customer, shared), give_key(member, shared)
    keys.remove(first, by=SYSTEM)
    assert lines_of(lease) == [shared]
    keys.remove(second, by=SYSTEM)
    assert lines_of(lease) == []


def test_whoever_is_disabled_removed_or_made_a_viewer_opens_nothing(customer, member, tenant, lease):
    first, second = give_key(customer), give_key(member)
    users.disable(customer, by=SYSTEM)
    assert lines_of(lease) == [second.line]
    users.enable(customer, by=SYSTEM)
    tenants.set_member_role(tenant, member.id, "viewer", by=SYSTEM)
    assert lines_of(lease) == [first.line]
    tenants.remove_member(tenant, customer.id, by=SYSTEM)
    assert lines_of(lease) == []


def test_adding_and_removing_wakes_the_agents_of_my_machines_and_of_no_other(customer, lease, foreign_lease):
    ended = make_lease(make_machine(), lease.tenant, state="ended")
    machines = [lease.machine, foreign_lease.machine, ended.machine]
    before = [generation_of(machine) for machine in machines]
    key = give_key(customer)
    assert [generation_of(machine) for machine in machines] == [before[0] + 1, *before[1:]]
    keys.remove(key, by=SYSTEM)
    assert [generation_of(machine) for machine in machines] == [before[0] + 2, *before[1:]]
    assert {event.machine_id for event in Event.select().where(Event.topic == "machine.generation")} == {
        lease.machine_id
    }


def test_a_key_that_was_refused_wakes_nobody(customer, lease):
    line = give_key(customer).line
    before = generation_of(lease.machine)
    with pytest.raises(keys.Conflict):
        give_key(customer, line)
    assert generation_of(lease.machine) == before
    assert AuditEntry.select().where(AuditEntry.action == "key.added").count() == 1


def test_the_list_says_which_host_has_the_key(sign_in, customer, viewer, lease, foreign_lease):
    key = give_key(customer)

    def seen(person=customer):
        return sign_in(person).get("/customer/keys").json["items"][0]["machines"]

    told = {"machine_id": lease.machine_id, "machine": lease.machine.name}
    assert seen() == [{**told, "present": None}]
    observed = {"observed": "open", "observed_at": utcnow()}
    grant = (Grant.lease == lease) & (Grant.kind == "keys")
    Grant.update(detail={"fingerprints": []}, **observed).where(grant).execute()
    assert seen() == [{**told, "present": False}]
    Grant.update(detail={"fingerprints": [key.fingerprint]}, **observed).where(grant).execute()
    assert seen() == [{**told, "present": True}]
    give_key(viewer)
    assert seen(viewer) == []  # a viewer's key goes nowhere


@pytest.mark.postgresql
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_lease_that_opens_while_a_key_is_added_gets_it(customer, tenant, monkeypatch):
    """Neither transaction sees the other (on SQLite there is one writer at a time)."""
    machine, real, opened = make_machine(), keys._leased_by, []

    def open_lease():
        with connection():
            opened.append(make_lease(Machine.get_by_id(machine.id), tenant))

    def look_just_before_it_opens(of):
        seen = real(of)
        if not opened:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(open_lease).result(20)
        return seen

    monkeypatch.setattr(keys, "_leased_by", look_just_before_it_opens)
    before = generation_of(machine)
    key = give_key(customer)
    assert generation_of(machine) == before + 1
    assert lines_of(opened[0]) == [key.line]


def test_two_changes_of_many_machines_at_once_both_succeed(sign_in, tenant, customer, member):
    """Each raises the same ten generations: taken in one order, they wait for each other and never deadlock."""
    machines = [make_lease(make_machine(), tenant).machine for _ in range(10)]
    people, together = [sign_in(customer), sign_in(member)], Barrier(2)

    def add(person):
        together.wait(20)
        return [person.post("/customer/keys", {"name": "k", "key": ssh_key_pair()[0]}).status_code for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(add, people)) == [[201] * 5] * 2
    assert {generation_of(machine) for machine in machines} == {11}


def test_the_staff_has_no_keys_on_hosts(sign_in, operator):
    assert sign_in(operator).post("/customer/keys", {"name": "x", "key": ssh_key_pair()[0]}).status_code == 403


def test_a_user_of_two_tenants_reaches_the_machines_of_both(tenant, other_tenant, lease, foreign_lease):
    both = make_user("customer", tenant=tenant)
    tenants.add_member(other_tenant, both, "member", by=SYSTEM)
    line = give_key(both).line
    assert lines_of(lease) == lines_of(foreign_lease) == [line]
