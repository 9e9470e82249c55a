"""A server for one call, over a bare socket: what it answers, and how it fails to, is up to the test."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[[socket.socket], None]


@contextmanager
def answering(answer: Answer, *, after: bytes = b"\r\n\r\n") -> Iterator[tuple[str, list[bytes]]]:
    """Answers once it has read `after`; yields its address and what it was sent."""
    heard: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            while after not in b"".join(heard):
                part = connection.recv(65536)
                if not part:  # hung up: what was asked shows what is missing
                    return
                heard.append(part)
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
        thread.join(10)
        assert not thread.is_alive()


def saying(status: str, body: Any, **headers: str) -> Answer:
    text = body if isinstance(body, str) else json.dumps(body)
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(text.encode())}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return lambda connection: connection.sendall(("\r\n".join(lines) + "\r\n\r\n" + text).encode())


def trickling(head: bytes) -> Answer:
    """A byte now and then, until the other side hangs up."""

    def trickle(connection: socket.socket) -> None:
        connection.sendall(head)
        give_up_at = time.monotonic() + 8
        try:
            while time.monotonic() < give_up_at:
                connection.sendall(b" ")
                time.sleep(0.02)
        except OSError:
            return

    return trickle
