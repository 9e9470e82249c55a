"""One switch for each lease: name, openings, forward and group open and close with its keys, and wait to be seen."""

from __future__ import annotations

import json
import zlib
from datetime import timedelta
from typing import Any

import pytest

from portal.db import utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.integrations import protocol
from portal.integrations.network_format import document
from portal.models import Alert, AuditEntry, DnsZone, Forward, Grant, Lease, Machine, NetworkExport, Tenant, User
from portal.services import (
    alerts_own,
    connections,
    grants,
    leases,
    machines,
    network,
    network_applied,
    network_export,
    network_forwards,
    network_names,
    network_openings,
    network_posts,
    network_requests,
    network_switch,
    network_views,
    network_zones,
    overviews,
    retirement,
)
from portal.services.actors import SYSTEM
from portal.services.availability import CannotAllocate
from tests.factories import actor_of
from tests.support.network import (
    OFFICE,
    applied,
    export,
    group,
    outputs,
    place,
    reports,
    seen,
    state_of,
    states_of,
    wish,
    zone,
)
from tests.support.rental import Host, allocate, ready_host, reclaim_of

HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has looked at nothing yet."""
    monkeypatch.setattr(network_posts, "_settled", None)
    monkeypatch.setattr(network_posts, "_followed", None)


@pytest.fixture
def names(database: Any) -> DnsZone:
    return zone(serves_leases=True)


@pytest.fixture
def host(names: DnsZone) -> Host:
    """Behind a gateway and a security group, with an agent that knows openings."""
    ways_in = ready_host("way-in", address="192.0.2.254", public_address="198.51.100.1")
    place(ways_in, forward_ports="20000-20002")
    host = ready_host("gpu-1", address="10.0.0.17")
    place(host, gateway_id=ways_in.id, security_group_id=group().id)
    Machine.update(hears_openings=True).execute()
    return host


@pytest.fixture
def gateway(host: Host) -> Host:
    return Host(Machine.get(Machine.name == "way-in"))


@pytest.fixture
def lease(host: Host, tenant: Tenant) -> Lease:
    """With an opening; nothing of it was seen yet."""
    return allocate(host, tenant, openings=[wish()], retain_s=3600)


def behind_too(gateway: Host, tenant: Tenant, *, count: int) -> list[Lease]:
    """Leases of other machines behind it, each with a port."""
    held = []
    for number in range(1, count + 1):
        other = ready_host(f"other-{number}", address=f"10.0.1.{number}")
        place(other, gateway_id=gateway.id)
        held.append(allocate(other, tenant))
    return held


def everything_seen(host: Host, gateway: Host, lease: Lease) -> None:
    """Host, gateway and pipeline have done what is wanted now, and say so."""
    is_open = leases.get(lease.id).state == "active"
    host.sees(lease, "open" if is_open else "closed")
    reports(host, openings=seen(*network_openings.wanted_of(host.machine, lease)))
    wanted = [each for each in network_forwards.of_lease(lease) if each.closed_at is None]
    reports(gateway, forwards=seen(*wanted))
    applied(clouds=("cloudflare", "aws"))


def ends_but_for_the_stacks(host: Host, gateway: Host, lease: Lease) -> None:
    """The lease is over, and closed wherever an agent closes it."""
    leases.end(lease, by=SYSTEM, reason="done")
    host.sees(lease, "closed")
    reports(host)
    reports(gateway)


# Open together


def test_name_opening_forward_and_keys_open_in_one_transaction(host: Host, gateway: Host, lease: Lease) -> None:
    assert states_of(lease) == {
        "keys": ("open", "unknown"),
        "tasks": ("open", "unknown"),
        "firewall": ("open", "unknown"),
        "forward": ("open", "unknown"),
        "security_group": ("open", "closed"),
        "name": ("open", "closed"),
    }
    ssh, opened = network_forwards.to_send(gateway.machine, utcnow())
    assert (ssh["public_port"], ssh["target_address"], ssh["target_port"], ssh["lease"]) == (
        20000, "10.0.0.17", host.machine.ssh_port, lease.host_id,
    )  # fmt: skip
    assert (opened["public_port"], opened["target_port"], opened["source"]) == (20001, 8888, OFFICE)
    document = export()
    (name,) = document["names"]
    assert (name["key"], name["name"], name["type"], name["values"]) == (
        f"l{lease.id}.address", f"lease{lease.id}.gpu.example.org", "A", ["198.51.100.1"],
    )  # fmt: skip
    (opening,) = document["openings"]
    assert (opening["lease"], opening["machine"], opening["ports"]) == (f"l{lease.id}", f"m{host.id}", [8888, 8888])


def test_a_lease_has_only_the_grants_of_what_it_opens(database: Any, tenant: Tenant) -> None:
    assert set(states_of(allocate(ready_host("plain"), tenant))) == {"keys", "tasks"}


def test_an_allocation_that_fails_at_its_last_step_leaves_nothing_open(
    host: Host, gateway: Host, tenant: Tenant
) -> None:
    behind_too(gateway, tenant, count=2)
    before, generation = network_openings.search().count(), network.state().generation
    with pytest.raises(Conflict, match="no port left in 20000-20002"):
        allocate(host, tenant, openings=[wish()])  # for the way in there is one
    assert (host.state, network_openings.search().count(), network.state().generation) == ("ready", before, generation)
    assert Lease.select().where(Lease.machine == host.id).count() == 0


def test_a_machine_that_nobody_can_get_to_is_leased_to_nobody(host: Host, gateway: Host, tenant: Tenant) -> None:
    gateway.report(received_at=utcnow() - HOUR)
    with pytest.raises(CannotAllocate, match="way-in, the gateway of gpu-1, is offline: customers could not get in"):
        allocate(host, tenant)
    gateway.report()
    Machine.update(frozen_reason="The portal was restored.").where(Machine.id == gateway.id).execute()
    with pytest.raises(CannotAllocate, match="way-in, the gateway of gpu-1, is frozen and opens nothing"):
        allocate(host, tenant)
    assert (host.state, Lease.select().count()) == ("ready", 0)


def test_a_lease_that_cannot_begin_because_no_port_is_left_says_so_and_begins_when_one_is(
    host: Host, gateway: Host, tenant: Tenant
) -> None:
    lease = allocate(host, tenant, starts_at=utcnow() + HOUR, until=utcnow() + 9 * HOUR)
    first, *_ = behind_too(gateway, tenant, count=3)
    later = utcnow() + HOUR + timedelta(minutes=1)
    for each in (host, gateway):
        each.report(received_at=later)
    assert leases.activate_due(later) == 0
    (why,) = overviews.of_lease(leases.get(lease.id), later).waits_for
    assert why.code == "no_port_left"
    assert why.message.startswith("way-in, the gateway of gpu-1, has no port left in 20000-20002")
    leases.end(first, by=SYSTEM, reason="done")
    reports(gateway)
    for each in (host, gateway):
        each.report(received_at=later)
    assert leases.activate_due(later) == 1
    assert overviews.of_lease(leases.get(lease.id), later).waits_for == ()


def test_a_lease_that_opens_nothing_begins_behind_a_group_that_is_full(host: Host, tenant: Tenant) -> None:
    network_requests.open_port(host.machine, wish(1), by=SYSTEM)
    network_requests.open_port(host.machine, wish(3), by=SYSTEM)
    network_openings.set_limits(by=SYSTEM, rules_a_group=1)
    assert allocate(host, tenant).state == "active"


def test_what_was_done_is_seen_part_by_part(host: Host, gateway: Host, lease: Lease) -> None:
    (opening,) = network_openings.wanted_of(host.machine, lease)
    reports(host, openings=seen(opening))
    assert state_of(lease, "firewall") == ("open", "open")
    reports(gateway, forwards=seen(*network_forwards.of_lease(lease)))
    assert state_of(lease, "forward") == ("open", "open")
    applied(clouds=("cloudflare",))
    assert (state_of(lease, "name"), state_of(lease, "security_group")) == (("open", "open"), ("open", "closed"))
    applied(clouds=("aws",), stack="production-aws")
    assert state_of(lease, "security_group") == ("open", "open")
    assert grants.get(lease, "name").waits_since is None


def test_a_grant_waits_since_it_was_wanted_and_says_what_is_missing(host: Host, lease: Lease) -> None:
    applied(clouds=("cloudflare", "aws"))
    since = utcnow()
    network_requests.open_port(host.machine, wish(9999), by=SYSTEM, lease=lease)
    grant = grants.get(lease, "security_group")
    assert (grant.desired, grant.observed) == ("open", "unknown"), "one of the two is there"
    assert grant.waits_since >= since
    assert grant.detail["missing"] == [network_openings.wanted_of(host.machine, lease)[1].key]
    applied(clouds=("cloudflare", "aws"))
    assert grants.get(lease, "security_group").waits_since is None


def test_a_rule_that_a_stack_has_still_to_take_away_is_waited_for(host: Host, lease: Lease) -> None:
    more = network_requests.open_port(host.machine, wish(9999), by=SYSTEM, lease=lease)
    applied(clouds=("cloudflare", "aws"))
    assert state_of(lease, "security_group") == ("open", "open")
    network_requests.close_port(more, by=SYSTEM)
    assert state_of(lease, "security_group") == ("open", "unknown")
    assert grants.get(lease, "security_group").detail["left"] == [more.key]
    applied(clouds=("cloudflare", "aws"))
    assert state_of(lease, "security_group") == ("open", "open")


def test_what_the_host_and_the_gateway_keep_open_though_it_was_closed_is_waited_for_while_the_lease_goes_on(
    host: Host, gateway: Host, lease: Lease
) -> None:
    more = network_requests.open_port(host.machine, wish(9999), by=SYSTEM, lease=lease)
    (kept,) = (each for each in network_openings.wanted_of(host.machine, lease) if each.id != more.id)
    forwards = network_forwards.of_lease(lease)
    reports(host, openings=seen(kept, more))
    reports(gateway, forwards=seen(*forwards))
    assert (state_of(lease, "firewall"), state_of(lease, "forward")) == (("open", "open"), ("open", "open"))
    network_requests.close_port(more, by=SYSTEM)
    for state in ("open", "failed"):
        reports(host, openings=[*seen(kept), *seen(more, state=state)])
        reports(gateway, forwards=seen(*forwards))
        for kind in ("firewall", "forward"):
            grant = grants.get(lease, kind)
            assert (grant.desired, grant.observed, grant.waits_since) == ("open", "unknown", grant.desired_at)
    reports(host, openings=seen(kept))
    reports(gateway, forwards=seen(*(each for each in forwards if each.target_port != 9999)))
    assert (state_of(lease, "firewall"), state_of(lease, "forward")) == (("open", "open"), ("open", "open"))


def test_an_allocation_that_would_overflow_the_clouds_group_is_refused_whole(host: Host, tenant: Tenant) -> None:
    network_openings.set_limits(by=SYSTEM, rules_a_group=1)
    with pytest.raises(Conflict, match="cannot take it"):
        allocate(host, tenant, openings=[wish(1), wish(3)])
    assert (host.state, network_openings.search().count()) == ("ready", 0)


def test_a_name_that_shall_lead_elsewhere_waits_since_then_until_a_stack_has_applied_it(
    host: Host, gateway: Host, lease: Lease
) -> None:
    everything_seen(host, gateway, lease)
    network_posts.sweep()
    others = {kind: state for kind, state in states_of(lease).items() if kind != "name"}
    stale, edited_at = export(), utcnow()
    machines.edit(gateway.machine, public_address="198.51.100.9", by=SYSTEM)
    assert network_views.names_seen(lease) == [], "in the cloud it still leads to the old address"
    assert network_posts.sweep() == 1
    grant = grants.get(lease, "name")
    assert (grant.desired, grant.observed, grant.waits_since) == ("open", "unknown", grant.desired_at)
    assert grant.desired_at >= edited_at
    assert grant.detail["missing"] == grant.detail["left"] == [f"l{lease.id}.address"]
    assert {kind: state for kind, state in states_of(lease).items() if kind != "name"} == others
    assert network_posts.sweep() == 0
    applied(stale, clouds=("cloudflare", "aws"))
    assert grants.get(lease, "name").waits_since is not None, "an apply of what was wanted before"
    applied(clouds=("cloudflare", "aws"))
    assert grants.get(lease, "name").waits_since is None
    assert network_views.names_seen(lease) == [f"lease{lease.id}.gpu.example.org"]


def test_a_machines_own_address_is_followed_by_the_name_of_its_lease_and_no_other(
    names: DnsZone, tenant: Tenant
) -> None:
    host, other = ready_host("gpu-8", address="192.0.2.8"), ready_host("gpu-9", address="192.0.2.9")
    lease, beside = allocate(host, tenant), allocate(other, tenant)
    applied()
    network_posts.sweep()
    machines.edit(host.machine, public_address="198.51.100.8", by=SYSTEM)
    assert [each.id for each in network_switch.leases_to_follow()] == [lease.id]
    network_posts.sweep()
    assert (state_of(lease, "name"), state_of(beside, "name")) == (("open", "unknown"), ("open", "open"))


def test_a_record_with_other_values_waits_and_the_leases_own_name_is_there_all_the_same(
    host: Host, lease: Lease
) -> None:
    record = network_requests.want_record(
        DnsZone.get(), lease=lease, by=SYSTEM, name="jupyter.gpu.example.org", type="A", values=["198.51.100.1"]
    )
    applied(clouds=("cloudflare", "aws"))
    own = f"lease{lease.id}.gpu.example.org"
    assert network_views.names_seen(lease) == ["jupyter.gpu.example.org", own]
    network_requests.edit_record(record, by=SYSTEM, values=["198.51.100.2"])
    grant = grants.get(lease, "name")
    assert (grant.observed, grant.waits_since) == ("unknown", grant.desired_at)
    assert network_views.names_seen(lease) == [own]
    applied(clouds=("cloudflare", "aws"))
    assert network_views.names_seen(lease) == ["jupyter.gpu.example.org", own]


def test_a_lease_that_ends_while_its_name_shall_lead_elsewhere_waits_until_it_is_gone(
    host: Host, gateway: Host, lease: Lease
) -> None:
    everything_seen(host, gateway, lease)
    machines.edit(gateway.machine, public_address="198.51.100.9", by=SYSTEM)
    network_posts.sweep()
    leases.end(lease, by=SYSTEM, reason="done")
    assert state_of(lease, "name") == ("closed", "open"), "whatever it leads to"
    applied(clouds=("cloudflare", "aws"))
    assert state_of(lease, "name") == ("closed", "closed")


def test_an_opening_that_is_asked_for_later_makes_its_grant(host: Host, tenant: Tenant) -> None:
    lease = allocate(host, tenant)
    assert state_of(lease, "firewall") is None
    opening = network_requests.open_port(host.machine, wish(), by=SYSTEM, lease=lease)
    assert state_of(lease, "firewall") == ("open", "unknown")
    reports(host, openings=seen(opening))
    network_requests.close_port(opening, by=SYSTEM)
    assert state_of(lease, "firewall") == ("closed", "open")
    reports(host)
    assert state_of(lease, "firewall") == ("closed", "closed")


def test_the_connection_names_the_gateways_address_and_port(host: Host, lease: Lease, customer: User) -> None:
    way = connections.of(leases.get(lease.id), user=customer)
    assert (way.host, way.port) == ("198.51.100.1", 20000)
    assert way.command == f"ssh -p 20000 lease{lease.id}@198.51.100.1"
    assert "Port 20000" in way.ssh_config
    assert way.known_hosts_line.startswith("[198.51.100.1]:20000 ssh-ed25519 ")


# Close together


def test_the_end_closes_all_in_one_and_the_lease_has_ended_when_all_was_seen(
    host: Host, gateway: Host, lease: Lease
) -> None:
    everything_seen(host, gateway, lease)
    assert set(states_of(lease).values()) == {("open", "open")}
    leases.end(lease, by=SYSTEM, reason="done")
    assert {desired for desired, _ in states_of(lease).values()} == {"closed"}
    assert (export()["names"], export()["openings"]) == ([], [])
    assert network_forwards.to_send(gateway.machine, utcnow()) == []

    def still_open() -> list[str]:
        assert leases.get(lease.id).state == "ending"
        return [kind for kind, (_, seen_as) in states_of(lease).items() if seen_as != "closed"]

    host.sees(lease, "closed")
    assert still_open() == ["firewall", "forward", "security_group", "name"]
    reports(host)
    assert still_open() == ["forward", "security_group", "name"]
    reports(gateway)
    assert still_open() == ["security_group", "name"]
    applied(clouds=("cloudflare",))
    assert still_open() == ["security_group"]
    applied(clouds=("aws",), stack="production-aws")
    assert leases.get(lease.id).state == "ended"
    assert reclaim_of(lease).state == "waiting"


def test_a_lease_that_no_stack_was_ever_given_waits_for_none(host: Host, gateway: Host, lease: Lease) -> None:
    leases.end(lease, by=SYSTEM, reason="a mistake")
    assert NetworkExport.select().count() == 0
    assert (state_of(lease, "name"), state_of(lease, "security_group")) == (("closed", "closed"), ("closed", "closed"))
    host.sees(lease, "closed")
    reports(host)
    reports(gateway)
    assert leases.get(lease.id).state == "ended"


def test_an_apply_that_is_still_under_way_cannot_bring_a_closed_name_back_unnoticed(host: Host, lease: Lease) -> None:
    """The pipeline has read the export with the name; the lease ends before it has applied it."""
    under_way = export()
    leases.end(lease, by=SYSTEM, reason="done")
    assert state_of(lease, "name") == ("closed", "unknown"), "somebody may be applying it at this moment"
    applied(under_way, clouds=("cloudflare", "aws"))
    assert state_of(lease, "name") == ("closed", "open")
    applied(clouds=("cloudflare", "aws"))
    assert state_of(lease, "name") == ("closed", "closed")


def test_an_apply_that_comes_after_a_later_one_is_refused_and_changes_nothing(host: Host, lease: Lease) -> None:
    with_name = export()
    leases.end(lease, by=SYSTEM, reason="done")
    applied(clouds=("cloudflare", "aws"))
    with pytest.raises(Conflict) as refused:
        applied(with_name, clouds=("cloudflare", "aws"))
    assert refused.value.code == "stale_apply"
    assert state_of(lease, "name") == ("closed", "closed")


def test_a_step_between_two_exports_says_nothing_about_leases(host: Host, lease: Lease) -> None:
    applied(clouds=("cloudflare", "aws"))
    step = outputs(clouds=("cloudflare", "aws"), checksum="sha256:" + "0" * 64)
    network_posts.take("production", step, by=SYSTEM)
    assert state_of(lease, "name") == ("open", "unknown")
    generation = network.state().generation
    applied(clouds=("cloudflare", "aws"))
    assert state_of(lease, "name") == ("open", "open")
    assert network.state().generation == generation, "a step asks for no other run of the pipeline"


# What cannot be reached


def test_a_week_without_ci_keeps_the_lease_ending_raises_an_alert_and_can_be_written_off(
    host: Host, gateway: Host, lease: Lease, operator: User
) -> None:
    everything_seen(host, gateway, lease)
    ends_but_for_the_stacks(host, gateway, lease)
    assert leases.finish_silent(utcnow() + timedelta(days=7)) == 0
    assert leases.get(lease.id).state == "ending"

    def told(after: timedelta) -> list[tuple[str, str]]:
        found = alerts_own.conditions(utcnow() + after, utcnow())
        return [(each.labels["host"], each.labels["part"]) for each in found if each.name == "GrantStillOpen"]

    assert told(timedelta(minutes=14)) == []
    assert told(timedelta(minutes=16)) == [("gpu-1", "security_group"), ("gpu-1", "name")]
    who = actor_of(operator)
    with pytest.raises(Invalid):
        leases.write_off_grant(lease, "name", by=who, reason=" ")
    leases.write_off_grant(lease, "name", by=who, reason="CI is gone; removed by hand")
    assert told(timedelta(minutes=16)) == [("gpu-1", "security_group")]
    assert leases.get(lease.id).state == "ending"
    leases.write_off_grant(lease, "security_group", by=who, reason="the same")
    assert leases.get(lease.id).state == "ended"
    assert told(timedelta(minutes=16)) == []
    grant = grants.get(lease, "name")
    assert (grant.observed, grant.written_off_by_id, grant.waits_since) == ("open", operator.id, None)
    entry = AuditEntry.get(AuditEntry.action == "grant.written_off")
    assert (entry.actor_name, entry.detail["kind"], entry.detail["observed"]) == ("olga", "name", "open")


def test_the_alert_of_a_part_that_is_still_open_ends_when_it_was_seen_closed(
    host: Host, gateway: Host, lease: Lease
) -> None:
    everything_seen(host, gateway, lease)
    leases.end(lease, by=SYSTEM, reason="done")
    host.sees(lease, "closed")
    reports(gateway)
    applied(clouds=("cloudflare", "aws"))
    watch, later = alerts_own.Watch(), utcnow() + timedelta(minutes=16)

    def told() -> list[tuple[str, str]]:
        watch.sweep(later)
        rows = Alert.select().where(Alert.name == "GrantStillOpen").order_by(Alert.id)
        return [(alert.state, alert.labels["part"]) for alert in rows]

    assert told() == [("firing", "firewall")]
    assert Alert.get(Alert.name == "GrantStillOpen").severity == "critical"
    reports(host)
    assert leases.get(lease.id).state == "ended"
    assert told() == [("resolved", "firewall")]


@pytest.mark.parametrize("kind", ["keys", "tasks", "desktop"])
def test_keys_and_tasks_are_written_off_with_the_whole_lease_alone(lease: Lease, kind: str) -> None:
    leases.end(lease, by=SYSTEM, reason="done")
    with pytest.raises(NotFound):
        leases.write_off_grant(lease, kind, by=SYSTEM, reason="gone")


def test_what_is_wanted_or_seen_closed_is_not_written_off(host: Host, lease: Lease) -> None:
    with pytest.raises(Conflict):
        leases.write_off_grant(lease, "name", by=SYSTEM, reason="gone")
    leases.end(lease, by=SYSTEM, reason="done")
    reports(host)
    with pytest.raises(Conflict):
        leases.write_off_grant(lease, "firewall", by=SYSTEM, reason="gone")


def test_a_port_that_is_written_off_can_be_given_away_again(host: Host, gateway: Host, lease: Lease) -> None:
    reports(gateway, forwards=seen(*network_forwards.of_lease(lease)))
    leases.end(lease, by=SYSTEM, reason="done")
    leases.write_off_grant(lease, "forward", by=SYSTEM, reason="the gateway has burnt down")
    assert network_forwards.of_lease(lease) == []
    assert Forward.get(Forward.lease == lease).released_at is not None


# Extended, continued


def test_a_lease_that_continues_another_has_its_name_port_and_openings_again(
    host: Host, gateway: Host, lease: Lease
) -> None:
    record = network_requests.want_record(
        DnsZone.get(), lease=lease, by=SYSTEM, name="jupyter.gpu.example.org", type="A", values=["198.51.100.1"]
    )
    closed_before = network_requests.open_port(host.machine, wish(7777), by=SYSTEM, lease=lease)
    network_requests.close_port(closed_before, by=SYSTEM)
    keys = {row["key"] for row in export()["names"]}
    everything_seen(host, gateway, lease)
    leases.end(lease, by=SYSTEM, reason="done")
    everything_seen(host, gateway, lease)
    assert leases.get(lease.id).state == "ended"
    assert export()["names"] == []

    following = leases.extend(lease, until=utcnow() + 9 * HOUR, by=SYSTEM)
    assert following.id != lease.id
    assert {row["key"] for row in export()["names"]} == keys, "the same resources in the clouds, not others"
    assert network_names.get(record.id).lease_id == following.id
    assert [each.first_port for each in network_openings.wanted_of(host.machine, following)] == [8888]
    held = {each.target_port: each.public_port for each in network_forwards.of_lease(following)}
    assert held == {host.machine.ssh_port: 20000, 8888: 20001}, "what people have written down still works"
    everything_seen(host, gateway, following)
    assert set(states_of(following).values()) == {("open", "open")}
    assert {desired for desired, _ in states_of(lease).values()} == {"closed"}


def test_an_extension_reaches_the_gateway(host: Host, gateway: Host, lease: Lease) -> None:
    generation, later = gateway.machine.generation, lease.ends_at + HOUR
    leases.extend(lease, until=later, by=SYSTEM)
    assert gateway.machine.generation > generation
    ends = {forward["ends_at"] for forward in network_forwards.to_send(gateway.machine, utcnow())}
    assert ends == {protocol.format_time(later)}


# Gateways


def test_a_gateway_is_leased_to_nobody(gateway: Host, tenant: Tenant) -> None:
    for given in ({}, {"starts_at": utcnow() + HOUR}):
        with pytest.raises(CannotAllocate) as refused:
            allocate(gateway, tenant, **given)
        assert "gateway" in {reason.code for reason in refused.value.reasons}


def test_a_gateway_in_use_is_neither_retired_nor_made_something_else(host: Host, gateway: Host, lease: Lease) -> None:
    for act in (
        lambda: place(gateway, forward_ports=None),
        lambda: retirement.retire(gateway.machine, by=SYSTEM, reason="old"),
        lambda: place(host, gateway_id=None),
    ):
        with pytest.raises(Conflict):
            act()
    assert gateway.machine.is_gateway
    assert state_of(lease, "forward") == ("open", "unknown")


def test_state_pairs_of_a_grant_are_told_as_waiting_unless_they_agree(lease: Lease) -> None:
    for desired in ("open", "closed"):
        for observed in ("open", "closed", "unknown"):
            grant = Grant(desired=desired, observed=observed, desired_at=utcnow())
            assert (grant.waits_since is None) == (desired == observed)
            grant.written_off_at = utcnow()
            assert grant.waits_since is None


def test_only_leases_that_wait_or_may_change_are_looked_at_when_a_stack_tells(
    host: Host, gateway: Host, lease: Lease
) -> None:
    def waiting() -> list[int]:
        return [each.id for each in network_switch.leases_to_refresh(network_applied.views())]

    assert lease.id in waiting()
    everything_seen(host, gateway, lease)
    assert waiting() == []
    leases.end(lease, by=SYSTEM, reason="done")
    assert lease.id in waiting()
    everything_seen(host, gateway, lease)
    assert waiting() == []
    assert not network_export.refresh(utcnow()), "every change was counted"


def test_a_name_that_an_apply_took_away_by_mistake_is_not_shown_as_open(
    host: Host, gateway: Host, lease: Lease
) -> None:
    everything_seen(host, gateway, lease)
    assert state_of(lease, "name") == ("open", "open")
    row = network_export.current()
    content = network_export.content_of(row)
    without = document.seal(
        {**{name: content[name] for name in network_export.body_fields()}, "names": [], **moved(row)}
    )
    NetworkExport.create(
        generation=without["generation"], checksum=without["checksum"], counts=without["counts"],
        document=zlib.compress(json.dumps(without).encode()),
    )  # fmt: skip
    applied(without, clouds=("cloudflare", "aws"))
    assert state_of(lease, "name") == ("open", "closed")
    assert grants.get(lease, "name").waits_since is not None


def moved(row: NetworkExport) -> dict[str, Any]:
    """Of the next generation."""
    return {"generation": row.generation + 1, "generated_at": "2026-01-01T00:00:00Z"}


def test_a_sweep_settles_what_a_process_that_died_has_left(host: Host, lease: Lease) -> None:
    network_applied.note("production", outputs(clouds=("cloudflare", "aws")), by=SYSTEM)
    assert state_of(lease, "name") == ("open", "closed")
    assert network_posts.sweep() == 1
    assert state_of(lease, "name") == ("open", "open")
    assert network_posts.sweep() == 0


def test_a_zone_that_begins_or_ceases_to_serve_leases_is_followed_by_those_that_run(
    database: Any, tenant: Tenant
) -> None:
    holds, lease = zone(), allocate(ready_host("gpu-1"), tenant)
    network_posts.sweep()
    assert state_of(lease, "name") is None
    network_zones.edit_zone(holds, serves_leases=True, by=SYSTEM)
    assert network_posts.sweep() == 1
    assert state_of(lease, "name") == ("open", "closed")
    applied()
    assert state_of(lease, "name") == ("open", "open")
    network_zones.edit_zone(holds, serves_leases=False, by=SYSTEM)
    assert network_posts.sweep() == 1
    assert state_of(lease, "name") == ("closed", "open")
    applied()
    assert state_of(lease, "name") == ("closed", "closed")


def test_a_name_that_moves_to_another_zone_waits_until_it_stands_there_alone(database: Any, tenant: Tenant) -> None:
    old, new = zone(serves_leases=True), zone("hosts.example.org", cloud="aws")
    lease = allocate(ready_host("gpu-1"), tenant)
    applied(clouds=("cloudflare", "aws"))
    network_posts.sweep()
    network_zones.edit_zone(old, serves_leases=False, by=SYSTEM)
    network_zones.edit_zone(new, serves_leases=True, by=SYSTEM)
    assert network_posts.sweep() == 1
    assert state_of(lease, "name") == ("open", "unknown")
    assert network_views.names_seen(lease) == []
    applied(clouds=("aws",), stack="production-aws")
    assert state_of(lease, "name") == ("open", "unknown"), "the old one is there still"
    applied(clouds=("cloudflare",))
    assert state_of(lease, "name") == ("open", "open")
    assert network_views.names_seen(lease) == [f"lease{lease.id}.hosts.example.org"]


# Stacks that are gone


def test_a_lease_that_has_ended_waits_for_no_stack_that_was_taken_down(
    host: Host, gateway: Host, lease: Lease, operator: User
) -> None:
    everything_seen(host, gateway, lease)
    ends_but_for_the_stacks(host, gateway, lease)
    assert (state_of(lease, "name"), leases.get(lease.id).state) == (("closed", "open"), "ending")
    with pytest.raises(Invalid):
        network_posts.forget("production", by=SYSTEM, reason=" ")
    network_posts.forget("production", by=actor_of(operator), reason="pulumi destroy")
    assert leases.get(lease.id).state == "ended"
    entry = AuditEntry.get(AuditEntry.action == "network.stack_gone")
    assert (entry.actor_name, entry.detail["stack"], entry.detail["clouds"]) == (
        "olga", "production", ["aws", "cloudflare"],
    )  # fmt: skip
    with pytest.raises(NotFound):
        network_posts.forget("production", by=SYSTEM, reason="again")


def test_what_no_other_stack_makes_is_not_left_alone_unasked(host: Host, lease: Lease) -> None:
    applied(clouds=("cloudflare", "aws"))
    with pytest.raises(Conflict, match="No other stack has aws, cloudflare, where 2 names and openings are wanted"):
        network_posts.forget("production", by=SYSTEM, reason="pulumi destroy")
    assert state_of(lease, "name") == ("open", "open")
    network_posts.forget("production", by=SYSTEM, reason="pulumi destroy", although_wanted=True)
    assert (state_of(lease, "name"), state_of(lease, "security_group")) == (("open", "closed"), ("open", "closed"))
    applied(clouds=("cloudflare", "aws"))
    assert state_of(lease, "name") == ("open", "open"), "made again, by the same stack"


def test_the_alert_does_not_wait_for_a_stack_that_is_gone(host: Host, lease: Lease) -> None:
    def is_raised() -> bool:
        found = alerts_own.conditions(utcnow() + 2 * HOUR, utcnow())
        return "NetworkNotApplied" in {each.name for each in found}

    applied(clouds=("cloudflare", "aws"), stack="old")
    network_requests.open_port(host.machine, wish(9999), by=SYSTEM)
    applied(clouds=("cloudflare",), stack="new-dns")
    assert is_raised(), "old has aws still"
    applied(clouds=("aws",), stack="new-groups")
    assert not is_raised()
    applied(export(), clouds=("alicloud",), stack="tried")
    network_requests.open_port(host.machine, wish(9998), by=SYSTEM)
    for stack in ("new-dns", "new-groups"):
        applied(clouds=("cloudflare",) if stack == "new-dns" else ("aws",), stack=stack)
    assert is_raised(), "nobody applies tried any more"
    network_posts.forget("tried", by=SYSTEM, reason="pulumi destroy")
    network_posts.forget("old", by=SYSTEM, reason="pulumi destroy")
    assert not is_raised()
    assert [stack.name for stack in network_views.standing().stacks] == ["new-dns", "new-groups"]
    assert state_of(lease, "security_group") == ("open", "open"), "what others have is theirs"
    for stack in ("new-dns", "new-groups"):
        network_posts.forget(stack, by=SYSTEM, reason="pulumi destroy", although_wanted=True)
    network_requests.open_port(host.machine, wish(9997), by=SYSTEM)
    assert not is_raised(), "there is no stack"


def test_a_lease_that_ends_before_it_was_looked_at_takes_its_name_along(database: Any, tenant: Tenant) -> None:
    lease = allocate(ready_host("gpu-1"), tenant)
    zone(serves_leases=True)
    assert len(export()["names"]) == 1
    leases.end(lease, by=SYSTEM, reason="done")
    assert export()["names"] == []
