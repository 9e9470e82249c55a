"""Forwards: the port of a gateway that leads to a leased machine behind it. Told in order: take, close, seen, release.

A port belongs to one forward until the gateway was seen to have closed it; the database refuses a second one, whoever
comes at once. The machines and their gateways are in network_machines.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict
from portal.integrations.protocol import format_time
from portal.models import Forward, Lease, Machine
from portal.services import events, network_machines, network_places

EVERYBODY = {4: "0.0.0.0/0", 6: "::/0"}


class NoPortLeft(Conflict):
    """The gateway has given all its ports away."""

    code = "no_port_left"


# Take


def take(lease: Lease, machine: Machine, *, target_port: int, before: Lease | None = None) -> Forward:
    """A port of the machine's gateway for this lease; the one that `before` had, if it is free.

    Called inside the transaction that holds the machine's row. Raises NoPortLeft.
    """
    gateway: Machine = Machine.get_by_id(machine.gateway_id)
    address = network_places.find_address(machine)
    source = EVERYBODY[address.version if address is not None else 4]
    wanted = {"gateway": gateway, "machine": machine, "lease": lease, "protocol": "tcp", "source": source}
    for port in _free(gateway, before):
        try:
            with atomic():  # a savepoint: whoever was first keeps the port, and this transaction goes on
                forward = Forward.create(public_port=port, target_port=target_port, **wanted)
        except peewee.IntegrityError:
            continue
        events.desired_changed(gateway.id)
        return forward
    raise NoPortLeft(f"{gateway.name} has no port left in {gateway.forward_ports}. Give it a larger pool.")


def _free(gateway: Machine, before: Lease | None) -> Iterable[int]:
    """Ports that were free a moment ago, in turn: one that was just released is given away as late as can be."""
    ports = network_machines.pool(gateway)
    mine = Forward.gateway == gateway
    taken = {each.public_port for each in Forward.select().where(mine, Forward.released_at.is_null())}
    if before is not None:
        had = Forward.select().where(mine, Forward.lease == before).order_by(Forward.id.desc()).first()
        if had is not None and had.public_port in ports and had.public_port not in taken:
            yield had.public_port
    newest = Forward.select().where(mine).order_by(Forward.id.desc()).first()
    start = newest.public_port + 1 if newest is not None and newest.public_port + 1 in ports else ports.start
    for port in (*range(start, ports.stop), *range(ports.start, start)):
        if port not in taken:
            yield port


# Close


def close_all(lease: Lease, now: datetime) -> None:
    """Wanted no longer; the port stays taken until the gateway was seen to have closed it."""
    wanted = (Forward.lease == lease) & Forward.closed_at.is_null()
    gateways = {each.gateway_id for each in Forward.select(Forward.gateway).where(wanted)}
    Forward.update(closed_at=now).where(wanted).execute()
    for gateway_id in sorted(gateways):
        events.desired_changed(gateway_id)


def moved(lease: Lease) -> None:
    """The lease has another end: so have its forwards."""
    wanted = Forward.select(Forward.gateway).where(Forward.lease == lease, Forward.closed_at.is_null())
    for gateway_id in sorted({each.gateway_id for each in wanted}):
        events.desired_changed(gateway_id)


# What the gateway is told, and says


def to_send(gateway: Machine, now: datetime) -> list[dict[str, Any]]:
    """What it shall forward now, in the words of the protocol."""
    if not gateway.is_gateway:
        return []
    rows = (
        Forward.select(Forward, Lease, Machine)
        .join(Lease)
        .switch(Forward)
        .join(Machine, on=Forward.machine)
        .where(Forward.gateway == gateway, Forward.closed_at.is_null(), Lease.state == "active", Lease.ends_at > now)
        .order_by(Forward.id)
    )
    return [_sent(each) for each in rows]


def _sent(forward: Forward) -> dict[str, Any]:
    return {
        "id": forward.id,
        "lease": forward.lease.host_id,
        "protocol": forward.protocol,
        "public_port": forward.public_port,
        "source": forward.source,
        "target_address": str(ipaddress.ip_address(forward.machine.address)),
        "target_port": forward.target_port,
        "ends_at": format_time(forward.lease.ends_at),
    }


def observe(gateway: Machine, seen: Sequence[Mapping[str, Any]] | None, *, is_current: bool) -> set[int]:
    """Take in what the gateway says it forwards; returns the leases for which that is news.

    `is_current` and None mean what they do for openings.
    """
    told = {entry["id"]: entry for entry in seen or ()}
    held = (Forward.gateway == gateway) & Forward.released_at.is_null()
    if seen is None:
        held &= Forward.observed_at.is_null()
    leases = set()
    for forward in list(Forward.select().where(held)):  # read to its end: a half read one keeps SQLite from writing
        entry = told.get(forward.id)
        state, error = ("closed", None) if entry is None else (entry["state"], entry["error"])
        if (entry is None and not is_current) or not _note(forward, state, error):
            continue
        leases.add(forward.lease_id)
    return leases


def _note(forward: Forward, state: str, error: str | None) -> bool:
    """Write down what was seen; a forward that nobody wants and that is closed gives its port back."""
    is_over = forward.closed_at is not None and state == "closed"
    if (forward.observed, forward.error) == (state, error) and not is_over and forward.observed_at is not None:
        return False
    since = forward.observed_at if forward.observed == state and forward.observed_at else utcnow()
    changes: dict[str, Any] = {"observed": state, "error": error, "observed_at": since}
    with atomic():
        Forward.update(**changes).where(Forward.id == forward.id).execute()
        if is_over:
            unwanted = (Forward.id == forward.id) & Forward.closed_at.is_null(False) & Forward.released_at.is_null()
            Forward.update(released_at=utcnow()).where(unwanted).execute()
    return True


# Release


def release(lease: Lease, *, gateway: Machine | None = None) -> None:
    """Give the ports of a lease back unseen: an operator waits for the gateway no longer."""
    closed = (Forward.lease == lease) & Forward.closed_at.is_null(False) & Forward.released_at.is_null()
    if gateway is not None:
        closed &= Forward.gateway == gateway
    Forward.update(released_at=utcnow()).where(closed).execute()


def of_lease(lease: Lease) -> list[Forward]:
    """Those that hold a port now, with their gateways."""
    held = Forward.select(Forward, Machine).join(Machine, on=Forward.gateway)
    return list(held.where(Forward.lease == lease, Forward.released_at.is_null()).order_by(Forward.id))


def find_ssh(lease: Lease) -> Forward | None:
    """The one by which its customers sign in, with its gateway, while it is wanted."""
    to_ssh = Forward.target_port == lease.machine.ssh_port
    wanted = Forward.select(Forward, Machine).join(Machine, on=Forward.gateway)
    found: Forward | None = wanted.where(Forward.lease == lease, Forward.closed_at.is_null(), to_ssh).first()
    return found


def search(*, gateway_id: int | None = None) -> peewee.ModelSelect[Forward]:
    """Forwards that hold a port, by gateway and port."""
    rows = Forward.select().where(Forward.released_at.is_null()).order_by(Forward.gateway, Forward.public_port)
    return rows if gateway_id is None else rows.where(Forward.gateway == gateway_id)
