#!/usr/bin/env python3
"""Tells whoever comes which address that is: `serve PORT`; and asks for it: `ask ADDRESS PORT [SECONDS [SOURCE]]`.

`ask` prints what it was told, `refused` or `silence`; with SECONDS it then stays for so long, says a word again and
again, and prints `cut` when that is answered no more. SOURCE is the address that it comes from.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import time
from typing import Any

PATIENCE_S = 2.0


class Greeter(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        address = self.client_address[0].removeprefix("::ffff:")
        self.wfile.write(f"you are {address}\n".encode())
        for word in self.rfile:
            self.wfile.write(word)


class Server(socketserver.ThreadingTCPServer):
    address_family, daemon_threads, allow_reuse_address = socket.AF_INET6, True, True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever is cut off says no farewell."""


def ask(address: str, port: int, seconds: float = 0, source: str = "") -> str:
    try:
        server = socket.create_connection((address, port), timeout=PATIENCE_S, source_address=(source, 0))
    except TimeoutError:
        return "silence"
    except OSError:
        return "refused"
    with server:
        try:
            told = server.recv(100).decode().strip()
        except OSError:
            return "cut"
        return told if not seconds or stays(server, seconds) else "cut"


def stays(server: socket.socket, seconds: float) -> bool:
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            time.sleep(0.2)
            server.sendall(b"still there?\n")
            if not server.recv(100):
                return False
    except OSError:
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        Server(("::", int(sys.argv[2])), Greeter).serve_forever()
    else:
        where, port, *more = sys.argv[2:]
        print(ask(where, int(port), float(more[0]) if more else 0, more[1] if more[1:] else ""))  # noqa: T201
