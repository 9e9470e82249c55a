"""From nothing to a watched site by one playbook; each fault is told, shown and, once mended, forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.world import RECLAIM_TIMEOUT_S
from tests.hosts import Host
from tests.site.conftest import Rounds
from tests.site.faults import FAULTS, FREE, Fault
from tests.site.site import LEASED, Site
from tests.support.scanning import EVERY_PORT, USUAL_UDP, Scanner, build_listener
from tests.support.waiting import until

DOORS = {"tcp/22": "syn-ack", "tcp/80": "syn-ack", "tcp/443": "syn-ack"}

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(2400)]


def test_one_run_makes_a_control_plane_and_gpu_hosts(site: Site) -> None:
    """From nothing, and without a failure; Prometheus then sees every part of the site, and no part that is down."""
    names = {site.control.name, *(host.name for host in site.hosts.values())}
    assert set(site.recap) == names
    for name, counts in site.recap.items():
        assert (counts["failed"], counts["unreachable"]) == (0, 0), name
        assert counts["changed"] > 20, name
    jobs = {each["metric"]["job"] for each in site.prometheus("up == 1")}
    assert jobs == {"alertmanager", "control_plane", "node", "nvidia_gpu", "portal", "prometheus"}
    assert site.prometheus("up == 0") == []


def test_the_portals_own_run_finds_the_hosts_as_the_operator_left_them(site: Site) -> None:
    """A second run, from the control plane: a key and the agent's settings come, nothing else moves."""
    for host in site.hosts.values():
        (run,) = site.world.admin.get("admin/runs", machine_id=site.world.machines[host.name])["items"]
        counts = run["stats"][host.name]
        assert (run["state"], counts["failed"]) == ("succeeded", 0)
        assert counts["ok"] > 100
        assert counts["changed"] <= 8, "two for the portal's key, five for the agent; a site's own words were lost"


def test_nothing_of_the_control_plane_has_failed(site: Site) -> None:
    """No unit, and no error in the journal of any part since the machine was bare."""
    assert site.control.run(["systemctl", "--failed", "--plain", "--no-legend"]).stdout == ""
    units = "--unit=remotegpu-* --unit=nginx --unit=prometheus* --unit=postgresql*"
    errors = site.control.run(f"journalctl --quiet --boot --priority=err --no-pager --output=short {units}")
    assert errors.stdout == ""


def test_a_neighbour_finds_three_doors_of_the_control_plane_and_no_other(site: Site) -> None:
    """Every port of TCP, and UDP's usual ones, over IPv4 and IPv6: a refusal would be an answer, too."""
    neighbour, control = Scanner.on(site.hosts[LEASED]), site.control
    addresses = [control.address, control.address_v6]
    with ThreadPoolExecutor(len(addresses)) as pool:
        heard = pool.map(lambda each: neighbour.hear(str(each), tcp=EVERY_PORT, udp=USUAL_UDP, again=DOORS), addresses)
        assert list(heard) == [DOORS, DOORS]


@pytest.fixture
def published(site: Site, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host with a container's port, published on every address of both families; the host itself is greeted there."""
    host, port = site.hosts[request.param], 8090
    host.put("/root/listener/listener", build_listener(tmp_path).read_bytes(), mode="0755")
    try:
        host.run("tar -C /root/listener -c listener | docker import - listener", timeout_s=120)
        doors = f"-p 0.0.0.0:{port}:80 -p [::]:{port}:80"
        host.run(f"docker run --detach --name published {doors} listener /listener tcp/80", timeout_s=120)
        for address in (host.address, host.address_v6):
            greeted = f"timeout 5 bash -c 'cat </dev/tcp/{address}/{port}'"
            until(lambda greeted=greeted: host.run(greeted, check=False).stdout == "here\n", f"{address} to greet")  # type: ignore[misc]
        yield host
    finally:
        host.run("docker rm --force published; docker rmi listener; rm -r /root/listener", check=False, timeout_s=120)


@pytest.mark.parametrize(("published", "lease"), [(LEASED, "active"), (FREE, None)], indirect=["published"])
def test_a_neighbour_finds_the_door_of_a_host_and_nothing_else(site: Site, published: Host, lease: str | None) -> None:
    """Every port, over IPv4 and IPv6, while a customer works there and while nobody does."""
    (neighbour,) = (host for host in site.hosts.values() if host is not published)
    leased = site.world.machine(published)["lease"]
    assert (leased and leased["state"]) == lease
    addresses, door = [published.address, published.address_v6], {"tcp/22": "syn-ack"}
    # From a port that is open itself: who was asked just now waits for an answer at the port that asked.
    asked = partial(Scanner.on(neighbour).hear, tcp=EVERY_PORT, udp=USUAL_UDP, again=door, options="--source-port=22")
    with ThreadPoolExecutor(len(addresses)) as pool:
        heard = pool.map(asked, map(str, addresses))
        assert list(heard) == [door, door]


def test_a_watched_machine_is_rented_and_proven_clean_again(site: Site) -> None:
    """Who scans it is the control plane, to which its exporters are open: at both of its addresses."""
    host, world = site.hosts[FREE], site.world
    world.allocate(host, world.tenant("Initech"), lasts_s=3600)
    world.admin.post(f"admin/machines/{world.machines[host.name]}/reclaim", reason="end", force=True, confirm=host.name)
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)
    (scanned,) = [check for check in site.verdict(host)["checks"] if check["id"] == "ports_from_outside"]
    found = {scan["address"]: scan["open"] for scan in scanned["evidence"]["scans"]}
    assert found == {host.address: [22, 9100, 9835], host.address_v6: [22]}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_is_told_shown_and_over_once_it_is_mended(rounds: Rounds, fault: Fault) -> None:
    rounds.outcome(fault)
