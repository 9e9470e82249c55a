"""A form that arrives after its sign-in ran out: it is taken up again if it is ours, and only then."""

from __future__ import annotations

import html
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_jwt_extended import create_access_token, create_refresh_token, decode_token
from werkzeug.test import TestResponse

from portal.api import auth
from portal.models import SshKey, User
from portal.services import keys, sessions
from portal.services.sessions import Caller
from tests.factories import ssh_key_pair

Post = Callable[..., TestResponse]
PASSED = timedelta(minutes=-1)


@pytest.fixture
def csrf_token() -> dict[str, str]:
    """The CSRF token of the sign-in that ran out, as the page had it."""
    return {}


@pytest.fixture
def browser(app: Flask, customer: User, csrf_token: dict[str, str]) -> FlaskClient:
    """A browser whose access token has run out and whose refresh token has not."""
    session = sessions.start(customer, caller=Caller("192.0.2.10"), life_s=3600)
    with app.app_context():
        claims = {"generation": customer.generation, "family": session.family.id}
        access = create_access_token(str(customer.id), expires_delta=PASSED, additional_claims=claims)
        _, following = auth.tokens_of(session)
        csrf_token["access"], csrf_token["refresh"] = csrf_of(access), csrf_of(following)
    client = app.test_client()
    client.set_cookie("access_token_cookie", access)
    client.set_cookie("csrf_access_token", csrf_token["access"])
    client.set_cookie("refresh_token_cookie", following, path="/api/v1/auth")
    client.set_cookie("csrf_refresh_token", csrf_token["refresh"])
    return client


def csrf_of(token: str) -> str:
    return str(decode_token(token, allow_expired=True)["csrf"])


class Later(datetime):
    """The time that the library for tokens is told from now on."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # a plain datetime will do
        return datetime.now(tz) + timedelta(hours=1)


def test_a_page_comes_whose_token_runs_out_while_it_is_made(
    app: Flask, customer: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow request: the guard saw a valid token, the page is written when it is none any more."""
    session = sessions.start(customer, caller=Caller("192.0.2.10"), life_s=3600)
    with app.app_context():
        access, _ = auth.tokens_of(session)
        value = csrf_of(access)
    browser = app.test_client()
    browser.set_cookie("access_token_cookie", access)

    def slow(_user: User) -> dict[str, list[keys.Presence]]:
        monkeypatch.setattr("jwt.api_jwt.datetime", Later)
        return {}

    monkeypatch.setattr(keys, "presence_of", slow)
    answer = browser.get("/my/keys")
    assert answer.status_code == 200
    assert f'name="csrf_token" value="{value}"' in answer.text
    assert browser.get("/my/keys").status_code in (302, 401), "the next one is asked to sign in"


def test_our_own_form_comes_back_as_it_was_typed(browser: FlaskClient, csrf_token: dict[str, str]) -> None:
    typed = {"name": 'a "quoted" <name>', "key": "line one\nline two", "csrf_token": csrf_token["access"]}
    answer = browser.post("/my/keys?a=1", data=typed)
    assert answer.status_code == 401
    assert 'action="/my/keys?a=1"' in answer.text
    assert html.escape('a "quoted" <name>').replace("&quot;", "&#34;") in answer.text
    assert "line one\nline two</textarea>" in answer.text
    assert csrf_token["access"] not in answer.text, "the new page carries the token of the new sign-in"
    assert answer.headers["Cache-Control"] == "no-store"
    assert not SshKey.select().exists()


@pytest.mark.parametrize("sent", [None, "", "guessed", "refresh"])
def test_a_form_of_another_site_is_not_taken_up(
    browser: FlaskClient, csrf_token: dict[str, str], sent: str | None
) -> None:
    value = csrf_token["refresh"] if sent == "refresh" else sent
    answer = browser.post("/my/keys", data={"name": "theirs", **({} if value is None else {"csrf_token": value})})
    assert "theirs" not in answer.text
    assert answer.status_code in (302, 403)


def test_a_token_that_we_did_not_sign_takes_up_nothing(browser: FlaskClient, csrf_token: dict[str, str]) -> None:
    token = browser.get_cookie("access_token_cookie")
    assert token is not None
    head, body, _signature = token.value.split(".")
    browser.set_cookie("access_token_cookie", f"{head}.{body}.{'A' * 43}")
    answer = browser.post("/my/keys", data={"name": "theirs", "csrf_token": csrf_token["access"]})
    assert "theirs" not in answer.text
    assert answer.status_code == 302


def test_a_refresh_token_is_no_sign_in_of_a_form(app: Flask, browser: FlaskClient, customer: User) -> None:
    with app.app_context():
        token = create_refresh_token(str(customer.id), expires_delta=PASSED)
        value = csrf_of(token)
    browser.set_cookie("access_token_cookie", token)
    answer = browser.post("/my/keys", data={"name": "theirs", "csrf_token": value})
    assert "theirs" not in answer.text


def test_without_a_way_to_renew_one_signs_in_first(browser: FlaskClient, csrf_token: dict[str, str]) -> None:
    browser.delete_cookie("csrf_refresh_token")
    answer = browser.post("/my/keys", data={"name": "x", "csrf_token": csrf_token["access"]})
    assert answer.status_code == 302
    assert answer.headers["Location"].startswith("/sign-in")


def test_the_api_answers_programs_as_before(browser: FlaskClient, csrf_token: dict[str, str]) -> None:
    line, _private = ssh_key_pair()
    answer = browser.post(
        "/api/v1/customer/keys", json={"name": "x", "key": line}, headers={"X-CSRF-TOKEN": csrf_token["access"]}
    )
    assert (answer.status_code, answer.json["code"]) == (401, "token_expired")  # type: ignore[index]  # it is JSON
