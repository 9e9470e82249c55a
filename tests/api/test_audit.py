"""The audit trail as operators read it, and that whatever a person changes is in it.

The second is watched in every test of this folder (tests/support/trail.py); here is what no other test of it changes.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from portal.db import atomic, utcnow
from portal.models import AuditEntry
from portal.services import audit, seals
from tests.factories import actor_of, make_machine


def record(action, resource=None, by=None, **more):
    with atomic():
        audit.record(action, resource, by=by, **more)


@pytest.fixture
def trail(operator, customer, tenant):
    carol, olga = actor_of(customer), actor_of(operator)
    record("key.added", customer, by=carol, tenant_id=tenant.id, fingerprint="SHA256:x")
    record("key.removed", customer, by=carol, outcome="failed")
    record("lease.active", tenant, by=olga)
    AuditEntry.update(at=utcnow() - timedelta(days=2)).where(AuditEntry.action == "key.added").execute()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["lease.active", "key.removed", "key.added"]),
        ("action=key.added", ["key.added"]),
        ("action=key.", ["key.removed", "key.added"]),
        ("action=key", []),
        ("actor=olga", ["lease.active"]),
        ("outcome=failed", ["key.removed"]),
        ("resource_type=tenant", ["lease.active"]),
        ("resource_type=user&resource_id=4711", []),
        ("since={yesterday}", ["lease.active", "key.removed"]),
        ("until={yesterday}", ["key.added"]),
    ],
)
def test_the_trail_is_read_newest_first_with_filters(sign_in, admin, trail, query, expected):
    yesterday = (utcnow() - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    answer = sign_in(admin).get(f"/admin/audit/logs?{query.format(yesterday=yesterday)}")
    assert [item["action"] for item in answer.json["items"]] == expected


def test_an_entry_says_who_what_where_and_whether_it_is_sealed(sign_in, admin, trail):
    seals.seal()
    record("late.entry", by=actor_of(admin))
    late, *_, first = sign_in(admin).get("/admin/audit/logs").json["items"]
    assert first["detail"] == {"fingerprint": "SHA256:x"}
    assert (first["actor_name"], first["actor_role"], first["address"]) == ("carol", "customer", "192.0.2.10")
    assert (first["sealed"], late["sealed"]) == (True, False)


@pytest.mark.parametrize("query", ["since=yesterday", "since=2030-01-01", "outcome=maybe", "resource_id=x", "action="])
def test_a_filter_that_makes_no_sense_is_refused(sign_in, admin, query):
    assert sign_in(admin).get(f"/admin/audit/logs?{query}").status_code == 422


def test_customers_do_not_read_it_and_nobody_changes_it(sign_in, admin, customer, trail):
    assert sign_in(customer).get("/admin/audit/logs").status_code == 403
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert sign_in(admin).open(method, "/admin/audit/logs").status_code == 405


def test_a_write_that_tells_nobody_is_seen_by_the_tests_of_this_folder(
    sign_in, customer, monkeypatch, every_write_of_a_request_is_in_the_trail
):
    monkeypatch.setattr(audit, "record", lambda *_, **__: None)
    assert sign_in(customer).post("/auth/logout").status_code == 204
    untold = every_write_of_a_request_is_in_the_trail.untold
    assert untold == ["POST /api/v1/auth/logout changed refresh_family"]
    untold.clear()


def told():
    return [entry.action for entry in AuditEntry.select().order_by(AuditEntry.id)]


def test_who_shuts_out_staff_and_lets_them_in_again_is_told(sign_in, admin, operator):
    person = sign_in(admin)
    for what in ("disable", "enable", "reset-password"):
        assert person.post(f"/admin/staff/{operator.id}/{what}").status_code == 200
    assert told() == ["user.disabled", "user.enabled", "user.password_reset"]


def test_who_changes_what_the_network_has_is_told(sign_in, operator):
    person = sign_in(operator)
    zone = person.post("/admin/network/zones", {"name": "gpu.example.org", "cloud": "cloudflare"}).json["id"]
    wanted = {"name": "gpus", "cloud": "aws", "region": "eu-central-1", "vpc": "vpc-1"}
    group = person.post("/admin/network/groups", wanted).json["id"]
    assert person.patch(f"/admin/network/groups/{group}", {"name": "cards"}).status_code == 200
    assert person.delete(f"/admin/network/groups/{group}").status_code == 204
    assert person.delete(f"/admin/network/zones/{zone}").status_code == 204
    assert person.patch("/admin/network/limits", {"openings_a_lease": 3}).status_code == 200
    made = ["zone.created", "security_group.created", "security_group.edited"]
    assert told() == [*made, "security_group.deleted", "zone.deleted", "network.limits_set"]


def test_who_opens_a_port_of_a_machine_and_closes_it_is_told(sign_in, operator):
    person, machine = sign_in(operator), make_machine()
    wish = {"machine_id": machine.id, "protocol": "tcp", "first_port": 8888, "source": "203.0.113.0/24"}
    opening = person.post("/admin/openings", wish).json["id"]
    assert person.delete(f"/admin/openings/{opening}").status_code == 200
    assert told() == ["opening.asked", "opening.closed"]


def test_who_says_that_a_host_was_installed_anew_is_told(sign_in, operator):
    machine = make_machine(state="quarantined")
    answer = sign_in(operator).post(f"/admin/machines/{machine.id}/reimaged", {"reason": "from the rescue system"})
    assert (answer.status_code, told()) == (200, ["agent.credentials_ended", "machine.reimaged"])
