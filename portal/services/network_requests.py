"""What people ask of the network: an opening or a record, for a machine or for a lease, and that it be gone again.

The lease's grants follow in the same transaction (network_switch.py). What an opening or a record is, and when one is
valid, is in network_openings.py and network_names.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid
from portal.models import DnsRecord, DnsZone, Lease, Machine, Opening, User
from portal.services import (
    batch,
    events,
    machines,
    network,
    network_forwards,
    network_names,
    network_openings,
    network_quota,
    network_switch,
    tenants,
)
from portal.services.actors import SYSTEM, Actor
from portal.services.network_openings import Wish

# Openings


def open_port(machine: Machine, wished: Wish, *, by: Actor, lease: Lease | None = None) -> Opening:
    """Open it for a lease, or for the machine itself; what is open already is answered, not opened twice.

    A lease's opening ends with it, whatever was asked. Raises Conflict where there is nobody to open it for, or where
    the cloud would not take one more.
    """
    with atomic():
        machine = machines.lock(machine)
        if machine.state == "retired":
            raise Conflict("The machine is retired.", code="wrong_state")
        if lease is not None:
            lease = _active(lease)
        opening = network_openings.add(machine, wished, by=by, lease=lease)
        _changed(machine, lease, by=by, is_more=True)
    return opening


def open_for(*, machine: Machine | None, lease: Lease | None, wished: Wish, by: Actor) -> Opening:
    """For a lease, or for a machine: one of them is to be named. Raises Invalid, and what `open_port` does."""
    if lease is not None and machine is not None and lease.machine_id != machine.id:
        raise Invalid({"lease_id": [f"Lease {lease.id} is of another machine."]})
    if lease is None and machine is None:
        raise Invalid({"machine_id": ["Name the machine, or the lease."]})
    return open_port(machine or lease.machine, wished, by=by, lease=lease)  # type: ignore[union-attr]  # one is there


def open_port_as_customer(user: User, lease: Lease, wished: Wish, *, by: Actor) -> Opening:
    """The same for the own lease, within what the operator lets customers open.

    Raises NotFound and Forbidden for who may not use the lease, Invalid that names the limit, Conflict.
    """
    tenants.require(user, lease.tenant_id, "use")
    with atomic():
        machine = machines.lock(lease.machine)
        there = network_openings.wanted_of(machine, lease)
        network_openings.refuse_beyond(network_openings.limits(), wished, there)
        return open_port(machine, wished, by=by, lease=lease)


def close_port(opening: Opening, *, by: Actor, reason: str | None = None) -> Opening:
    """Wanted no longer; host and stacks follow. Closing one that is closed changes nothing."""
    with atomic():
        machine = machines.lock(opening.machine)
        opening = network_openings.get(opening.id)
        if opening.closed_at is None:
            network_openings.end(opening, by=by, reason=reason)
            _changed(machine, opening.lease, by=by)
    return network_openings.get(opening.id)


def close_port_as_customer(user: User, lease: Lease, opening_id: int, *, by: Actor) -> Opening:
    """One of the own lease's. Raises NotFound and Forbidden."""
    tenants.require(user, lease.tenant_id, "use")
    return close_port(network_openings.get_of(lease, opening_id), by=by)


def close_due(now: datetime | None = None) -> int:
    """Close those whose own time is up; returns how many."""
    now = now or utcnow()
    return batch.each(network_openings.due(now), lambda opening: _close_due(opening, now))


def _close_due(opening: Opening, now: datetime) -> bool:
    with atomic():
        machine = machines.lock(opening.machine)
        opening = network_openings.get(opening.id)
        if opening.closed_at is not None or opening.ends_at is None or opening.ends_at > now:
            return False
        network_openings.end(opening, by=SYSTEM, reason="Its time is up.")
        _changed(machine, opening.lease, by=SYSTEM)
    return True


def _active(lease: Lease) -> Lease:
    found: Lease = Lease.get_by_id(lease.id)
    if found.state != "active":
        raise Conflict(f"The lease is {found.state}; one can open ports while it is active.", code="lease_not_active")
    return found


def _changed(machine: Machine, lease: Lease | None, *, by: Actor, is_more: bool = False) -> None:
    """Host and gateway are told, the stacks too where a group stands in front, and the lease's grants follow.

    In this order: the network's row is the last that anybody takes.
    """
    events.desired_changed(machine.id)
    lease = None if lease is None else Lease.get_by_id(lease.id)
    if lease is not None and lease.state == "active":
        network_forwards.follow(lease, machine, network_openings.wanted_of(machine, lease), by=by)
    if machine.security_group_id is not None:
        if is_more:
            network_quota.refuse_unfit(machine)
        network.changed()
    if lease is not None:
        network_switch.follow(lease)


# Records


def want_record(
    zone: DnsZone, *, by: Actor, machine: Machine | None = None, lease: Lease | None = None, **fields: Any
) -> DnsRecord:
    """For a machine, for as long as a lease is active, or by itself.

    Raises Invalid that names the field, Conflict where name and type are taken or the lease is not active.
    """
    if machine is not None and lease is not None:
        raise Invalid({"lease_id": ["A record belongs to a machine or to a lease, not to both."]})
    with _of_lease(lease) as active:
        return network_names.create(zone, by=by, machine=machine, lease=active, **fields)


def edit_record(record: DnsRecord, *, by: Actor, **changes: Any) -> DnsRecord:
    with _of_lease(record.lease):
        return network_names.edit(record, by=by, **changes)


def remove_record(record: DnsRecord, *, by: Actor, reason: str | None = None) -> None:
    with _of_lease(record.lease):
        network_names.remove(record, by=by, reason=reason)


@contextmanager
def _of_lease(lease: Lease | None) -> Iterator[Lease | None]:
    """A change of a lease's records, whose grants follow; of a record without a lease, nothing more than that."""
    with atomic():
        if lease is None:
            yield None
            return
        machines.lock(lease.machine)
        lease = Lease.get_by_id(lease.id)
        if lease.state != "active":
            raise Conflict(f"The lease is {lease.state}; it has names while it is active.", code="lease_not_active")
        yield lease
        network_switch.follow(lease)
