"""Every refusal has a real status and one form, whoever raised it: our rules, Flask, an extension or the database."""

from __future__ import annotations

import dataclasses
import functools
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import BytesIO

import jwt as pyjwt
import peewee
import psycopg2
import pytest
from flask import request
from flask_jwt_extended import create_access_token, create_refresh_token
from playhouse.pool import MaxConnectionsExceeded
from werkzeug.routing import AnyConverter

from portal.app import build, create_app
from portal.db import db
from portal.errors import Conflict
from portal.models import AuditEntry, Tenant, User
from portal.services import sessions
from portal.services.sessions import Caller
from tests.conftest import lend, settings_in
from tests.factories import PASSWORD, make_tenant

MEMBERS = {"type", "title", "status", "detail", "code"}


@pytest.fixture(scope="module")
def app_with_a_spare_route(tmp_path_factory):
    """Built once: that takes longer than any test here."""
    app = build(settings_in(tmp_path_factory.mktemp("spare")))
    for rule in ("/api/v1/spare", "/spare"):
        app.add_url_rule(rule, "spare", methods=["GET", "POST"])
    return app


@pytest.fixture
def where(app_with_a_spare_route, database, settings):
    """`where(view)`: a client of a portal in which `view` answers at /api/v1/spare and, as a page, at /spare."""
    app = lend(app_with_a_spare_route, settings)

    def client_of(view):
        app.view_functions["spare"] = view
        return app.test_client()

    return client_of


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    """`behind(proxies)`: a client of a portal that knows these; whoever asks at /who is told who it takes them for."""

    @functools.cache
    def app_behind(proxies):
        app = build(dataclasses.replace(settings_in(tmp_path_factory.mktemp("behind")), trusted_proxies=proxies))
        app.add_url_rule("/who", view_func=lambda: f"{request.remote_addr} {request.host} {request.is_secure}")
        return app

    return lambda proxies: app_behind(proxies).test_client()


def assert_problem(answer, status, code):
    assert (answer.status_code, answer.json.get("code")) == (status, code), answer.json
    assert answer.mimetype == "application/problem+json"
    assert set(answer.json) >= MEMBERS
    assert answer.json["status"] == status
    assert answer.json["type"] == f"urn:remotegpu:problem:{code}"
    assert answer.json["detail"]


# What an operator is refused: the status, our code for it, and what is asked.
REFUSALS = (
    (400, "malformed", "POST", "/auth/login", {"data": "{", "content_type": "application/json"}),
    (401, "not_signed_in", "GET", "/admin/customers", {"headers": {"Authorization": ""}}),
    (401, "token_refused", "GET", "/admin/customers", {"headers": {"Authorization": "Bearer a.forged.token"}}),
    (403, "forbidden", "GET", "/admin/staff", {}),
    (404, "not_found", "GET", "/nowhere", {}),
    (404, "not_found", "GET", "/admin/customers/99999", {}),
    (404, "not_found", "GET", "/admin/customers/99999999999999999999", {}),
    (405, "method_not_allowed", "PUT", "/auth/login", {}),
    (409, "name_taken", "POST", "/admin/tenants", {"json": {"name": "Acme"}}),
    (413, "too_large", "POST", "/auth/login", {"data": "x" * 2**21, "content_type": "application/json"}),
    (415, "unsupported_media_type", "POST", "/auth/login", {"data": "a=b", "content_type": "text/plain"}),
    (422, "invalid", "POST", "/admin/tenants", {"json": {}}),
    (500, "internal", "GET", "/fails", {}),
)


def test_every_status_has_one_form(database, settings, operator, tenant):
    """One walk, past what the extensions refuse as well: a forged token, a cookie alone, one request too many."""
    app = create_app(dataclasses.replace(settings, people_limit="8 per day"))
    app.add_url_rule("/api/v1/fails", view_func=lambda: str(1 / 0))
    program, browser = app.test_client(), app.test_client()
    signed_in = program.post("/api/v1/auth/login", json={"username": "olga", "password": PASSWORD}).json
    for status, code, method, path, how in REFUSALS:
        headers = {"Authorization": f"Bearer {signed_in['access_token']}", **how.get("headers", {})}
        assert_problem(program.open(f"/api/v1{path}", method=method, **{**how, "headers": headers}), status, code)
    browser.post("/api/v1/auth/login", json={"username": "olga", "password": PASSWORD, "cookies": True})
    assert_problem(browser.post("/api/v1/admin/tenants", json={"name": "Bolt"}), 403, "csrf")
    answers = [browser.get("/api/v1/auth/me") for _ in range(9)]
    assert [answer.status_code for answer in answers] == [200] * 8 + [429]
    assert_problem(answers[-1], 429, "too_many_requests")


def test_405_names_the_methods_that_are_allowed(client, app):
    assert "POST" in client.put("/api/v1/auth/login").headers["Allow"]


def test_429_says_when_to_come_back(database, settings):
    app = create_app(dataclasses.replace(settings, people_limit="2 per minute"))
    answers = [app.test_client().get("/api/v1/auth/me") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [401, 401, 429]
    assert_problem(answers[2], 429, "too_many_requests")
    assert 0 < int(answers[2].headers["Retry-After"]) <= 60


def test_a_redis_that_dies_refuses_nobody_who_was_asking(database, settings):
    """Two wait for its answer; it goes from the second when the first has found out and counts in memory."""
    with socket.create_server(("127.0.0.1", 0)) as dying, ThreadPoolExecutor(2) as pool:
        port = dying.getsockname()[1]
        app = create_app(dataclasses.replace(settings, redis_url=f"redis://127.0.0.1:{port}/0"))
        asking, held = [], []
        for _ in range(2):
            asking.append(pool.submit(lambda: app.test_client().get("/api/v1/auth/me")))
            held.append(dying.accept()[0])
        dying.close()
        for connection, answer in zip(held, asking, strict=True):
            connection.close()
            assert_problem(answer.result(timeout=60), 401, "not_signed_in")


def test_the_limit_holds_while_redis_is_away(database, settings):
    away = dataclasses.replace(settings, people_limit="2 per minute", redis_url="redis://127.0.0.1:1/0")
    client = create_app(away).test_client()
    assert [client.get("/api/v1/auth/me").status_code for _ in range(4)] == [401, 401, 429, 429]


def test_a_body_may_be_a_mebibyte_and_no_more(where):
    client = where(lambda: str(len(request.get_data())))
    assert client.post("/api/v1/spare", data=b"x" * 2**20).status_code == 200
    assert_problem(client.post("/api/v1/spare", data=b"x" * (2**20 + 1)), 413, "too_large")


def test_a_body_that_does_not_say_its_length_is_refused_rather_than_cut(client):
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    body = {"input_stream": BytesIO(b'{"username": "x"}'), "content_type": "application/json"}
    answer = client.post("/api/v1/auth/login", environ_overrides=chunked, **body)
    assert_problem(answer, 411, "length_required")


def test_a_redirect_is_no_problem(client):
    answer = client.get("/api//docs")
    assert (answer.status_code, answer.headers["Location"]) == (308, "http://localhost/api/docs")


def test_agents_behind_the_same_address_are_not_counted(database, settings):
    app = create_app(dataclasses.replace(settings, people_limit="2 per minute"))
    client = app.test_client()
    for _ in range(5):
        assert client.post("/api/v1/agent/unknown").status_code == 404
        assert client.get("/healthz").status_code == 200
    assert client.get("/api/v1/auth/me").status_code == 401


def test_500_tells_a_number_and_nothing_else(where, caplog):
    def fail():
        raise RuntimeError("password of the database is hunter2")

    answer = where(fail).get("/api/v1/spare")
    assert_problem(answer, 500, "internal")
    assert "hunter2" not in answer.text
    assert "RuntimeError" not in answer.text
    incident = answer.json["info"]["incident"]
    assert any(incident in record.getMessage() and record.exc_info for record in caplog.records)


def test_a_value_that_must_be_unique_is_409_on_both_databases(where, tenant):
    answer = where(lambda: str(Tenant.create(name="Acme"))).get("/api/v1/spare")
    assert_problem(answer, 409, "already_exists")
    assert "tenant" not in answer.json["detail"].lower()


def test_something_still_in_use_is_409_on_both_databases(where, customer, tenant):
    assert_problem(where(lambda: str(tenant.delete_instance())).get("/api/v1/spare"), 409, "in_use")


def test_a_broken_rule_of_the_schema_is_our_fault(where):
    answer = where(lambda: str(User.create(username="x", role="king", password_hash="-"))).get("/api/v1/spare")
    assert_problem(answer, 500, "internal")
    assert "king" not in answer.text


def test_an_unexpected_error_of_the_database_says_nothing_of_it(where):
    def fail():
        raise peewee.OperationalError("no such table: secrets")

    assert "secrets" not in where(fail).get("/api/v1/spare").text


@pytest.mark.parametrize(
    "error",
    [
        peewee.OperationalError("database is locked"),
        peewee.OperationalError("canceling statement due to lock timeout\nCONTEXT: while updating a tuple"),
        MaxConnectionsExceeded("Max connections exceeded"),
    ],
)
def test_a_busy_database_asks_to_come_back(where, error):
    def fail():
        raise error

    answer = where(fail).get("/api/v1/spare")
    assert_problem(answer, 503, "unavailable")
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_a_standby_and_a_server_that_is_gone_ask_to_come_back(where, database_url):
    def write():
        return str(make_tenant("Somebody"))

    def gone():
        ours = db.connection().info.backend_pid
        with psycopg2.connect(database_url) as other:
            other.cursor().execute("SELECT pg_terminate_backend(%s, 10000)", (ours,))
        return write()

    def standby():
        db.execute_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        return write()

    for view in (gone, standby):
        answer = where(view).get("/api/v1/spare")
        assert_problem(answer, 503, "unavailable")
        assert answer.headers["Retry-After"] == "5"
        assert "connection" not in answer.json["detail"]
        page = where(view).get("/spare")
        assert (page.status_code, page.mimetype, page.headers["Retry-After"]) == (503, "text/html", "5")
    assert Tenant.select().count() == 0
    make_tenant("Somebody")  # by a connection of its own again


def test_what_a_rule_knows_is_told(where):
    def fail():
        raise Conflict("It is leased.", code="leased", state="leased")

    answer = where(fail).get("/api/v1/spare")
    assert_problem(answer, 409, "leased")
    assert answer.json["info"] == {"state": "leased"}


def test_422_lists_every_field(sign_in, admin):
    body = {"role": "king", "email": "no", "display_name": "two\nlines", "id": 1}
    answer = sign_in(admin).post("/admin/staff", body)
    assert_problem(answer, 422, "invalid")
    assert set(answer.json["errors"]) == {"username", "role", "email", "display_name", "id"}


@pytest.mark.parametrize("username", ["a\x00b", "\ud800", "a\udfffb"])
def test_a_text_that_no_database_keeps_is_422(client, operator, username):
    assert_problem(client.post("/api/v1/auth/login", json={"username": username, "password": "x"}), 422, "invalid")


def test_a_text_that_looks_like_one_is_kept(sign_in, admin):
    for name in ("a\\u0000b", "德 😀"):
        assert sign_in(admin).post("/admin/tenants", {"name": name}).json["name"] == name


@pytest.mark.parametrize("path", ["/admin/customers?keyword=a%00b", "/admin/%00", "/admin/machines/1/gpus/a%00b"])
def test_an_address_with_a_nul_is_400(sign_in, admin, path):
    assert_problem(sign_in(admin).get(path), 400, "malformed")


def test_a_form_with_a_nul_is_400(client, app):
    assert client.post("/sign-in", data={"username": "a\x00b", "password": "x"}).status_code == 400


@pytest.mark.parametrize("number", [2**31, 2**63, 10**30, -(10**30)])
def test_a_number_that_no_column_holds_is_no_failure(sign_in, admin, number):
    body = {"username": "dora", "tenant_id": number}
    assert sign_in(admin).post("/admin/customers", body).status_code in (404, 422)
    assert sign_in(admin).get(f"/admin/audit/logs?resource_id={number}").status_code in (200, 422)


def test_a_body_that_is_no_object_is_422(sign_in, admin):
    answer = sign_in(admin).post("/admin/tenants", ["a"])
    assert_problem(answer, 422, "invalid")


@pytest.fixture
def tokens(app, operator):
    """Tokens that must not be taken, by what is wrong with them."""
    session = sessions.start(operator, caller=Caller("192.0.2.1"), life_s=600)
    claims = {"generation": operator.generation, "family": session.family.id}
    payload = {"sub": str(operator.id), "iss": "remotegpu", "type": "access", "fresh": False, "jti": "x", "csrf": "x"}
    with app.app_context():
        good = create_access_token(str(operator.id), additional_claims=claims)
        return {
            "good": good,
            "expired": create_access_token(
                str(operator.id), additional_claims=claims, expires_delta=timedelta(seconds=-1)
            ),
            "refresh": create_refresh_token(str(operator.id), additional_claims=claims),
            "foreign": pyjwt.encode({**payload, **claims}, "another key that is long enough, 32 bytes", "HS256"),
            "unsigned": pyjwt.encode({**payload, **claims}, None, "none"),
            "of another family": create_access_token(str(operator.id), additional_claims={**claims, "family": 4711}),
            "of an older generation": create_access_token(
                str(operator.id), additional_claims={**claims, "generation": 0}
            ),
            "of nobody": create_access_token("4711", additional_claims=claims),
            "without claims": create_access_token(str(operator.id)),
            "with a strange subject": create_access_token("admin", additional_claims=claims),
            "with a huge subject": create_access_token("9" * 40, additional_claims=claims),
            "changed": good[:-4] + "AAAA",
            "nonsense": "abc",
            "an API token": "rgt_unknown",
        }


def test_a_token_that_is_not_good_is_401(client, tokens):
    good = tokens.pop("good")
    assert client.get("/api/v1/auth/me", headers={"Authorization": f"Bearer {good}"}).status_code == 200
    for wrong, token in tokens.items():
        answer = client.get("/api/v1/auth/me", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 401, (wrong, answer.json)
        assert answer.mimetype == "application/problem+json", wrong
        assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Bearer", "Bearer a b", "Basic YTpi", "Bearer  ", "rubbish", "Bearer \xe9"])
def test_a_header_that_holds_no_token_is_401(client, app, header):
    answer = client.get("/api/v1/auth/me", headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.mimetype == "application/problem+json"


def test_a_cookie_alone_changes_nothing(client, operator):
    """The CSRF extension's refusals too: a missing and a wrong token."""
    client.post("/api/v1/auth/login", json={"username": "olga", "password": PASSWORD, "cookies": True})
    assert client.get("/api/v1/auth/me").status_code == 200
    assert_problem(client.post("/api/v1/admin/tenants", json={"name": "Evil"}), 403, "csrf")
    wrong = client.post("/api/v1/admin/tenants", json={"name": "Evil"}, headers={"X-CSRF-TOKEN": "guess"})
    assert_problem(wrong, 403, "csrf")
    assert not Tenant.select().exists()
    right = client.get_cookie("csrf_access_token").value
    done = client.post("/api/v1/admin/tenants", json={"name": "Good"}, headers={"X-CSRF-TOKEN": right})
    assert done.status_code == 201


def test_no_route_is_changed_by_a_cookie_alone(client, admin, app):
    """Every one: what a guard forgot would be open to any page that the person visits."""
    client.post("/api/v1/auth/login", json={"username": "root", "password": PASSWORD, "cookies": True})
    before, addresses, tried = AuditEntry.select().count(), app.url_map.bind("localhost"), 0
    for rule in app.url_map.iter_rules():
        for method in rule.methods - {"GET", "HEAD", "OPTIONS"}:
            if rule.rule.startswith("/api/v1/agent/") or "anyone" in app.view_functions[rule.endpoint].who_may:
                continue
            address = addresses.build(rule.endpoint, {name: example(rule, name) for name in rule.arguments}, method)
            answer = client.open(address, method=method, json={})
            assert answer.status_code == 403, f"{method} {address}: {answer.status_code}"
            tried += 1
    assert tried > 50
    assert AuditEntry.select().count() == before


def example(rule, argument):
    """A value that the address takes."""
    kind = rule._converters[argument]
    return next(iter(kind.items)) if isinstance(kind, AnyConverter) else 1


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["/sign-in", "/locale", "/api/v1/auth/login", "/api/v1/auth/refresh"])
def test_another_site_cannot_make_a_browser_sign_in_here(client, operator, path, site):
    """Not even as somebody else: whoever works in a stranger's account leaves keys and tasks there."""
    answer = client.post(
        path, data={"username": "olga", "password": PASSWORD, "locale": "en"}, headers={"Sec-Fetch-Site": site}
    )
    assert answer.status_code == 403
    assert "Set-Cookie" not in answer.headers
    assert not AuditEntry.select().exists()


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_a_browser_signs_in_from_the_portal_itself(client, operator, site):
    form = {"username": "olga", "password": PASSWORD}
    assert client.post("/sign-in", data=form, headers={"Sec-Fetch-Site": site}).status_code == 303


def test_a_token_in_an_address_is_no_token(client, tokens):
    for name in ("jwt", "token", "access_token"):
        assert client.get(f"/api/v1/auth/me?{name}={tokens['good']}").status_code == 401


def test_answers_carry_the_headers_that_browsers_obey(client, app):
    answer = client.get("/api/v1/auth/me")
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in answer.headers


OURS, STRANGER, CALLER = "127.0.0.1", "203.0.113.9", "198.51.100.7"


@pytest.mark.parametrize(
    ("proxies", "sender", "forwarded", "seen"),
    [
        (OURS, OURS, CALLER, CALLER),
        (OURS, OURS, f"1.2.3.4, {CALLER}", CALLER),  # the caller wrote the first part
        (f"{OURS}, 10.0.0.0/8", OURS, f"1.2.3.4, {CALLER}, 10.1.2.3", CALLER),
        (f"{OURS}, 10.0.0.0/8", OURS, "10.9.9.9", "10.9.9.9"),
        (OURS, f"::ffff:{OURS}", "2001:db8::7", "2001:db8::7"),
        (OURS, OURS, "no address, x", OURS),
        (OURS, OURS, "", OURS),
        ("unix", "", CALLER, CALLER),
    ],
)
def test_a_forwarded_address_counts_as_far_as_known_proxies_wrote_it(
    behind, database, proxies, sender, forwarded, seen
):
    assert who_called(behind(proxies), sender, forwarded) == f"{seen} portal.example.org True"


@pytest.mark.parametrize(
    ("proxies", "sender"), [("", OURS), (OURS, STRANGER), (OURS, ""), ("unix", OURS), ("10.0.0.0/8", STRANGER)]
)
def test_what_anybody_else_says_about_itself_counts_for_nothing(behind, database, proxies, sender):
    assert who_called(behind(proxies), sender, CALLER) == f"{sender} localhost False"


def who_called(client, sender, forwarded):
    """Address, host and whether by TLS, as the portal sees a request with forwarding headers."""
    headers = {
        "X-Forwarded-For": forwarded,
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "portal.example.org",
    }
    return client.get("/who", environ_base={"REMOTE_ADDR": sender}, headers=headers).text


def test_who_comes_past_the_proxy_cannot_choose_the_address_that_is_throttled_and_kept(database, settings, operator):
    client = create_app(dataclasses.replace(settings, trusted_proxies="127.0.0.1", people_limit="2 per minute"))
    codes = [
        client.test_client()
        .post(
            "/api/v1/auth/login",
            json={"username": "olga", "password": "wrong"},
            headers={"X-Forwarded-For": f"198.51.100.{number}"},
            environ_base={"REMOTE_ADDR": STRANGER},
        )
        .status_code
        for number in range(3)
    ]
    assert codes == [401, 401, 429]
    assert {entry.address for entry in AuditEntry.select()} == {STRANGER}


def test_a_request_gives_its_connection_back(client, operator, database):
    make_tenant()
    client.get("/healthz")
    assert database.is_closed()
