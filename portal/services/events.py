"""Events: a row for each change that somebody may be waiting for. Waiting itself is in integrations/wake.py."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any

from portal.db import atomic, connection, db, utcnow
from portal.integrations.wake import HEARD, WINDOW_S, Heard
from portal.models import Event, Machine

KEEP = timedelta(hours=1)
INTERNAL = ("machine.generation", "credential.ended")  # of no meaning to people
PAGE = 500  # as many missed events are read at a time


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


def missed(last: int, *, of_tenants: Collection[int | None] | None) -> Iterator[Heard]:
    """What people may hear of after the event `last`, and shortly before it: ids commit out of order. None: of all.

    Whoever was away for longer than events are kept is told all that there are. Waiting between two of them holds no
    database connection.
    """
    told: Any = Event.select(*HEARD).where(Event.topic.not_in(INTERNAL), Event.id != last)
    if of_tenants is not None:
        told = told.where(Event.tenant_id << of_tenants)
    with connection():
        seen_at = Event.select(Event.at).where(Event.id == last).scalar()
    if seen_at is not None:
        told = told.where(Event.at > seen_at - timedelta(seconds=WINDOW_S))
    page: list[Any] = []
    while True:
        after = page[-1][0] if page else 0
        with connection():
            page = list(told.where(Event.id > after).order_by(Event.id).limit(PAGE).tuples())
        yield from (Heard(*row) for row in page)
        if len(page) < PAGE:
            return


def prune() -> int:
    """Delete what nobody can be waiting for any more; returns how many."""
    with atomic():
        return int(Event.delete().where(Event.at < utcnow() - KEEP).execute())
