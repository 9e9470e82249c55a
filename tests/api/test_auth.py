"""Signing in, refreshing and signing out."""

from __future__ import annotations

from tests.factories import PASSWORD


def test_whoever_knows_the_password_gets_tokens_that_work(client, operator):
    answer = client.post("/api/v1/auth/login", json={"username": "olga", "password": PASSWORD})
    assert answer.status_code == 200, answer.json
    token = answer.json["access_token"]
    me = client.get("/api/v1/auth/me", headers={"Authorization": f"Bearer {token}"})
    assert me.json["role"] == "operator"
    assert client.get(f"/api/v1/auth/me?jwt={token}").status_code == 401
