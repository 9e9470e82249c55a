"""The inventory at the front door: what a token of a shell may read, and what it never does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient

from portal.db import utcnow
from portal.models import Opening, Tenant, User
from portal.services import network_requests, tokens, vault
from portal.services.actors import SYSTEM
from tests.conftest import API, SignedIn
from tests.factories import actor_of
from tests.support.network import wish
from tests.support.rental import allocate, ready_host
from tests.support.runs import KEY, make_machine

SECRET = "s3cret-of-first-contact"


def token_of(user: User, *scopes: str) -> dict[str, str]:
    _, secret = tokens.create(
        user, name="shell", scopes=list(scopes), expires_at=utcnow() + timedelta(days=1), by=actor_of(user)
    )
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def read(client: FlaskClient, operator: User) -> Callable[[], Any]:
    headers = token_of(operator, "inventory")
    return lambda: client.get(f"{API}/admin/inventory", headers=headers)


def test_a_shell_with_a_token_reads_the_machines(read: Callable[[], Any]) -> None:
    machine = make_machine("gpu-1", ssh_port=2222)
    document = read().json
    assert document["schema"] == 1
    (host,) = document["hosts"]
    assert (host["name"], host["address"], host["port"], host["user"]) == ("gpu-1", "gpu-1.test", 2222, "ops")
    assert host["host_keys"] == [KEY]
    assert host["groups"] == ["gpu_hosts"]
    assert host["vars"]["remotegpu_machine_id"] == machine.id
    assert host["vars"]["remotegpu_lease_active"] is False


def test_ports_that_a_machine_has_open_for_itself_are_named_and_no_others(
    read: Callable[[], Any], tenant: Tenant
) -> None:
    """A scan from outside will find them, and finds nothing else right."""
    host = ready_host("gpu-1")
    make_machine("gpu-2")

    def opened(port: int, **fields: Any) -> Opening:
        lease = fields.pop("lease", None)
        return network_requests.open_port(host.machine, wish(port, **fields), by=SYSTEM, lease=lease)

    opened(7000, last_port=7002)
    opened(53, protocol="udp")
    opened(8888, lease=allocate(host, tenant))
    network_requests.close_port(opened(9998), by=SYSTEM)
    Opening.update(ends_at=utcnow() - timedelta(seconds=1)).where(Opening.id == opened(9999).id).execute()
    named = {each["name"]: each["vars"]["remotegpu_open_ports"] for each in read().json["hosts"]}
    assert named == {"gpu-1": [7000, 7001, 7002], "gpu-2": []}


def test_a_gateway_is_in_a_group_of_its_own(read: Callable[[], Any]) -> None:
    """What makes GPU hosts leaves it alone."""
    make_machine("gateway-1", public_address="gateway.example.org", forward_ports="20000-20999")
    (host,) = read().json["hosts"]
    assert host["groups"] == ["gateways"]


def test_no_secret_is_in_it(read: Callable[[], Any]) -> None:
    make_machine("gpu-1", first_contact=vault.encrypt(f'{{"password": "{SECRET}", "become_password": "{SECRET}"}}'))
    answer = read()
    assert answer.status_code == 200
    assert SECRET not in answer.text
    assert "token" not in answer.text
    assert "password" not in answer.text


def test_a_machine_without_a_pinned_key_is_left_out_and_named(read: Callable[[], Any]) -> None:
    make_machine("gpu-1")
    make_machine("gpu-2", host_key=None)
    make_machine("gpu-3", state="retired")
    document = read().json
    assert [host["name"] for host in document["hosts"]] == ["gpu-1"]
    assert document["left_out"] == [{"name": "gpu-2", "reason": "its host key is not confirmed"}]


def test_another_scope_does_not_read_it(client: FlaskClient, operator: User) -> None:
    answer = client.get(f"{API}/admin/inventory", headers=token_of(operator, "prometheus"))
    assert answer.status_code == 403


def test_nobody_else_reads_it(client: FlaskClient, sign_in: Callable[[User], SignedIn], customer: User) -> None:
    assert client.get(f"{API}/admin/inventory").status_code == 401
    assert sign_in(customer).get("/admin/inventory").status_code == 403
