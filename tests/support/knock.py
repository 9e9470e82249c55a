"""Knock at an address of which the kernel would say that it is not on the cable: 127.0.0.1 of a neighbour.

`knock.py INTERFACE SOURCE CARD ADDRESS PORT…` sends a SYN in a frame of its own to the neighbour's card, as root, and
prints the ports that answered with SYN-ACK. A program by itself, so that it runs in any network namespace.
"""

from __future__ import annotations

import secrets
import socket
import struct
import sys
import time

FROM_PORT = 40_000 + secrets.randbelow(20_000)  # another each time, or it would be the connection of before
WAIT_S = 1.5
IPV4 = 0x0800
SYN_ACK = 0x12


def main(interface: str, source: str, card: str, address: str, *ports: str) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(IPV4)) as cable:
        cable.bind((interface, 0))
        own = cable.getsockname()[4]
        frame = bytes.fromhex(card.replace(":", "")) + own + struct.pack("!H", IPV4)
        for port in [*ports, *ports]:  # the second for what was lost
            cable.send(frame + syn(source, address, int(port)))
        print(*sorted(answers(cable, socket.inet_aton(address))))


def syn(source: str, address: str, port: int) -> bytes:
    """A packet that asks for a connection."""
    ends = socket.inet_aton(source) + socket.inet_aton(address)
    tcp = struct.pack("!HHIIBBHHH", FROM_PORT, port, 1000, 0, 5 << 4, 0x02, 64240, 0, 0)
    seen_as = ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp))
    tcp = tcp[:16] + checksum(seen_as + tcp) + tcp[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, socket.IPPROTO_TCP, 0)
    return head[:10] + checksum(head + ends) + ends + tcp


def checksum(data: bytes) -> bytes:
    """Of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    return struct.pack("!H", ~total & 0xFFFF)


def answers(cable: socket.socket, address: bytes) -> set[int]:
    found = set()
    deadline = time.monotonic() + WAIT_S
    while (left := deadline - time.monotonic()) > 0:
        cable.settimeout(left)
        try:
            packet = cable.recv(2048)[14:]
        except TimeoutError:
            break
        tcp = packet[(packet[0] & 0x0F) * 4 :]
        if packet[9] != socket.IPPROTO_TCP or packet[12:16] != address or len(tcp) < 20:
            continue
        port, to = struct.unpack("!HH", tcp[:4])
        if to == FROM_PORT and tcp[13] == SYN_ACK:
            found.add(port)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
