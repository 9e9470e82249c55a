"""Asking Prometheus ends by its deadline, and each way in which it can fail has a name."""

from __future__ import annotations

import socket
import time
from functools import partial
from typing import Any

import pytest

from portal.integrations import prometheus
from portal.integrations.prometheus import Prometheus, PrometheusDown, PrometheusRefused
from portal.settings import Settings
from tests.support.one_answer import Answer, answering, saying, trickling

asked = partial(answering, after=b"query=")  # it stands in the body, which follows the head


def vector(*values: tuple[dict[str, str], str]) -> dict[str, Any]:
    result = [{"metric": labels, "value": [1000.5, value]} for labels, value in values]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


def test_an_answer_becomes_values_and_what_is_no_number_is_none() -> None:
    said = vector(({"host": "a"}, "0"), ({"host": "b"}, "NaN"), ({"host": "c"}, "+Inf"))
    with asked(saying("200 OK", said)) as (url, heard):
        found = Prometheus(url + "/prefix/").query("up", at=1000)
    assert [(series.labels["host"], series.value) for series in found] == [("a", 0.0), ("b", None), ("c", None)]
    assert found[0].points == ((1000.5, 0.0),)
    assert b"".join(heard).startswith(b"POST /prefix/api/v1/query HTTP/1.1\r\n")
    assert b"Authorization" not in b"".join(heard)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"prometheus_token": "tok"}, b"Authorization: Bearer tok\r\n"),
        ({"prometheus_user": "u", "prometheus_password": "p"}, b"Authorization: Basic dTpw\r\n"),
    ],
)
def test_our_credentials_go_along_and_are_not_shown(settings: Settings, given: dict[str, str], sent: bytes) -> None:
    with asked(saying("200 OK", vector())) as (url, heard):
        for name, value in {**given, "prometheus_url": url}.items():
            object.__setattr__(settings, name, value)
        asking = prometheus.of_settings(settings)
        assert asking is not None
        assert asking.query("up") == []
    assert sent in b"".join(heard)
    assert "authorization" not in repr(asking)


def test_without_an_address_there_is_none(settings: Settings) -> None:
    assert prometheus.of_settings(settings) is None


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (saying("401 Unauthorized", "no"), "does not accept our credentials"),
        (saying("403 Forbidden", "no"), "does not accept our credentials"),
        (saying("400 Bad Request", {"status": "error", "error": "parse error"}), "refuses the query: parse error"),
        (saying("503 Service Unavailable", "<html>"), "refuses the query: HTTP 503"),
        (saying("200 OK", "<html>"), "refuses the query: HTTP 200"),
        (saying("200 OK", "[]"), "refuses the query: HTTP 200"),
        (saying("302 Found", "", Location="http://192.0.2.1/"), "refuses the query: HTTP 302"),
    ],
)
def test_a_refusal_is_told(answer: Answer, told: str) -> None:
    with asked(answer) as (url, _heard), pytest.raises(PrometheusRefused, match=told):
        Prometheus(url).query("up")


def test_nobody_there_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PrometheusDown, match="Connection refused"):
        Prometheus(f"http://127.0.0.1:{port}").query("up")


def test_a_server_that_hangs_up_is_told() -> None:
    with asked(lambda _connection: None) as (url, _heard), pytest.raises(PrometheusDown, match="does not answer"):
        Prometheus(url).query("up")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_a_server_that_trickles_is_left_at_the_deadline(head: bytes) -> None:
    began = time.monotonic()
    with asked(trickling(head)) as (url, _heard), pytest.raises(PrometheusDown, match=r"no answer within 0\.3 s"):
        Prometheus(url, deadline_s=0.3).query("up")
    assert time.monotonic() - began < 20


def test_more_points_than_prometheus_allows_are_not_asked_for() -> None:
    with pytest.raises(ValueError, match="more than the 11000"):
        Prometheus("http://127.0.0.1:1").query_range("up", start=0, end=11_000 * 15, step_s=15)
