"""Every port of a GPU host, asked from another machine, on IPv4 and IPv6, before and during a lease.

Exactly what the roles' variables open may answer: the two lists below. Around it listens whatever a careless person
starts: a service of the host, containers with published ports, the customer's own programs. The stranger is another
host on the same network; the control plane is this machine.

In `make test` the host has what the roles would write, from their own files; in `make test-all` playbooks/gpu_hosts.yml
makes it, with every owner of a firewall, and it is attacked in every way that we know.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, boot, gateway_address, unique
from tests.integration.agent.conftest import Lease, Site, install_agent
from tests.integration.agent.portal_double import Portal, in_seconds
from tests.support import scanning
from tests.support.rendering import evaluate, render
from tests.support.scanning import Scanner, build_listener
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[3]
TICKING = ROOT / "tests" / "support" / "ticking.py"
SET_UP_S = 300.0  # for each thing that must be there first; how long it takes is another test's affair

# What a stranger may hear: the door, the container that the site has opened to everybody, and the port that it has
# opened for a container that listens on loopback only (a refusal: it is not there for him).
FROM_ANYWHERE = {"tcp/22": "syn-ack", "udp/8092": "udp-response", "tcp/8094": "reset"}
TCP_FROM_ANYWHERE = {port: how for port, how in FROM_ANYWHERE.items() if port.startswith("tcp")}
# What the control plane may hear beside it: one exporter, the port of the other (a host without cards has none: the
# host says so, which tells that it was reached), and a container that the site has opened for it alone.
FROM_THE_CONTROL_PLANE = {**FROM_ANYWHERE, "tcp/9100": "syn-ack", "tcp/9835": "reset", "tcp/8091": "syn-ack"}
# What nobody may hear, though somebody listens there on every address: containers, a service of the host, then what
# the customer's login, task and forwarded port (which sshd keeps on loopback) add during the lease.
CLOSED = {
    "tcp/8090": "syn-ack",
    "udp/8093": "udp-response",
    "udp/68": "udp-response",
    "tcp/8095": "syn-ack",
    "tcp/8100": "syn-ack",
    "udp/8101": "udp-response",
    "tcp/8102": "syn-ack",
    "udp/8102": "udp-response",
}
CLOSED_OF_THE_LEASE = {"tcp/7000": "syn-ack", "udp/7001": "udp-response", "tcp/7002": "syn-ack", "tcp/7003": "reset"}

USUAL_UDP = f"{scanning.USUAL_UDP},7001,8092-8093,8101-8102"  # and what listens here
NOBODY = "port-unreach"
LISTENING = "1-1024,7000-7003,8090-8102,9100,9835"  # what listens here, and where one would look for more
# systemd starts Docker three times a minute and no more, unless its count begins anew.
DOCKER_AGAIN = "systemctl reset-failed docker && systemctl restart docker"
# What a lease opens of that, and how the openings are dropped that its owner's firewall has, by somebody else.
OPENED = {port: CLOSED[port] for port in ("tcp/8100", "udp/8101", "tcp/8090", "udp/8093", "tcp/8102", "udp/8102")}
DROP_OPENINGS = {
    "nftables": "nft delete table inet remotegpu",
    "iptables": f"systemctl restart nftables && {DOCKER_AGAIN}",
    "firewalld": "nft delete table inet remotegpu_openings && firewall-cmd --reload",
    "ufw": "nft delete table inet remotegpu_openings && ufw reload",
}
CONTAINERS = (
    "-p 0.0.0.0:8090:80 -p [::]:8090:80 -p 0.0.0.0:8093:81/udp -p [::]:8093:81/udp",
    "-p 0.0.0.0:8091:80 -p [::]:8091:80 -p 0.0.0.0:8092:81/udp -p [::]:8092:81/udp",
    "-p 127.0.0.1:8094:80 -p 0.0.0.0:68:81/udp -p [::]:68:81/udp",
    "-p 0.0.0.0:8095:80 -p [::]:8095:80 --network=six",
)
SIX = "docker network create --ipv6 --subnet=fd00:5151::/64 six"
# How each owner of a host's firewall is taken away, and brought back.
OFF = {
    "nftables": ("nft delete table inet remotegpu", "nft -f /etc/remotegpu/firewall.nft"),
    "iptables": ("remotegpu-firewall unload", "remotegpu-firewall load"),
    # Docker's own rules go with firewalld, and come back at its start; a reload is what puts them in the way of others.
    "firewalld": (
        f"systemctl stop firewalld && {DOCKER_AGAIN}",
        f"systemctl start firewalld && {DOCKER_AGAIN} && firewall-cmd --quiet --reload",
    ),
    "ufw": ("ufw disable && remotegpu-firewall unload", "ufw --force enable && remotegpu-firewall load"),
}


def opened(control_plane: list[str]) -> dict[str, Any]:
    """What the site has said to the roles."""
    allow = [{"port": port, "sources": control_plane, "comment": "control plane"} for port in (9100, 9835, 8091)]
    allow += [{"port": 8092, "protocol": "udp", "comment": "a container"}, {"port": 8094, "comment": "another"}]
    return {"node_exporter_listen_address": "::", "firewall_allow": allow}


@dataclass
class Attacked:
    """A GPU host with an agent, where more listens than may be heard; and the two who ask."""

    site: Site
    stranger: Host
    backend: str

    @property
    def host(self) -> Host:
        return self.site.host

    @property
    def addresses(self) -> list[str]:
        assert self.host.address_v6 is not None, "the network has no IPv6"
        return [self.host.address, self.host.address_v6]

    def heard_by_strangers(self, **how: Any) -> list[dict[str, str]]:
        """On both families."""
        return self._heard(Scanner.on(self.stranger), FROM_ANYWHERE, **how)

    def heard_by_the_control_plane(self, **how: Any) -> list[dict[str, str]]:
        return self._heard(Scanner(), FROM_THE_CONTROL_PLANE, **how)

    @property
    def stranger_as_source(self) -> list[str]:
        return [f"{self.stranger.address}/32", f"{self.stranger.address_v6}/128"]

    def longest_opening_s(self) -> int:
        """How long the one that lasts longest is still open."""
        listed = self.host.run("nft -j list ruleset").stdout
        return max((int(each) for each in re.findall(r'"expires": (\d+)', listed)), default=0)

    @contextmanager
    def followed(self, port: str) -> Iterator[subprocess.Popen[str]]:
        """The stranger's connection to a service of the host that never rests: what it says in the end is whether it
        was cut. The port is open for him by then.
        """
        protocol, _, number = port.partition("/")
        self.stranger.put("/usr/local/bin/ticking.py", TICKING.read_text())
        argv = ["docker", "exec", self.stranger.id, "python3", "/usr/local/bin/ticking.py"]
        argv += ["follow", protocol, self.host.address, number, str(10**9)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as client:
            try:
                assert client.stdout is not None
                assert client.stdout.readline() == "open\n"
                yield client
            finally:
                client.kill()

    @contextmanager
    def without_firewall(self) -> Iterator[None]:
        off, on = OFF[self.backend]
        self.host.run(off, timeout_s=SET_UP_S)
        try:
            yield
        finally:
            self.host.run(on, timeout_s=SET_UP_S)

    def _heard(self, scanner: Scanner, expected: Mapping[str, str], **how: Any) -> list[dict[str, str]]:
        asked = {"udp": USUAL_UDP, "again": expected, **how}
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda address: scanner.hear(address, **asked), self.addresses))


def test_before_and_during_a_lease_only_what_the_site_has_opened_answers(attacked: Attacked) -> None:
    only_what_is_open_answers(attacked)
    with leased(attacked.site):
        only_what_is_open_answers(attacked)
        with attacked.without_firewall():
            everything = {**FROM_THE_CONTROL_PLANE, **CLOSED, **CLOSED_OF_THE_LEASE}
            found = attacked.heard_by_strangers(tcp=of("tcp", everything), udp=of("udp", everything), again=everything)
        assert found == [everything, everything], "or the rest has proven nothing"


def only_what_is_open_answers(attacked: Attacked) -> None:
    with ThreadPoolExecutor(1) as pool:  # both ask at the same time: each waits more than it works
        strangers = pool.submit(attacked.heard_by_strangers)
        assert attacked.heard_by_the_control_plane() == [FROM_THE_CONTROL_PLANE, FROM_THE_CONTROL_PLANE]
        assert strangers.result() == [FROM_ANYWHERE, FROM_ANYWHERE]


def test_what_a_lease_opens_answers_its_source_alone_until_its_end_with_the_portal_down(attacked: Attacked) -> None:
    """A service of the host, the customer's container, over TCP and UDP, IPv4 and IPv6."""
    site, portal = attacked.site, attacked.site.portal
    opened = {**FROM_ANYWHERE, **OPENED}
    asked = {"tcp": of("tcp", opened), "udp": of("udp", opened)}

    def is_heard(expected: Mapping[str, str]) -> bool:
        return attacked.heard_by_strangers(**asked, again=expected) == [expected, expected]

    lease = site.open_lease()
    ids = site.open_ports(lease, OPENED, attacked.stranger_as_source)
    assert attacked.heard_by_strangers(**asked, again=opened) == [opened, opened]
    assert attacked.heard_by_the_control_plane(**asked) == [FROM_THE_CONTROL_PLANE, FROM_THE_CONTROL_PLANE]
    attacked.host.run(DROP_OPENINGS[attacked.backend], timeout_s=SET_UP_S)
    until(attacked.longest_opening_s, "the agent to open again what was dropped", timeout_s=60, also=site.agent_log)
    until(lambda: is_heard(opened), "all of it to be open", timeout_s=60, also=site.agent_log)
    with attacked.followed("tcp/8102") as tcp, attacked.followed("udp/8102") as udp:
        site.end_soon(lease)
        portal.stop()
        assert [each.communicate(timeout=60)[0] for each in (tcp, udp)] == ["cut\n", "cut\n"]
    assert is_heard(FROM_ANYWHERE)
    portal.start()
    site.wait_for_openings(ids, "closed")
    portal.change(openings=[])
    site.wait_for_openings(ids, None)


def test_what_is_prolonged_goes_on_and_what_is_closed_is_cut_while_the_rest_stays(attacked: Attacked) -> None:
    site, portal = attacked.site, attacked.site.portal
    lease = site.open_lease(seconds=300)
    (closed,) = site.open_ports(lease, ["tcp/8102"], attacked.stranger_as_source[:1])
    (kept,) = site.open_ports(lease, ["tcp/8090"], attacked.stranger_as_source[:1])
    with attacked.followed("tcp/8102") as client:
        site.change_lease(lease, ends_at=in_seconds(3600))
        moved = [opening | {"ends_at": lease.wanted["ends_at"]} for opening in portal.openings]
        portal.change(openings=moved)
        until(lambda: attacked.longest_opening_s() > 3000, "the ends to be moved", also=site.agent_log)
        assert client.poll() is None
        portal.change(openings=[opening for opening in portal.openings if opening["id"] == kept])
        assert client.communicate(timeout=60)[0] == "cut\n"
    site.wait_for_openings([closed], None)
    site.wait_for_openings([kept], "open")
    site.change_lease(lease, state="closed")
    site.wait_for_lease(lease, "closed")
    site.wait_for_openings([kept], "closed")
    portal.change(openings=[])


@pytest.mark.slow
@pytest.mark.parametrize("port", [20, 53, 67, 123, 500, 547])
def test_nobody_gets_further_by_the_port_that_he_comes_from(attacked: Attacked, port: int) -> None:
    """Answers to DHCP belong to no known connection: they are let in for the host, but for no container."""
    heard = attacked.heard_by_strangers(tcp=LISTENING, options=f"-g {port}")
    assert heard == [FROM_ANYWHERE, FROM_ANYWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["-sA", "-sF", "-sN", "-sX", "-sW", "-sM"])
def test_no_stray_packet_gets_further(attacked: Attacked, options: str) -> None:
    for heard in attacked.heard_by_strangers(tcp=LISTENING, udp="", again=(), options=options):
        assert set(heard) <= {"tcp/22", "tcp/8094"}


@pytest.mark.slow
def test_no_piece_of_a_packet_gets_further(attacked: Attacked) -> None:
    heard = Scanner.on(attacked.stranger).hear(
        attacked.host.address, tcp=LISTENING, again=TCP_FROM_ANYWHERE, options="-f"
    )
    assert heard == TCP_FROM_ANYWHERE


@pytest.mark.slow
def test_the_hosts_other_addresses_open_no_more(attacked: Attacked) -> None:
    """Its own on the cable, and that of Docker's bridge, for whoever has a route to it."""
    host, stranger = attacked.host, attacked.stranger
    on_the_cable = host.run("ip -6 -o addr show dev eth0 scope link").stdout.split()[3].split("/")[0]
    bridge = host.run("ip -4 -o addr show dev docker0").stdout.split()[3].split("/")[0]
    stranger.run(f"ip route replace {bridge}/32 via {host.address}")
    for address in (f"{on_the_cable}%eth0", bridge):
        heard = Scanner.on(stranger).hear(address, udp=USUAL_UDP, again=FROM_ANYWHERE)
        assert heard.pop("udp/546", NOBODY) == NOBODY, "what looks like an answer to DHCPv6, on the cable"
        # Where Docker rewrites IPv6, the kernel says that no neighbour's address leads there, before any rule is asked.
        assert heard.pop("tcp/8095", "beyond-scope") == "beyond-scope"
        assert heard == FROM_ANYWHERE, address


@pytest.mark.slow
def test_whoever_knows_a_containers_own_address_reaches_nothing(attacked: Attacked) -> None:
    each = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{end}}"
    addresses = attacked.host.run(f"docker ps -q | xargs docker inspect -f '{each}'").stdout.split()
    assert len(addresses) == len(CONTAINERS) + 1, "and one of IPv6"
    scanner = Scanner.on(attacked.stranger)
    for address in addresses:
        attacked.stranger.run(f"ip route replace {address} via {attacked.addresses[':' in address]}")
        assert scanner.hear(address, tcp=LISTENING, udp="53,67-68,80-82,123") == {}
    with attacked.without_firewall():
        for address in addresses:
            assert scanner.hear(address, tcp="80", again=["tcp/80"]) == {"tcp/80": "syn-ack"}


@pytest.mark.slow
def test_what_is_published_on_loopback_is_for_the_host_alone(attacked: Attacked) -> None:
    """A neighbour may send to 127.0.0.1 by the host's card, and Docker takes it for its own."""
    ports = [22, 8090, 8091, 8094]
    knock = Scanner.on(attacked.stranger).hear_as_loopback
    card = attacked.host.read("/sys/class/net/eth0/address").strip()
    assert knock(card, ports, source=attacked.stranger.address) == []
    with attacked.without_firewall():
        assert 8094 in knock(card, ports, source=attacked.stranger.address)


def of(protocol: str, ports: Mapping[str, str]) -> str:
    """The numbers, as nmap takes them."""
    return ",".join(port.split("/")[1] for port in ports if port.startswith(protocol))


# --- the host and what listens on it


MADE = [
    pytest.param(("trixie", None), id="trixie-by-files"),
    pytest.param(("bookworm", "nftables"), id="bookworm", marks=pytest.mark.slow),
    *(pytest.param(("trixie", name), id=f"trixie-{name}", marks=pytest.mark.slow) for name in OFF),
]


@pytest.fixture(scope="module", params=MADE)
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """It stays as it is through all the tests here."""
    suite, backend = request.param
    with a_host(suite, tmp_path_factory.mktemp("attack"), backend) as made:
        yield made


@contextmanager
def a_host(suite: str, folder: Path, backend: str | None) -> Iterator[Attacked]:
    with ExitStack() as stack:
        portal = Portal(gateway_address(), folder).start()
        stack.callback(portal.stop)
        host = boot(unique(f"attacked-{suite}"), suite, prepared=True)
        stack.callback(host.destroy)
        stranger = boot(unique("stranger"), "trixie", gpus=0)
        stack.callback(stranger.destroy)
        site = Site(host, portal, folder)
        if backend:
            by_the_playbook(site, {"firewall_backend": backend, **opened(control_plane(host))})
        else:
            by_roles_files(site, opened(control_plane(host)))
        until(lambda: portal.reports, "the first report", timeout_s=SET_UP_S, also=site.agent_log)
        listen_carelessly(host, build_listener(folder))
        yield Attacked(site, stranger, backend or "nftables")
        assert portal.complaints == []


def control_plane(host: Host) -> list[str]:
    """This machine, as the host sees it."""
    routes = host.run("ip route show default; ip -6 route show default").stdout.splitlines()
    return [route.split()[2] for route in routes]


def by_roles_files(site: Site, said: dict[str, Any]) -> None:
    """What the roles would leave, in seconds."""
    host = site.host
    install_agent(host, site.portal)
    said = {"ansible_managed": "managed", "__firewall_ssh": [22], **said}
    for file in ("firewall.nft", "firewall.json"):
        host.put(f"/etc/remotegpu/{file}", render("firewall", f"{file}.j2", host.suite, **said))
    daemon = evaluate("{{ docker_daemon_config | combine(docker_daemon_config_extra) }}", "docker", host.suite)
    host.put("/etc/docker/daemon.json", json.dumps(daemon))
    arguments = render("node_exporter", "default.j2", host.suite, **said)
    host.put("/etc/default/prometheus-node-exporter", arguments)
    start = "nft -f /etc/remotegpu/firewall.nft && systemctl start docker prometheus-node-exporter"
    host.run(start, timeout_s=SET_UP_S)


def by_the_playbook(site: Site, said: dict[str, Any]) -> None:
    """As a site does it, but for the portal, which is the tests'."""
    host, portal = site.host, site.portal
    key, public = site.new_key()
    host.authorize("ops", public["line"])
    known_hosts = site.directory / "known_hosts"
    known_hosts.write_text(host.known_hosts)
    told = {
        "ansible_host": host.address,
        "ansible_user": "ops",
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_common_args": f"-oUserKnownHostsFile={known_hosts} -oGlobalKnownHostsFile=/dev/null",
        "base_time_sync_started": False,  # molecule/image/README.md
        # Docker rewrites IPv6 as well, as it does by itself from release 27 on; else its proxy listens there.
        "docker_daemon_config_extra": {"experimental": True, "ip6tables": True},
        "gpu_agent_portal_url": portal.url,
        "gpu_agent_ca_pem": portal.ca_pem,
        "gpu_agent_enroll_token": portal.token,
    }
    inventory = site.directory / "hosts.yml"
    inventory.write_text(json.dumps({"gpu_hosts": {"hosts": {host.name: told | said}}}))
    program = Path(sys.executable).parent / "ansible-playbook"
    argv = [str(program), "-i", str(inventory), "playbooks/gpu_hosts.yml"]
    environ = {**os.environ, "ANSIBLE_HOME": str(ROOT / ".ansible"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]


def listen_carelessly(host: Host, listener: Path) -> None:
    host.put("/usr/local/bin/listener", listener.read_bytes(), mode="0755")
    host.run("tar -C /usr/local/bin -c listener | docker import - listener", timeout_s=SET_UP_S)
    host.run(SIX, timeout_s=SET_UP_S)
    logs = ["journalctl -u careless -o cat"]
    for published in CONTAINERS:
        made = host.run(f"docker run -d {published} listener /listener tcp/80 udp/81", timeout_s=SET_UP_S)
        logs.append(f"docker logs {made.stdout}")
    host.run("systemd-run --unit=careless /usr/local/bin/listener tcp/8100 udp/8101")
    host.put("/usr/local/bin/ticking.py", TICKING.read_text())
    host.run("systemd-run --unit=ticking python3 /usr/local/bin/ticking.py serve 8102")
    logs.append("journalctl -u ticking -o cat")
    until(lambda: all("listening" in host.run(log).stdout for log in logs), "all of them to listen", timeout_s=SET_UP_S)


@contextmanager
def leased(site: Site) -> Iterator[Lease]:
    """A lease whose customer opens whatever he can."""
    lease = site.open_lease()
    task = site.run_task(lease, "exec /usr/local/bin/listener tcp/7002")
    site.wait_for_task(task, "running")
    argv = site.host.ssh_argv(
        lease.login,
        lease.key,
        "exec /usr/local/bin/listener tcp/7000 udp/7001",
        options=["-R", "*:7003:127.0.0.1:22", "-oExitOnForwardFailure=yes"],
    )
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as session:
        try:
            assert session.stdout is not None
            assert session.stdout.readline() == "listening\n", "the customer's program did not start"
            yield lease
        finally:
            session.kill()
