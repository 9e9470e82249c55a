"""The network over HTTP: the document and its ETag, who may, what a pipeline tells, and openings as a customer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from portal.db import atomic, utcnow
from portal.integrations.network_format import document
from portal.models import AppliedNetwork, AuditEntry, DnsZone, Lease, Machine, NetworkState, Opening, Tenant, User
from portal.services import desired, network, network_requests, retirement, tokens
from portal.services.actors import SYSTEM
from portal.settings import Settings
from tests.api.fake_agent import FakeAgent, agent_of, leased_machine, observed
from tests.factories import actor_of, make_machine
from tests.support.network import applied, export, outputs, place, seen, states_of, wish, zone
from tests.support.rental import Host, allocate, ready_host, tomorrow

ROOT = Path(__file__).parents[2]
SignIn = Callable[[User], Any]
OPENING = {"protocol": "tcp", "first_port": 8888, "source": "203.0.113.0/24"}


@pytest.fixture
def token(operator: User) -> dict[str, str]:
    """Of a pipeline."""
    ends_at = utcnow() + timedelta(days=1)
    _, secret = tokens.create(operator, name="ci", scopes=["network"], expires_at=ends_at, by=actor_of(operator))
    return {"Authorization": f"Bearer {secret}"}


# The document


def test_the_document_is_given_to_a_pipeline_and_is_one_that_the_stacks_take(
    client: FlaskClient, token: dict[str, str]
) -> None:
    zone(serves_machines=True)
    make_machine("gpu-1")
    with atomic():
        network.changed()
    answer = client.get("/api/v1/admin/network", headers=token)
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    parsed = document.read(answer.data)
    assert [each.name for each in parsed.names] == ["gpu-1.gpu.example.org"]
    assert answer.headers["X-RemoteGPU-Generation"] == str(parsed.generation)


def test_the_document_is_given_out_whatever_a_zone_below_another_makes_of_it(
    operator: User, sign_in: SignIn, client: FlaskClient, token: dict[str, str]
) -> None:
    person, holds = sign_in(operator), zone()
    body = {"zone_id": holds.id, "name": "deep.inner.gpu.example.org", "type": "A", "values": ["192.0.2.1"]}
    assert person.post("/admin/network/records", body).status_code == 201
    inner = {"name": "inner.gpu.example.org", "cloud": "cloudflare"}
    answer = person.post("/admin/network/zones", inner)
    assert (answer.status_code, set(answer.json["errors"])) == (422, {"name"})
    with atomic():
        DnsZone.create(**inner)  # as an older portal let it
        network.changed()
    answer = client.get("/api/v1/admin/network", headers=token)
    assert (answer.status_code, answer.json["names"]) == (200, [])


def test_who_asks_again_is_told_that_nothing_has_changed(client: FlaskClient, token: dict[str, str]) -> None:
    tag = client.get("/api/v1/admin/network", headers=token).headers["ETag"]
    same = client.get("/api/v1/admin/network", headers={**token, "If-None-Match": tag})
    assert (same.status_code, same.data) == (304, b"")
    zone()
    changed = client.get("/api/v1/admin/network", headers={**token, "If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["ETag"] != tag
    assert changed.json["checksum"] in changed.headers["ETag"]


def test_a_pipelines_token_opens_nothing_else_and_no_other_token_opens_the_network(
    client: FlaskClient, token: dict[str, str], operator: User
) -> None:
    for method, path in (("GET", "zones"), ("POST", "zones"), ("POST", "thaw"), ("PATCH", "limits")):
        answer = client.open(f"/api/v1/admin/network/{path}", method=method, headers=token, json={})
        assert (answer.status_code, answer.json["code"]) == (403, "scope_missing"), path
    ends_at = utcnow() + timedelta(days=1)
    _, other = tokens.create(operator, name="x", scopes=["read"], expires_at=ends_at, by=actor_of(operator))
    answer = client.get("/api/v1/admin/network", headers={"Authorization": f"Bearer {other}"})
    assert answer.json["code"] == "scope_missing"


def test_the_command_line_prints_the_same_document(
    client: FlaskClient, token: dict[str, str], settings: Settings
) -> None:
    zone()
    environ = {
        **os.environ,
        "INSTANCE_DIR": str(settings.instance_dir),
        "DATABASE_URL": settings.database_url,
        "SECRET_KEY": settings.secret_key.replace("test", "real"),
        "JWT_SECRET_KEY": settings.jwt_secret_key.replace("test", "real"),
        "ENCRYPTION_KEY": settings.encryption_key.replace("test", "real"),
    }
    command = [sys.executable, "-m", "portal", "export-network"]
    printed = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=True).stdout
    assert printed.rstrip(b"\n") == client.get("/api/v1/admin/network", headers=token).data


def test_a_frozen_network_answers_with_the_way_out(
    client: FlaskClient, token: dict[str, str], operator: User, sign_in: SignIn
) -> None:
    zone()
    NetworkState.update(frozen_reason="The portal was restored.", frozen_at=utcnow()).execute()
    answer = client.get("/api/v1/admin/network", headers=token)
    assert (answer.status_code, answer.json["code"]) == (409, "network_frozen")
    assert "thaw it" in answer.json["detail"]
    person = sign_in(operator)
    assert person.get("/admin/network/state").json["frozen_reason"] == "The portal was restored."
    assert person.post("/admin/network/thaw", {"reason": "compared"}).status_code == 200
    assert client.get("/api/v1/admin/network", headers=token).status_code == 200
    assert AuditEntry.get(AuditEntry.action == "network.thawed").actor_name == "olga"


# What a pipeline tells


def test_a_stack_tells_what_it_applied_and_is_answered_the_document_of_it(
    client: FlaskClient, token: dict[str, str], operator: User
) -> None:
    url = "/api/v1/admin/network/applied?stack=production"
    assert client.get(url, headers=token).status_code == 404
    zone()
    text = client.get("/api/v1/admin/network", headers=token).data
    told = outputs(json.loads(text))
    first = client.post(url, headers=token, json=told)
    assert (first.status_code, first.json["is_known"], first.json["clouds"]) == (200, True, ["cloudflare"])
    assert client.post(url, headers=token, json=told).json["id"] == first.json["id"]
    assert AppliedNetwork.select().count() == 1
    assert client.get(url, headers=token).data == text
    by_checksum = f"/api/v1/admin/network/applied?stack=another&checksum={json.loads(text)['checksum']}"
    assert client.get(by_checksum, headers=token).data == text, "also where its apply was never told"
    unknown = client.get(f"/api/v1/admin/network/applied?stack=production&checksum=sha256:{'0' * 64}", headers=token)
    assert unknown.status_code == 404
    assert AppliedNetwork.get().posted_by_id == operator.id
    entry = AuditEntry.get(AuditEntry.action == "network.applied")
    assert (entry.actor_kind, entry.detail["stack"]) == ("token", "production")


def test_a_failed_apply_is_kept_and_is_nobodys_view(client: FlaskClient, token: dict[str, str]) -> None:
    url = "/api/v1/admin/network/applied?stack=production&outcome=failed&reason=quota"
    answer = client.post(url, headers=token, json={})
    assert (answer.status_code, answer.json["outcome"], answer.json["reason"]) == (200, "failed", "quota")
    assert client.get("/api/v1/admin/network/applied?stack=production", headers=token).status_code == 404


def test_staff_say_that_a_stack_was_taken_down_and_its_pipeline_does_not(
    client: FlaskClient, token: dict[str, str], operator: User, sign_in: SignIn
) -> None:
    zone(serves_machines=True)
    host, said = make_machine("gpu-1"), {"stack": "production", "reason": "pulumi destroy"}
    applied()
    person, url = sign_in(operator), "/admin/network/stacks/gone"
    assert client.post(f"/api/v1{url}", headers=token, json=said).status_code == 403
    assert person.post(url, {**said, "stack": "staging"}).status_code == 404
    refused = person.post(url, said)
    assert (refused.status_code, refused.json["code"]) == (409, "stack_needed")
    assert [each["stack"] for each in person.get("/admin/network/state").json["stacks"]] == ["production"]
    retirement.retire(host, by=SYSTEM, reason="old")
    gone = person.post(url, said)
    assert (gone.status_code, gone.json["is_gone"], gone.json["reason"]) == (200, True, "pulumi destroy")
    assert person.get("/admin/network/state").json["stacks"] == []
    assert client.get("/api/v1/admin/network/applied?stack=production", headers=token).status_code == 404
    assert AuditEntry.get(AuditEntry.action == "network.stack_gone").actor_name == "olga"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"network": {"generation": "7"}}, 422),
        ({"network": {"generation": -1}}, 422),
        ({"network": {"secret": "x"}}, 422),
        ({"network": []}, 422),
        ({"resources": {}}, 422),
        ([], 422),
        ({}, 422),
    ],
)
def test_what_is_no_output_of_a_stack_is_refused(
    client: FlaskClient, token: dict[str, str], body: Any, status: int
) -> None:
    answer = client.post("/api/v1/admin/network/applied?stack=production", headers=token, json=body)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert answer.json["errors"]
    assert AppliedNetwork.select().count() == 0


def test_a_body_beyond_every_bound_is_refused_before_it_is_read(client: FlaskClient, token: dict[str, str]) -> None:
    answer = client.post(
        "/api/v1/admin/network/applied?stack=production", headers=token, json={"groups": {"x": "y" * 2_000_000}}
    )
    assert answer.status_code == 413


# Zones, records, places


def test_zones_groups_and_records_are_made_changed_and_removed(operator: User, sign_in: SignIn) -> None:
    person = sign_in(operator)
    zone_id = person.post("/admin/network/zones", {"name": "Größe.example", "cloud": "cloudflare"}).json["id"]
    path = f"/admin/network/zones/{zone_id}"
    assert person.patch(path, {"external_id": "abc", "serves_leases": True}).json["serves_leases"] is True
    record = {"zone_id": zone_id, "name": "a.größe.example", "type": "A", "values": ["192.0.2.7"]}
    made = person.post("/admin/network/records", record).json
    assert made["name"] == "a.xn--gre-6ka8i.example"
    assert person.patch(f"/admin/network/records/{made['id']}", {"values": ["192.0.2.8"]}).json["values"] == [
        "192.0.2.8"
    ]
    assert person.get("/admin/network/records?keyword=a.xn").json["total"] == 1
    assert person.delete(path).json["code"] == "zone_in_use"
    assert person.delete(f"/admin/network/records/{made['id']}").status_code == 204
    assert person.get(f"/admin/network/records/{made['id']}").status_code == 404
    group = {"name": "gpus", "cloud": "aws", "region": "eu-central-1", "vpc": "vpc-1"}
    group_id = person.post("/admin/network/groups", group).json["id"]
    assert person.post("/admin/network/groups", group).json["code"] == "group_exists"
    machine = make_machine(public_address="198.51.100.1")
    placed = person.patch(f"/admin/network/machines/{machine.id}", {"security_group_id": group_id})
    assert placed.json["security_group_id"] == group_id
    assert person.delete(f"/admin/network/groups/{group_id}").json["code"] == "group_in_use"
    assert person.patch(f"/admin/network/machines/{machine.id}", {"forward_ports": "20000-20010"}).status_code == 200
    assert person.get("/admin/network/gateways").json["total"] == 1
    told = {entry.action for entry in AuditEntry.select(AuditEntry.action).where(AuditEntry.actor_name == "olga")}
    assert told >= {"zone.created", "zone.edited", "record.wanted", "record.edited", "record.removed", "machine.placed"}


def test_every_faulty_field_is_named_with_a_way_out(operator: User, sign_in: SignIn) -> None:
    person = sign_in(operator)
    holds = zone()
    body = {"zone_id": holds.id, "name": "a b.gpu.example.org", "type": "A", "values": ["192.0.2.256"], "ttl_s": 5}
    answer = person.post("/admin/network/records", body)
    assert (answer.status_code, set(answer.json["errors"])) == (422, {"name", "values.0", "ttl_s"})
    answer = person.patch(f"/admin/network/zones/{holds.id}", {"ttl_s": 30})
    assert (answer.status_code, set(answer.json["errors"])) == (422, {"ttl_s"})
    answer = person.post("/admin/network/groups", {"name": "gpus", "cloud": "aws", "region": "eu-central-1"})
    assert (answer.status_code, set(answer.json["errors"])) == (422, {"vpc"})
    answer = person.post("/admin/openings", {**OPENING, "source": "203.0.113.7/24", "machine_id": make_machine().id})
    assert set(answer.json["errors"]) == {"source"}
    assert "203.0.113.0/24" in answer.json["errors"]["source"][0], "what was probably meant"
    assert set(person.post("/admin/openings", OPENING).json["errors"]) == {"machine_id"}


def test_drift_is_told_in_pages_with_who_asked(operator: User, sign_in: SignIn) -> None:
    person = sign_in(operator)
    holds = zone()
    for number in range(3):
        network_requests.want_record(
            holds, name=f"a{number}.gpu.example.org", type="A", values=["192.0.2.1"], by=actor_of(operator)
        )
    page = person.get("/admin/network/drift?page_size=2&state=to_make").json
    assert (page["total"], [entry["label"] for entry in page["items"]]) == (
        3, ["A a0.gpu.example.org", "A a1.gpu.example.org"],
    )  # fmt: skip
    assert {entry["asked_by"] for entry in page["items"]} == {"olga"}
    assert person.get("/admin/network/drift/counts").json["counts"]["to_make"] == 3


# Allocation and openings


def test_openings_are_given_with_the_allocation_and_shown_as_grants(
    tenant: Tenant, operator: User, sign_in: SignIn
) -> None:
    host, person = ready_host("gpu-1"), sign_in(operator)
    body = {"tenant_id": tenant.id, "until": tomorrow().isoformat(), "openings": [{**OPENING, "source": "0.0.0.0/0"}]}
    refused = person.post(f"/admin/machines/{host.id}/allocate", body)
    assert (refused.status_code, list(refused.json["errors"])) == (422, ["openings.0.reason"])
    assert host.state == "ready"
    body["openings"] = [OPENING]
    answer = person.post(f"/admin/machines/{host.id}/allocate", body)
    assert answer.status_code == 201
    grant = next(each for each in answer.json["grants"] if each["kind"] == "firewall")
    assert (grant["desired"], grant["observed"], grant["detail"]["holes"][0]["observed"]) == (
        "open",
        "unknown",
        "unknown",
    )
    assert grant["waits_since"] is not None
    opening = person.get(f"/admin/openings?lease_id={answer.json['id']}").json["items"][0]
    assert (opening["requested_by"], opening["first_port"]) == ("olga", 8888)


def test_a_customer_opens_and_closes_ports_of_the_own_lease_alone(
    tenant: Tenant, customer: User, viewer: User, stranger: User, sign_in: SignIn
) -> None:
    host = ready_host("gpu-1")
    lease = allocate(host, tenant)
    path = f"/customer/machines/{host.id}/openings"
    mine = sign_in(customer).post(path, OPENING)
    assert mine.status_code == 201
    assert "requested_by" not in mine.json
    assert sign_in(stranger).get(path).status_code == 404
    assert sign_in(stranger).post(path, OPENING).status_code == 404
    assert sign_in(viewer).get(path).json["total"] == 1
    assert sign_in(viewer).post(path, OPENING).status_code == 403
    for sneaked in ("machine_id", "lease_id", "observed", "closed_at", "requested_by"):
        answer = sign_in(customer).post(path, {**OPENING, sneaked: 1})
        assert (answer.status_code, list(answer.json["errors"])) == (422, [sneaked])
    world = sign_in(customer).post(path, {**OPENING, "source": "0.0.0.0/0", "reason": "a web page"})
    assert list(world.json["errors"]) == ["source"]
    machines_own = network_requests.open_port(host.machine, wish(22), by=SYSTEM)
    assert sign_in(customer).delete(f"{path}/{machines_own.id}").status_code == 404
    assert sign_in(viewer).delete(f"{path}/{mine.json['id']}").status_code == 403
    assert sign_in(customer).delete(f"{path}/{mine.json['id']}").json["closed_at"] is not None
    assert [opening.lease_id for opening in Opening.select().order_by(Opening.id)] == [lease.id, None]


def test_a_customer_is_told_by_which_port_of_the_gateway_what_is_reached(
    tenant: Tenant, customer: User, stranger: User, operator: User, sign_in: SignIn
) -> None:
    gateway = ready_host("way-in", public_address="198.51.100.1")
    place(gateway, forward_ports="20000-20010")
    host = ready_host("gpu-1", address="10.0.0.17")
    placed = sign_in(operator).patch(f"/admin/network/machines/{host.id}", {"gateway_id": gateway.id})
    assert placed.json["gateway_id"] == gateway.id
    allocate(host, tenant, openings=[wish()])
    path = f"/customer/machines/{host.id}/forwards"
    rows = sign_in(customer).get(path).json["items"]
    assert [(row["public_address"], row["public_port"], row["port"], row["source"]) for row in rows] == [
        ("198.51.100.1", 20000, host.machine.ssh_port, "0.0.0.0/0"), ("198.51.100.1", 20001, 8888, "203.0.113.0/24"),
    ]  # fmt: skip
    assert sign_in(stranger).get(path).status_code == 404
    told = sign_in(customer).get(f"/customer/machines/{host.id}/connection").json
    assert (told["host"], told["port"]) == ("198.51.100.1", 20000)


def test_a_part_is_written_off_over_http_with_a_reason(tenant: Tenant, operator: User, sign_in: SignIn) -> None:
    host, person = ready_host("gpu-1"), sign_in(operator)
    lease = allocate(host, tenant, openings=[wish()])
    path = f"/admin/leases/{lease.id}/grants/firewall/write-off"
    assert person.post(path, {"reason": "gone"}).json["code"] == "wrong_state"
    person.post(f"/admin/leases/{lease.id}/end", {"reason": "done"})
    assert person.post(path, {}).status_code == 422
    answer = person.post(path, {"reason": "the host has burnt down"})
    grant = next(each for each in answer.json["grants"] if each["kind"] == "firewall")
    assert (grant["written_off_reason"], grant["waits_since"]) == ("the host has burnt down", None)
    assert person.post(f"/admin/leases/{lease.id}/grants/keys/write-off", {"reason": "x"}).status_code == 404


# Sync


@pytest.fixture
def leased(app: Any, tenant: Tenant) -> tuple[FakeAgent, Machine, Lease]:
    machine, lease = leased_machine(tenant)
    return agent_of(app, machine), machine, lease


def test_an_older_agent_is_told_of_no_openings_and_a_newer_one_as_soon_as_it_says_so(
    leased: tuple[FakeAgent, Machine, Lease],
) -> None:
    agent, machine, lease = leased
    network_requests.open_port(machine, wish(), by=SYSTEM, lease=lease)
    assert not {"openings", "forwards"} & agent.await_order().keys()
    agent.report()
    agent.report(openings=[], forwards=[])
    told = agent.await_order()
    assert [(entry["ports"], entry["lease"]) for entry in told["openings"]] == [([8888, 8888], lease.host_id)]
    assert told["forwards"] == []
    agent.report()  # put back to the version before
    assert "openings" not in agent.await_order()


def test_what_an_agent_sees_reaches_the_lease_and_its_end(leased: tuple[FakeAgent, Machine, Lease]) -> None:
    agent, machine, lease = leased
    agent.report(openings=[], forwards=[])
    agent.hold(wait_s=10)
    opening = network_requests.open_port(machine, wish(), by=SYSTEM, lease=lease)
    agent.await_order()
    agent.report(leases=[observed(lease)], openings=seen(opening, state="failed", error="no room"), forwards=[])
    assert states_of(lease)["firewall"] == ("open", "unknown")
    agent.report(leases=[observed(lease)], openings=seen(opening), forwards=[])
    assert states_of(lease)["firewall"] == ("open", "open")
    network_requests.close_port(opening, by=SYSTEM)
    assert agent.await_order()["openings"] == []
    agent.report(leases=[observed(lease)], openings=seen(opening), forwards=[])
    assert states_of(lease)["firewall"] == ("closed", "open")
    agent.report(leases=[observed(lease)], openings=[], forwards=[])
    assert states_of(lease)["firewall"] == ("closed", "closed")


def test_ids_that_the_portal_does_not_know_are_not_refused(leased: tuple[FakeAgent, Machine, Lease]) -> None:
    """A restored portal has lost them: the host must stay reachable, and closes them since they are not wanted."""
    agent, _, _ = leased
    unknown = [{"id": 4711, "state": "open", "error": None}]
    answer = agent.say(agent.message(openings=unknown, forwards=unknown))
    assert answer.status_code == 200


@pytest.mark.parametrize("entry", [{"id": 0}, {"id": 1, "state": "ajar"}, {"id": 1, "error": "x" * 500}, {"ids": 1}])
def test_what_is_no_word_of_the_protocol_is_refused(leased: tuple[FakeAgent, Machine, Lease], entry: Any) -> None:
    agent, _, _ = leased
    told = [{"id": 1, "state": "open", "error": None, **entry}]
    assert agent.say(agent.message(openings=told, forwards=[])).status_code == 422


def test_the_host_of_a_fresh_lease_gets_all_of_it_in_one_state(tenant: Tenant, app: Any) -> None:
    host: Host = ready_host("gpu-1")
    Machine.update(hears_openings=True).where(Machine.id == host.id).execute()
    before = host.machine.generation
    lease = allocate(host, tenant, openings=[wish()])
    state = desired.desired_of(host.machine)
    assert state["generation"] > before
    assert ([entry["lease_id"] for entry in state["leases"]], [entry["lease"] for entry in state["openings"]]) == (
        [lease.id], [lease.id],
    )  # fmt: skip
    assert export()["openings"] == []
