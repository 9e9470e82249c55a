"""The gateway's rules in a real kernel: who gets to a host behind it, for how long, and what passes besides.

The namespaces of tests/roles/network.py: the one in the middle is the gateway, its "container" the host behind it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from tests.roles.network import CONTAINER, HOST, OUTSIDE, Net, network
from tests.roles.rendering import Role
from tests.support.waiting import until

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not all(map(shutil.which, ("nft", "ip", "conntrack"))), reason="needs nft and conntrack"),
]

ROOT = Path(__file__).parents[2]
GREETER = ROOT / "molecule/gateway/files/greeter.py"
NETWORKS = ["172.30.0.0/24", "2001:db8:2::/64"]
FAMILIES = (4, 6)
PUBLIC, SSH, ANOTHER = 20017, 2022, 2023
EVERYBODY = {4: "0.0.0.0/0", 6: "::/0"}
OURS = {4: f"{OUTSIDE[4]}/32", 6: f"{OUTSIDE[6]}/128"}
OTHERS = {4: "192.0.2.0/24", 6: "2001:db8:9::/64"}


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with network([22]) as made:
        greeters = [
            subprocess.Popen(["ip", "netns", "exec", made.container, sys.executable, GREETER, "serve", str(port)])
            for port in (SSH, ANOTHER)
        ]
        try:
            until(lambda: made.on(made.container, "ss", "-Hltn").count("LISTEN") == 3, "the host behind to listen")
            yield made
        finally:
            for greeter in greeters:
                greeter.kill()
                greeter.wait()


@pytest.fixture
def load(net: Net, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Load both roles' rules as their units do."""

    def loaded(**said: Any) -> None:
        roles = {
            "firewall": Role("firewall", firewall_gateway=True, __firewall_ssh=[22]),
            "gateway": Role("gateway", __gateway_seen=[f"network {each}" for each in NETWORKS], **said),
        }
        for name, role in roles.items():
            (tmp_path / name).write_text(role.template(f"{name}.nft.j2"))
            net.on(net.host, "nft", "-f", str(tmp_path / name))

    yield loaded
    net.on(net.host, "nft", "flush", "ruleset")


def forward(net: Net, family: int, source: str, *, to: int = SSH, seconds: float = 600) -> None:
    """As the agent does it."""
    suffix, target, end = {4: "", 6: "6"}[family], CONTAINER[family], f"timeout {round(seconds * 1000)}ms"
    commands = [
        f"add element inet remotegpu_gateway forwards{suffix} {{ tcp . {PUBLIC} . {source} {end} : {target} . {to} }}",
        f"add element inet remotegpu_gateway flows{suffix} {{ tcp . {PUBLIC} . {source} . {target} . {to} {end} }}",
    ]
    net.on(net.host, "nft", "; ".join(commands))


def close(net: Net, family: int) -> None:
    suffix = {4: "", 6: "6"}[family]
    flush = [f"flush map inet remotegpu_gateway forwards{suffix}", f"flush set inet remotegpu_gateway flows{suffix}"]
    net.on(net.host, "nft", "; ".join(flush))


def ask(net: Net, family: int, *, at: str | None = None, port: int = PUBLIC, seconds: float = 0) -> str:
    argv = [sys.executable, str(GREETER), "ask", at or HOST[family], str(port), str(seconds)]
    return net.on(net.outside, *argv).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_who_is_forwarded_gets_in_under_the_own_address_and_nobody_else(net: Net, load: Any, family: int) -> None:
    load()
    assert ask(net, family) != f"you are {OUTSIDE[family]}"
    forward(net, family, OTHERS[family])
    assert ask(net, family) == "silence"
    close(net, family)
    forward(net, family, OURS[family])
    assert ask(net, family) == f"you are {OUTSIDE[family]}"
    assert ask(net, family, port=PUBLIC + 1) == "silence"
    load()
    assert ask(net, family) == f"you are {OUTSIDE[family]}", "and after the rules were loaded again"


@pytest.fixture
def by_number(net: Net, tmp_path: Path) -> Callable[[str], str]:
    """Run a command on a host without /etc/protocols, where nft lists protocols by numbers that it does not read."""

    def run(command: str) -> str:
        hidden = f"[ ! -e /etc/protocols ] || mount --bind /dev/null /etc/protocols; cd {tmp_path}; {command}"
        return net.on(net.host, "unshare", "--mount", "sh", "-euc", hidden)

    return run


def test_the_way_back_is_read_where_nft_knows_protocols_by_number_alone(
    net: Net, load: Any, by_number: Callable[[str], str]
) -> None:
    """Else nobody would get in again."""
    script = ROOT / "roles/firewall/files/way_back.sh"

    def rules() -> str:
        return re.sub(r" expires \S+", "", by_number("nft list ruleset"))

    load()
    forward(net, 4, OURS[4])
    before = rules()
    assert "\t\tprotocol 6\n" in before, "this nft says it otherwise"
    for table in ("remotegpu", "remotegpu_gateway"):
        by_number(f"sh {script} remember {table}")
    net.on(net.host, "nft", "add chain inet remotegpu locked { type filter hook input priority -50; policy drop; }")
    assert rules() != before
    by_number(f"sh {script} our_tables | nft -f -")
    assert rules() == before
    assert ask(net, 4) == f"you are {OUTSIDE[4]}", "what was forwarded is so still"


def test_an_agents_baseline_is_read_where_nft_knows_protocols_by_number_alone(
    net: Net, load: Any, by_number: Callable[[str], str], tmp_path: Path
) -> None:
    """Else a table that a tenant has changed could not be made what it was."""
    take = "import json; from remotegpu_agent.observe import firewall; print(json.dumps(firewall.look_at()))"

    def tables() -> dict[str, Any]:
        seen = json.loads(by_number(f"PYTHONPATH={ROOT / 'agent'} {sys.executable} -c '{take}'"))
        return cast(dict[str, Any], seen["tables"])

    load()
    short = "{ protocol udp; l3proto ip; policy = { unreplied : 10 }; }"
    net.on(net.host, "nft", f"add table inet site; add ct timeout inet site short {short}")
    assert "\t\tprotocol 17\n" in by_number("nft list table inet site"), "this nft says it otherwise"
    before = tables()
    for key, table in before.items():
        (tmp_path / "table.nft").write_text(f"table {key} {{}}\ndelete table {key}\n{table['text']}")
        by_number("nft -f table.nft")
    assert len(before) == 3
    assert tables() == before


def test_a_rule_of_somebody_else_in_our_table_is_found_and_what_is_forwarded_is_none(
    net: Net, load: Any, tmp_path: Path
) -> None:
    """By what the role asks the host, so that a run and drift hear of it."""
    role = Role("gateway", __firewall_compare=Role("firewall").variables["__firewall_compare"])
    (look,) = [
        task for task in yaml.safe_load((role.path / "tasks/look.yml").read_text()) if "ansible.builtin.shell" in task
    ]

    def is_right() -> bool:
        asked = role.expression(look["ansible.builtin.shell"]["cmd"], __gateway_rules=f"{tmp_path}/gateway")
        return "loaded" in net.on(net.host, "bash", "-c", asked).splitlines()

    load()
    for family in FAMILIES:
        forward(net, family, OURS[family])
    assert is_right()
    net.on(net.host, "nft", "insert rule inet remotegpu_gateway forward meta mark set 0x20000000 accept")
    assert not is_right()
    load()
    assert is_right()
    assert ask(net, 4) == f"you are {OUTSIDE[4]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_everybody_gets_in_where_everybody_may(net: Net, load: Any, family: int) -> None:
    load()
    forward(net, family, EVERYBODY[family])
    assert ask(net, family) == f"you are {OUTSIDE[family]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_comes_by_itself_for_connections_too(net: Net, load: Any, family: int) -> None:
    """Nobody is there to see to it: no agent, no portal, and nothing that forgets connections."""
    load()
    forward(net, family, EVERYBODY[family], seconds=2.5)
    assert ask(net, family, seconds=15) == "cut"
    assert ask(net, family) == "silence"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_that_leads_elsewhere_now_revives_no_connection_of_before(net: Net, load: Any, family: int) -> None:
    load()
    forward(net, family, EVERYBODY[family])
    argv = ["ip", "netns", "exec", net.outside, sys.executable, str(GREETER), "ask", HOST[family], str(PUBLIC), "30"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as before:
        asked = ["ss", "-Htn", "state", "established", f"dport = :{PUBLIC}"]
        until(lambda: net.on(net.outside, *asked), "the connection to be there")
        close(net, family)
        forward(net, family, EVERYBODY[family], to=ANOTHER)
        assert ask(net, family) == f"you are {OUTSIDE[family]}", "the next one gets in"
        assert before.communicate(timeout=60)[0].strip() == "cut"


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_passes_who_was_not_led_there(net: Net, load: Any, family: int) -> None:
    assert ask(net, family, at=CONTAINER[family], port=SSH) == f"you are {OUTSIDE[family]}", "or this proves nothing"
    load()
    assert ask(net, family, at=CONTAINER[family], port=SSH) == "silence"
    forward(net, family, EVERYBODY[family])
    assert ask(net, family, at=CONTAINER[family], port=SSH) == "silence"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_portals_word_leads_into_the_named_networks_only(net: Net, load: Any, family: int) -> None:
    load(gateway_networks=[{4: "10.0.0.0/24", 6: "fd00::/64"}[family]])
    forward(net, family, EVERYBODY[family])
    assert ask(net, family) != f"you are {OUTSIDE[family]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_table_a_gateway_passes_nothing_on(net: Net, load: Any, family: int) -> None:
    """The kernel still passes packets on: it is the role firewall's table that refuses what carries no mark."""
    load()
    net.on(net.host, "nft", "delete", "table", "inet", "remotegpu_gateway")
    assert ask(net, family, at=CONTAINER[family], port=SSH) == "silence"


@pytest.mark.parametrize("family", FAMILIES)
def test_who_is_trusted_reaches_the_hosts_by_their_own_address(net: Net, load: Any, family: int) -> None:
    load(gateway_trusted=[OUTSIDE[family]])
    assert ask(net, family, at=CONTAINER[family], port=SSH) == f"you are {OUTSIDE[family]}"


def test_nobody_outside_passes_for_a_host_behind_or_for_who_is_trusted(net: Net, load: Any) -> None:
    load(gateway_way_out="routed", gateway_trusted=["192.0.2.10"])
    borrowed, nobody = ("172.30.0.77", "192.0.2.10"), "198.51.100.77"
    net.on(net.host, "ip", "route", "add", "192.0.2.10/32", "dev", "docker0")
    net.on(net.outside, "ip", "route", "add", f"{nobody}/32", "via", HOST[4])
    for address, to in zip(borrowed, (nobody, CONTAINER[4]), strict=True):
        net.on(net.outside, "ip", "addr", "add", f"{address}/32", "dev", "lo")
        net.on(net.outside, sys.executable, str(GREETER), "ask", to, str(SSH), "0", address)
        assert address not in net.on(net.host, "conntrack", "-L"), "the kernel has passed it on"


THINKING = """
import socket, sys
door = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
talk, _ = door.accept()
asked = b"".join(iter(lambda: talk.recv(4096), b""))
sys.stdin.readline()
talk.sendall(b"thought about " + asked)
"""
ASKING = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 60) as talk:
    talk.sendall(b"it")
    talk.shutdown(socket.SHUT_WR)
    print("asked", flush=True)
    print(b"".join(iter(lambda: talk.recv(4096), b"")).decode())
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_who_has_said_all_may_wait_for_the_answer_as_long_as_for_any_other(net: Net, load: Any, family: int) -> None:
    """The kernel's own minute for a connection whose one half has ended drops what comes later."""
    load()
    port = ANOTHER + family
    forward(net, family, OURS[family], to=port)

    def started(where: str, script: str, *args: str) -> subprocess.Popen[str]:
        argv = ["ip", "netns", "exec", where, sys.executable, "-c", script, *args]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with started(net.container, THINKING, str(port)) as host:
        try:
            until(lambda: f":{port} " in net.on(net.container, "ss", "-Hltn"), "the host behind to listen")
            with started(net.outside, ASKING, HOST[family], str(PUBLIC)) as customer:
                assert customer.stdout is not None
                assert customer.stdout.readline() == "asked\n"
                (known,) = until(lambda: half_closed(net, family), "the gateway to know of the end of one half")
                assert int(known.split()[2]) > 3600, known
                assert host.stdin is not None
                host.stdin.write("\n")
                host.stdin.flush()
                assert customer.communicate(timeout=30)[0] == "thought about it\n"
        finally:
            host.kill()


def half_closed(net: Net, family: int) -> list[str]:
    argv = ["conntrack", "-L", "-f", f"ipv{family}", "-p", "tcp", "--orig-port-dst", str(PUBLIC)]
    return [line for line in net.on(net.host, *argv, "--state", "CLOSE_WAIT").splitlines() if "tcp" in line]


@pytest.mark.parametrize("way", ["none", "routed", "masquerade"])
def test_the_hosts_way_out_is_as_it_is_said(net: Net, load: Any, way: str) -> None:
    load(gateway_way_out=way)
    with subprocess.Popen(["ip", "netns", "exec", net.outside, sys.executable, GREETER, "serve", "8443"]) as portal:
        try:
            until(lambda: "8443" in net.on(net.outside, "ss", "-Hltn"), "somebody outside to listen")
            told = [
                net.on(net.container, sys.executable, str(GREETER), "ask", OUTSIDE[family], "8443").strip()
                for family in FAMILIES
            ]
        finally:
            portal.kill()
    own, ours = f"you are {CONTAINER[4]}", f"you are {HOST[4]}"
    public = f"you are {CONTAINER[6]}"  # its IPv6 is everybody's to reach
    assert told == {"none": ["silence", "silence"], "routed": [own, public], "masquerade": [ours, public]}[way]


AGENT = Path(__file__).parents[2] / "agent"
KNOWN_AND_FORGOTTEN = """
import sys
sys.path.insert(0, sys.argv.pop())
from remotegpu_agent import conntrack

def those() -> list[conntrack.Flow]:
    way = ("tcp", sys.argv[1], int(sys.argv[2]))
    return [each for each in conntrack.flows() if (each.protocol, str(each.destination), each.destination_port) == way]

known = those()
print(*{str(each.source) for each in known}, conntrack.forget(known) - len(known), len(those()))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_agent_reads_the_kernels_connections_and_has_it_forget_them(net: Net, load: Any, family: int) -> None:
    load()
    forward(net, family, OURS[family])
    assert ask(net, family) == f"you are {OUTSIDE[family]}"
    said = net.on(net.host, sys.executable, "-c", KNOWN_AND_FORGOTTEN, HOST[family], str(PUBLIC), str(AGENT))
    assert said.split() == [OUTSIDE[family], "0", "0"], "all that were known were forgotten, and none is left"
