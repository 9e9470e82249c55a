"""A customer, a gateway and a GPU host, on two networks with IPv4 and IPv6.

Inside is Docker's bridge: the GPU host, the portal on this machine, and one leg of the gateway. Outside is a cable from
the gateway to the customer, who has addresses of their own and no other way. The GPU host's way to customers is the
gateway. Here is no portal and no agent.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import Host, Result, boot, unique
from tests.hosts.owner import keeps_hosts
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
GREETER = ROOT / "molecule" / "gateway" / "files" / "greeter.py"
FAMILIES = (4, 6)

PUBLIC = {4: "198.51.100.1", 6: "2001:db8:113::1"}  # the gateway's, outside
CUSTOMER = {4: "198.51.100.7", 6: "2001:db8:113::7"}
THEIRS = {4: "198.51.100.0/28", 6: "2001:db8:113::/124"}  # the customer's network
ANOTHER = {4: "198.51.100.200", 6: "2001:db8:113::200"}  # another customer's address, not in it
EVERYBODY = {4: "0.0.0.0/0", 6: "::/0"}
_BEYOND = {4: "198.51.100.254", 6: "2001:db8:113::fe"}  # the rest of the world, which nobody plays
_LENGTH = {4: 24, 6: 64}
_OUTSIDE = {4: "198.51.100.0/24", 6: "2001:db8:113::/64"}


@dataclass
class Place:
    customer: Host
    gateway: Host
    gpu: Host

    def plug(self) -> None:
        """Lay the cable, and set the routes. Again after a reboot of the gateway, which takes its end along."""
        one, other = _pid(self.customer), _pid(self.gateway)
        cable = f"ip link add eth1 netns {one} type veth peer name outside0 netns {other}"
        subprocess.run(cable.split(), check=True, capture_output=True)
        # A container has IPv6 off for interfaces that come later.
        self.customer.run("ip link set eth0 down; sysctl -qw net.ipv6.conf.eth1.disable_ipv6=0; ip link set eth1 up")
        self.gateway.run("sysctl -qw net.ipv6.conf.outside0.disable_ipv6=0; ip link set outside0 up")
        for family in FAMILIES:
            for address in (CUSTOMER[family], ANOTHER[family]):
                self._address(self.customer, family, address, "eth1")
            self._address(self.gateway, family, PUBLIC[family], "outside0")
            self._route(self.customer, family, f"default via {PUBLIC[family]} dev eth1")
            self._keep_mirror(self.gateway, family)
            self._route(self.gateway, family, f"default via {_BEYOND[family]} dev outside0")
            self._route(self.gpu, family, f"{_OUTSIDE[family]} via {self.inside(self.gateway)[family]}")

    @staticmethod
    def inside(host: Host) -> dict[int, str]:
        """Its addresses on the inside."""
        assert host.address_v6 is not None, "Docker's bridge has no IPv6"
        return {4: host.address, 6: host.address_v6}

    def ask(self, family: int, port: int, *, seconds: float = 0, source: str | None = None) -> str:
        """What the customer is told at the public address: see greeter.py."""
        return self.customer.run(self.ask_argv(family, port, seconds=seconds, source=source)).stdout.strip()

    @staticmethod
    def ask_argv(family: int, port: int, *, seconds: float = 0, source: str | None = None) -> list[str]:
        whence = source or CUSTOMER[family]
        return ["python3", "/usr/local/bin/greeter", "ask", PUBLIC[family], str(port), str(seconds), whence]

    def ssh(self, family: int, port: int, login: str, key: Path, *command: str, source: str | None = None) -> Result:
        """As the customer signs in, at the public address. The host's keys are those of the GPU host, and pinned."""
        self.customer.put("/root/key", key.read_text(), mode="0600")
        names = f"[{PUBLIC[family]}]:{port}"
        self.customer.put("/root/known", "".join(f"{names} {key}\n" for key in self.gpu.host_keys))
        return self.customer.run(self._ssh(family, port, login, *command, source=source), check=False)

    def ssh_argv(self, family: int, port: int, login: str, *command: str) -> list[str]:
        """The same as a command of this machine, for one who stays; after an `ssh`, whose key is used."""
        return ["docker", "exec", self.customer.id, *self._ssh(family, port, login, *command)]

    @staticmethod
    def _ssh(family: int, port: int, login: str, *command: str, source: str | None = None) -> list[str]:
        settings = "BatchMode=yes StrictHostKeyChecking=yes UserKnownHostsFile=/root/known ConnectTimeout=5"
        options = [f"-o{setting}" for setting in settings.split()]
        whence = ["-b", source or CUSTOMER[family], "-i", "/root/key", "-p", str(port)]
        return ["ssh", "-F", "/dev/null", *options, *whence, f"{login}@{PUBLIC[family]}", *command]

    @staticmethod
    def _address(host: Host, family: int, address: str, interface: str) -> None:
        nodad = " nodad" if family == 6 else ""
        host.run(f"ip addr add {address}/{_LENGTH[family]} dev {interface}{nodad}")

    @staticmethod
    def _route(host: Host, family: int, route: str) -> None:
        host.run(f"ip -{family} route replace {route}")

    @staticmethod
    def _keep_mirror(host: Host, family: int) -> None:
        """Packages still come by Docker's bridge, which is nobody's default route from here on."""
        halves = {4: "0.0.0.0/1 128.0.0.0/1", 6: "::/1 8000::/1"}[family]
        route = f"ip -{family} route"
        host.run(
            f"via=$({route} show default dev eth0 | grep -o 'via [^ ]*' | head -1); [ -z \"$via\" ] || "
            f"{{ for half in {halves}; do {route} replace $half $via dev eth0; done; {route} del default dev eth0; }}"
        )


@contextmanager
def three_hosts(suite: str, *, options: Sequence[str] = (), password: str | None = None) -> Iterator[Place]:
    """Connected, with nothing configured; a greeter listens on port 8888 of the GPU host."""
    with ExitStack() as stack:

        def booted(name: str, *, gpus: int, of: str = suite) -> Host:
            host = boot(unique(name), of, prepared=True, gpus=gpus, password=password, options=options)
            if not keeps_hosts():
                stack.callback(host.destroy)
            return host

        place = Place(booted("customer", gpus=0, of="trixie"), booted("gateway", gpus=0), booted("behind", gpus=2))
        place.plug()
        for host in (place.customer, place.gpu):
            host.put("/usr/local/bin/greeter", GREETER.read_text(), mode="0755")
        place.gpu.run("systemd-run --unit=greeter /usr/bin/python3 /usr/local/bin/greeter serve 8888")
        yield place


def _pid(host: Host) -> str:
    argv = ["docker", "inspect", "--format={{.State.Pid}}", host.id]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def staying(place: Place, family: int, port: int, *, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """A customer who is in and says a word again and again; prints `cut` once nobody answers any more."""
    argv = ["docker", "exec", place.customer.id, *place.ask_argv(family, port, seconds=seconds)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as inside:
        try:
            asked = f"ss -Htn state established dport = :{port}"
            until(lambda: place.customer.run(asked).stdout, "the customer to be in", every_s=0.05)
            yield inside
        finally:
            inside.kill()
