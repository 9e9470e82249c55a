"""Leases behind one gateway and one zone begin and end at once, while gateway, hosts and a pipeline tell what they see.

Everybody writes to the gateway's row and to the network's: nobody may wait for somebody who waits for him, no port may
have two holders, and in the end nothing is open and every lease has ended.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from portal.db import connection, utcnow
from portal.errors import Conflict
from portal.models import Forward, Grant, Lease, Machine, NetworkExport, Opening, Tenant
from portal.services import leases, network, network_export, network_forwards, network_openings, network_posts
from portal.services.actors import SYSTEM
from tests.factories import make_tenant
from tests.support.network import applied, export, group, outputs, place, reports, seen, wish, zone
from tests.support.rental import Host, allocate, ready_host

HOSTS = 6
CLOUDS = ("cloudflare", "aws")


@pytest.fixture
def gateway(database: Any) -> Host:
    zone(serves_leases=True, serves_machines=True)
    gateway = ready_host("way-in", address="192.0.2.254", public_address="198.51.100.1")
    place(gateway, forward_ports=f"20000-{20000 + 2 * HOSTS - 1}")
    return gateway


@pytest.fixture
def hosts(gateway: Host) -> list[Host]:
    own_group = group()
    found = [ready_host(f"gpu-{number}", address=f"10.0.0.{number}") for number in range(1, HOSTS + 1)]
    for host in found:
        place(host, gateway_id=gateway.id, security_group_id=own_group.id)
    Machine.update(hears_openings=True).execute()
    return found


def together(*acts: Callable[[], None]) -> list[str]:
    """All at once, each with a connection of its own; what went wrong in any of them."""
    wrong, barrier = list[str](), threading.Barrier(len(acts))

    def run(act: Callable[[], None]) -> None:
        barrier.wait(30)
        try:
            with connection():
                act()
        except BaseException:
            wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return wrong


def rent(host: Host, tenant: Tenant) -> Callable[[], None]:
    """From the allocation to the end, as host and operator see it."""

    def act() -> None:
        lease = allocate(host, tenant, openings=[wish(8000 + host.id)], retain_s=3600)
        host.sees(lease)
        reports(host, openings=seen(*network_openings.wanted_of(host.machine, lease)))
        leases.end(lease, by=SYSTEM, reason="done")
        host.sees(lease, "closed")
        reports(host)

    return act


def watch(gateway: Host, until_over: threading.Event) -> Callable[[], None]:
    """The gateway's agent, again and again: it says what it was told a moment ago."""

    def act() -> None:
        while not until_over.wait(0.05):
            told = network_forwards.to_send(gateway.machine, utcnow())
            rows = [Forward.get_by_id(entry["id"]) for entry in told]
            leases.holes_observed(gateway.machine, {"openings": [], "forwards": seen(*rows)})

    return act


def pipeline(until_over: threading.Event) -> Callable[[], None]:
    """Reads, applies, tells; and now and then something comes late."""

    def act() -> None:
        while not until_over.wait(0.05):
            document = network_export.content_of(network_export.current())
            with suppress(Conflict):  # one that comes late is refused
                network_posts.take("production", outputs(document, clouds=CLOUDS), by=SYSTEM)

    return act


def test_leases_begin_and_end_at_once_and_nobody_waits_for_ever(hosts: list[Host], gateway: Host) -> None:
    tenant, over = make_tenant(), threading.Event()
    rentals = [rent(host, tenant) for host in hosts]
    waiting = threading.Semaphore(0)

    def counted(act: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                act()
            finally:
                waiting.release()

        return run

    def end_when_all_are_over() -> None:
        for _ in rentals:
            waiting.acquire(timeout=100)
        over.set()

    wrong = together(
        *map(counted, rentals), watch(gateway, over), pipeline(over), pipeline(over), end_when_all_are_over
    )
    assert not wrong, "\n".join(wrong)

    gateway.applies_everything()
    reports(gateway)
    applied(export(), clouds=CLOUDS)
    assert {lease.state for lease in Lease.select()} == {"ended"}
    assert Lease.select().count() == HOSTS
    assert {(grant.desired, grant.observed) for grant in Grant.select()} == {("closed", "closed")}
    assert Forward.select().where(Forward.released_at.is_null()).count() == 0
    assert Opening.select().where(Opening.closed_at.is_null()).count() == 0
    assert sorted(forward.public_port for forward in Forward.select()) == list(range(20000, 20000 + 2 * HOSTS))
    told = [row.generation for row in NetworkExport.select().order_by(NetworkExport.id)]
    assert told == sorted(set(told)), "no generation has two documents"
    assert network.state().generation >= 2 * HOSTS
