"""Writing the audit trail: with the change or not at all, and never with a secret."""

from __future__ import annotations

import pytest
from peewee import IntegrityError

from portal.db import atomic
from portal.models import AuditEntry, Tenant
from portal.services import audit
from portal.services.actors import SYSTEM


def test_an_entry_needs_the_transaction_that_it_speaks_of(database):
    with pytest.raises(RuntimeError, match="outside a transaction"):
        audit.record("tenant.created", None, by=SYSTEM)


def create_tenant(name="Acme"):
    with atomic():
        audit.record("tenant.created", Tenant.create(name=name), by=SYSTEM)


def test_a_change_that_is_undone_leaves_no_entry(database):
    create_tenant("Bolt")
    with pytest.raises(IntegrityError), atomic():
        [create_tenant(name) for name in ("Acme", "Bolt")]
    assert AuditEntry.select().count() == 1
    assert Tenant.get().name == "Bolt"


def test_a_failed_entry_undoes_the_change(database, monkeypatch):
    def fail(**_):
        raise OSError("the disk is full")

    monkeypatch.setattr(AuditEntry, "create", fail)
    with pytest.raises(OSError, match="disk"):
        create_tenant()
    assert not Tenant.select().exists()


def test_the_id_of_a_secret_is_told_and_the_secret_is_not(database):
    with atomic():
        audit.record("agent.credential_rotating", None, by=SYSTEM, credential_id=7, credential="marker", token_id=9)
    assert AuditEntry.get().detail == {"credential_id": 7, "credential": audit.MASK, "token_id": 9}


def test_secrets_are_masked_by_name_at_any_depth(database):
    with atomic():
        audit.record(
            "machine.registered", None, by=SYSTEM, name="gpu-1", password="marker", ssh={"Private_Key": "marker"},
            hosts=[{"first_contact": {"user": "marker"}, "port": 22}], token=None, at=SYSTEM,
        )  # fmt: skip
    detail = AuditEntry.get().detail
    assert "marker" not in str(detail)
    assert detail["name"] == "gpu-1"
    assert detail["hosts"][0]["port"] == 22
    assert detail["token"] is None
    assert detail["ssh"] == {"Private_Key": audit.MASK}
