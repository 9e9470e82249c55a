"""What a host answers to somebody else, asked by nmap from that machine's place in the network.

Every answer counts, a refusal as well: it tells that the packet came through. Here is no opinion about what may answer;
what listens is `build_listener`'s program, which greets whoever knocks, over TCP and UDP.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import Host

EVERY_PORT = "1-65535"
# DNS, DHCP, TFTP, RPC, NTP, NetBIOS, SNMP, LDAP, IKE, syslog, RIP, DHCPv6, IPMI, OpenVPN, SQL, L2TP, RADIUS, SSDP, NFS,
# STUN, NAT-T, SIP, mDNS, LLMNR, VXLAN, Geneve, WireGuard, RoCE.
USUAL_UDP = (
    "53,67-69,111,123,137-138,161-162,389,443,500,514,520,546-547,623,1194,1434,1701,1812-1813,1900,2049,3478,4500,"
    "4789,4791,5060,5353,5355,6081,8472,51820"
)
PER_SECOND = 40_000
TIMEOUT_S = 300.0
SILENT = "no-response"
KNOCK = Path(__file__).with_name("knock.py")


@dataclass(frozen=True)
class Scanner:
    """Somebody's place in the network: the one of this process, or of this machine itself."""

    pid: int | None = None

    @classmethod
    def on(cls, host: Host) -> Scanner:
        """Needs root on this machine, and nothing on the host: nmap is this machine's."""
        argv = ["docker", "inspect", "--format={{.State.Pid}}", host.id]
        return cls(int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout))

    def hear(
        self, address: str, *, tcp: str = EVERY_PORT, udp: str = "", again: Collection[str] = (), options: str = ""
    ) -> dict[str, str]:
        """What answered, and how: {"tcp/22": "syn-ack", "tcp/9835": "reset", "udp/53": "udp-response"}.

        Ports and `options` are written as nmap takes them. Those in `again` ("tcp/22") are asked once more if they are
        silent: on a busy machine an answer may be lost. Raises AssertionError if not every port has been asked.
        """
        heard = self._ask(address, tcp, udp, options)
        lost = [each for each in again if each not in heard]
        return heard | self._ask(address, _only("tcp", lost), _only("udp", lost), options)

    def hear_as_loopback(self, card: str, ports: Sequence[int], *, source: str) -> list[int]:
        """Which of these let a neighbour in who sends to 127.0.0.1, by the card's own address; see knock.py."""
        program = [sys.executable, "-I", str(KNOCK), "eth0", source, card, "127.0.0.1", *map(str, ports)]
        told = subprocess.run([*self.place, *program], check=True, capture_output=True, text=True, timeout=60)
        return [int(port) for port in told.stdout.split()]

    @property
    def place(self) -> list[str]:
        """The words before a command that has it run there."""
        return [] if self.pid is None else ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def _ask(self, address: str, tcp: str, udp: str, options: str) -> dict[str, str]:
        heard: dict[str, str] = {}
        if tcp:
            heard |= self._nmap(address, tcp, options if "-s" in options else f"-sS {options}")
        if udp:  # with a word in it: Docker's proxy hands on no empty datagram
            heard |= self._nmap(address, udp, f"-sU --data-string knock {options}")
        return heard

    def _nmap(self, address: str, ports: str, options: str) -> dict[str, str]:
        family = ["-6"] if ":" in address else []
        speed = [f"--min-rate={PER_SECOND}", "--max-retries=1", "-T4"]
        argv = [*self.place, "nmap", "-n", "-Pn", *family, *options.split(), f"-p{ports}", *speed, "-oX", "-", address]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return answers_in(done.stdout, asked=len(list(_numbers(ports))))


def answers_in(xml: str, *, asked: int) -> dict[str, str]:
    """The answers in nmap's XML."""
    scanned = ElementTree.fromstring(xml)  # noqa: S314 - our own nmap wrote it
    port_states = [
        (f"{port.get('protocol')}/{port.get('portid')}", state.get("reason", ""))
        for port in scanned.iterfind("host/ports/port")
        for state in port.iterfind("state")
    ]
    for alike in scanned.iterfind("host/ports/extraports/extrareasons"):
        numbers = _numbers(alike.get("ports", ""))
        port_states += [(f"{alike.get('proto')}/{number}", alike.get("reason", "")) for number in numbers]
    assert len(port_states) == asked, f"{len(port_states)} of {asked} ports were asked: {xml[-1500:]}"
    return {port: reason for port, reason in port_states if reason != SILENT}


def _only(protocol: str, ports: Sequence[str]) -> str:
    return ",".join(each.split("/")[1] for each in ports if each.startswith(f"{protocol}/"))


def _numbers(ports: str) -> Iterator[int]:
    """ "1-3,7" → 1, 2, 3, 7."""
    for part in ports.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def build_listener(folder: Path) -> Path:
    """A static program that needs nothing beside itself, in a container neither: `listener tcp/80 udp/81`."""
    program = folder / "listener"
    source = Path(__file__).with_name("listener.c")
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", program, source], check=True)
    return program
