"""Listening ports, and the program behind each: from /proc/net and the descriptors of every process."""

from __future__ import annotations

import functools
import ipaddress
import os
import struct
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from remotegpu_agent.observe.packages import merged
from remotegpu_agent.observe.processes import DELETED, program
from remotegpu_agent.observe.special import packaged_paths
from remotegpu_agent.observe.tools import read_text

_ESTABLISHED, _LISTEN, _UDP_UNCONNECTED = 0x01, 0x0A, 0x07


@dataclass(frozen=True)
class Socket:
    """One line of /proc/net/{tcp,udp}{,6}."""

    protocol: str
    address: str
    port: int
    state: int
    uid: int
    inode: int
    remote: str


def sockets() -> Iterator[Socket]:
    """Every TCP and UDP socket of this network namespace, also of processes we cannot see."""
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in (read_text(f"/proc/net/{protocol}") or "").splitlines()[1:]:
            yield _parsed(protocol, line.split())


def _parsed(protocol: str, fields: list[str]) -> Socket:
    address, port = _endpoint(fields[1])
    remote, remote_port = _endpoint(fields[2])
    return Socket(
        protocol=protocol[:3],
        address=address,
        port=port,
        state=int(fields[3], 16),
        uid=int(fields[7]),
        inode=int(fields[9]),
        remote=f"{remote}:{remote_port}",
    )


def _endpoint(text: str) -> tuple[str, int]:
    address, _, port = text.partition(":")
    words = struct.pack(f"={len(address) // 8}I", *(int(address[i : i + 8], 16) for i in range(0, len(address), 8)))
    return str(ipaddress.ip_address(words)), int(port, 16)


def established_by(uid: int) -> list[str]:
    """Open TCP connections of one user, as text."""
    return sorted(
        f"{s.address}:{s.port} → {s.remote}"
        for s in sockets()
        if s.protocol == "tcp" and s.state == _ESTABLISHED and s.uid == uid
    )


def listening(at: Container[tuple[str, int]] | None = None) -> list[dict[str, str | int]]:
    """What can be connected to: protocol, address, port and program ("?" where no process shows it).

    `at`: only at these, each a protocol and a port. Where nothing listens no process is looked at, which is what costs.
    """
    there = [s for s in sockets() if _listens(s) and (at is None or (s.protocol, s.port) in at)]
    owners = _programs_by_inode() if there else {}
    installed = functools.cache(packaged_paths)
    found = {(s.protocol, s.address, s.port, _name(owners.get(s.inode, "?"), installed)) for s in there}
    return [{"protocol": p, "address": a, "port": n, "program": o} for p, a, n, o in sorted(found)]


def _name(program: str, installed: Callable[[], frozenset[str]]) -> str:
    """A package's program that was upgraded while it runs is the same: the kernel says that its file is deleted."""
    name = program.removesuffix(DELETED)
    return name if name == program or merged(name) in installed() else program


def _listens(socket: Socket) -> bool:
    return (socket.protocol, socket.state) in (("tcp", _LISTEN), ("udp", _UDP_UNCONNECTED))


def lasting() -> list[dict[str, str | int | None]]:
    """What listens, without the numbers that the kernel hands out: at the next start they are others (port None)."""
    first = first_ephemeral()
    found = {
        (
            p["protocol"],
            p["address"],
            None if int(p["port"]) >= first and p["program"] != "?" else p["port"],
            p["program"],
        )
        for p in listening()
    }
    return [{"protocol": p, "address": a, "port": n, "program": o} for p, a, n, o in sorted(found, key=str)]


def known(before: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What listened in a baseline, also as it is called once it was started again after an upgrade."""
    for each in before:
        yield each
        yield each | {"program": each["program"].removesuffix(DELETED)}


def _programs_by_inode() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        for inode in _socket_inodes(name):
            found.setdefault(inode, program(int(name)))
    return found


def _socket_inodes(pid: str) -> Iterator[int]:
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for number in numbers:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue
        if target.startswith("socket:["):
            yield int(target[8:-1])


def first_ephemeral() -> int:
    """From this port on the kernel hands them out by itself."""
    return int((read_text("/proc/sys/net/ipv4/ip_local_port_range") or "32768 60999").split()[0])
