"""/metrics: who may read it, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from portal.app import create_app
from portal.db import db, utcnow
from portal.models import User
from portal.services import tokens
from portal.settings import Settings
from tests.factories import actor_of, make_machine

SignIn = Callable[[User], Any]


@pytest.fixture
def bearer(operator: User) -> dict[str, str]:
    return bearer_of(operator, "prometheus")


def bearer_of(owner: User, *scopes: str) -> dict[str, str]:
    expires_at = utcnow() + timedelta(days=30)
    secret = tokens.create(owner, name="p", scopes=list(scopes), expires_at=expires_at, by=actor_of(owner))[1]
    return {"Authorization": f"Bearer {secret}"}


def requests_counted(text: str) -> dict[tuple[str, str, str], float]:
    return {
        (sample.labels["area"], sample.labels["method"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "remotegpu_http_requests_total"
    }


def test_it_is_text_that_prometheus_reads(client: FlaskClient, bearer: dict[str, str]) -> None:
    make_machine("gpu-1")
    answer = client.get("/metrics", headers=bearer)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = [family.name for family in text_string_to_metric_families(answer.text)]
    assert len(names) == len(set(names)) > 10
    assert {"remotegpu_machines", "remotegpu_http_requests", "remotegpu_queue_depth"} <= set(names)


def test_only_staff_and_their_tokens_with_the_scope_may_read_it(
    client: FlaskClient, sign_in: SignIn, operator: User, customer: User
) -> None:
    nobody = client.get("/metrics")
    assert (nobody.status_code, nobody.mimetype) == (401, "application/problem+json")
    assert client.get("/metrics", headers=sign_in(operator).headers).status_code == 200
    assert client.get("/metrics", headers=sign_in(customer).headers).status_code == 403
    assert client.get("/metrics", headers=bearer_of(operator, "read")).status_code == 403
    assert client.get("/metrics", headers=bearer_of(customer, "read")).status_code == 403


@pytest.mark.parametrize(
    ("allow", "address", "headers", "status"),
    [
        ("", "127.0.0.1", {}, 401),
        ("127.0.0.1", "127.0.0.1", {}, 200),
        ("127.0.0.1", "192.0.2.1", {}, 401),
        ("10.0.0.0/8, ::1", "10.9.8.7", {}, 200),
        ("10.0.0.0/8, ::1", "::1", {}, 200),
        ("10.0.0.0/8", "::ffff:10.9.8.7", {}, 200),
        ("::/0", "10.9.8.7", {}, 401),
        # A proxy that nobody told us of stands in front: everybody seems to come from it.
        ("127.0.0.1", "127.0.0.1", {"X-Forwarded-For": "203.0.113.5"}, 401),
        ("127.0.0.1", "127.0.0.1", {"Forwarded": "for=203.0.113.5"}, 401),
    ],
)
def test_addresses_that_are_allowed_need_no_token(
    client: FlaskClient, settings: Settings, allow: str, address: str, headers: dict[str, str], status: int
) -> None:
    object.__setattr__(settings, "metrics_allow", allow)
    answer = client.get("/metrics", environ_base={"REMOTE_ADDR": address}, headers=headers)
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("sender", "headers", "status"),
    [
        ("127.0.0.1", {"X-Forwarded-For": "10.0.0.9"}, 200),
        ("127.0.0.1", {"X-Forwarded-For": "203.0.113.5"}, 401),
        ("127.0.0.1", {"X-Forwarded-For": "10.0.0.9, 203.0.113.5"}, 401),
        ("127.0.0.1", {}, 401),  # a proxy that does not say who it was
        ("192.0.2.1", {"X-Forwarded-For": "10.0.0.9"}, 401),  # somebody who says so himself
    ],
)
def test_behind_a_known_proxy_the_address_is_that_of_the_caller(
    database: Any, settings: Settings, sender: str, headers: dict[str, str], status: int
) -> None:
    object.__setattr__(settings, "metrics_allow", "127.0.0.1, 10.0.0.0/8")
    object.__setattr__(settings, "trusted_proxies", "127.0.0.1")
    client = create_app(settings).test_client()
    assert client.get("/metrics", environ_base={"REMOTE_ADDR": sender}, headers=headers).status_code == status


def test_answers_are_counted_by_area_and_status(client: FlaskClient, bearer: dict[str, str]) -> None:
    before = requests_counted(client.get("/metrics", headers=bearer).text)
    client.get("/api/v1/admin/machines")
    client.get("/healthz")
    client.get("/sign-in")
    client.get("/nowhere")
    client.post("/api/v1/agent/sync", json={})
    client.open("/healthz", method="BREW")
    after = requests_counted(client.get("/metrics", headers=bearer).text)
    new = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    assert new == {
        ("api", "GET", "401"): 1,
        ("page", "GET", "200"): 2,
        ("page", "GET", "404"): 1,
        ("agent", "POST", "401"): 1,
        ("page", "other", "405"): 1,
        ("metrics", "GET", "200"): 1,  # the one before
    }


def test_where_the_database_is_away_it_is_an_error(client: FlaskClient, bearer: dict[str, str]) -> None:
    db.execute_sql("ALTER TABLE machine_report RENAME TO away")
    try:
        answer = client.get("/metrics", headers=bearer)
    finally:
        db.execute_sql("ALTER TABLE away RENAME TO machine_report")
    assert (answer.status_code, answer.mimetype) == (500, "application/problem+json")
