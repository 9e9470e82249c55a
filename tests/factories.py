"""Rows for tests: each factory fills in what the test does not speak of.

People are made with `PASSWORD` and may sign in. What a rule protects (leases, runs) is made through the services, so
that no test starts from a world that the portal would not let happen.
"""

from __future__ import annotations

import itertools
import uuid
from datetime import timedelta
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from portal.db import utcnow
from portal.models import Grant, Lease, Machine, Membership, Tenant, User
from portal.models.states import GRANTS_OF_EVERY_LEASE
from portal.services import actors, passwords
from portal.services.actors import Actor

PASSWORD = "correct horse battery"
_numbers = itertools.count(1)


@cache
def _password_hash() -> str:
    return passwords.hash_of(PASSWORD)  # once for all: it takes as long as it does for people


def make_user(
    role: str = "customer", *, tenant: Tenant | None = None, member_role: str = "member", **fields: Any
) -> User:
    """A user, and with `tenant` a membership in it."""
    name = fields.pop("username", None) or f"{role}{next(_numbers)}"
    user = User.create(username=name, role=role, password_hash=fields.pop("password_hash", _password_hash()), **fields)
    if tenant is not None:
        Membership.create(tenant=tenant, user=user, role=member_role)
    return user


def make_tenant(name: str | None = None) -> Tenant:
    return Tenant.create(name=name or f"Tenant {next(_numbers)}")


def actor_of(user: User) -> Actor:
    """What a service wants as `by=`."""
    return actors.of_user(User.get_by_id(user.id), address="192.0.2.10", request="TEST")


def make_machine(name: str | None = None, **fields: Any) -> Machine:
    """A machine that is ready, as far as its row goes."""
    number = next(_numbers)
    given = {"address": f"192.0.2.{number % 250}", "ssh_port": 22000 + number, "ssh_user": "root", "state": "ready"}
    return Machine.create(name=name or f"gpu-{number}", epoch=str(uuid.uuid4()), **{**given, **fields})


def make_lease(machine: Machine, tenant: Tenant, **fields: Any) -> Lease:
    """An active lease for an hour, with its grants, as far as the rows go. `leases.allocate` is the real way."""
    now = utcnow()
    given = {"state": "active", "starts_at": now, "ends_at": now + timedelta(hours=1), "activated_at": now}
    lease = Lease.create(machine=machine, tenant=tenant, **{**given, **fields})
    for kind in GRANTS_OF_EVERY_LEASE:
        Grant.create(lease=lease, kind=kind, desired="open")
    return lease


def ssh_key_pair() -> tuple[str, str]:
    """A new Ed25519 key: the public line and the private key in OpenSSH's format."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return public.decode(), private.decode()
