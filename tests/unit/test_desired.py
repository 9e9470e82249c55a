"""The desired state says everything that a host must make true, in the words of the protocol, whatever there is."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from portal.db import utcnow
from portal.integrations import protocol
from portal.models import Baseline, Lease, Machine, Membership, Tenant, User
from portal.services import agents, commands, desired, keys, leases, reclaims, tasks
from portal.services.actors import SYSTEM
from tests.api.fake_agent import leased_machine, make_task
from tests.factories import actor_of, make_lease, make_machine, ssh_key_pair

BASELINE = {
    "schema": 1,
    "taken_at": "2026-01-01T00:00:00Z",
    "boot_id": "b",
    "agent_version": "1",
    "sections": {"users": [1]},
}


def wanted(machine: Machine) -> dict[str, Any]:
    told: dict[str, Any] = protocol.check(desired.desired_of(Machine.get_by_id(machine.id)), "desired")
    return told


def add_key(user: User) -> str:
    line = ssh_key_pair()[0]
    keys.add(user, name="laptop", line=line, by=actor_of(user))
    return keys.parse(line).line


def keep_baseline(machine: Machine) -> None:
    Baseline.create(machine=machine, digest="0" * 64, content=BASELINE, taken_at=utcnow())


def test_a_machine_that_nobody_has_wants_nothing(database: Any) -> None:
    machine = make_machine()
    told = wanted(machine)
    assert (told["leases"], told["attempts"], told["commands"]) == ([], [], [])
    assert (told["epoch"], told["generation"]) == (machine.epoch, machine.generation)


def test_a_lease_opens_to_its_owners_and_members_and_to_nobody_else(
    customer: User, member: User, viewer: User, stranger: User, tenant: Tenant
) -> None:
    machine, lease = leased_machine(tenant)
    opens = {add_key(customer), add_key(member)}
    closed = {add_key(viewer), add_key(stranger)}
    (told,) = wanted(machine)["leases"]
    lines = {key["line"] for key in told["keys"]}
    assert (told["lease_id"], told["login"], told["uid"], told["state"]) == (lease.id, lease.login, lease.uid, "open")
    assert lines == opens
    assert not lines & closed
    assert {keys.parse(key["line"]).fingerprint for key in told["keys"]} == {key["fingerprint"] for key in told["keys"]}


def test_the_key_that_tries_the_door_later_is_among_them(customer: User, tenant: Tenant) -> None:
    machine, lease = leased_machine(tenant)
    Lease.update(probe_key=reclaims.new_probe_key()).where(Lease.id == lease.id).execute()
    own = add_key(customer)
    (told,) = wanted(machine)["leases"]
    probe = reclaims.probe_line(Lease.get_by_id(lease.id))
    assert {key["line"] for key in told["keys"]} == {own, keys.parse(probe or "").line}


@pytest.mark.parametrize("how", ["ending", "over"])
def test_a_lease_that_ends_is_closed_and_listed_until_it_has_ended(customer: User, tenant: Tenant, how: str) -> None:
    machine, lease = leased_machine(tenant)
    add_key(customer)
    changes: dict[str, Any] = {"state": "ending"} if how == "ending" else {"ends_at": utcnow() - timedelta(seconds=1)}
    Lease.update(**changes).where(Lease.id == lease.id).execute()
    (told,) = wanted(machine)["leases"]
    assert (told["state"], told["keys"]) == ("closed", [])
    Lease.update(state="ended").where(Lease.id == lease.id).execute()
    assert wanted(machine)["leases"] == []


def test_a_lease_that_continues_another_goes_on_under_its_name_on_the_host(customer: User, tenant: Tenant) -> None:
    machine, first = leased_machine(tenant)
    Lease.update(state="ended").where(Lease.id == first.id).execute()
    second = make_lease(machine, tenant, uid=first.uid, login=first.login, continues=first)
    make_task(second, customer)
    told = wanted(machine)
    assert [lease["lease_id"] for lease in told["leases"]] == [first.id]
    assert [attempt["lease_id"] for attempt in told["attempts"]] == [first.id]


def test_a_removed_key_and_a_lost_membership_are_gone_from_the_next_state(
    customer: User, member: User, tenant: Tenant
) -> None:
    machine, _ = leased_machine(tenant)
    add_key(customer)
    add_key(member)
    before = wanted(machine)
    keys.remove(keys.list_of(customer).get(), by=actor_of(customer))
    after = wanted(machine)
    assert after["generation"] > before["generation"]
    assert len(after["leases"][0]["keys"]) == 1
    Membership.delete().where(Membership.user == member).execute()
    assert wanted(machine)["leases"][0]["keys"] == []


def test_every_command_is_sent_as_the_protocol_has_it(customer: User, tenant: Tenant) -> None:
    machine, lease = leased_machine(tenant)
    keep_baseline(machine)
    Lease.update(state="ended").where(Lease.id == lease.id).execute()
    commands.queue(machine, "baseline", by=SYSTEM)
    commands.queue(machine, "clean", lease, by=SYSTEM)
    commands.queue(machine, "thaw", by=SYSTEM, epoch="of-then", generation=1)
    agents.rotate(machine, by=SYSTEM)
    told = wanted(machine)
    args = {command["kind"]: command["args"] for command in told["commands"]}
    assert list(args) == ["baseline", "clean", "thaw", "rotate_credential"]
    assert args["clean"] == {
        "lease_id": lease.id, "machine_id": machine.id, "login": lease.login, "uid": lease.uid, "baseline": BASELINE,
    }  # fmt: skip
    assert args["thaw"] == {
        "machine_id": machine.id, "epoch": told["epoch"], "generation": told["generation"], "retained": [],
    }  # fmt: skip


def test_a_cleaning_is_never_sent_while_another_lease_is_open(customer: User, tenant: Tenant) -> None:
    machine, lease = leased_machine(tenant)
    keep_baseline(machine)
    Lease.update(state="ended").where(Lease.id == lease.id).execute()
    commands.queue(machine, "clean", lease, by=SYSTEM)
    assert [command["kind"] for command in wanted(machine)["commands"]] == ["clean"]
    make_lease(machine, tenant, uid=20001, login="lease999")
    assert wanted(machine)["commands"] == []


def test_every_kind_of_attempt_is_sent_as_the_protocol_has_it(customer: User, tenant: Tenant) -> None:
    machine, lease = leased_machine(tenant)
    make_task(lease, customer, env={"A": "1"}, workdir="/srv", gpu_uuids=[], time_limit_s=None)
    stopped, _ = make_task(lease, customer)
    tasks.stop(stopped, by=actor_of(customer))
    assert [attempt["state"] for attempt in wanted(machine)["attempts"]] == ["run", "stop"]
    leases.end(Lease.get_by_id(lease.id), by=SYSTEM, reason="test")
    assert {attempt["state"] for attempt in wanted(machine)["attempts"]} == {"stop"}
