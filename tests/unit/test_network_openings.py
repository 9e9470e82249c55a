"""Openings: valid as the stacks have it, merged, told to the agent, ended with the lease, seen open and closed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from portal.db import utcnow
from portal.errors import Conflict, Forbidden, Invalid, NotFound
from portal.integrations import protocol
from portal.models import AuditEntry, Lease, Machine, Opening, Tenant, User
from portal.services import (
    desired,
    leases,
    network,
    network_names,
    network_openings,
    network_requests,
    network_zones,
    retirement,
)
from portal.services.actors import SYSTEM
from tests.factories import actor_of, make_machine
from tests.support.network import OFFICE, export, group, place, reports, seen, states_of, wish, zone
from tests.support.rental import Host, allocate, ready_host

HOUR = timedelta(hours=1)


@pytest.fixture
def host(database: Any) -> Host:
    host = ready_host("gpu-1")
    Machine.update(hears_openings=True).where(Machine.id == host.id).execute()
    return host


@pytest.fixture
def lease(host: Host, tenant: Tenant) -> Lease:
    return allocate(host, tenant)


def ask(host: Host, lease: Lease | None = None, **fields: Any) -> Opening:
    return network_requests.open_port(host.machine, wish(**fields), by=SYSTEM, lease=lease)


def told(host: Host) -> list[dict[str, Any]]:
    checked: dict[str, Any] = protocol.check(desired.desired_of(host.machine), "desired")
    return list(checked["openings"])


def ports(rows: Any) -> list[tuple[int, int]]:
    return [(each.first_port, each.last_port) for each in rows]


# What is valid


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"protocol": "icmp"}, "protocol"),
        ({"first_port": 0}, "first_port"),
        ({"first_port": 70000}, "first_port"),
        ({"first_port": 10, "last_port": 9}, "first_port"),
        ({"source": "203.0.113.7/24"}, "source"),
        ({"source": "::ffff:192.0.2.0/120"}, "source"),
        ({"source": "fe80::1%eth0"}, "source"),
        ({"source": "2001:db8::%x } ; y/64"}, "source"),
        ({"source": "203.0.113.0/２４"}, "source"),
        ({"source": "office"}, "source"),
        ({"source": "sg-0123456789abcdef0"}, "source"),
        ({"source": "0.0.0.0/0"}, "reason"),
        ({"source": "::/0"}, "reason"),
        ({"source": "128.0.0.0/1"}, "reason"),
        ({"source": "0.0.0.0/0", "reason": "  "}, "reason"),
        ({"reason": "two\nlines"}, "reason"),
        ({"ends_at": utcnow() - HOUR}, "ends_at"),
    ],
)
def test_what_no_firewall_or_cloud_should_get_is_refused_by_its_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        network_openings.wish(**{"protocol": "tcp", "first_port": 22, "source": OFFICE, **given})
    assert list(refused.value.fields) == [field]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (" 203.0.113.7 ", "203.0.113.7/32"),
        ("2001:DB8:0:0::/64", "2001:db8::/64"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
    ],
)
def test_a_source_is_kept_in_one_form(given: str, kept: str) -> None:
    assert wish(source=given, reason="a web server").source == kept


def test_every_fault_is_named_with_its_place_in_the_list() -> None:
    rows = [{"protocol": "tcp", "first_port": 22, "source": OFFICE}, {"protocol": "x", "first_port": 0, "source": "?"}]
    with pytest.raises(Invalid) as refused:
        network_openings.checked(rows)
    assert set(refused.value.fields) == {"openings.1.protocol", "openings.1.first_port", "openings.1.source"}


# Merged


def test_what_is_open_already_is_answered_and_not_opened_twice(host: Host, lease: Lease) -> None:
    first = ask(host, lease, port=8000, last_port=8100)
    generation = host.machine.generation
    assert ask(host, lease, port=8050) == first
    assert Opening.select().count() == 1
    assert host.machine.generation > generation, "saying it again tells the agent again, which changes nothing there"


def test_ports_that_overlap_or_touch_become_one_opening(host: Host, lease: Lease) -> None:
    low, high = ask(host, lease, port=8000, last_port=8010), ask(host, lease, port=8021, last_port=8030)
    joined = ask(host, lease, port=8011, last_port=8020)
    assert ports([joined]) == [(8000, 8030)]
    assert ports(network_openings.wanted_of(host.machine, lease)) == [(8000, 8030)]
    assert [network_openings.get(each.id).closed_at is not None for each in (low, high)] == [True, True]
    assert [entry["ports"] for entry in told(host)] == [[8000, 8030]]


def test_another_source_end_or_owner_is_another_opening(host: Host, lease: Lease) -> None:
    ask(host, lease)
    ask(host, lease, source="198.51.100.0/24")
    ask(host, lease, port=8889, ends_at=utcnow() + HOUR)
    ask(host)
    assert Opening.select().where(Opening.closed_at.is_null()).count() == 4


def test_one_that_ends_earlier_is_not_taken_for_one_that_stays(host: Host, lease: Lease) -> None:
    ask(host, lease, ends_at=utcnow() + HOUR)
    ask(host, lease)
    assert [each.ends_at is None for each in network_openings.wanted_of(host.machine, lease)] == [False, True]


# Told to the agent


def test_an_opening_of_a_lease_never_outlives_it(host: Host, lease: Lease) -> None:
    ask(host, lease, port=1)
    ask(host, lease, port=3, ends_at=lease.ends_at + HOUR)
    ask(host, lease, port=5, ends_at=utcnow() + HOUR)
    ask(host, port=7)
    ends = [entry["ends_at"] for entry in told(host)]
    assert ends[:2] == [protocol.format_time(lease.ends_at)] * 2
    assert ends[2] < ends[0]
    assert ends[3] is None
    assert [entry["lease"] for entry in told(host)] == [lease.host_id, lease.host_id, lease.host_id, None]


def test_an_extension_moves_the_ends_of_what_ends_with_the_lease(host: Host, lease: Lease) -> None:
    ask(host, lease)
    later = lease.ends_at + HOUR
    leases.extend(lease, until=later, by=SYSTEM)
    assert [entry["ends_at"] for entry in told(host)] == [protocol.format_time(later)]


def test_an_agent_that_does_not_know_openings_is_sent_no_such_field(host: Host, lease: Lease) -> None:
    ask(host, lease)
    Machine.update(hears_openings=False).where(Machine.id == host.id).execute()
    assert not {"openings", "forwards"} & desired.desired_of(host.machine).keys()


# Closed


def test_the_end_of_the_lease_closes_its_openings_and_no_other(host: Host, lease: Lease, operator: User) -> None:
    mine, machines_own = ask(host, lease), ask(host, port=9100)
    leases.end(lease, by=actor_of(operator), reason="done")
    assert [entry["id"] for entry in told(host)] == [machines_own.id]
    assert network_openings.get(mine.id).closed_at is not None
    entry = AuditEntry.get(AuditEntry.action == "opening.closed")
    assert (entry.actor_name, entry.resource_id, entry.detail["reason"]) == ("olga", mine.id, "The lease ends.")


def test_one_whose_own_time_is_up_is_closed_by_the_sweep_once(host: Host, lease: Lease) -> None:
    opening = ask(host, lease, ends_at=utcnow() + HOUR)
    assert network_requests.close_due(utcnow()) == 0
    assert network_requests.close_due(utcnow() + 2 * HOUR) == 1
    assert network_requests.close_due(utcnow() + 2 * HOUR) == 0
    assert network_openings.get(opening.id).closed_at is not None
    assert states_of(lease)["firewall"][0] == "closed"


def test_the_end_of_its_own_is_in_the_export_and_takes_it_out_of_that(host: Host, tenant: Tenant) -> None:
    place(host, security_group_id=group().id)
    lease = allocate(host, tenant)
    ends_at = utcnow() + HOUR
    mine, leases_own = ask(host, lease, ends_at=ends_at), ask(host, lease, port=9999)
    ends = {row["key"]: row["ends_at"] for row in export()["openings"]}
    assert ends == {mine.key: protocol.format_time(ends_at), leases_own.key: protocol.format_time(lease.ends_at)}
    generation = network.state().generation
    network_requests.close_due(ends_at + timedelta(seconds=1))
    assert [row["key"] for row in export()["openings"]] == [leases_own.key]
    assert network.state().generation > generation


def test_nothing_is_opened_for_a_lease_that_is_over(host: Host, lease: Lease) -> None:
    leases.end(lease, by=SYSTEM, reason="done")
    with pytest.raises(Conflict, match="ending"):
        ask(host, lease)
    assert Opening.select().count() == 0


# Seen


def test_the_agents_word_is_kept_with_its_age_and_reason(host: Host, lease: Lease) -> None:
    opening = ask(host, lease)
    reports(host, openings=seen(opening, state="failed", error="nft: no such table"))
    kept = network_openings.get(opening.id)
    since = kept.observed_at
    assert (kept.observed, kept.error) == ("failed", "nft: no such table")
    reports(host, openings=seen(opening, state="failed", error="nft: no such table"))
    assert network_openings.get(opening.id).observed_at == since
    assert states_of(lease)["firewall"] == ("open", "unknown")
    reports(host, openings=seen(opening))
    assert states_of(lease)["firewall"] == ("open", "open")


def test_what_is_not_listed_is_closed_only_once_everything_was_applied(host: Host, lease: Lease) -> None:
    opening = ask(host, lease)
    reports(host, openings=seen(opening))
    network_requests.close_port(opening, by=SYSTEM)
    leases.holes_observed(host.machine, {"openings": []})  # of before: it has not heard of the order
    assert network_openings.get(opening.id).observed == "open"
    reports(host, openings=seen(opening))
    assert network_openings.get(opening.id).observed == "open"
    reports(host)
    assert network_openings.get(opening.id).observed == "closed"


def test_an_agent_that_was_put_back_to_an_older_one_does_not_close_what_was_seen_open(host: Host, lease: Lease) -> None:
    opening, unseen = ask(host, lease), ask(host, lease, port=9)
    reports(host, openings=seen(opening))
    Opening.update(observed="unknown", observed_at=None).where(Opening.id == unseen.id).execute()
    host.applies_everything()
    leases.holes_observed(host.machine, {})
    assert [network_openings.get(each.id).observed for each in (opening, unseen)] == ["open", "closed"]


def test_a_machine_says_nothing_of_another_ones_openings(host: Host, lease: Lease) -> None:
    opening, other = ask(host, lease), ready_host("gpu-2")
    reports(host, openings=seen(opening))
    reports(other, openings=seen(opening, state="closed"))
    assert network_openings.get(opening.id).observed == "open"


def test_a_host_that_was_installed_anew_has_nothing_open(host: Host) -> None:
    kept, closed = ask(host, port=22), ask(host, port=80)
    reports(host, openings=seen(kept, closed))
    network_requests.close_port(closed, by=SYSTEM)
    network_openings.forget_seen(host.machine)
    assert [network_openings.get(each.id).observed for each in (kept, closed)] == ["unknown", "closed"]


# Customers


def test_a_customer_opens_within_the_limits_and_no_further(
    host: Host, lease: Lease, customer: User, viewer: User, stranger: User
) -> None:
    network_openings.set_limits(by=SYSTEM, openings_a_lease=2, ports_an_opening=5, first_port=8000, last_port=9000)

    def opened(user: User = customer, **fields: Any) -> Opening:
        return network_requests.open_port_as_customer(user, lease, wish(**fields), by=actor_of(user))

    faults: dict[str, dict[str, Any]] = {
        "first_port": {"port": 22},
        "last_port": {"port": 8000, "last_port": 8005},
        "source": {"source": "0.0.0.0/0", "reason": "everybody shall see it"},
    }
    for field, fields in faults.items():
        with pytest.raises(Invalid) as refused:
            opened(**fields)
        assert list(refused.value.fields) == [field]
    mine = opened()
    assert (mine.requested_by_id, mine.lease_id) == (customer.id, lease.id)
    opened(port=8000)
    with pytest.raises(Forbidden, match="2 of 2 openings"):
        opened(port=9000)
    for somebody, refusal in ((viewer, Forbidden), (stranger, NotFound)):
        with pytest.raises(refusal):
            opened(somebody)
        with pytest.raises(refusal):
            network_requests.close_port_as_customer(somebody, lease, mine.id, by=actor_of(somebody))
    assert ports(network_openings.wanted_of(host.machine, lease)) == [(8888, 8888), (8000, 8000)]


def test_many_small_openings_do_not_grow_into_one_beyond_the_limit(host: Host, lease: Lease, customer: User) -> None:
    def opened(first: int, last: int, **fields: Any) -> Opening:
        wished = wish(first, last_port=last, **fields)
        return network_requests.open_port_as_customer(customer, lease, wished, by=actor_of(customer))

    opened(1024, 1122)
    assert ports([opened(1123, 1123)]) == [(1024, 1123)], "a hundred ports, as many as one opening may have"
    for first, last in ((1124, 1124), (1124, 1223), (1100, 1199)):
        with pytest.raises(Invalid, match="Close some of them first") as refused:
            opened(first, last)
        assert list(refused.value.fields) == ["last_port"]
    assert ports([opened(1125, 1224)]) == [(1125, 1224)], "a port between them, and they stay two"
    with pytest.raises(Invalid, match="one opening of 201 ports, and you may have 100 in one"):
        opened(1124, 1124)
    assert ports([opened(1100, 1110)]) == [(1024, 1123)], "open already: nothing more comes of it"
    assert ports(network_openings.wanted_of(host.machine, lease)) == [(1024, 1123), (1125, 1224)]


def test_what_joins_an_opening_is_no_further_one(host: Host, lease: Lease, customer: User) -> None:
    network_openings.set_limits(by=SYSTEM, openings_a_lease=2, ports_an_opening=5)

    def opened(port: int) -> Opening:
        return network_requests.open_port_as_customer(customer, lease, wish(port), by=actor_of(customer))

    opened(8000), opened(8002)
    assert ports([opened(8001)]) == [(8000, 8002)]
    opened(9000)
    with pytest.raises(Forbidden, match="2 of 2 openings"):
        opened(9002)
    assert ports(network_openings.wanted_of(host.machine, lease)) == [(8000, 8002), (9000, 9000)]


def test_a_customer_closes_the_own_openings_and_not_the_machines(host: Host, lease: Lease, customer: User) -> None:
    mine, machines_own = ask(host, lease), ask(host, port=22)
    with pytest.raises(NotFound):
        network_requests.close_port_as_customer(customer, lease, machines_own.id, by=actor_of(customer))
    closed = network_requests.close_port_as_customer(customer, lease, mine.id, by=actor_of(customer))
    assert closed.closed_at is not None
    assert network_openings.get(machines_own.id).closed_at is None


def test_limits_are_checked_audited_and_kept(database: Any, operator: User) -> None:
    with pytest.raises(Invalid) as refused:
        network_openings.set_limits(by=actor_of(operator), first_port=9, last_port=8)
    assert list(refused.value.fields) == ["first_port"]
    network_openings.set_limits(by=actor_of(operator), openings_a_lease=3)
    network_openings.set_limits(by=actor_of(operator), may_open_to_world=True)
    kept = network_openings.limits()
    assert (kept.openings_a_lease, kept.may_open_to_world, kept.first_port) == (3, True, 1024)
    assert AuditEntry.select().where(AuditEntry.action == "network.limits_set").count() == 2


# In front of a group


def test_a_rule_beyond_the_clouds_quota_is_refused_before_it_stops_the_stack(host: Host) -> None:
    place(host, security_group_id=group().id)
    network_openings.set_limits(by=SYSTEM, rules_a_group=2)
    ask(host, port=1)
    ask(host, port=3)
    generation = network.state().generation
    with pytest.raises(Conflict, match=r"cannot take it: .*3 IPv4 rules") as refused:
        ask(host, port=5)
    assert refused.value.code == "group_full"
    assert ports(network_openings.wanted_of(host.machine, None)) == [(1, 1), (3, 3)]
    assert network.state().generation == generation
    ask(host, port=2)
    assert ports(network_openings.wanted_of(host.machine, None)) == [(1, 3)], "merged, it is one rule"


@pytest.mark.parametrize(
    ("cloud", "limit", "words"),
    [
        ("alicloud", "alicloud_rules_a_group", "2 rules, but Alibaba Cloud takes 1"),
        ("tencent", "tencent_rules_a_group", "2 rules, but Tencent Cloud takes 1"),
    ],
)
def test_each_cloud_has_its_own_quota(host: Host, cloud: str, limit: str, words: str) -> None:
    place(host, security_group_id=group(cloud=cloud, region="cn-shanghai").id)
    network_openings.set_limits(by=SYSTEM, rules_a_group=0)
    ask(host, port=1)
    network_openings.set_limits(by=SYSTEM, **{limit: 1})
    with pytest.raises(Conflict, match=words):
        ask(host, port=3)
    assert ports(network_openings.wanted_of(host.machine, None)) == [(1, 1)]


def test_what_is_beyond_a_quota_that_was_lowered_can_still_be_closed(host: Host) -> None:
    place(host, security_group_id=group().id)
    opened = [ask(host, port=port) for port in (1, 3, 5)]
    network_openings.set_limits(by=SYSTEM, rules_a_group=1)
    assert network_requests.close_port(opened[0], by=SYSTEM).closed_at is not None


def test_a_retired_machine_has_no_openings_of_its_own(host: Host) -> None:
    opening = ask(host)
    retirement.retire(host.machine, by=SYSTEM, reason="old")
    assert network_openings.get(opening.id).closed_at is not None
    with pytest.raises(Conflict, match="retired"):
        ask(host)


def test_a_retired_machine_gives_its_names_back(host: Host) -> None:
    holds = zone()
    wanted = {"by": SYSTEM, "name": "lab.gpu.example.org", "type": "A", "values": ["192.0.2.7"]}
    record = network_requests.want_record(holds, machine=host.machine, **wanted)
    kept = network_requests.want_record(holds, **{**wanted, "name": "www.gpu.example.org"})
    retirement.retire(host.machine, by=SYSTEM, reason="old")
    assert AuditEntry.get(AuditEntry.action == "record.removed").resource_id == record.id
    following = network_requests.want_record(holds, machine=ready_host("gpu-2").machine, **wanted)
    assert [each.id for each in network_names.search()] == [following.id, kept.id]
    for each in (following, kept):
        network_requests.remove_record(each, by=SYSTEM)
    network_zones.delete_zone(holds, by=SYSTEM)


def test_the_protocol_carries_as_many_as_a_machine_may_have(database: Any) -> None:
    machine = make_machine(hears_openings=True)
    most = network_openings.MOST_OF_MACHINE
    rows = [
        {"machine": machine.id, "protocol": "tcp", "first_port": port, "last_port": port, "source": OFFICE}
        for port in range(1, 2 * most, 2)
    ]
    Opening.insert_many(rows).execute()
    assert len(protocol.check(desired.desired_of(Machine.get_by_id(machine.id)), "desired")["openings"]) == most
    with pytest.raises(Conflict, match=f"has {most} openings"):
        network_requests.open_port(machine, wish(50000), by=SYSTEM)


def test_a_machine_whose_openings_a_group_cannot_take_is_not_put_behind_it(host: Host) -> None:
    network_openings.set_limits(by=SYSTEM, rules_a_group=2)
    for port in (1, 3, 5):
        ask(host, port=port)
    with pytest.raises(Conflict, match="cannot take it"):
        place(host, security_group_id=group().id)
    assert host.machine.security_group_id is None
