"""Signing in, refreshing and signing out: who may, for how long, and what ends it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from threading import Barrier, BrokenBarrierError

import jwt
import pytest

from portal.app import create_app
from portal.db import connection, utcnow
from portal.models import AuditEntry, RefreshFamily, SignInFailure, User
from portal.services import passwords, sessions, users
from portal.services.actors import SYSTEM
from tests.factories import PASSWORD, actor_of, make_user

NEW_PASSWORD = "a brand new pass phrase"


def sign_in_with(client, username="olga", password=PASSWORD, **more):
    return client.post("/api/v1/auth/login", json={"username": username, "password": password, **more})


def me(client, token):
    return client.get("/api/v1/auth/me", headers={"Authorization": f"Bearer {token}"})


def refresh(client, token):
    return client.post("/api/v1/auth/refresh", headers={"Authorization": f"Bearer {token}"})


def actions():
    return [entry.action for entry in AuditEntry.select().order_by(AuditEntry.id)]


@pytest.fixture
def tokens(client, operator):
    """Olga, signed in by her password."""
    return sign_in_with(client).json


def test_whoever_knows_the_password_gets_tokens_that_work(client, operator, settings):
    answer = sign_in_with(client)
    assert answer.status_code == 200, answer.json
    assert answer.json["expires_in"] == settings.access_token_s
    assert answer.json["must_change_password"] is False
    assert me(client, answer.json["access_token"]).json["role"] == "operator"
    assert "Set-Cookie" not in answer.headers
    assert actions() == ["user.signed_in"]
    assert User.get_by_id(operator.id).last_sign_in_at is not None


def test_a_token_lives_as_long_as_the_answer_says(client, tokens):
    claims = jwt.decode(tokens["access_token"], options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == tokens["expires_in"]
    assert "role" not in claims


def test_the_name_is_read_in_any_case(client, operator):
    assert sign_in_with(client, " OLGA ").status_code == 200


def test_pages_get_cookies_that_scripts_cannot_read_and_no_token_in_the_body(client, operator):
    answer = sign_in_with(client, cookies=True)
    assert not {"access_token", "refresh_token"} & set(answer.json)
    cookies = {cookie.split("=")[0]: cookie for cookie in answer.headers.getlist("Set-Cookie")}
    assert set(cookies) == {
        "access_token_cookie", "csrf_access_token", "refresh_token_cookie", "csrf_refresh_token",
    }  # fmt: skip
    assert all("HttpOnly" in cookies[name] for name in ("access_token_cookie", "refresh_token_cookie"))
    assert all("SameSite=Lax" in cookie for cookie in cookies.values())
    assert "Path=/api/v1/auth" in cookies["refresh_token_cookie"]
    assert client.get("/api/v1/auth/me").status_code == 200


def test_pages_refresh_and_sign_out_by_cookie(client, operator):
    sign_in_with(client, cookies=True)
    csrf = client.get_cookie("csrf_refresh_token").value
    assert client.post("/api/v1/auth/refresh").status_code == 403
    answer = client.post("/api/v1/auth/refresh", headers={"X-CSRF-TOKEN": csrf})
    assert answer.status_code == 200
    assert "access_token" not in answer.json
    csrf = client.get_cookie("csrf_access_token").value
    assert client.post("/api/v1/auth/logout", json={}, headers={"X-CSRF-TOKEN": csrf}).status_code == 204
    assert client.get_cookie("access_token_cookie") is None
    assert client.get("/api/v1/auth/me").status_code == 401


def test_an_unknown_name_and_a_wrong_password_get_the_same_answer_for_the_same_work(client, operator, monkeypatch):
    hashed = []
    real = passwords._verify
    monkeypatch.setattr(passwords, "_verify", lambda *args: hashed.append(args) or real(*args))
    unknown = sign_in_with(client, "nobody", "wrong password")
    wrong = sign_in_with(client, "olga", "wrong password")
    assert (unknown.status_code, unknown.json) == (wrong.status_code, wrong.json)
    assert wrong.status_code == 401
    assert len(hashed) == 2
    assert {entry.outcome for entry in AuditEntry.select()} == {"refused"}


def test_a_disabled_user_is_told_what_a_stranger_is_told(client, operator):
    unknown = sign_in_with(client, "nobody")
    users.disable(operator, by=SYSTEM)
    assert sign_in_with(client).json == unknown.json


def test_an_account_is_throttled_by_every_process(app, settings, operator):
    others = [app.test_client(), create_app(settings).test_client()]
    for number in range(sessions.MAX_FAILURES_ACCOUNT):
        assert sign_in_with(others[number % 2], password="wrong").status_code == 401
    for other in others:
        answer = sign_in_with(other)
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) == sessions.FAILURE_WINDOW.total_seconds()
    SignInFailure.update(at=utcnow() - sessions.FAILURE_WINDOW).execute()
    assert sign_in_with(others[0]).status_code == 200
    assert not SignInFailure.select().where(SignInFailure.username == "olga").exists()


def test_an_address_is_throttled_whatever_names_it_tries(client, operator):
    now = utcnow()
    rows = [{"username": f"name{n}", "address": "127.0.0.1", "at": now} for n in range(sessions.MAX_FAILURES_ADDRESS)]
    SignInFailure.insert_many(rows).execute()
    assert sign_in_with(client).status_code == 429
    elsewhere = client.post(
        "/api/v1/auth/login",
        json={"username": "olga", "password": PASSWORD},
        environ_overrides={"REMOTE_ADDR": "203.0.113.9"},
    )
    assert elsewhere.status_code == 200


@pytest.mark.parametrize(
    ("column", "limit"),
    [("username", sessions.MAX_FAILURES_ACCOUNT), ("address", sessions.MAX_FAILURES_ADDRESS)],
)
def test_parallel_guesses_do_not_slip_past_the_throttle(app, operator, monkeypatch, column, limit):
    """One guess short of the limit, of eight that come together one is let through: each counts before it looks."""
    given = {"username": "olga", "address": "127.0.0.1"}
    for number in range(limit - 1):
        other = "address" if column == "username" else "username"
        SignInFailure.create(**{**given, other: f"other {number}"})
    together, count = Barrier(8), SignInFailure.create

    def counted_by_all(**fields):
        with suppress(BrokenBarrierError):
            together.wait(timeout=1)
        return count(**fields)

    monkeypatch.setattr(SignInFailure, "create", counted_by_all)
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda _: sign_in_with(app.test_client(), password="wrong").status_code, range(8)))
    assert sorted(codes) == [401] + [429] * 7


def test_a_refresh_gives_new_tokens_and_the_sign_in_goes_on(client, tokens):
    following = refresh(client, tokens["refresh_token"]).json
    assert me(client, following["access_token"]).status_code == 200
    assert following["refresh_token"] != tokens["refresh_token"]
    assert refresh(client, following["refresh_token"]).status_code == 200
    assert RefreshFamily.select().count() == 1


def test_an_access_token_refreshes_nothing(client, tokens):
    assert refresh(client, tokens["access_token"]).status_code == 401


def test_a_refresh_token_that_was_used_before_ends_the_whole_family(client, tokens):
    following = refresh(client, tokens["refresh_token"]).json
    stolen = refresh(client, tokens["refresh_token"])
    assert (stolen.status_code, stolen.json["code"]) == (401, "refresh_reused")
    assert me(client, following["access_token"]).status_code == 401
    assert refresh(client, following["refresh_token"]).status_code == 401
    assert RefreshFamily.get().end_reason == "reused"
    assert actions().count("session.reuse_detected") == 1


def test_of_parallel_uses_of_one_refresh_token_exactly_one_wins_and_goes_on(database, operator):
    """All have seen the token as valid before any of them writes: the database decides."""
    session = sessions.start(operator, caller=sessions.Caller("192.0.2.1"), life_s=600)
    claims = {"sub": str(operator.id), "generation": 1, "family": session.family.id, "jti": session.jti}
    together = Barrier(6)
    real = RefreshFamily.get_or_none

    def seen_by_all(*args):
        family = real(*args)
        together.wait(20)
        return family

    def use(_number):
        with connection():
            try:
                return sessions.refresh(claims, caller=sessions.Caller("192.0.2.1"), life_s=600).jti
            except sessions.NotSignedIn as error:
                return error.code

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as pool:
        patch.setattr(RefreshFamily, "get_or_none", seen_by_all)
        results = list(pool.map(use, range(6)))
    assert sorted(results).count("refresh_raced") == 5
    family = RefreshFamily.get()
    assert family.current_jti in results
    assert family.ended_at is None


def test_a_refresh_that_comes_too_late_is_refused(client, tokens):
    RefreshFamily.update(expires_at=utcnow() - timedelta(seconds=1)).execute()
    assert refresh(client, tokens["refresh_token"]).json["code"] == "session_ended"


def test_signing_out_ends_this_sign_in_and_no_other(client, tokens):
    other = sign_in_with(client).json
    answer = client.post("/api/v1/auth/logout", json={}, headers={"Authorization": f"Bearer {tokens['access_token']}"})
    assert answer.status_code == 204
    assert me(client, tokens["access_token"]).status_code == 401
    assert refresh(client, tokens["refresh_token"]).status_code == 401
    assert me(client, other["access_token"]).status_code == 200


def test_signing_out_everywhere_ends_all_of_them_and_nobody_elses(client, tokens, admin, sign_in):
    other = sign_in_with(client).json
    somebody = sign_in(admin)
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert client.post("/api/v1/auth/logout", json={"everywhere": True}, headers=headers).status_code == 204
    for ended in (tokens, other):
        assert me(client, ended["access_token"]).status_code == 401
        assert refresh(client, ended["refresh_token"]).status_code == 401
    assert somebody.get("/auth/me").status_code == 200


def test_signing_out_needs_no_body(client, tokens):
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert client.post("/api/v1/auth/logout", headers=headers).status_code == 204


def disabled(user):
    users.disable(user, by=SYSTEM)


def reset(user):
    users.reset_password(user, by=SYSTEM)


def changed(user):
    users.change_password(user, old=PASSWORD, new=NEW_PASSWORD, by=actor_of(user))


@pytest.mark.parametrize("act", [disabled, reset, changed])
def test_what_happens_to_an_account_acts_on_the_next_request(client, tokens, operator, act):
    act(operator)
    assert me(client, tokens["access_token"]).status_code == 401
    assert refresh(client, tokens["refresh_token"]).status_code == 401


def test_the_role_is_read_from_the_database_not_from_the_token(client, tokens, operator):
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert client.get("/api/v1/admin/staff", headers=headers).status_code == 403
    User.update(role="admin").where(User.id == operator.id).execute()
    assert client.get("/api/v1/admin/staff", headers=headers).status_code == 200
    User.update(role="customer").where(User.id == operator.id).execute()
    assert client.get("/api/v1/admin/customers", headers=headers).status_code == 403


def test_changing_the_password_goes_on_here_and_ends_everywhere_else(client, tokens):
    other = sign_in_with(client).json
    answer = client.post(
        "/api/v1/auth/password",
        json={"old_password": PASSWORD, "new_password": NEW_PASSWORD},
        headers={"Authorization": f"Bearer {tokens['access_token']}"},
    )
    assert answer.status_code == 200
    assert me(client, answer.json["access_token"]).status_code == 200
    assert me(client, other["access_token"]).status_code == 401
    assert sign_in_with(client).status_code == 401
    assert sign_in_with(client, password=NEW_PASSWORD).status_code == 200


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("wrong password", NEW_PASSWORD, "old_password"),
        (PASSWORD, PASSWORD, "new_password"),
        (PASSWORD, "short", "new_password"),
        (PASSWORD, "aaaaaaaaaaaaaaaa", "new_password"),
        (PASSWORD, "I am olga, hello", "new_password"),
    ],
)
def test_a_password_that_the_policy_refuses_changes_nothing(client, tokens, old, new, field):
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    answer = client.post("/api/v1/auth/password", json={"old_password": old, "new_password": new}, headers=headers)
    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])
    assert sign_in_with(client).status_code == 200


def test_of_two_password_changes_at_once_one_is_refused(database, operator):
    first, second = User.get_by_id(operator.id), User.get_by_id(operator.id)
    users.change_password(first, old=PASSWORD, new=NEW_PASSWORD, by=actor_of(operator))
    with pytest.raises(users.Conflict):
        users.change_password(second, old=PASSWORD, new="yet another pass phrase", by=actor_of(operator))
    assert passwords.matches(NEW_PASSWORD, User.get_by_id(operator.id).password_hash)


def test_who_must_change_the_password_can_do_that_and_sign_out_and_nothing_else(app, database, sign_in):
    novice = sign_in(make_user("operator", username="nina", must_change_password=True))
    for rule in app.url_map.iter_rules():
        who = getattr(app.view_functions[rule.endpoint], "who_may", ())
        if not rule.rule.startswith("/api/v1/") or "operator" not in who:
            continue
        path = rule.rule.removeprefix("/api/v1")
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            address = "/".join("1" if part.startswith("<") else part for part in path.split("/"))
            if address in ("/auth/password", "/auth/logout"):
                continue
            answer = novice.open(method, address, json={} if method != "GET" else None)
            assert (answer.status_code, answer.json["code"]) == (403, "password_change_required"), address
    body = {"old_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert novice.post("/auth/password", body).status_code == 200


def test_people_change_their_own_profile_and_nothing_more(sign_in, viewer, customer):
    person = sign_in(viewer)
    assert person.patch("/auth/me", {"display_name": "Vera", "locale": "zh_CN"}).json["display_name"] == "Vera"
    assert person.patch("/auth/me", {"display_name": None}).json["locale"] == "zh_CN"
    for field in ("role", "username", "id", "must_change_password"):
        assert person.patch("/auth/me", {field: "admin"}).status_code == 422
    assert User.get_by_id(viewer.id).role == "customer"
    assert User.get_by_id(customer.id).locale is None


def test_passwords_and_tokens_reach_neither_the_log_nor_the_audit_trail(client, operator, caplog):
    with caplog.at_level("DEBUG"):
        answer = sign_in_with(client)
        sign_in_with(client, password="marker-of-a-wrong-password")
        refresh(client, answer.json["refresh_token"])
    told = caplog.text + "".join(str(entry.__data__) for entry in AuditEntry.select())
    for secret in (PASSWORD, "marker-of-a-wrong-password", answer.json["access_token"], answer.json["refresh_token"]):
        assert secret not in told


def test_a_password_typed_as_the_name_is_not_kept(client, operator):
    sign_in_with(client, "My Secret Passphrase!", "x")
    assert [entry.actor_name for entry in AuditEntry.select()] == ["unknown"]


def test_old_families_and_failures_are_forgotten(client, tokens):
    sign_in_with(client, password="wrong")
    assert sessions.prune() == 0
    RefreshFamily.update(expires_at=utcnow() - timedelta(days=1)).execute()
    SignInFailure.update(at=utcnow() - timedelta(days=1)).execute()
    assert sessions.prune() == 2
