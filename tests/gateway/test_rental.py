"""A rental behind a gateway, with the portal itself: two machines provisioned through it, and what a customer meets.

A lease has two forwards, for SSH and for the port that it opens. The pool of the gateway is two ports, so that the next
lease gets in only if the one before has given them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.e2e.world import INSTALLER_PASSWORD, PROVISION_TIMEOUT_S, RECLAIM_TIMEOUT_S, Person, World
from tests.gateway.place import ANOTHER, CUSTOMER, FAMILIES, PUBLIC, THEIRS, Place, staying, three_hosts
from tests.hosts import Host, gateway_address
from tests.support.portal import Portal, running
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(2400)]
POOL = (20000, 20001)
GREETING = 8888
LEASE_S = 45.0


@dataclass
class Rented:
    """Ready machines, and the family in which customers come."""

    world: World
    place: Place
    gpu: Host  # as the portal knows it: by an address of that family
    family: int

    def connection(self, person: Person) -> Any:
        machine_id = self.world.machines[self.gpu.name]
        return person.client.get(f"customer/machines/{machine_id}/connection").body

    def allocate(self, tenant_id: int, *, lasts_s: float) -> Any:
        """With the greeter's port open for the customer's own network."""
        opening = {"protocol": "tcp", "first_port": GREETING, "source": THEIRS[self.family]}
        lease = self.world.allocate(self.gpu, tenant_id, lasts_s=lasts_s, openings=[opening])
        assert {"keys", "firewall", "forward"} <= {grant["kind"] for grant in lease["grants"]}
        return lease

    def port_of(self, target_port: int) -> int:
        (forward,) = [each for each in self.forwards() if each["target_port"] == target_port]
        return int(forward["public_port"])

    def sign_in(self, person: Person, *command: str) -> str:
        """As the connection dialog says."""
        told = self.connection(person)
        assert (told["host"], told["port"]) == (PUBLIC[self.family], self.port_of(22))
        said = self.place.ssh(self.family, told["port"], told["login"], person.key, *command)
        assert said.ok, said.stderr
        return said.stdout.strip()

    def forwards(self) -> list[Any]:
        return list(self.world.admin.get("admin/network/forwards")["items"])


@pytest.fixture(scope="module", params=FAMILIES, ids=["IPv4", "IPv6"])
def rented(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rented]:
    family: int = request.param
    folder = tmp_path_factory.mktemp("rental")
    with ExitStack() as stack:
        place = stack.enter_context(three_hosts("trixie", password=INSTALLER_PASSWORD))
        environ = {"REPORT_INTERVAL_S": "1", "OFFLINE_AFTER_S": "10"}
        portal = stack.enter_context(running(Portal(folder / "instance", address=gateway_address(), environ=environ)))
        world = World(portal, portal.set_up(), folder)
        portal.start("worker")
        gateway, gpu = (replace(host, address=place.inside(host)[family]) for host in (place.gateway, place.gpu))
        for host in (gateway, gpu):
            world.add(host)
            world.confirm(host)
        gateway_id, gpu_id = world.machines[gateway.name], world.machines[gpu.name]
        world.admin.patch(f"admin/machines/{gateway_id}", public_address=PUBLIC[family])
        world.admin.patch(f"admin/network/machines/{gateway_id}", forward_ports=f"{POOL[0]}-{POOL[1]}")
        world.admin.patch(f"admin/network/machines/{gpu_id}", gateway_id=gateway_id)
        for host in (gateway, gpu):
            world.provision(host)
        for host in (gateway, gpu):
            world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S)
            world.wait_until_healthy(host)
        yield Rented(world, place, gpu, family)


def test_a_lease_opens_the_gateway_and_its_end_closes_it_with_the_portal_down(rented: Rented) -> None:
    world, place, family = rented.world, rented.place, rented.family
    tenant = world.tenant("Quark Labs")
    alice = world.person("alice", tenant)
    assert [place.ask(family, port) for port in POOL] == ["silence", "silence"]

    lease = rented.allocate(tenant, lasts_s=LEASE_S)
    greeting = rented.port_of(GREETING)
    assert rented.sign_in(alice, "echo $SSH_CONNECTION").split()[0] == CUSTOMER[family]
    assert place.ask(family, greeting) == f"you are {CUSTOMER[family]}"
    assert place.ask(family, greeting, source=ANOTHER[family]) == "silence"

    # One who is in by the opening is no process of the lease: nobody ends it on the host, it has to be cut.
    with staying(place, family, greeting, seconds=600) as inside:
        world.portal.stop()
        assert inside.communicate(timeout=LEASE_S + 90)[0].strip() == "cut"
    assert [place.ask(family, port) for port in POOL] == ["silence", "silence"]
    left = place.gateway.run("nft list table inet remotegpu_gateway").stdout
    assert not [port for port in POOL if f"tcp . {port}" in left], "and at the gateway itself, not by the host alone"

    world.portal.start("web", "worker")
    until(lambda: world.lease(lease["id"])["state"] == "ended", "the portal to know", timeout_s=90)
    until(lambda: not rented.forwards(), "the ports to be given back", timeout_s=90, also=rented.forwards)


def test_the_next_lease_gets_the_ports_that_the_one_before_gave_back(rented: Rented) -> None:
    world = rented.world
    world.wait_for_state(rented.gpu, "ready", timeout_s=RECLAIM_TIMEOUT_S)
    tenant = world.tenant("Northern Lights")
    carol = world.person("carol", tenant)
    lease = rented.allocate(tenant, lasts_s=3600)
    assert sorted(each["public_port"] for each in rented.forwards()) == [*POOL]
    assert rented.sign_in(carol, "id -un") == world.lease(lease["id"])["login"]

    world.admin.post(f"admin/leases/{lease['id']}/end", reason="enough")
    world.wait_for_grant(lease["id"], "forward", "closed", timeout_s=60)
    assert [rented.place.ask(rented.family, port) for port in POOL] == ["silence", "silence"]


def test_a_gateway_is_leased_to_nobody(rented: Rented) -> None:
    gateway_id = rented.world.machines[rented.place.gateway.name]
    machine = rented.world.admin.get(f"admin/machines/{gateway_id}").body
    assert machine["is_healthy"], "though it has no GPU"
    wanted = {"tenant_id": rented.world.tenant("Nobody"), "until": "2999-01-01T00:00Z"}
    refused = rented.world.admin.ask("POST", f"admin/machines/{gateway_id}/allocate", json=wanted)
    assert refused.status == 409
    assert "is a gateway" in str(refused.body)
