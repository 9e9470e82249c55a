"""The pool of ports: each is given to one lease at a time, whoever comes at once, and again when it was seen closed."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import peewee
import pytest

from portal.db import atomic, connection, db, utcnow
from portal.errors import Conflict, Invalid
from portal.integrations import protocol
from portal.models import AuditEntry, Forward, Lease, Machine, Opening, Tenant
from portal.services import desired, grants, leases, machines, network_forwards, network_machines, network_requests
from portal.services.actors import SYSTEM
from portal.services.network_forwards import NoPortLeft
from tests.factories import make_lease, make_machine, make_tenant
from tests.support.network import OFFICE, reports, seen, wish
from tests.support.rental import Host
from tests.support.waiting import until

POOL = 8


@pytest.fixture
def gateway(database: Any) -> Host:
    ports = f"20000-{20000 + POOL - 1}"
    return Host(make_machine("way-in", public_address="198.51.100.1", forward_ports=ports, hears_openings=True))


def behind(gateway: Host, tenant: Tenant, **fields: Any) -> Lease:
    """An active lease of a machine behind it."""
    number = Machine.select().count()
    given = {"address": f"10.0.0.{number}", "ssh_port": 22, "state": "leased", "gateway": gateway.id, **fields}
    lease = make_lease(make_machine(**given), tenant)
    lease.login = f"lease{lease.id}"
    lease.save()
    return lease


def take(lease: Lease, before: Lease | None = None) -> Forward:
    """The way in by SSH."""
    with atomic():
        machine = machines.lock(lease.machine)
        network_forwards.follow(lease, machine, [], by=SYSTEM, before=before)
    return Forward.get(Forward.lease == lease, Forward.closed_at.is_null())


def close(gateway: Host, lease: Lease) -> None:
    """Wanted no longer, and seen closed."""
    with atomic():
        network_forwards.close_all(lease, utcnow(), by=SYSTEM)
    reports(gateway, forwards=[])


def test_many_who_come_at_once_get_a_port_each_and_the_rest_is_refused(
    gateway: Host, tenant: Tenant, database_url: str
) -> None:
    wanted = [behind(gateway, tenant) for _ in range(POOL + 3)]
    barrier, ports, refused = threading.Barrier(len(wanted)), list[int](), list[Exception]()

    def come(lease: Lease) -> None:
        barrier.wait(30)
        with connection():
            try:
                ports.append(take(lease).public_port)
            except NoPortLeft as refusal:
                refused.append(refusal)

    threads = [threading.Thread(target=come, args=(lease,)) for lease in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ports) == list(range(20000, 20000 + POOL))
    assert len(refused) == 3
    held = Forward.select().where(Forward.released_at.is_null())
    assert sorted(each.public_port for each in held) == sorted(ports)


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_two_who_take_several_ports_at_once_do_not_wait_for_each_other(
    gateway: Host, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One goes round in the pool and comes to the port with which the other, who has had it before, begins."""
    before = behind(gateway, tenant)
    for lease in (before, *(behind(gateway, tenant) for _ in range(POOL - 2))):
        take(lease)
        close(gateway, lease)
    Machine.update(state="retired").where(Machine.gateway == gateway.id).execute()  # no port is kept for them
    first, second = behind(gateway, tenant), behind(gateway, tenant)
    wide = Opening(protocol="tcp", first_port=9000, last_port=9001, source=OFFICE)
    wrong, tell = list[Exception](), network_forwards._tell

    def come(lease: Lease, before: Lease | None = None) -> None:
        try:
            with connection(), atomic():
                network_forwards.follow(lease, machines.lock(lease.machine), [wide], by=SYSTEM, before=before)
        except Exception as error:
            wrong.append(error)

    other = threading.Thread(target=come, args=(second, before))

    def begin_the_other(action: str, forward: Forward, lease: Lease, **rest: Any) -> None:
        tell(action, forward, lease, **rest)
        if lease.id == first.id and other.ident is None:
            other.start()
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            until(lambda: db.execute_sql(waiting).fetchone()[0], "the other to wait for a row of this one")

    monkeypatch.setattr(network_forwards, "_tell", begin_the_other)
    come(first)
    other.join(60)
    assert wrong == []
    taken = {lease.id: [each.public_port for each in network_forwards.of_lease(lease)] for lease in (first, second)}
    assert taken == {first.id: [20007, 20000, 20001], second.id: [20002, 20003, 20004]}


def test_the_database_refuses_a_second_holder_whatever_the_code_believes(gateway: Host, tenant: Tenant) -> None:
    first = take(behind(gateway, tenant))
    other = behind(gateway, tenant)
    with pytest.raises(peewee.IntegrityError), atomic():
        Forward.create(
            gateway=gateway.id, machine=other.machine, lease=other, protocol="tcp", public_port=first.public_port,
            source="0.0.0.0/0", target_port=22,
        )  # fmt: skip


def test_a_port_is_given_again_only_when_it_was_seen_closed_and_as_late_as_can_be(
    gateway: Host, tenant: Tenant
) -> None:
    held = [behind(gateway, tenant) for _ in range(POOL)]
    forwards = [take(lease) for lease in held]
    reports(gateway, forwards=seen(*forwards))
    with atomic():
        network_forwards.close_all(held[2], utcnow(), by=SYSTEM)
    reports(gateway, forwards=seen(*forwards))  # still there
    with pytest.raises(NoPortLeft):
        take(behind(gateway, tenant))
    reports(gateway, forwards=seen(*(each for each in forwards if each.id != forwards[2].id)))
    assert take(behind(gateway, tenant)).public_port == 20002
    for lease in (held[0], held[1]):
        close(gateway, lease)
    assert [take(behind(gateway, tenant)).public_port for _ in range(2)] == [20000, 20001]


def test_a_port_that_was_just_released_is_not_the_next_to_be_given_away(gateway: Host, tenant: Tenant) -> None:
    lease = behind(gateway, tenant)
    assert take(lease).public_port == 20000
    close(gateway, lease)
    assert take(behind(gateway, tenant)).public_port == 20001


def test_a_lease_that_continues_another_gets_its_port_back_unless_it_is_taken(gateway: Host, tenant: Tenant) -> None:
    first = behind(gateway, tenant)
    port = take(first).public_port
    close(gateway, first)
    assert take(behind(gateway, tenant), before=first).public_port == port
    assert take(behind(gateway, tenant), before=first).public_port != port


def test_a_gateway_is_told_of_its_own_forwards_in_the_words_of_the_protocol(gateway: Host, tenant: Tenant) -> None:
    lease, other = behind(gateway, tenant), Host(make_machine(forward_ports="1024-1025", hears_openings=True))
    forward = take(lease)
    told = protocol.check(desired.desired_of(gateway.machine), "desired")["forwards"]
    assert told == [
        {
            "id": forward.id,
            "lease": lease.id,
            "protocol": "tcp",
            "public_port": 20000,
            "source": "0.0.0.0/0",
            "target_address": lease.machine.address,
            "target_port": 22,
            "ends_at": protocol.format_time(lease.ends_at),
        }
    ]
    assert desired.desired_of(other.machine)["forwards"] == []
    assert desired.desired_of(machines.get(lease.machine_id)).get("forwards", []) == []


def test_a_machine_of_ipv6_is_open_to_everybody_of_ipv6(gateway: Host, tenant: Tenant) -> None:
    assert take(behind(gateway, tenant, address="2001:db8::7")).source == "::/0"


def test_a_machine_that_moves_is_reached_at_its_new_address(gateway: Host, tenant: Tenant) -> None:
    lease = behind(gateway, tenant)
    take(lease)
    generation = gateway.machine.generation
    machines.edit(lease.machine, address="10.9.9.9", by=SYSTEM)
    assert gateway.machine.generation > generation
    assert network_forwards.to_send(gateway.machine, utcnow())[0]["target_address"] == "10.9.9.9"
    with pytest.raises(Invalid) as refused:
        machines.edit(lease.machine, address="gpu.example.org", by=SYSTEM)
    assert list(refused.value.fields) == ["address"]


def test_a_forward_that_the_gateway_cannot_make_says_why(gateway: Host, tenant: Tenant) -> None:
    forward = take(behind(gateway, tenant))
    reports(gateway, forwards=seen(forward, state="failed", error="in none of this gateway's networks"))
    kept = Forward.get_by_id(forward.id)
    assert (kept.observed, kept.error, kept.released_at) == ("failed", "in none of this gateway's networks", None)


def test_another_machine_cannot_speak_for_the_gateway(gateway: Host, tenant: Tenant) -> None:
    lease = behind(gateway, tenant)
    forward = take(lease)
    with atomic():
        network_forwards.close_all(lease, utcnow(), by=SYSTEM)
    other = Host(make_machine(forward_ports="1024-1025", public_address="192.0.2.9"))
    reports(other, forwards=seen(forward, state="closed"))
    leases.holes_observed(machines.get(lease.machine_id), {"openings": [], "forwards": seen(forward, state="closed")})
    assert Forward.get_by_id(forward.id).released_at is None


# Of what a lease opens


def ways(lease: Lease) -> dict[tuple[str, int, str], int]:
    """What is forwarded for it, and by which port of the gateway."""
    rows = network_forwards.wanted_of(lease)
    return {(row.protocol, row.target_port, row.source): row.public_port for row in rows}


def ask(lease: Lease, port: int, **fields: Any) -> Opening:
    return network_requests.open_port(machines.get(lease.machine_id), wish(port, **fields), by=SYSTEM, lease=lease)


def test_a_port_that_is_opened_behind_a_gateway_is_reached_through_it_from_its_source(
    gateway: Host, tenant: Tenant
) -> None:
    lease = behind(gateway, tenant)
    take(lease)
    opening = ask(lease, 8888)
    ask(lease, 9000, protocol="udp", source="198.51.100.7/32")
    assert ways(lease) == {
        ("tcp", 22, "0.0.0.0/0"): 20000,
        ("tcp", 8888, OFFICE): 20001,
        ("udp", 9000, "198.51.100.7/32"): 20002,
    }
    told = {entry["target_port"]: entry for entry in network_forwards.to_send(gateway.machine, utcnow())}
    assert (told[8888]["public_port"], told[8888]["source"], told[9000]["protocol"]) == (20001, OFFICE, "udp")
    network_requests.close_port(opening, by=SYSTEM)
    assert list(ways(lease)) == [("tcp", 22, "0.0.0.0/0"), ("udp", 9000, "198.51.100.7/32")]
    assert {each.public_port for each in network_forwards.of_lease(lease)} == {20000, 20001, 20002}, "not seen closed"
    assert grants.get(lease, "forward").detail["holes"][1]["wanted"] is False
    taken = AuditEntry.select().where(AuditEntry.action << ("forward.taken", "forward.closed"))
    assert [(entry.action, entry.detail["target_port"]) for entry in taken.order_by(AuditEntry.id)] == [
        ("forward.taken", 22), ("forward.taken", 8888), ("forward.taken", 9000), ("forward.closed", 8888),
    ]  # fmt: skip


def ends_told(gateway: Host) -> dict[int, str]:
    """Until when each port of the machines is led to, as the gateway's agent is answered."""
    answer = protocol.check(desired.desired_of(gateway.machine), "desired")
    return {entry["target_port"]: entry["ends_at"] for entry in answer["forwards"]}


def test_a_forward_ends_with_its_opening_and_the_way_in_with_the_lease(gateway: Host, tenant: Tenant) -> None:
    """The gateway closes by what it was told, with the portal down."""
    lease = behind(gateway, tenant)
    soon, with_lease = utcnow() + timedelta(minutes=20), protocol.format_time(lease.ends_at)
    ask(lease, 8888, ends_at=soon)
    ask(lease, 9000)
    ask(lease, 9100, ends_at=lease.ends_at + timedelta(days=1))
    ask(lease, 22, source="0.0.0.0/0", reason="for a while", ends_at=soon)
    told = ends_told(gateway)
    assert told == {22: with_lease, 8888: protocol.format_time(soon), 9000: with_lease, 9100: with_lease}
    later = {entry["target_port"] for entry in network_forwards.to_send(gateway.machine, soon)}
    assert later == {22, 9000, 9100}, "over, though nobody has closed it yet"


def test_a_way_that_several_openings_want_ends_with_the_last_and_the_gateway_hears_of_it(
    gateway: Host, tenant: Tenant
) -> None:
    lease = behind(gateway, tenant)
    sooner, later = (utcnow() + timedelta(minutes=minutes) for minutes in (10, 20))
    ask(lease, 8888, ends_at=sooner)
    generation, port = gateway.machine.generation, ways(lease)["tcp", 8888, OFFICE]
    longer = ask(lease, 8888, ends_at=later)
    assert gateway.machine.generation > generation
    assert ends_told(gateway)[8888] == protocol.format_time(later)
    generation = gateway.machine.generation
    network_requests.close_port(longer, by=SYSTEM)
    assert gateway.machine.generation > generation
    assert ends_told(gateway)[8888] == protocol.format_time(sooner)
    assert ways(lease)["tcp", 8888, OFFICE] == port, "the same port all the time"


def test_openings_that_are_merged_keep_the_ports_that_people_know(gateway: Host, tenant: Tenant) -> None:
    lease = behind(gateway, tenant)
    ask(lease, 8888)
    before = ways(lease)
    ask(lease, 8889)
    after = ways(lease)
    assert {way: after[way] for way in before} == before
    assert len(after) == len(before) + 1


def test_a_wide_range_and_another_family_take_no_ports(gateway: Host, tenant: Tenant) -> None:
    lease = behind(gateway, tenant)
    ask(lease, 8000, last_port=8000 + network_forwards.MOST_OF_OPENING)
    ask(lease, 443, source="2001:db8::/48")
    assert list(ways(lease)) == [("tcp", 22, "0.0.0.0/0")]


def test_an_opening_for_which_no_port_is_left_is_refused_whole(gateway: Host, tenant: Tenant) -> None:
    lease = behind(gateway, tenant)
    ask(lease, 8000, last_port=8000 + POOL - 2)
    assert len(ways(lease)) == POOL
    with pytest.raises(NoPortLeft):
        ask(lease, 9999)
    assert len(ways(lease)) == POOL
    assert Opening.select().where(Opening.first_port == 9999).count() == 0


def test_openings_leave_a_port_for_the_way_in_of_every_other_machine(gateway: Host, tenant: Tenant) -> None:
    first, second = behind(gateway, tenant), behind(gateway, tenant)
    make_machine(address="10.0.1.1", gateway=gateway.id)  # ready, and leased to nobody yet
    make_machine(address="10.0.1.2", gateway=gateway.id, state="retired")
    kept = ask(first, 8000, last_port=8000 + POOL - 4)
    assert len(ways(first)) == POOL - 2
    with pytest.raises(NoPortLeft, match=f"no port left in 20000-{20000 + POOL - 1} for openings: it keeps 2"):
        ask(first, 9999)
    assert len(ways(first)) == POOL - 2
    assert take(second).public_port == 20000 + POOL - 2, "the way in is what is kept for it"
    with pytest.raises(NoPortLeft, match="it keeps 1"):
        ask(second, 8888)
    network_requests.close_port(kept, by=SYSTEM)
    with pytest.raises(NoPortLeft):
        ask(second, 8888)  # not seen closed, so still taken
    reports(gateway, forwards=[])
    ask(second, 8888)


# What makes a gateway


@pytest.mark.parametrize(
    "pool", ["20000", "20000-", "20999-20000", "80-90", "20000-70000", "a-b", "20000-20999 ", "20000-25000"]
)
def test_a_pool_is_a_range_above_the_gateways_own_services(database: Any, pool: str) -> None:
    machine = make_machine(public_address="198.51.100.1")
    with pytest.raises(Invalid) as refused:
        network_machines.place(machine, forward_ports=pool, by=SYSTEM)
    assert list(refused.value.fields) == ["forward_ports"]


def test_what_stands_behind_what_must_be_able_to(database: Any) -> None:
    plain = make_machine(address="192.0.2.1")
    gateway = make_machine(address="10.0.0.1", public_address="198.51.100.1", forward_ports="20000-20999")
    faults = [
        (plain, {"forward_ports": "20000-20999"}, "forward_ports"),  # without a public address
        (plain, {"gateway_id": make_machine().id}, "gateway_id"),
        (plain, {"gateway_id": 2147483000}, "gateway_id"),
        (gateway, {"gateway_id": gateway.id}, "gateway_id"),
        (make_machine(address="2001:db8::1"), {"gateway_id": gateway.id}, "gateway_id"),
        (make_machine(address="gpu.example.org"), {"gateway_id": gateway.id}, "gateway_id"),
        (plain, {"security_group_id": 2147483000}, "security_group_id"),
    ]
    for machine, given, field in faults:
        with pytest.raises(Invalid) as refused:
            network_machines.place(machine, by=SYSTEM, **given)
        assert list(refused.value.fields) == [field], given
    network_machines.place(plain, gateway_id=gateway.id, by=SYSTEM)
    with pytest.raises(Conflict) as in_use:
        network_machines.place(gateway, forward_ports=None, by=SYSTEM)
    assert in_use.value.code == "gateway_in_use"
    with pytest.raises(Invalid) as needed:
        machines.edit(gateway, public_address=None, by=SYSTEM)
    assert list(needed.value.fields) == ["public_address"]


def test_a_machine_does_not_move_while_it_is_leased(gateway: Host) -> None:
    lease = behind(gateway, make_tenant())
    with pytest.raises(Conflict, match=f"Lease {lease.id} has"):
        network_machines.place(machines.get(lease.machine_id), gateway_id=None, by=SYSTEM)


def test_a_lease_that_is_scheduled_does_not_hide_the_one_that_has_the_machine(gateway: Host, tenant: Tenant) -> None:
    other = make_machine("way-out", public_address="198.51.100.2", forward_ports="30000-30009")
    machine = make_machine(address="10.0.0.9", state="ready", gateway=gateway.id)
    planned = make_lease(machine, tenant, state="scheduled", starts_at=utcnow() + timedelta(days=30))
    network_machines.place(machine, gateway_id=other.id, by=SYSTEM)  # alone it keeps nobody from that
    network_machines.place(machine, gateway_id=gateway.id, by=SYSTEM)
    held = make_lease(machine, tenant)
    assert planned.id < held.id
    with pytest.raises(Conflict, match=f"Lease {held.id} has"):
        network_machines.place(machine, gateway_id=other.id, by=SYSTEM)
    with pytest.raises(Conflict, match=f"Lease {held.id} has"):
        network_machines.place(machine, gateway_id=None, by=SYSTEM)
    assert machines.get(machine.id).gateway_id == gateway.id


def test_a_machine_that_is_to_be_leased_becomes_no_gateway(database: Any, tenant: Tenant) -> None:
    machine = make_machine(public_address="198.51.100.9")
    lease = make_lease(machine, tenant, state="scheduled", starts_at=utcnow() + timedelta(days=30))
    with pytest.raises(Conflict, match=f"Lease {lease.id} has"):
        network_machines.place(machine, forward_ports="20000-20009", by=SYSTEM)


def test_an_address_of_another_family_does_not_cut_customers_off(gateway: Host, tenant: Tenant) -> None:
    Machine.update(public_address="way-in.example.org").where(Machine.id == gateway.id).execute()
    lease = behind(gateway, tenant)
    take(lease)
    with pytest.raises(Conflict, match="come in by IPv4, and the address 2001:db8::7 is IPv6; change it when"):
        machines.edit(lease.machine, address="2001:db8::7", by=SYSTEM)
    assert len(network_forwards.to_send(gateway.machine, utcnow())) == 1
    close(gateway, lease)
    machines.edit(lease.machine, address="2001:db8::7", by=SYSTEM)
    assert machines.get(lease.machine_id).address == "2001:db8::7"


def test_gateway_and_machine_stay_of_one_family_whichever_is_edited(gateway: Host) -> None:
    machine = make_machine("gpu-1", address="10.0.0.9", gateway=gateway.id)
    for edited, field, address, told in (
        (machine, "address", "2001:db8::7", "way-in has an IPv4 address and cannot forward to IPv6"),
        (gateway.machine, "public_address", "2001:db8::1", "gpu-1 stands behind it with an IPv4 address"),
    ):
        with pytest.raises(Invalid) as refused:
            machines.edit(edited, by=SYSTEM, **{field: address})
        assert list(refused.value.fields) == [field]
        assert told in refused.value.fields[field][0]
    machines.edit(gateway.machine, public_address="way-in.example.org", by=SYSTEM)
    machines.edit(machine, address="2001:db8::7", by=SYSTEM)


def test_the_port_that_customers_are_led_to_is_not_moved_from_under_them(gateway: Host, tenant: Tenant) -> None:
    lease = behind(gateway, tenant)
    take(lease)
    with pytest.raises(Conflict, match="change it when the lease has ended"):
        machines.edit(lease.machine, by=SYSTEM, ssh_port=2200)
    assert machines.get(lease.machine_id).ssh_port == 22
