"""The firewall's rules in a real kernel: what somebody outside gets through, on IPv4 and IPv6, beside Docker's own."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.network import CONTAINER, HOST, OUTSIDE, Net, network
from tests.roles.rendering import Role, load_module
from tests.support.rendering import ROLES

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not all(map(shutil.which, ("nft", "iptables", "ip"))), reason="needs nft and iptables"),
]

firewalld_direct = load_module("firewall", "firewalld_direct")
ALLOW = [
    {"port": 8100, "sources": [OUTSIDE[4], OUTSIDE[6]], "comment": "for us"},
    {"port": 8101, "sources": ["192.0.2.1", "2001:db8:9::/64"], "comment": "for somebody else"},
    {"port": 8091, "sources": [OUTSIDE[4], OUTSIDE[6]]},
    {"port": 8200},
]
SSH, FOR_US, FOR_OTHERS, CLOSED, PUBLISHED, PUBLISHED_FOR_US = 22, 8100, 8101, 8102, 8090, 8091
ECHO = 8200  # answers what it is told
EVERY = (SSH, FOR_US, FOR_OTHERS, CLOSED, PUBLISHED, PUBLISHED_FOR_US)
owns_everything = pytest.mark.parametrize("backend", ["nftables", "iptables"])
every_writer = pytest.mark.parametrize("backend", ["nftables", "iptables", "ufw", "firewalld"])


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with network([SSH, FOR_US, FOR_OTHERS, CLOSED, ECHO]) as made:
        yield made


@pytest.fixture
def load(net: Net, tmp_path: Path) -> Iterator[Callable[..., Callable[[], str]]]:
    """Load a backend's rules as its unit does; what comes back loads them once more."""

    def loaded(backend: str, **said: Any) -> Callable[[], str]:
        role = Role("firewall", firewall_backend=backend, **{"firewall_allow": ALLOW, "__firewall_ssh": [22], **said})
        if backend == "nftables":
            (tmp_path / "firewall.nft").write_text(role.template("firewall.nft.j2"))
            return lambda: net.on(net.host, "nft", "-f", str(tmp_path / "firewall.nft"))
        if backend == "firewalld":
            (tmp_path / "openings.nft").write_text(role.template("openings.nft.j2"))
            return lambda: (net.on(net.host, "nft", "-f", str(tmp_path / "openings.nft")), load_direct(net, role))
        for family in (4, 6):
            (tmp_path / f"firewall.v{family}").write_text(role.template("chains.j2", item={"family": family}))
        program = role.template("remotegpu-firewall.sh.j2").replace("/etc/remotegpu", str(tmp_path))
        program = program.replace("ufw_is_there ||", "true ||").replace("/run/", f"{tmp_path}/")
        (tmp_path / "program").write_text(program)
        (tmp_path / "program").chmod(0o755)
        (tmp_path / "openings.nft").write_text(role.template("openings.nft.j2"))
        return lambda: net.on(net.host, "sh", str(tmp_path / "program"), "load")

    yield loaded
    net.on(net.host, "nft", "flush", "ruleset")


def load_direct(net: Net, role: Role) -> None:
    """What firewalld does with its direct.xml, and then Docker, which hears of it: accepts first, DOCKER-USER last."""
    for family, program in ((4, "iptables"), (6, "ip6tables")):
        text = role.template("chains.j2", item={"family": family})
        for table in ("filter", "mangle"):
            for chain in re.findall("^-N (REMOTEGPU-.*)", net.on(net.host, program, "-t", table, "-S"), re.M):
                net.on(net.host, program, "-t", table, "-F", chain)
            net.on(net.host, program, "-t", table, "-D", "FORWARD", "-j", "REMOTEGPU-FORWARD", check=False)
        for each in firewalld_direct.our_elements(f"ipv{family}", text):
            table, chain = each.attrib["table"], each.attrib["chain"]
            if each.tag == "chain":
                net.on(net.host, program, "-t", table, "-N", chain, check=False)
            else:
                net.on(net.host, program, "-t", table, "-A", chain, *shlex.split(each.text or ""))
        if net.on(net.host, program, "-D", "FORWARD", "-j", "DOCKER-USER", check=False) == "":
            net.on(net.host, program, "-N", "DOCKER-USER", check=False)
            net.on(net.host, program, "-A", "FORWARD", "-j", "DOCKER-USER")


def test_without_rules_everything_answers_or_the_rest_proves_nothing(net: Net) -> None:
    net.play_docker([PUBLISHED, PUBLISHED_FOR_US])
    assert net.answering(EVERY) == list(EVERY)
    assert net.answering([80], at=CONTAINER) == [80]
    assert net.answering(EVERY, protocol="udp") == list(EVERY)
    net.on(net.host, "nft", "flush", "ruleset")


@owns_everything
def test_who_is_allowed_gets_in_and_nobody_else(backend: str, net: Net, load: Any) -> None:
    load(backend)()
    assert net.answering(EVERY) == [SSH, FOR_US]
    assert net.pings(4)
    assert net.pings(6)


@every_writer
def test_what_docker_publishes_is_closed_unless_it_is_open(backend: str, net: Net, load: Any) -> None:
    load(backend)()
    net.play_docker([PUBLISHED, PUBLISHED_FOR_US])
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US]) == [PUBLISHED_FOR_US], "rules first, Docker later"
    load(backend)()
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US]) == [PUBLISHED_FOR_US], "and loaded again"


BY_UDP = [{**each, "protocol": "udp"} for each in ALLOW if each["port"] != ECHO]


@owns_everything
def test_udp_is_closed_but_for_whom_it_is_allowed_and_opens_nothing_else(backend: str, net: Net, load: Any) -> None:
    """How ufw and firewalld close the host itself is for their scenarios to say."""
    load(backend)()
    assert net.answering([FOR_US, FOR_OTHERS, CLOSED], protocol="udp") == [], "what is allowed is TCP"
    load(backend, firewall_allow=BY_UDP)()
    assert net.answering([FOR_US, FOR_OTHERS, CLOSED], protocol="udp") == [FOR_US]
    assert net.answering([FOR_US, FOR_OTHERS, CLOSED]) == []


@every_writer
def test_what_docker_publishes_by_udp_is_closed_unless_it_is_open(backend: str, net: Net, load: Any) -> None:
    load(backend)()
    net.play_docker([PUBLISHED, PUBLISHED_FOR_US])
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US], protocol="udp") == [], "what is allowed is TCP"
    load(backend, firewall_allow=BY_UDP)()
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US], protocol="udp") == [PUBLISHED_FOR_US]
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US]) == []
    open_for(net, backend, PUBLISHED, OUTSIDE, protocol="udp")
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US], protocol="udp") == [PUBLISHED, PUBLISHED_FOR_US]


@every_writer
def test_what_docker_publishes_is_closed_where_docker_never_asks_the_chain_for_others(
    backend: str, net: Net, load: Any
) -> None:
    load(backend)()
    net.play_docker([PUBLISHED, PUBLISHED_FOR_US], asks_user=False)
    load(backend)()
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US]) == [PUBLISHED_FOR_US]


@every_writer
def test_what_docker_has_published_before_is_closed_too(backend: str, net: Net, load: Any) -> None:
    net.play_docker([PUBLISHED, PUBLISHED_FOR_US])
    assert net.answering([PUBLISHED]) == [PUBLISHED]
    load(backend)()
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US]) == [PUBLISHED_FOR_US]


@every_writer
def test_who_knows_a_containers_own_address_gets_no_further(backend: str, net: Net, load: Any) -> None:
    net.play_docker([])
    for program in ("iptables", "ip6tables"):
        net.on(net.host, program, "-P", "FORWARD", "ACCEPT")
    assert net.answering([80], at=CONTAINER) == [80]
    load(backend)()
    assert net.answering([80], at=CONTAINER) == []


@every_writer
def test_what_docker_publishes_on_loopback_is_not_for_neighbours(backend: str, net: Net, load: Any) -> None:
    """Not even by a port that is open: whoever publishes it there has said who may come."""
    net.play_docker([PUBLISHED, PUBLISHED_FOR_US])
    assert net.answering_as_loopback([PUBLISHED, PUBLISHED_FOR_US]) == [PUBLISHED, PUBLISHED_FOR_US]
    load(backend)()
    assert net.answering([PUBLISHED_FOR_US]) == [PUBLISHED_FOR_US]
    assert net.answering_as_loopback([SSH, PUBLISHED, PUBLISHED_FOR_US]) == []


ANSWERS_DHCP = """
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("::", 81))
print("listening", flush=True)
while True:
    word, who = server.recvfrom(100)
    server.sendto(word, who)
"""


@every_writer
def test_what_looks_like_an_answer_to_dhcp_reaches_no_container(backend: str, net: Net, load: Any) -> None:
    """It belongs to no connection that the host knows of, so it is let in by the port that it comes from."""
    net.play_docker([])
    for family, program in ((4, "iptables"), (6, "ip6tables")):
        to = {4: f"{CONTAINER[4]}:81", 6: f"[{CONTAINER[6]}]:81"}[family]
        net.on(
            net.host, program, "-t", "nat", "-A", "DOCKER", *f"-p udp --dport 68 -j DNAT --to-destination {to}".split()
        )
        net.on(net.host, program, "-A", "DOCKER", *f"-p udp -d {CONTAINER[family]} --dport 81 -j ACCEPT".split())
    with subprocess.Popen(
        ["ip", "netns", "exec", net.container, "python3", "-c", ANSWERS_DHCP], stdout=subprocess.PIPE, text=True
    ) as container:
        try:
            assert container.stdout
            assert container.stdout.readline() == "listening\n"
            # Each time from another address, or it would be the connection of before.
            assert heard_from_port_67(net, "198.51.100.3", "2001:db8:1::3") == [4, 6]
            load(backend)()
            assert heard_from_port_67(net, OUTSIDE[4], OUTSIDE[6]) == []
        finally:
            container.kill()


def heard_from_port_67(net: Net, *sources: str) -> list[int]:
    """The families on which port 68 of the host answers."""
    heard = []
    for family, source in zip((4, 6), sources, strict=True):
        if source != OUTSIDE[family]:
            length = {4: "24", 6: "64 nodad"}[family].split()
            net.on(net.outside, "ip", "addr", "replace", f"{source}/{length[0]}", "dev", "eth0", *length[1:])
        script = (
            "import socket; asking = socket.socket(socket.AF_INET{}, socket.SOCK_DGRAM); asking.settimeout(1.2); "
            "asking.bind(({!r}, 67)); asking.sendto(b'answer', ({!r}, 68)); print(asking.recv(100).decode())"
        ).format("6" if family == 6 else "", source, HOST[family])
        if net.on(net.outside, "python3", "-c", script, check=False) == "answer\n":
            heard.append(family)
        if source != OUTSIDE[family]:  # or the next test would come from there
            net.on(net.outside, "ip", "addr", "del", f"{source}/{length[0]}", "dev", "eth0")
    return heard


@every_writer
def test_containers_go_out(backend: str, net: Net, load: Any) -> None:
    load(backend)()
    net.play_docker([])
    for family in (4, 6):
        script = f"import socket; socket.create_connection(({OUTSIDE[family]!r}, 80), timeout=2)"
        net.on(net.container, "python3", "-c", script)


@owns_everything
def test_an_established_connection_survives_rules_that_would_refuse_it(backend: str, net: Net, load: Any) -> None:
    load(backend)()
    talk = f"""
import socket
connection = socket.create_connection(({HOST[4]!r}, {ECHO}), timeout=5)
print("open", flush=True)
input()
connection.sendall(b"still there?")
print(connection.recv(100).decode())
"""
    argv = ["ip", "netns", "exec", net.outside, "python3", "-c", talk]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as talking:
        assert talking.stdin
        assert talking.stdout
        assert talking.stdout.readline() == "open\n"
        load(backend, firewall_allow=[])()
        assert net.answering([ECHO, SSH]) == [SSH]
        answer, _ = talking.communicate("now\n", timeout=10)
    assert answer == "still there?\n"


# --- openings of leases


TABLES = {"nftables": "remotegpu"}  # the others: remotegpu_openings


def open_for(
    net: Net,
    backend: str,
    port: int | str,
    sources: Mapping[int, str],
    *,
    protocol: str = "tcp",
    timeout: str = "1h",
) -> None:
    """As the agent does it, for IPv4 and IPv6; what was open there before is replaced, at no time closed."""
    table = TABLES.get(backend, "remotegpu_openings")
    for family, name in ((4, "openings"), (6, "openings6")):
        element = f"{protocol} . {port} . {sources[family]}"
        known = net.on(net.host, "nft", "get", "element", "inet", table, name, f"{{ {element} }}", check=False)
        deleting = f"delete element inet {table} {name} {{ {element} }};" if known else ""
        net.on(net.host, "nft", f"{deleting} add element inet {table} {name} {{ {element} timeout {timeout} }}")


@owns_everything
def test_an_opening_lets_in_its_source_by_its_ports_and_nobody_else(backend: str, net: Net, load: Any) -> None:
    load(backend)()
    open_for(net, backend, CLOSED, {4: f"{OUTSIDE[4]}/31", 6: f"{OUTSIDE[6]}/127"})
    assert net.answering([FOR_OTHERS, CLOSED]) == [CLOSED]
    load(backend)()
    assert net.answering([FOR_OTHERS, CLOSED]) == [CLOSED], "and loading the rules again leaves it open"
    open_for(net, backend, f"{FOR_OTHERS}-{CLOSED}", {4: "203.0.113.0/24", 6: "2001:db8:9::/64"})
    assert net.answering([FOR_OTHERS]) == []


@every_writer
def test_an_opening_lets_in_by_the_port_that_docker_publishes(backend: str, net: Net, load: Any) -> None:
    load(backend)()
    net.play_docker([PUBLISHED, PUBLISHED_FOR_US])
    open_for(net, backend, 80, OUTSIDE)  # the container's own port is nobody's business
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US]) == [PUBLISHED_FOR_US]
    assert net.answering([80], at=CONTAINER) == []
    open_for(net, backend, PUBLISHED, OUTSIDE)
    assert net.answering([PUBLISHED, PUBLISHED_FOR_US]) == [PUBLISHED, PUBLISHED_FOR_US]
    assert net.answering([80], at=CONTAINER) == []


PROGRAM = Path(__file__).parents[1] / "support" / "ticking.py"
TICKING = 8300  # of the host and of the container, which publishes it by the same number


@contextmanager
def ticking(net: Net, where: str) -> Iterator[subprocess.Popen[str]]:
    """Somebody who sends without pause to whoever has connected, and says what he hears."""
    argv = ["ip", "netns", "exec", where, "python3", str(PROGRAM), "serve", str(TICKING)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            assert server.stdout.readline() == "listening\n"
            if where == net.container:
                net.play_docker([])
                for family, program in ((4, "iptables"), (6, "ip6tables")):
                    to = {4: f"{CONTAINER[4]}:{TICKING}", 6: f"[{CONTAINER[6]}]:{TICKING}"}[family]
                    for rule in (f"-p {protocol} --dport {TICKING}" for protocol in ("tcp", "udp")):
                        net.on(net.host, program, *f"-t nat -A DOCKER {rule} -j DNAT --to-destination {to}".split())
                        net.on(net.host, program, *f"-A DOCKER {rule} -j ACCEPT".split())
            yield server
        finally:
            server.kill()


@contextmanager
def following(net: Net, protocol: str, family: int, *, most: int) -> Iterator[subprocess.Popen[str]]:
    told = ["follow", protocol, HOST[family], str(TICKING), str(most)]
    argv = ["ip", "netns", "exec", net.outside, "python3", str(PROGRAM), *told]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout
            assert client.stdout.readline() == "open\n"
            yield client
        finally:
            client.kill()


HELD_BY = [
    ("nftables", "host"),
    ("iptables", "host"),
    ("ufw", "container"),
    ("firewalld", "container"),
    *(pytest.param(backend, "container", marks=pytest.mark.slow) for backend in ("nftables", "iptables")),
]


@pytest.mark.parametrize(("backend", "where"), HELD_BY)
def test_the_end_of_an_opening_cuts_what_is_connected_both_ways(backend: str, where: str, net: Net, load: Any) -> None:
    """With nobody there who sees to it: the kernel's own time is up, while the other side sends without pause."""
    load(backend)()
    with ticking(net, net.container if where == "container" else net.host) as server, ExitStack() as stack:
        clients = []
        for protocol, family in itertools.product(("tcp", "udp"), (4, 6)):
            open_for(net, backend, TICKING, OUTSIDE, protocol=protocol, timeout="3s")
            clients.append(stack.enter_context(following(net, protocol, family, most=10**9)))
        assert [client.communicate(timeout=30)[0] for client in clients] == ["cut\n"] * 4
        assert net.answering([TICKING]) == []
        server.kill()
        assert server.stdout
        assert server.stdout.read() == "heard hello\n" * 4


HELD_HERE = pytest.mark.parametrize(("backend", "where"), [("nftables", "host"), ("firewalld", "container")])


@HELD_HERE
def test_an_opening_that_is_prolonged_cuts_nobody(backend: str, where: str, net: Net, load: Any) -> None:
    load(backend)()
    with ticking(net, net.container if where == "container" else net.host):
        open_for(net, backend, TICKING, OUTSIDE, timeout="2s")
        with following(net, "tcp", 4, most=60) as client:
            open_for(net, backend, TICKING, OUTSIDE)
            load(backend)()
            heard, _ = client.communicate(timeout=20)
        assert heard == "lasting\n"


@HELD_HERE
def test_what_is_open_for_good_does_not_end_with_an_opening(backend: str, where: str, net: Net, load: Any) -> None:
    load(backend, firewall_allow=[{"port": TICKING}])()
    with ticking(net, net.container if where == "container" else net.host):
        open_for(net, backend, TICKING, OUTSIDE, timeout="500ms")
        with following(net, "tcp", 4, most=40) as client:
            heard, _ = client.communicate(timeout=20)
        assert heard == "lasting\n"


def test_loading_twice_changes_nothing_and_ours_is_asked_first(net: Net, load: Any) -> None:
    again = load("iptables")
    again()
    first = net.on(net.host, "iptables", "-S"), net.on(net.host, "ip6tables", "-S")
    again()
    assert (net.on(net.host, "iptables", "-S"), net.on(net.host, "ip6tables", "-S")) == first
    net.on(net.host, "iptables", "-I", "INPUT", "1", "-j", "ACCEPT")
    again()
    rules = net.on(net.host, "iptables", "-S", "INPUT").splitlines()
    assert rules == ["-P INPUT ACCEPT", "-A INPUT -j REMOTEGPU-INPUT", "-A INPUT -j ACCEPT"]


def test_the_whole_ruleset_of_iptables_is_ours_and_what_was_there(net: Net, load: Any) -> None:
    net.on(net.host, "iptables", "-A", "INPUT", "-s", "203.0.113.9/32", "-j", "DROP")
    load("iptables", firewall_allow=[{"port": 9100, "sources": ["192.0.2.10"], "comment": "Prometheus"}])()
    assert net.on(net.host, "iptables", "-S").splitlines() == [
        "-P INPUT ACCEPT",
        "-P FORWARD ACCEPT",
        "-P OUTPUT ACCEPT",
        "-N DOCKER-USER",
        "-N REMOTEGPU-ALLOWED",
        "-N REMOTEGPU-FORWARD",
        "-N REMOTEGPU-INPUT",
        "-N REMOTEGPU-PUBLISHED",
        "-N REMOTEGPU-REFUSED",
        "-A INPUT -j REMOTEGPU-INPUT",
        "-A INPUT -s 203.0.113.9/32 -j DROP",
        "-A FORWARD -j REMOTEGPU-FORWARD",
        "-A DOCKER-USER -j REMOTEGPU-FORWARD",
        "-A REMOTEGPU-ALLOWED -p tcp -m conntrack --ctorigdstport 22 -m comment --comment SSH -j RETURN",
        "-A REMOTEGPU-ALLOWED -s 192.0.2.10/32 -p tcp -m conntrack --ctorigdstport 9100 -m comment --comment Prometheus"
        " -j RETURN",
        "-A REMOTEGPU-ALLOWED -m mark --mark 0x10000000/0x10000000 -j RETURN",
        "-A REMOTEGPU-ALLOWED -g REMOTEGPU-REFUSED",
        "-A REMOTEGPU-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN",
        "-A REMOTEGPU-FORWARD -m conntrack --ctorigdst 127.0.0.0/8 -g REMOTEGPU-REFUSED",
        "-A REMOTEGPU-FORWARD -i docker0 -j RETURN",
        "-A REMOTEGPU-FORWARD -i br-+ -j RETURN",
        "-A REMOTEGPU-FORWARD -g REMOTEGPU-PUBLISHED",
        "-A REMOTEGPU-INPUT -i lo -j RETURN",
        "-A REMOTEGPU-INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN",
        "-A REMOTEGPU-INPUT -p icmp -m icmp --icmp-type 3 -j RETURN",
        "-A REMOTEGPU-INPUT -p icmp -m icmp --icmp-type 8 -j RETURN",
        "-A REMOTEGPU-INPUT -p icmp -m icmp --icmp-type 11 -j RETURN",
        "-A REMOTEGPU-INPUT -p icmp -m icmp --icmp-type 12 -j RETURN",
        "-A REMOTEGPU-INPUT -m conntrack --ctstate INVALID -j DROP",
        "-A REMOTEGPU-INPUT -p udp -m udp --sport 67 --dport 68 -j RETURN",
        "-A REMOTEGPU-INPUT -p tcp -m tcp --dport 22 -m comment --comment SSH -j RETURN",
        "-A REMOTEGPU-INPUT -g REMOTEGPU-ALLOWED",
        "-A REMOTEGPU-PUBLISHED -m conntrack --ctstate INVALID -j DROP",
        "-A REMOTEGPU-PUBLISHED -m conntrack ! --ctstate DNAT -g REMOTEGPU-REFUSED",
        "-A REMOTEGPU-PUBLISHED -g REMOTEGPU-ALLOWED",
        "-A REMOTEGPU-REFUSED -j DROP",
    ]


def test_a_rule_of_somebody_else_still_narrows_what_we_allow(net: Net, load: Any) -> None:
    for program in ("iptables", "ip6tables"):
        net.on(net.host, program, "-A", "INPUT", "-p", "tcp", "--dport", str(FOR_US), "-j", "DROP")
    load("iptables")()
    assert net.answering(EVERY) == [SSH]


def test_what_is_taken_out_leaves_everything_else(net: Net, load: Any, tmp_path: Path) -> None:
    """Docker's place for rules of others as well, where Docker has it; on IPv6 it was ours alone, and goes."""

    def filtered() -> list[str]:
        saved = "".join(net.on(net.host, f"{each}-save", "-t", "filter") for each in ("iptables", "ip6tables"))
        return [re.sub(r" \[\d+:\d+\]", "", line) for line in saved.splitlines() if not line.startswith("#")]

    net.on(net.host, "iptables", "-A", "INPUT", "-s", "203.0.113.9/32", "-j", "DROP")
    net.on(net.host, "iptables", "-N", "DOCKER-USER")
    net.on(net.host, "iptables", "-A", "FORWARD", "-j", "DOCKER-USER")
    net.on(net.host, "ip6tables", "-P", "INPUT", "ACCEPT")  # so that its frame is there before
    before = filtered()
    load("iptables")()
    assert filtered() != before
    net.on(net.host, "sh", str(tmp_path / "program"), "unload")
    assert filtered() == before


def is_loaded(net: Net, tmp_path: Path) -> bool:
    """What the host's program says when asked to `check`; whether ufw itself is at work is another question."""
    program = (tmp_path / "program").read_text()
    (tmp_path / "asked").write_text(re.sub("^ +ufw .*return 1$|^ +ufw_lets.*return 1$", "", program, flags=re.M))
    said = net.on(net.host, "sh", "-c", f"sh {tmp_path}/asked check && echo yes || echo no")
    return said.strip() == "yes"


def test_check_sees_a_rule_that_somebody_has_taken_out_of_ours(net: Net, load: Any, tmp_path: Path) -> None:
    load("iptables")()
    assert is_loaded(net, tmp_path)
    net.on(net.host, "ip6tables", "-D", "REMOTEGPU-REFUSED", "-j", "DROP")
    assert not is_loaded(net, tmp_path)
    load("iptables")()
    assert is_loaded(net, tmp_path)
    net.on(net.host, "iptables", "-D", "DOCKER-USER", "-j", "REMOTEGPU-FORWARD")
    assert not is_loaded(net, tmp_path)


@pytest.mark.parametrize("backend", ["iptables", "ufw"])
def test_check_sees_that_docker_is_before_ours(backend: str, net: Net, load: Any, tmp_path: Path) -> None:
    """One that asks DOCKER-USER first asks ours first."""
    load(backend)()
    for program in ("iptables", "ip6tables"):
        net.play_docker([PUBLISHED])
        assert is_loaded(net, tmp_path)
        assert net.answering([PUBLISHED]) == []
        net.on(net.host, program, "-D", "FORWARD", "-j", "DOCKER-USER")
        assert not is_loaded(net, tmp_path)
        load(backend)()
        assert is_loaded(net, tmp_path)
    net.on(net.host, "ip6tables", "-D", "FORWARD", "-j", "REMOTEGPU-FORWARD")
    assert not is_loaded(net, tmp_path)


def tasks_of_role(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((ROLES / "firewall" / "tasks" / file).read_text()))


@pytest.mark.parametrize(
    ("backend", "disturbance"),
    [
        ("nftables", "insert rule inet remotegpu input accept"),
        ("iptables", "insert rule inet remotegpu_openings opened meta mark set 0x10000000"),
        (
            "nftables",
            "add chain inet remotegpu one { type filter hook input priority -200; }; add chain inet remotegpu two;"
            "add set inet remotegpu more { type ipv4_addr; elements = { 192.0.2.1 }; };"
            "add rule inet remotegpu one ip saddr @more jump two",
        ),
    ],
)
def test_a_table_of_ours_that_somebody_has_changed_is_found_and_mended(
    disturbance: str, backend: str, net: Net, load: Any, tmp_path: Path
) -> None:
    """By what the role asks the host, so that a run and drift hear of it; what the agent has opened is no change."""
    rules = "firewall.nft" if backend == "nftables" else "openings.nft"
    role = Role("firewall", firewall_backend=backend, firewall_allow=ALLOW, __firewall_ssh=[22])
    places = {
        "__firewall_rules": f"{tmp_path}/{rules}",
        "__firewall_table_file": f"{tmp_path}/{rules}",
        "__firewall_program": f"{tmp_path}/program",
    }
    (look,) = [task for task in tasks_of_role("look.yml") if "register" in task]
    (mend,) = [task for task in tasks_of_role("apply.yml") if task["name"].startswith("Take out of our table")]

    def is_right() -> bool:
        asked = role.expression(look["ansible.builtin.shell"]["cmd"], **places)
        return "right" in net.on(net.host, "bash", "-c", asked).splitlines()

    load(backend)()
    assert is_right()
    open_for(net, backend, CLOSED, OUTSIDE)
    open_for(net, backend, FOR_OTHERS, OUTSIDE)
    assert is_right(), "one opening and several are written differently by nft"
    net.on(net.host, "nft", disturbance)
    assert not is_right()
    load(backend)()
    net.on(net.host, "sh", "-euc", role.expression(mend["ansible.builtin.shell"]["cmd"], **places))
    assert is_right()
    assert net.answering([CLOSED]) == [CLOSED], "and what the agent has opened stays open"


def test_ufw_keeps_what_it_owns_and_our_chains_ask_only_about_containers(net: Net, load: Any) -> None:
    load("iptables")()
    load("ufw")()
    rules = net.on(net.host, "iptables", "-S")
    assert "REMOTEGPU-INPUT" not in rules, "what comes in is ufw's to say"
    assert re.findall("-A (INPUT|FORWARD) (.*)", rules) == [("FORWARD", "-j REMOTEGPU-FORWARD")]
    assert net.answering([CLOSED]) == [CLOSED]


def test_the_table_of_nftables_is_the_file_and_nothing_else_whatever_was_there(net: Net, load: Any) -> None:
    net.on(net.host, "nft", "add table ip foreign; add chain ip foreign keep; add rule ip foreign keep counter")
    foreign = net.on(net.host, "nft", "-s", "list", "table", "ip", "foreign")
    load("nftables", firewall_allow=[])()
    fresh = net.on(net.host, "nft", "-s", "list", "table", "inet", "remotegpu")
    load("nftables")()
    net.on(net.host, "nft", "insert rule inet remotegpu input accept")
    load("nftables", firewall_allow=[])()
    assert net.on(net.host, "nft", "-s", "list", "table", "inet", "remotegpu") == fresh
    assert net.on(net.host, "nft", "-s", "list", "table", "ip", "foreign") == foreign
    assert sorted(net.on(net.host, "nft", "list", "tables").split("\n")) == [
        "",
        "table inet remotegpu",
        "table ip foreign",
    ]


@pytest.mark.parametrize(
    ("interfaces", "mistaken"),
    [(["docker0", "br-*"], ["br-lan"]), (["docker0", "br-0a1b2c3d4e5f"], []), (["docker0", "e*"], ["eth0"])],
)
def test_a_sites_own_bridge_is_not_taken_for_dockers(net: Net, interfaces: list[str], mistaken: list[str]) -> None:
    """What comes from containers may go everywhere: the role asks the host which ways lead outside, and refuses."""
    role = Role("firewall", firewall_container_interfaces=interfaces, firewall_allow=[], __firewall_ssh=[22])
    (look,) = [task for task in yaml.safe_load((role.path / "tasks/look.yml").read_text()) if "register" in task]
    asked = role.expression(look["ansible.builtin.shell"]["cmd"], firewall_backend="nftables")
    made = (
        "ip link add br-lan type bridge; ip link add lan0 type veth peer name lan1; ip link set lan0 master br-lan;"
        "ip link add br-0a1b2c3d4e5f type bridge; ip link add veth1 type veth peer name veth2;"
        f"ip link set veth1 master br-0a1b2c3d4e5f; ip route add default via {OUTSIDE[4]} dev eth0"
    )
    undone = "ip route del default; for each in br-lan lan0 br-0a1b2c3d4e5f veth1; do ip link del $each; done"
    try:
        net.on(net.host, "bash", "-c", f"set -e; {made}")
        seen = net.on(net.host, "bash", "-c", asked).splitlines()
    finally:
        net.on(net.host, "bash", "-c", undone, check=False)
    assert role.value("__firewall_mistaken", __firewall_seen=seen) == mistaken
