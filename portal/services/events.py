"""Events: a row for each change that somebody may be waiting for. Waiting itself is in integrations/wake.py."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from portal.db import atomic, db, utcnow
from portal.models import Event, Machine

KEEP = timedelta(hours=1)


def write(
    topic: str,
    *,
    machine_id: int | None = None,
    tenant_id: int | None = None,
    resource_id: int | None = None,
    **data: Any,
) -> None:
    """Write an event; it is heard after the commit. Raises RuntimeError outside a transaction."""
    if not db.in_transaction():
        raise RuntimeError(f"event {topic}: outside a transaction")
    Event.create(topic=topic, machine_id=machine_id, tenant_id=tenant_id, resource_id=resource_id, data=data)


def desired_changed(machine_id: int) -> None:
    """What the agent of this machine must do has changed: raise its generation and wake its held call."""
    Machine.update(generation=Machine.generation + 1).where(Machine.id == machine_id).execute()
    write("machine.generation", machine_id=machine_id)


def prune() -> int:
    """Delete what nobody can be waiting for any more; returns how many."""
    with atomic():
        return int(Event.delete().where(Event.at < utcnow() - KEEP).execute())
