"""A list asks the database as often for a page of many rows as for a page of few."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from portal.db import atomic, utcnow
from portal.integrations import login_key_files
from portal.models import Alert, Attempt, Baseline, Gpu, Run, RunHost, SshKey, Task, User
from portal.services import audit, inventory
from portal.services.actors import SYSTEM
from portal.settings import Settings
from tests.conftest import SignedIn
from tests.factories import make_lease, make_machine, make_tenant, make_user
from tests.support.rental import HOST_KEY

STAFFS = (
    "/customers",
    "/customers/tenants",
    "/machines",
    "/leases",
    "/runs",
    "/tasks",
    "/alerts",
    "/alerts/offline",
    "/audit",
    "/staff",
    "/api/v1/admin/customers",
    "/api/v1/admin/tenants",
    "/api/v1/admin/machines",
    "/api/v1/admin/leases",
    "/api/v1/admin/runs",
    "/api/v1/admin/tasks",
    "/api/v1/admin/alerts",
    "/api/v1/admin/audit/logs",
    "/api/v1/admin/drift",
    "/api/v1/prometheus/targets",
)
CUSTOMERS = (
    "/my/machines",
    "/my/keys",
    "/tasks",
    "/api/v1/customer/machines",
    "/api/v1/customer/tasks",
    "/api/v1/customer/keys",
)

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # the same queries on both


def grow(customer: User, rows: int) -> None:
    """That many more of everything, some of it the customer's."""
    own = customer.memberships.get().tenant
    for number in range(rows):
        tenant = make_tenant()
        person = make_user(tenant=tenant)
        make_user("operator")
        machine = make_machine()
        Gpu.create(machine=machine, uuid=f"GPU-{machine.id}", slot=0, name="H100")
        lease = make_lease(machine, own if number % 2 else tenant)
        run = Run.create(playbook="gpu_hosts", purpose="operator", state="failed")
        RunHost.create(run=run, machine=machine)
        task = Task.create(lease=lease, created_by=customer if number % 2 else person, name="work", command="true")
        Attempt.create(task=task, number=1)
        key = {"type": "ssh-ed25519", "bits": 256, "line": "ssh-ed25519 AAAA", "fingerprint": f"SHA256:{machine.id}"}
        SshKey.create(user=customer, name=f"key {machine.id}", **key)
        Alert.create(
            fingerprint=str(machine.id),
            source="portal",
            name="A",
            severity="warning",
            machine=machine,
            starts_at=utcnow(),
        )
        with atomic():
            audit.record("machine.ready", machine, by=SYSTEM)


@contextmanager
def counted() -> Iterator[list[str]]:
    """The statements that the block sends to the database."""
    sent: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: sent.append(str(record.msg))  # type: ignore[method-assign]
    log = logging.getLogger("peewee")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield sent
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def asked(who: SignedIn, path: str) -> int:
    with counted() as sent:
        answer = who.client.get(path, headers=who.headers)
    assert answer.status_code == 200, answer.text
    return sum(text.lstrip("('").startswith("SELECT") for text in sent)


@pytest.mark.parametrize(("role", "paths"), [("admin", STAFFS), ("customer", CUSTOMERS)])
def test_a_list_asks_as_often_however_long_it_is(
    sign_in: Callable[[User], SignedIn], admin: User, customer: User, role: str, paths: tuple[str, ...]
) -> None:
    who = sign_in(admin if role == "admin" else customer)
    grow(customer, 4)
    for path in paths:
        asked(who, path)  # the first time may differ for another reason
    few = {path: asked(who, path) for path in paths}
    grow(customer, 8)
    assert {path: asked(who, path) for path in paths} == few


def test_an_inventory_asks_as_often_however_many_machines_there_are(database: Any, settings: Settings) -> None:
    """While the portal's key is being replaced, too, when each machine has a way of its own."""
    settings.ssh_key_file.parent.mkdir(parents=True, exist_ok=True)
    login_key_files.ensure(settings.ssh_key_file)
    login_key_files.replace(settings.ssh_key_file)

    def sent_for(more: int) -> int:
        for _ in range(more):
            machine = make_machine(host_key=HOST_KEY)
            Baseline.create(machine=machine, digest="0" * 64, content={"sections": {}}, taken_at=utcnow())
        with counted() as sent:
            assert inventory.of_all()["hosts"]
        return len(sent)

    few = sent_for(2)
    assert sent_for(8) == few
