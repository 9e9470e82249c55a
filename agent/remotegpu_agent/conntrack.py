"""The connections that the kernel follows: which there are, and forgetting some of them.

A firewall lets the packets of a connection that it knows pass without asking its rules again, so what a rule let in
outlives the rule. Asked by netlink, since the program `conntrack` is on few hosts and cannot name a range of ports.
Whose connections end, and when, is forwards.py's to say; openings.py needs none of it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remotegpu_agent.observe.tools import ToolFailed
from remotegpu_agent.protocol import Address

PROTOCOLS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}

# linux/netlink.h, linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h
_NETLINK_NETFILTER = 12
_HEADER, _NFGEN, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("!BBH"), struct.Struct("=HH")
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF
_GET, _DELETE = 0x101, 0x102
_TUPLE_ORIG, _ID, _ZONE = 1, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_SOURCES, _DESTINATIONS = (1, 3), (2, 4)  # of IPv4, of IPv6
_PROTO_NUM, _PROTO_DST_PORT = 1, 3
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Flow:
    """One connection, as whoever began it sent its first packet: before any address was rewritten."""

    protocol: str
    source: Address
    destination: Address
    destination_port: int
    key: bytes  # what the kernel finds it by again


def flows() -> list[Flow]:
    """Every TCP and UDP connection. Raises ToolFailed."""
    found: list[Flow] = []
    with _open() as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                answers = list(_ask(kernel, _GET, _REQUEST | _DUMP, family))
            except OSError as error:
                raise ToolFailed(f"the kernel does not list its connections: {error}") from error
            read = (_read(body) for kind, body in answers if kind >> 8 == _GET >> 8)
            found += [flow for flow in read if flow is not None]
    return found


def forget(ended: Iterable[Flow]) -> int:
    """Have the kernel forget these; answers how many it still knew. Raises ToolFailed."""
    forgotten = 0
    with _open() as kernel:
        for flow in ended:
            family = socket.AF_INET if flow.source.version == 4 else socket.AF_INET6
            try:
                list(_ask(kernel, _DELETE, _REQUEST | _ACK, family, flow.key))
            except FileNotFoundError:
                continue  # it has ended meanwhile
            except OSError as error:
                raise ToolFailed(f"the kernel does not forget a connection: {error}") from error
            forgotten += 1
    return forgotten


def _open() -> socket.socket:
    try:
        kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    except OSError as error:
        raise ToolFailed(f"the kernel cannot be asked for its connections: {error}") from error
    kernel.settimeout(_PATIENCE_S)
    kernel.bind((0, 0))
    return kernel


def _ask(
    kernel: socket.socket, what: int, flags: int, family: int, attributes: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """The answers, each with its type. Raises OSError with the kernel's own number, ToolFailed when none comes."""
    body = _NFGEN.pack(family, 0, 0) + attributes
    kernel.send(_HEADER.pack(_HEADER.size + len(body), what, flags, 1, 0) + body)
    while True:
        try:
            data = kernel.recv(1 << 18)
        except TimeoutError as error:
            raise ToolFailed(f"the kernel says nothing of its connections within {_PATIENCE_S:.0f} s") from error
        while data:
            size, kind, _flags, _sequence, _port = _HEADER.unpack_from(data)
            answer, data = data[_HEADER.size : size], data[_aligned(size) :]
            if kind == _DONE:
                return
            if kind == _ERROR:
                number = -struct.unpack_from("=i", answer)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return
            yield kind, answer


def _read(body: bytes) -> Flow | None:
    """The connection in one answer; None where it is neither TCP nor UDP."""
    attributes = _attributes(body[_NFGEN.size :])
    ends = _attributes(attributes.get(_TUPLE_ORIG, b""))
    addresses, protocol = _attributes(ends.get(_TUPLE_IP, b"")), _attributes(ends.get(_TUPLE_PROTO, b""))
    name = PROTOCOLS.get(protocol.get(_PROTO_NUM, b"\0")[0])
    if name is None:
        return None
    key = _attribute(_TUPLE_ORIG | _NESTED, attributes[_TUPLE_ORIG])
    for kind in (_ID, _ZONE):
        if kind in attributes:
            key += _attribute(kind, attributes[kind])
    return Flow(
        protocol=name,
        source=_address(addresses, _SOURCES),
        destination=_address(addresses, _DESTINATIONS),
        destination_port=int.from_bytes(protocol[_PROTO_DST_PORT], "big"),
        key=key,
    )


def _address(addresses: dict[int, bytes], kinds: tuple[int, int]) -> Address:
    return ipaddress.ip_address(next(addresses[kind] for kind in kinds if kind in addresses))


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        if size < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : size]
        data = data[_aligned(size) :]
    return found


def _attribute(kind: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(_aligned(size) - size)


def _aligned(size: int) -> int:
    return (size + 3) & ~3
