"""What holds for every route, whoever wrote it: it is described, it says who may, it bounds its lists."""

from __future__ import annotations

import re
from typing import Any

import pytest
from flask import Flask
from openapi_spec_validator import OpenAPIV31SpecValidator

from portal.models.states import USER_ROLES
from portal.services.tokens import SCOPES
from tests.factories import make_user

METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}
UNDESCRIBED = ("/api/openapi.json", "/api/docs", "/api/docs/static/<path:filename>")  # the description itself


@pytest.fixture
def spec(client) -> dict[str, Any]:
    described: dict[str, Any] = client.get("/api/openapi.json").json
    return described


def routes(app: Flask):
    """Every (method, rule, view) below /api."""
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        if rule.rule.startswith("/api/") and rule.rule not in UNDESCRIBED:
            for method in sorted(METHODS & rule.methods):
                yield method, rule.rule, app.view_functions[rule.endpoint]


def filled_in(rule: str) -> str:
    """An address of the route that leads to nothing."""
    return re.sub(r"<(int:|float:)?[^>]*>", "1", rule)


def described_path(rule: str) -> str:
    return re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule)


def test_the_description_is_valid_openapi_3_1(spec):
    assert spec["openapi"].startswith("3.1")
    assert [error.message for error in OpenAPIV31SpecValidator(spec).iter_errors()] == []


def test_every_route_is_described_with_its_answer_and_its_errors(app, spec):
    for method, rule, _view in routes(app):
        operation = spec["paths"].get(described_path(rule), {}).get(method.lower())
        assert operation is not None, f"{method} {rule}"
        assert operation.get("summary"), f"{method} {rule} says in no word what it does"
        answers = set(operation["responses"])
        assert any(code.startswith(("2", "3", "1")) for code in answers), f"{method} {rule}: {answers}"
        assert "default" in answers, f"{method} {rule} describes no error"


def test_errors_are_described_as_they_are_sent(spec):
    described = spec["components"]["responses"]["DEFAULT_ERROR"]["content"]
    assert list(described) == ["application/problem+json"]
    problem = spec["components"]["schemas"]["ProblemOut"]
    assert set(problem["required"]) == {"type", "title", "status", "detail", "code"}


def test_every_route_names_who_may(app):
    for rule in app.url_map.iter_rules():
        if rule.endpoint == "static" or rule.endpoint.endswith(".static"):
            continue
        if rule.endpoint == "api-docs.openapi_json":
            continue  # flask-smorest's own view: the description, which holds no data
        who = getattr(app.view_functions[rule.endpoint], "who_may", None)
        assert who, f"{rule.rule} ({rule.endpoint}) does not say who may: add @requires, @public or @says_who"
        assert set(who) <= {*USER_ROLES, "agent", "anyone"}, rule.rule


def test_what_is_open_to_everybody_says_why(app):
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        if getattr(view, "who_may", ()) == ("anyone",):
            assert len(view.open_because) > 10, rule.rule


def test_everything_for_the_house_needs_an_admin_or_operator(app):
    for method, rule, view in routes(app):
        if rule.startswith("/api/v1/admin/"):
            assert set(view.who_may) <= {"admin", "operator"}, f"{method} {rule}"
        if rule.startswith("/api/v1/customer/"):
            assert "customer" in view.who_may, f"{method} {rule}"
        if rule.startswith("/api/v1/agent/"):
            assert set(view.who_may) <= {"agent", "anyone"}, f"{method} {rule}"


def test_a_route_turns_away_whoever_it_does_not_name(app, sign_in):
    """Called for real, by nobody and by each role: the note on the view and the guard behind it are one."""
    people = {role: sign_in(make_user(role)) for role in USER_ROLES}
    nobody = app.test_client()
    for method, rule, view in routes(app):
        if view.who_may == ("anyone",):
            continue
        path, body = filled_in(rule), None if method == "GET" else {}
        assert nobody.open(path, method=method, json=body).status_code == 401, f"{method} {rule}"
        for role, person in people.items():
            if role not in view.who_may:
                answer = person.open(method, path.removeprefix("/api/v1"), json=body)
                expected = {401} if view.who_may == ("agent",) else {403}
                assert answer.status_code in expected, f"{method} {rule} as {role}: {answer.text}"


def lists(app: Flask, spec: dict[str, Any]):
    """Every GET that takes `page`."""
    for method, rule, view in routes(app):
        operation = spec["paths"].get(described_path(rule), {}).get(method.lower(), {})
        names = {parameter.get("name") for parameter in operation.get("parameters", [])}
        if method == "GET" and "page" in names:
            yield rule, view, operation


def test_every_list_answers_items_page_size_and_total(app, spec):
    found = list(lists(app, spec))
    assert len(found) >= 6
    for rule, _view, operation in found:
        name = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        described = spec["components"]["schemas"][name]["properties"]
        assert set(described) == {"items", "page", "page_size", "total"}, rule


def test_every_page_is_bounded(app, spec, sign_in, admin, customer):
    people = {"admin": sign_in(admin), "customer": sign_in(customer)}
    for rule, view, _operation in lists(app, spec):
        person = people["admin" if "admin" in view.who_may else "customer"]
        path = filled_in(rule).removeprefix("/api/v1")
        for query in ("page=0", "page=-1", "page=x", f"page={10**30}", "page_size=0", "page_size=-1",
                      "page_size=201", "page_size=x", "page="):  # fmt: skip
            answer = person.get(f"{path}?{query}")
            assert (answer.status_code, answer.json["code"]) == (422, "invalid"), f"{path}?{query}: {answer.text}"
        for query in ("page=1&page_size=200", "page=1000000"):
            assert person.get(f"{path}?{query}").status_code in (200, 404), f"{path}?{query}"


def test_every_body_refuses_fields_that_it_does_not_name(app, spec):
    """`role`, `state` and `id` cannot ride along: a schema that ignored what it does not know would hide it."""
    for method, rule, _view in routes(app):
        operation = spec["paths"][described_path(rule)][method.lower()]
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is None or rule.startswith("/api/v1/agent/"):
            continue  # what agents send is checked by agent/protocol
        if rule == "/api/v1/alerts/webhook":
            continue  # a later Alertmanager says more, and its alerts must not be lost over it
        schema = content["schema"]
        if "$ref" in schema:
            schema = spec["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        assert schema.get("additionalProperties") is False, f"{method} {rule}"


HOSTILE = [10**30, -(10**30), -1, 0.5, True, None, "", "a\x00b", "\ud800", "{{ 7*7 }}", "x" * 70000, [], {}, [{}]]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_no_body_and_no_query_makes_the_portal_fail(app, spec, sign_in, admin, customer, value):
    """Each field of each route gets what nobody should send: the answer is an answer, never 500."""
    people = {"admin": sign_in(admin), "customer": sign_in(customer)}
    failed = []
    for method, rule, view in routes(app):
        role = next((role for role in people if role in view.who_may), None)
        if role is None or rule == "/api/v1/auth/logout":  # it would end the sign-in that the others need
            continue
        operation = spec["paths"][described_path(rule)][method.lower()]
        names = [given["name"] for given in operation.get("parameters", []) if given["in"] == "query"]
        query = {name: value for name in names if isinstance(value, str | int) and value != "\ud800"}
        body = None if method == "GET" else dict.fromkeys(properties_of(operation, spec), value)
        if not query and not body:
            continue
        path = filled_in(rule).removeprefix("/api/v1")
        answer = people[role].open(method, path, query_string=query, json=body)
        if answer.status_code >= 500:
            failed.append(f"{method} {rule}: {answer.text}")
    assert failed == []


def properties_of(operation: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return list(schema.get("properties", {}))


def test_an_unknown_id_is_404_for_whoever_may(app, spec, sign_in, admin, operator, customer):
    people = {"admin": sign_in(admin), "operator": sign_in(operator), "customer": sign_in(customer)}
    for method, rule, view in routes(app):
        operation = spec["paths"][described_path(rule)][method.lower()]
        asks = any(given["in"] == "query" and given["required"] for given in operation.get("parameters", []))
        if "<int:" not in rule or asks or "requestBody" in operation or "agent" in view.who_may:
            continue
        path = re.sub(r"<int:[^>]*>", "2147483000", rule).removeprefix("/api/v1")
        for role in set(view.who_may) & set(people):
            answer = people[role].open(method, path)
            assert answer.status_code == 404, f"{method} {path} as {role}: {answer.status_code} {answer.text}"


def test_the_docs_page_uses_our_own_files_only(client):
    page = client.get("/api/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert all(source.startswith("/") and not source.startswith("//") for source in sources)
    assert "<script>" not in page.text
    with client.get("/api/docs/static/docs.js") as script:
        assert script.status_code == 200


def test_health_is_one_word(client):
    assert client.get("/healthz").json == {"status": "ok"}


def test_every_scope_of_a_token_opens_something_and_no_other_is_offered(spec) -> None:
    """A scope that no route reads is a promise; one that only a route knows cannot be had."""
    operations = [
        operation for path in spec["paths"].values() for operation in path.values() if "security" in operation
    ]
    ways = [way for operation in operations for way in operation["security"]]
    assert {scope for way in ways for scope in way.get("api_token", [])} == set(SCOPES)
