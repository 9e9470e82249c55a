"""`/metrics`: the portal for Prometheus, and the counting of requests.

Several web processes answer, so each counts into files that all of them read (prometheus_client's multiprocess mode,
set up in cli/web.py); what the database knows is asked for anew by services/monitoring_samples.py. It is read by a
token with the scope `prometheus`, by signed-in staff, and without either from the addresses in METRICS_ALLOW.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from flask import Blueprint, Response, current_app, request
from flask.typing import ResponseReturnValue
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from portal.api.guard import requires, says_who
from portal.db import utcnow
from portal.services import alerts_samples, monitoring_samples
from portal.services.actors import STAFF
from portal.settings import Settings, networks

BY_KNOWN_PROXY = "werkzeug.proxy_fix.orig"  # set where portal/proxies.py has believed a proxy
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads it when it is imported
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
AREAS = (("/api/v1/agent/", "agent"), ("/api/", "api"), ("/static/", "static"), ("/metrics", "metrics"))
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_registry = CollectorRegistry()
REQUESTS = Counter(
    "remotegpu_http_requests",
    "Requests answered, by area (agent, api, page, static, metrics)",
    ("area", "method", "status"),
    registry=_registry,
)
SECONDS = Histogram(
    "remotegpu_http_request_seconds",
    "Time until an answer begins; calls of agents are held on purpose and not in it",
    ("area",),
    buckets=BUCKETS_S,
    registry=_registry,
)

bp = Blueprint("metrics", __name__)


@bp.get("/metrics")
@says_who(*STAFF)
def show() -> ResponseReturnValue:
    if may_without_token(request.remote_addr, current_app.config["SETTINGS"]):
        return _answer()
    return _for_token()


def may_without_token(address: str | None, settings: Settings) -> bool:
    """Whether METRICS_ALLOW names where this request comes from.

    A request that passed a proxy which nobody told us of (TRUSTED_PROXIES) seems to come from that proxy, usually from
    loopback, whoever sent it, and so does one whose proxy does not say who sent it: then the address says nothing.
    """
    allowed = networks(settings.metrics_allow)
    if not allowed or address is None:
        return False
    is_forwarded = "X-Forwarded-For" in request.headers or "Forwarded" in request.headers
    if is_forwarded != (BY_KNOWN_PROXY in request.environ):
        return False
    try:
        caller = ipaddress.ip_address(address)
    except ValueError:
        return False
    caller = getattr(caller, "ipv4_mapped", None) or caller
    return any(caller.version == network.version and caller in network for network in allowed)


@requires(*STAFF, scope="prometheus")
def _for_token() -> Response:
    return _answer()


def _answer() -> Response:
    """The rows first: where the database is away this is an error, and Prometheus notes that the portal is down."""
    rows = monitoring_samples.exposition(utcnow())
    rows += alerts_samples.exposition(utcnow())
    return Response(generate_latest(_counted_by_all()).decode() + rows, content_type=CONTENT_TYPE)


def _counted_by_all() -> CollectorRegistry:
    if VARIABLE not in os.environ:
        return _registry
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # it has no types
    return registry


# Counting


Start = Callable[..., Any]


def counting(wsgi_app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The same application; every answer is counted, whoever gave it."""

    def counted(environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
        began, area = time.perf_counter(), area_of(environ.get("PATH_INFO", ""))
        method = environ.get("REQUEST_METHOD", "")

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            # Labels are a closed set: a stranger must not be able to make series.
            REQUESTS.labels(area, method if method in METHODS else "other", status[:3]).inc()
            if area != "agent":
                SECONDS.labels(area).observe(time.perf_counter() - began)
            return start_response(status, headers, *exc_info)

        return wsgi_app(environ, start)

    return counted


def area_of(path: str) -> str:
    return next((area for prefix, area in AREAS if path.startswith(prefix)), "page")
