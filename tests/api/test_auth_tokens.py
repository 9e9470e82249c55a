"""API tokens: as much as their scopes say, for as long as they live, and nowhere else."""

from __future__ import annotations

from datetime import timedelta

import pytest

from portal.db import utcnow
from portal.models import ApiToken
from portal.services import tokens, users
from portal.services.actors import SYSTEM


def in_days(days):
    return (utcnow() + timedelta(days=days)).isoformat()


@pytest.fixture
def token(sign_in, operator):
    body = {"name": "ci", "scopes": ["read"], "expires_at": in_days(30)}
    return sign_in(operator).post("/auth/tokens", body).json


def call(client, secret, path="/admin/customers", method="GET"):
    return client.open(f"/api/v1{path}", method=method, headers={"Authorization": f"Bearer {secret}"}, json={})


def test_a_token_opens_the_routes_that_name_its_scope(client, token):
    assert token["token"].startswith("rgt_")
    assert call(client, token["token"]).status_code == 200
    assert ApiToken.get().last_used_at is not None


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/admin/customers"), ("GET", "/auth/me"), ("POST", "/auth/tokens"), ("POST", "/auth/password")],
)
def test_a_token_opens_nothing_else(client, token, method, path):
    answer = call(client, token["token"], path, method)
    assert (answer.status_code, answer.json["code"]) == (403, "scope_missing")


def test_a_token_without_the_scope_is_refused(client, sign_in, operator):
    body = {"name": "inv", "scopes": ["inventory"], "expires_at": in_days(1)}
    secret = sign_in(operator).post("/auth/tokens", body).json["token"]
    assert call(client, secret).status_code == 403


def test_a_token_can_do_no_more_than_its_owner(client, sign_in, customer):
    body = {"name": "mine", "scopes": ["read"], "expires_at": in_days(1)}
    secret = sign_in(customer).post("/auth/tokens", body).json["token"]
    assert call(client, secret, "/customer/keys").status_code == 200
    assert call(client, secret).status_code == 403


def test_only_a_hash_of_it_is_kept_and_no_list_shows_it(sign_in, operator, token):
    listed = sign_in(operator).get("/auth/tokens")
    assert token["token"] not in listed.text
    assert "token" not in listed.json["items"][0]
    assert token["token"] not in str(ApiToken.get().__data__)


def test_a_revoked_token_is_refused_at_once(client, sign_in, operator, token):
    assert sign_in(operator).delete(f"/auth/tokens/{token['id']}").status_code == 204
    assert call(client, token["token"]).status_code == 401
    assert sign_in(operator).delete(f"/auth/tokens/{token['id']}").status_code == 404


def test_an_expired_token_is_refused(client, token):
    ApiToken.update(expires_at=utcnow() - timedelta(seconds=1)).execute()
    assert call(client, token["token"]).status_code == 401


def test_the_token_of_a_disabled_owner_is_refused(client, operator, token):
    users.disable(operator, by=SYSTEM)
    assert call(client, token["token"]).status_code == 401


def test_nobody_sees_or_revokes_the_tokens_of_others(sign_in, admin, token):
    assert sign_in(admin).get("/auth/tokens").json["total"] == 0
    assert sign_in(admin).delete(f"/auth/tokens/{token['id']}").status_code == 404
    assert ApiToken.get().revoked_at is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scopes": ["root"]}, "scopes.0"),
        ({"scopes": []}, "scopes"),
        ({"expires_at": in_days(-1)}, "expires_at"),
        ({"expires_at": in_days(400)}, "expires_at"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"user_id": 1}, "user_id"),
    ],
)
def test_a_token_with_wrong_terms_is_not_made(sign_in, operator, change, field):
    body = {"name": "ci", "scopes": ["read"], "expires_at": in_days(1), **change}
    answer = sign_in(operator).post("/auth/tokens", body)
    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])


def test_a_customer_makes_reading_tokens_only(sign_in, customer):
    for scope in set(tokens.SCOPES) - {"read"}:
        body = {"name": "x", "scopes": [scope], "expires_at": in_days(1)}
        assert sign_in(customer).post("/auth/tokens", body).status_code == 422
