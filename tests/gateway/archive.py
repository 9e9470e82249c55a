#!/usr/bin/env python3
"""Answers a request when it has ended, as `ssh host tar x` and many protocols do; and asks so. `serve PORT`, or
`ask ADDRESS PORT SOURCE`: sends all, half-closes, prints `half` when it has read so much, and goes on after a line.

`wait ADDRESS PORT SOURCE` is somebody else's patience: prints `in`, says nothing until it gets a line, then one word,
and prints what it is told. SOURCE is the address to come from.
"""

from __future__ import annotations

import hashlib
import socket
import socketserver
import sys

REQUEST = b"a word " * 150_000
ANSWER_BYTES = 32 * 1024 * 1024  # more than the buffers on the way hold
PATIENCE_S = 60.0


def answer_to(request: bytes) -> bytes:
    return hashlib.shake_256(request).digest(ANSWER_BYTES)


class Archive(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(answer_to(self.rfile.read()))


class Server(socketserver.ThreadingTCPServer):
    address_family, daemon_threads, allow_reuse_address = socket.AF_INET6, True, True


def connect(address: str, port: str, source: str) -> socket.socket:
    return socket.create_connection((address, int(port)), timeout=PATIENCE_S, source_address=(source, 0))


def ask(where: socket.socket) -> str:
    where.sendall(REQUEST)
    where.shutdown(socket.SHUT_WR)
    with where.makefile("rb") as answer:
        told = answer.read(ANSWER_BYTES // 2)
        print("half", flush=True)
        sys.stdin.readline()
        told += answer.read()
    return "whole" if told == answer_to(REQUEST) else f"{len(told)} bytes, and not those"


def wait(where: socket.socket) -> str:
    with where.makefile("rwb") as talk:
        talk.readline()
        print("in", flush=True)
        sys.stdin.readline()
        talk.write(b"still there?\n")
        talk.flush()
        return talk.readline().decode().strip()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "serve":
        Server(("::", int(rest[0])), Archive).serve_forever()
    else:
        with connect(*rest) as connection:
            print({"ask": ask, "wait": wait}[what](connection))
