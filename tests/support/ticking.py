"""A connection that never rests, to see when it is cut. A program by itself, which runs in any place of the network.

`ticking.py serve PORT` sends without pause to whoever has connected over TCP or said hello over UDP, and prints what it
hears.
`ticking.py follow tcp|udp ADDRESS PORT MOST` prints "open", then "lasting" after MOST ticks, or "cut" where none came
for a while, and none came either when it had spoken once more.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

EVERY_S = 0.05
PATIENCE_S = 1.5


def serve(port: str) -> None:
    tcp = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.bind(("::", int(port)))
    _start(_serve_udp, udp)
    print("listening", flush=True)
    while True:
        connection, _ = tcp.accept()
        _start(_hear, connection)
        _start(_tick, lambda connection=connection: connection.sendall(b"t"))


def _serve_udp(udp: socket.socket) -> None:
    known = set()
    while True:
        word, caller = udp.recvfrom(100)
        print("heard", word.decode(), flush=True)
        if word != b"hello":
            udp.sendto(b"t", caller)
        elif caller not in known:
            known.add(caller)
            _start(_tick, lambda caller=caller: udp.sendto(b"t", caller))


def _hear(connection: socket.socket) -> None:
    while word := connection.recv(100):
        print("heard", word.decode(), flush=True)


def _tick(send: Any) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            with contextlib.suppress(PermissionError):  # a firewall that drops what leaves says so
                send()
            time.sleep(EVERY_S)


def _start(work: Any, *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def follow(protocol: str, address: str, port: str, most: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    connection.settimeout(PATIENCE_S)
    connection.connect((address, int(port)))
    connection.sendall(b"hello")
    heard = len(connection.recv(4096))
    print("open", flush=True)
    try:
        while heard < int(most):
            heard += len(connection.recv(4096))
        print("lasting", flush=True)
    except TimeoutError:
        _speak_once_more(connection)


def _speak_once_more(connection: socket.socket) -> None:
    try:
        connection.sendall(b"too late")
        connection.recv(4096)
        print("not cut", flush=True)
    except TimeoutError:
        print("cut", flush=True)


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"serve": serve, "follow": follow}
    roles[sys.argv[1]](*sys.argv[2:])
