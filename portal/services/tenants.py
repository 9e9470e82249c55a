"""Tenants: companies that lease machines, who belongs to them, and what each role there may do.

`RIGHTS` is the one table of that. A user who belongs to no such tenant is told that it does not exist. The people
themselves are in users.py; whose keys open a lease follows from here, and keys.py carries it to the hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import peewee

from portal.db import atomic
from portal.errors import Conflict, Forbidden, Invalid, NotFound
from portal.models import Membership, Tenant, User
from portal.models.states import MEMBER_ROLES
from portal.services import audit, events, keys
from portal.services.actors import Actor

RIGHTS: MappingProxyType[str, frozenset[str]] = MappingProxyType(
    {
        "owner": frozenset({"look", "use", "manage"}),
        "member": frozenset({"look", "use"}),
        "viewer": frozenset({"look"}),
    }
)
"""look: see machines, tasks, logs and reports. use: log in with one's keys, run and stop tasks. manage: stop the tasks
of others, and see who belongs to the tenant."""


def roles_with(right: str) -> tuple[str, ...]:
    """The roles that have `right`."""
    return tuple(role for role in MEMBER_ROLES if right in RIGHTS[role])


def create(name: str, *, by: Actor) -> Tenant:
    """Raises Conflict if the name is taken."""
    try:
        with atomic():
            tenant = Tenant.create(name=_clean(name))
            audit.record("tenant.created", tenant, by=by, tenant_id=tenant.id, name=tenant.name)
    except peewee.IntegrityError:
        raise Conflict(f"There is a tenant called {name} already.", code="name_taken") from None
    return tenant


def rename(tenant: Tenant, name: str, *, by: Actor) -> Tenant:
    """Raises Conflict if the name is taken."""
    try:
        with atomic():
            Tenant.update(name=_clean(name)).where(Tenant.id == tenant.id).execute()
            audit.record("tenant.renamed", tenant, by=by, tenant_id=tenant.id, name=name, was=tenant.name)
    except peewee.IntegrityError:
        raise Conflict(f"There is a tenant called {name} already.", code="name_taken") from None
    return get(tenant.id)


def _clean(name: str) -> str:
    name = " ".join(name.split())
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise Invalid({"name": ["Use 1 to 100 printable characters."]})
    return name


def get(tenant_id: int) -> Tenant:
    tenant = Tenant.get_or_none(Tenant.id == tenant_id)
    if tenant is None:
        raise NotFound("There is no such tenant.")
    return tenant


def search(keyword: str | None = None) -> peewee.ModelSelect[Tenant]:
    """All tenants, by name."""
    found = Tenant.select().order_by(Tenant.name)
    return found.where(Tenant.name.contains(keyword)) if keyword else found


def of(user: User) -> peewee.ModelSelect[Tenant]:
    """The tenants that `user` belongs to, by name."""
    return Tenant.select().join(Membership).where(Membership.user == user).order_by(Tenant.name)


def memberships_of(user: User) -> peewee.ModelSelect[Membership]:
    """The memberships of a user with their tenants, by the tenant's name."""
    return Membership.select(Membership, Tenant).join(Tenant).where(Membership.user == user).order_by(Tenant.name)


def memberships_by_user(people: Sequence[User]) -> dict[int, list[Membership]]:
    """User id → memberships with their tenants, by the tenant's name: for a page of people."""
    found: dict[int, list[Membership]] = {user.id: [] for user in people}
    rows = Membership.select(Membership, Tenant).join(Tenant).where(Membership.user << list(found))
    for membership in rows.order_by(Tenant.name):
        found[membership.user_id].append(membership)
    return found


def members_counted(companies: Sequence[Tenant]) -> dict[int, int]:
    """Tenant id → how many people belong to it: for a page of tenants."""
    counted = {tenant.id: 0 for tenant in companies}
    query = Membership.select(Membership.tenant, peewee.fn.COUNT(Membership.id)).group_by(Membership.tenant)
    rows: Any = query.where(Membership.tenant << list(counted)).tuples()
    return counted | dict(rows)


def ids_of(user: User, right: str = "look") -> list[int]:
    """The ids of the tenants in which `user` has `right`: the scope of every query by a customer."""
    memberships = Membership.select(Membership.tenant).where(
        (Membership.user == user) & (Membership.role << roles_with(right))
    )
    return [membership.tenant_id for membership in memberships.order_by(Membership.tenant)]


def may(user: User, tenant_id: int, right: str) -> bool:
    return tenant_id in ids_of(user, right)


def require(user: User, tenant_id: int, right: str) -> None:
    """Raises NotFound if `user` is no member of the tenant; Forbidden if the role there lacks the right."""
    membership = Membership.get_or_none((Membership.user == user) & (Membership.tenant == tenant_id))
    if membership is None:
        raise NotFound("There is no such tenant.")
    if right not in RIGHTS[membership.role]:
        needed = " or ".join(roles_with(right))
        raise Forbidden(f"You are {membership.role} of this tenant; this takes {needed}.", code="right_missing")


def members_of(tenant: Tenant) -> peewee.ModelSelect[Membership]:
    """The memberships of a tenant with their users, by user name."""
    return Membership.select(Membership, User).join(User).where(Membership.tenant == tenant).order_by(User.username)


def add_member(tenant: Tenant, user: User, role: str, *, by: Actor) -> Membership:
    """Make a customer a member. Raises Invalid for a user of another role, Conflict for one who is a member already."""
    _check_role(role)
    if user.role != "customer":
        raise Invalid({"user_id": [f"{user.username} is {user.role}; only customers belong to tenants."]})
    try:
        with keys.carrying(of=tenant):
            membership = Membership.create(tenant=tenant, user=user, role=role)
            _changed("tenant.member_added", tenant, user, by, role=role)
    except peewee.IntegrityError:
        raise Conflict(f"{user.username} belongs to {tenant.name} already.", code="already_member") from None
    return membership


def set_member_role(tenant: Tenant, user_id: int, role: str, *, by: Actor) -> Membership:
    _check_role(role)
    membership = get_member(tenant, user_id)
    with keys.carrying(of=tenant):
        Membership.update(role=role).where(Membership.id == membership.id).execute()
        _changed("tenant.member_changed", tenant, membership.user, by, role=role, was=membership.role)
    membership.role = role
    return membership


def remove_member(tenant: Tenant, user_id: int, *, by: Actor) -> None:
    """Take somebody out: the keys leave the tenant's machines at once, and end what they had open there."""
    membership = get_member(tenant, user_id)
    with keys.carrying(of=tenant):
        Membership.delete().where(Membership.id == membership.id).execute()
        _changed("tenant.member_removed", tenant, membership.user, by, was=membership.role)


def get_member(tenant: Tenant, user_id: int) -> Membership:
    membership = members_of(tenant).where(Membership.user == user_id).first()
    if membership is None:
        raise NotFound(f"{tenant.name} has no such member.")
    return membership  # type: ignore[no-any-return]  # peewee's `first` is untyped


def _check_role(role: str) -> None:
    if role not in MEMBER_ROLES:
        raise Invalid({"role": [f"Choose from {', '.join(MEMBER_ROLES)}."]})


def _changed(action: str, tenant: Tenant, user: User, by: Actor, **detail: Any) -> None:
    audit.record(action, tenant, by=by, tenant_id=tenant.id, user_id=user.id, username=user.username, **detail)
    events.write(action, tenant_id=tenant.id, resource_id=user.id)
