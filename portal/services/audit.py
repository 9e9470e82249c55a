"""The audit trail: who did what, written in the transaction that did it.

Secrets are masked here, by name and at any depth, so that no caller has to think of it. Sealing (the hash chain over
committed rows) is in seals.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import peewee

from portal.db import db
from portal.models import AuditEntry, Table
from portal.services.actors import Actor

MASK = "•••"
OUTCOMES = ("done", "refused", "failed")
SECRET_WORDS = ("password", "secret", "token", "private_key", "credential", "first_contact", "probe_key")


def record(
    action: str,
    resource: Table | None,
    *,
    by: Actor,
    tenant_id: int | None = None,
    outcome: str = "done",
    **detail: Any,
) -> None:
    """Write an entry, e.g. `record("lease.ending", lease, by=actor, reason=reason)`.

    `action` is a noun and its new state, or a past participle (`key.added`). Raises RuntimeError outside a transaction:
    an entry without the change, or a change without the entry, must not exist.
    """
    if not db.in_transaction():
        raise RuntimeError(f"audit {action}: outside a transaction")
    AuditEntry.create(
        actor_kind=by.kind,
        actor_id=by.id,
        actor_name=by.name,
        actor_role=by.role,
        address=by.address,
        request=by.request,
        action=action,
        resource_type=None if resource is None else type(resource).__name__.lower(),
        resource_id=None if resource is None else resource.id,
        tenant_id=tenant_id,
        detail=mask(detail),
        outcome=outcome,
    )


def search(
    *,
    action: str | None = None,
    resource_type: str | None = None,
    resource_id: int | None = None,
    tenant_id: int | None = None,
    actor: str | None = None,
    outcome: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> peewee.ModelSelect[AuditEntry]:
    """Entries that fit, newest first. An `action` that ends in a dot takes every action of that noun."""
    found = AuditEntry.select().order_by(AuditEntry.id.desc())
    exact: tuple[tuple[Any, Any], ...] = (
        (AuditEntry.resource_type, resource_type),
        (AuditEntry.resource_id, resource_id),
        (AuditEntry.tenant_id, tenant_id),
        (AuditEntry.actor_name, actor),
        (AuditEntry.outcome, outcome),
    )
    for column, wanted in exact:
        if wanted is not None:
            found = found.where(column == wanted)
    if action is not None:
        of_noun = action.endswith(".")
        found = found.where(AuditEntry.action.startswith(action) if of_noun else AuditEntry.action == action)
    if since is not None:
        found = found.where(AuditEntry.at >= since)
    if until is not None:
        found = found.where(AuditEntry.at < until)
    return found


def mask(value: Any) -> Any:
    """The same value with everything secret replaced."""
    if isinstance(value, dict):
        return {key: MASK if _is_secret(key) and item is not None else mask(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_secret(key: str) -> bool:
    """An id names something secret and gives nothing away."""
    name = key.lower()
    return not name.endswith("_id") and any(word in name for word in SECRET_WORDS)
