"""The HTTP API of Prometheus: instant and range queries, each of which ends by its deadline, whatever the server does.

What is asked and what it means is in services/monitoring_charts.py. Nothing here is retried or remembered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import orjson

from portal.errors import Unavailable
from portal.integrations.exchange import NoAnswer, TooLong, basic, exchange
from portal.settings import Settings

DEADLINE_S = 5.0  # a chart asks up to three times, and somebody waits for it
MAX_POINTS = 11_000  # of one series; Prometheus refuses more


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
        url = f"{self.url.rstrip('/')}/api/v1/{what}"
        try:
            status, answer = exchange("POST", url, body=body, headers=headers, deadline_s=self.deadline_s)
        except NoAnswer as error:
            raise PrometheusDown(f"Prometheus does not answer: {error}") from None
        except TooLong:
            raise PrometheusRefused("Prometheus answers with more than 64 MiB; ask for less.") from None
        if status in (401, 403):
            raise PrometheusRefused("Prometheus does not accept our credentials; see PROMETHEUS_TOKEN and its like.")
        told = _parsed(answer)
        if status != 200 or told.get("status") != "success":
            raise PrometheusRefused(f"Prometheus refuses the query: {told.get('error') or f'HTTP {status}'}")
        found: list[Any] = told["data"]["result"]
        return found


def of_settings(settings: Settings) -> Prometheus | None:
    """The Prometheus of this portal; None where there is none."""
    if settings.prometheus_url is None:
        return None
    return Prometheus(settings.prometheus_url, _authorization(settings))


def _authorization(settings: Settings) -> str | None:
    if settings.prometheus_token:
        return f"Bearer {settings.prometheus_token}"
    if settings.prometheus_user:
        return basic(settings.prometheus_user, settings.prometheus_password)
    return None


def _parsed(answer: bytes) -> dict[str, Any]:
    try:
        told = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def _point(pair: Any) -> tuple[float, float | None]:
    value = float(pair[1])
    return float(pair[0]), value if math.isfinite(value) else None
