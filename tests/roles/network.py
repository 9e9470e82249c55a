"""Three namespaces of the network: somebody outside, a host, a container behind Docker's bridge on it.

Enough to ask real rules of the kernel what they let through, in a second and without a host. Docker is played by its
own rules: DNAT for a published port, an accept for it in FORWARD, and its jumps in front. What a whole host does is for
molecule/ to say.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import until

HOST = {4: "198.51.100.1", 6: "2001:db8:1::1"}
OUTSIDE = {4: "198.51.100.2", 6: "2001:db8:1::2"}
CONTAINER = {4: "172.30.0.2", 6: "2001:db8:2::2"}
KNOCK = Path(__file__).parents[1] / "support" / "knock.py"
_numbers = itertools.count()
_LISTEN = """
import socketserver, sys, threading
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(self.request.recv(100))
class EchoUDP(socketserver.BaseRequestHandler):
    def handle(self):
        word, answering = self.request
        answering.sendto(word, self.client_address)
class Server(socketserver.ThreadingTCPServer):
    address_family, daemon_threads, allow_reuse_address = 10, True, True
class ServerUDP(socketserver.ThreadingUDPServer):
    address_family, daemon_threads = 10, True
for port in sys.argv[1:]:
    for server in (Server(("::", int(port)), Echo), ServerUDP(("::", int(port)), EchoUDP)):
        threading.Thread(target=server.serve_forever).start()
"""
_KNOCK = """
import concurrent.futures, socket, sys
kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[sys.argv[1]]
def knock(end):
    address, port = end.split()
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as asking:
            asking.settimeout(1.2)
            asking.connect((address, int(port)))
            if kind == socket.SOCK_DGRAM:
                asking.send(b"who is there?")
                asking.recv(100)
        return end
    except OSError:
        return ""
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    print(*pool.map(knock, sys.argv[2:]), sep="\\n")
"""
_DOCKER = """
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
{dnat}
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
-I FORWARD 1 -i docker0 ! -o docker0 -j ACCEPT
-I FORWARD 1 -o docker0 -j DOCKER
-I FORWARD 1 -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
{jump}
-A DOCKER -p tcp -d {address} --dport 80 -j ACCEPT
-A DOCKER -p udp -d {address} --dport 80 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
"""


@dataclass(frozen=True)
class Net:
    """The names of the three namespaces."""

    outside: str
    host: str
    container: str

    def on(self, name: str, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """Run in a namespace; its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", name, *argv], input=stdin, capture_output=True, text=True, timeout=30
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done.stdout

    def answering(self, ports: Sequence[int], at: Mapping[int, str] = HOST, *, protocol: str = "tcp") -> list[int]:
        """Which of these ports answer somebody outside. On both families alike, or it is an error."""
        ends = [f"{at[family]} {port}" for family in (4, 6) for port in ports]
        heard = self.on(self.outside, "python3", "-c", _KNOCK, protocol, *ends).splitlines()
        v4, v6 = ([port for port in ports if f"{at[family]} {port}" in heard] for family in (4, 6))
        assert v4 == v6, f"IPv4 answers on {v4}, IPv6 on {v6}"
        return v4

    def answering_as_loopback(self, ports: Sequence[int]) -> list[int]:
        """Which of these answer somebody on the same cable who sends to 127.0.0.1, by the host's card."""
        card = json.loads(self.on(self.host, "ip", "-j", "link", "show", "eth0"))[0]["address"]
        argv = ["python3", str(KNOCK), "eth0", OUTSIDE[4], card, "127.0.0.1", *map(str, ports)]
        return [int(port) for port in self.on(self.outside, *argv).split()]

    def pings(self, family: int) -> bool:
        done = subprocess.run(
            ["ip", "netns", "exec", self.outside, "ping", "-c1", "-W1", HOST[family]], capture_output=True
        )
        return done.returncode == 0

    def play_docker(self, published: Sequence[int], *, asks_user: bool = True) -> None:
        """What an engine writes at its start for a container that publishes these ports: in front of what is there.

        One that found DOCKER-USER made may forget to ask it (moby#48560).
        """
        for program, family in (("iptables", 4), ("ip6tables", 6)):
            self.on(self.host, program, "-N", "DOCKER-USER", check=False)  # kept, where it is there
            target = {4: f"{CONTAINER[4]}:80", 6: f"[{CONTAINER[6]}]:80"}[family]
            to = f"-j DNAT --to-destination {target}"
            ends = itertools.product(("tcp", "udp"), published)
            lines = [f"-A DOCKER ! -i docker0 -p {protocol} --dport {port} {to}" for protocol, port in ends]
            jump = "-I FORWARD 1 -j DOCKER-USER" if asks_user else ""
            text = _DOCKER.format(dnat="\n".join(lines), address=CONTAINER[family], jump=jump)
            self.on(self.host, f"{program}-restore", "--noflush", stdin=text)


@contextmanager
def network(host_ports: Sequence[int]) -> Iterator[Net]:
    """The three, connected; the host listens on `host_ports`, the container on 80. Everything is gone afterwards."""
    prefix = f"rgfw{os.getpid() % 100000}x{next(_numbers)}"
    net = Net(*(f"{prefix}-{name}" for name in ("outside", "host", "container")))
    with ExitStack() as stack:
        for name in (net.outside, net.host, net.container):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _connect(net.outside, "eth0", net.host, "eth0")
        _connect(net.container, "eth0", net.host, "veth0")
        _ip("-n", net.host, "link", "add", "docker0", "type", "bridge")
        _ip("-n", net.host, "link", "set", "veth0", "master", "docker0")
        for name, interface, addresses in (
            (net.outside, "eth0", (f"{OUTSIDE[4]}/24", f"{OUTSIDE[6]}/64")),
            (net.host, "eth0", (f"{HOST[4]}/24", f"{HOST[6]}/64")),
            (net.host, "docker0", ("172.30.0.1/24", "2001:db8:2::1/64")),
            (net.container, "eth0", (f"{CONTAINER[4]}/24", f"{CONTAINER[6]}/64")),
        ):
            for address in addresses:
                _ip("-n", name, "addr", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        for name, interface in ((net.outside, "eth0"), (net.host, "eth0"), (net.host, "veth0"), (net.host, "docker0")):
            _ip("-n", name, "link", "set", interface, "up")
        _ip("-n", net.container, "link", "set", "eth0", "up")
        net.on(net.host, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for name, via in ((net.outside, HOST), (net.container, {4: "172.30.0.1", 6: "2001:db8:2::1"})):
            for family in (4, 6):
                _ip(f"-{family}", "-n", name, "route", "add", "default", "via", via[family])
        for name, ports in ((net.host, host_ports), (net.container, [80]), (net.outside, [80])):
            stack.enter_context(_listening(net, name, ports))
        for family in (4, 6):
            until(lambda family=family: net.pings(family), "the namespaces to be connected", timeout_s=10)
        yield net


def _ip(*argv: str) -> None:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {argv}: {done.stderr}"


def _connect(one: str, at: str, other: str, there: str) -> None:
    _ip("link", "add", at, "netns", one, "type", "veth", "peer", "name", there, "netns", other)


@contextmanager
def _listening(net: Net, name: str, ports: Sequence[int]) -> Iterator[None]:
    process = subprocess.Popen(["ip", "netns", "exec", name, "python3", "-c", _LISTEN, *map(str, ports)])
    try:
        wanted = 2 * len(ports)
        until(lambda: len(net.on(name, "ss", "-Hltun").splitlines()) >= wanted, f"{name} to listen", timeout_s=10)
        yield
    finally:
        process.kill()
        process.wait()
