"""One HTTP exchange with another program of the site, over by its deadline whatever the other side does.

No proxy is asked and no redirection followed: credentials go where the settings say, and nowhere else. Whoever waits
here holds no database connection. What is asked and what the answer means is told by who asks (prometheus.py,
alertmanager.py, pipeline.py).
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from portal.db import release_connection

MAX_BYTES = 64 * 1024 * 1024


class NoAnswer(Exception):
    """The other side cannot be reached, hung up, or took longer than the deadline; the text says which."""


class TooLong(Exception):
    """The answer has more than MAX_BYTES."""


def exchange(
    method: str, url: str, *, body: bytes | None = None, headers: Mapping[str, str], deadline_s: float
) -> tuple[int, bytes]:
    """The status and the whole body of the answer. Raises NoAnswer and TooLong."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=deadline_s)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    release_connection()  # or one that hangs would leave none for those who never ask it
    with contextlib.closing(connection), _deadline(deadline_s) as (expired, cut):
        try:
            connection.connect()
            cut.append(connection.sock)
            connection.request(method, target, body, dict(headers))
            response = connection.getresponse()
            answer = response.read(MAX_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            late = expired.is_set() or isinstance(error, TimeoutError)
            why = f"no answer within {deadline_s:g} s" if late else str(error) or type(error).__name__
            raise NoAnswer(why) from None
        if expired.is_set():  # what was cut off looks like the end of an answer without a length
            raise NoAnswer(f"no answer within {deadline_s:g} s")
        if len(answer) > MAX_BYTES:
            raise TooLong
        return response.status, answer


def basic(user: str, password: str) -> str:
    """The value of an Authorization header."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@contextmanager
def _deadline(seconds: float) -> Iterator[tuple[threading.Event, list[socket.socket]]]:
    """Cut these sockets when the time is up: a timeout of their own begins anew with every byte that trickles in."""
    expired, sockets = threading.Event(), list[socket.socket]()

    def cut() -> None:
        expired.set()
        for each in sockets:
            with contextlib.suppress(OSError):  # the other side was first
                each.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield expired, sockets
    finally:
        timer.cancel()
