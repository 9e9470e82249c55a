"""The audit trail as operators read it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from portal.db import atomic, utcnow
from portal.models import AuditEntry
from portal.services import audit, seals
from tests.factories import actor_of


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
