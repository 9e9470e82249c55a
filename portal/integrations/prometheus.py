"""The HTTP API of Prometheus: instant and range queries, each of which ends by its deadline, whatever the server does.

What is asked and what it means is in services/monitoring_charts.py. Nothing here is retried or remembered.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import math
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

import orjson

from portal.errors import Unavailable
from portal.settings import Settings

DEADLINE_S = 5.0  # a chart asks up to three times, and somebody waits for it
MAX_POINTS = 11_000  # of one series; Prometheus refuses more
MAX_BYTES = 64 * 1024 * 1024


class PrometheusDown(Unavailable):
    """It cannot be reached, or took longer than the deadline."""

    code = "prometheus_down"


class PrometheusRefused(Unavailable):
    """It answered, but not with what was asked for: credentials, a query that is too large or that it rejects."""

    code = "prometheus_refused"


@dataclass(frozen=True)
class Series:
    """Points are (seconds since 1970, value). NaN and infinities are no values: None."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float | None], ...]

    @property
    def value(self) -> float | None:
        """The last value: of an instant query, the only one."""
        return self.points[-1][1]


@dataclass(frozen=True)
class Prometheus:
    """Where it is, and who we are there."""

    url: str
    authorization: str | None = field(default=None, repr=False)
    deadline_s: float = DEADLINE_S

    def query(self, expression: str, *, at: float | None = None) -> list[Series]:
        """Every series of an instant vector, at that time or now. Raises PrometheusDown or PrometheusRefused."""
        asked = {"query": expression} | ({} if at is None else {"time": f"{at:.3f}"})
        return [Series(entry["metric"], (_point(entry["value"]),)) for entry in self._ask("query", asked)]

    def query_range(self, expression: str, *, start: float, end: float, step_s: int) -> list[Series]:
        """Every series from `start` to `end`, a point each `step_s`. Raises ValueError for more than MAX_POINTS."""
        if (end - start) / step_s >= MAX_POINTS:
            raise ValueError(f"{(end - start) / step_s:.0f} points are more than the {MAX_POINTS} Prometheus allows")
        asked = {"query": expression, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": str(step_s)}
        found = self._ask("query_range", asked)
        return [Series(entry["metric"], tuple(map(_point, entry["values"]))) for entry in found]

    def _ask(self, what: str, asked: Mapping[str, str]) -> list[Any]:
        """POST, since an address has a greatest length and an expression has none."""
        body = urlencode({**asked, "timeout": f"{self.deadline_s:g}s"}).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        if self.authorization:
            headers["Authorization"] = self.authorization
        path = f"{urlsplit(self.url).path.rstrip('/')}/api/v1/{what}"
        status, answer = self._exchange(path, body, headers)
        if status in (401, 403):
            raise PrometheusRefused("Prometheus does not accept our credentials; see PROMETHEUS_TOKEN and its like.")
        told = _parsed(answer)
        if status != 200 or told.get("status") != "success":
            raise PrometheusRefused(f"Prometheus refuses the query: {told.get('error') or f'HTTP {status}'}")
        found: list[Any] = told["data"]["result"]
        return found

    def _exchange(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection = self._connection()
        try:
            with _deadline(self.deadline_s) as (expired, cut):
                try:
                    connection.connect()
                    cut.append(connection.sock)
                    connection.request("POST", path, body, dict(headers))
                    response = connection.getresponse()
                    answer = _read(response)
                except (OSError, http.client.HTTPException) as error:
                    late = expired.is_set() or isinstance(error, TimeoutError)
                    why = f"no answer within {self.deadline_s:g} s" if late else str(error) or type(error).__name__
                    raise PrometheusDown(f"Prometheus does not answer: {why}") from None
                if expired.is_set():  # what was cut off looks like the end of an answer without a length
                    raise PrometheusDown(f"Prometheus does not answer: no answer within {self.deadline_s:g} s")
                return response.status, answer
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=self.deadline_s)


def of_settings(settings: Settings) -> Prometheus | None:
    """The Prometheus of this portal; None where there is none."""
    if settings.prometheus_url is None:
        return None
    return Prometheus(settings.prometheus_url, _authorization(settings))


def _authorization(settings: Settings) -> str | None:
    if settings.prometheus_token:
        return f"Bearer {settings.prometheus_token}"
    if settings.prometheus_user:
        pair = f"{settings.prometheus_user}:{settings.prometheus_password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"
    return None


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


def _read(response: http.client.HTTPResponse) -> bytes:
    answer = response.read(MAX_BYTES + 1)
    if len(answer) > MAX_BYTES:
        raise PrometheusRefused("Prometheus answers with more than 64 MiB; ask for less.")
    return answer


def _parsed(answer: bytes) -> dict[str, Any]:
    try:
        told = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def _point(pair: Any) -> tuple[float, float | None]:
    value = float(pair[1])
    return float(pair[0]), value if math.isfinite(value) else None
