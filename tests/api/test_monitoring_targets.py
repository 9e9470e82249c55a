"""What Prometheus is told to ask: all of it, in one order, with no word about customers, and never empty by mistake."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient

from portal.db import db, utcnow
from portal.models import Baseline, Gpu, Machine, User
from portal.services import tokens
from tests.factories import actor_of, make_lease, make_machine, make_tenant, make_user

SignIn = Callable[[User], Any]
PATH = "/api/v1/prometheus/targets"


@pytest.fixture
def token(operator: User) -> str:
    return token_of(operator, "prometheus")


def token_of(owner: User, *scopes: str) -> str:
    expires_at = utcnow() + timedelta(days=30)
    return tokens.create(owner, name="p", scopes=list(scopes), expires_at=expires_at, by=actor_of(owner))[1]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def with_gpus(machine: Machine, *names: str | None) -> Machine:
    for slot, name in enumerate(names):
        Gpu.create(machine=machine, uuid=f"GPU-{machine.id}-{slot}", slot=slot, name=name)
    return machine


def test_every_host_in_service_is_told_with_its_exporters(client: FlaskClient, token: str) -> None:
    with_gpus(make_machine("b-2", address="2001:db8::7", region="eu", rack="r1"), "NVIDIA H100", "NVIDIA H100")
    make_machine("a-1", address="192.0.2.1")
    answer = client.get(PATH, headers=bearer(token))
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert [group["targets"] for group in answer.json] == [
        ["192.0.2.1:9100"],
        ["[2001:db8::7]:9100"],
        ["[2001:db8::7]:9835"],
    ]
    node, gpu = answer.json[1:]
    assert gpu["labels"] == node["labels"] | {"job": "nvidia_gpu"}
    assert node["labels"] == {
        "job": "node",
        "instance": "b-2",
        "host": "b-2",
        "machine_id": str(Machine.get(Machine.name == "b-2").id),
        "gpu_model": "NVIDIA H100",
        "region": "eu",
        "rack": "r1",
    }
    only = client.get(f"{PATH}?job=nvidia_gpu", headers=bearer(token))
    assert [group["targets"] for group in only.json] == [["[2001:db8::7]:9835"]]


def test_a_machine_is_asked_from_ready_to_retired(client: FlaskClient, token: str) -> None:
    for state in ("registered", "provisioning", "ready", "failed", "leased", "reclaiming", "quarantined", "retired"):
        make_machine(f"{state}-new", state=state)
        again = make_machine(f"{state}-again", state=state)
        Baseline.create(machine=again, digest="0", content={}, taken_at=utcnow())
    asked = {group["labels"]["host"] for group in client.get(PATH, headers=bearer(token)).json}
    in_service = {f"{state}-{which}" for state in ("ready", "leased", "reclaiming", "quarantined")
                  for which in ("new", "again")}  # fmt: skip
    assert asked == in_service | {"provisioning-again", "failed-again"}


def test_no_word_about_a_customer_is_in_a_label(client: FlaskClient, token: str) -> None:
    machine = with_gpus(make_machine(state="leased", remark="Tangerine pays late", labels={"for": "Tangerine"}), "H100")
    tenant = make_tenant("Tangerine")
    make_user(tenant=tenant, username="tangerine-tim")
    make_lease(machine, tenant, login="lease77")
    told = client.get(PATH, headers=bearer(token)).text
    assert machine.name in told
    assert "tangerine" not in told.lower()
    assert "lease77" not in told


def test_without_machines_the_list_is_empty(client: FlaskClient, token: str) -> None:
    answer = client.get(PATH, headers=bearer(token))
    assert (answer.status_code, answer.json) == (200, [])


@pytest.mark.parametrize("table", ["machine", "gpu", "baseline"])
def test_trouble_is_an_error_and_never_an_empty_list(client: FlaskClient, token: str, table: str) -> None:
    with_gpus(make_machine(), "H100")
    db.execute_sql(f"ALTER TABLE {table} RENAME TO away")
    try:
        answer = client.get(PATH, headers=bearer(token))
    finally:
        db.execute_sql(f"ALTER TABLE away RENAME TO {table}")
    assert answer.status_code == 500
    assert answer.mimetype == "application/problem+json"


def test_the_token_may_also_come_as_a_basic_password_to_read(client: FlaskClient, token: str) -> None:
    basic = {"Authorization": "Basic " + base64.b64encode(f"prometheus:{token}".encode()).decode()}
    assert client.get(PATH, headers=basic).status_code == 200
    writing = client.post("/api/v1/auth/logout", headers=basic)
    assert writing.status_code == 401


def test_only_staff_and_their_tokens_with_the_scope_may_read_it(
    client: FlaskClient, sign_in: SignIn, operator: User, customer: User
) -> None:
    assert client.get(PATH).status_code == 401
    assert sign_in(customer).get("/prometheus/targets").status_code == 403
    assert sign_in(operator).get("/prometheus/targets").status_code == 200
    assert client.get(PATH, headers=bearer(token_of(operator, "read", "inventory"))).status_code == 403
    assert client.get(PATH, headers=bearer(token_of(customer, "read"))).status_code == 403
    assert client.get(PATH, headers=bearer("rgt_guessed")).status_code == 401
