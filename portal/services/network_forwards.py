"""Forwards: the port of a gateway that leads to a leased machine behind it. Told in order: take, close, seen, release.

A port belongs to one forward until the gateway was seen to have closed it; the database refuses a second one, whoever
comes at once. The machines and their gateways are in network_machines.py.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict
from portal.integrations.protocol import format_time
from portal.models import Forward, Lease, Machine, Opening
from portal.services import audit, events, machines, network_machines, network_places
from portal.services.actors import Actor

EVERYBODY = {4: "0.0.0.0/0", 6: "::/0"}
MOST_OF_OPENING = 16  # ports


class Way(NamedTuple):
    """What a forward leads to on its machine, and for whom."""

    protocol: str
    target_port: int
    source: str


class NoPortLeft(Conflict):
    """The gateway has given all its ports away."""

    code = "no_port_left"


# Take, and close


def follow(
    lease: Lease, machine: Machine, openings: Iterable[Opening], *, by: Actor, before: Lease | None = None
) -> None:
    """Bring the forwards into step with what the lease opens: the way in by SSH, and the ports of its openings.

    A port that is wanted no longer is closed; it stays taken until the gateway was seen to have closed it. `before` is
    the lease that this one continues: its ports are taken again where they are free. Called inside the transaction that
    holds the machine's row, takes the gateway's, and comes before the network's. Raises NoPortLeft.
    """
    if machine.gateway_id is None:
        return
    gateway = machines.lock(machine.gateway)  # of two who take several ports, each might wait for one of the other's
    events.desired_changed(gateway.id)  # also where nothing but an end is another
    wanted = _ends(lease, machine, openings)
    there = {_way_of(each): each for each in wanted_of(lease)}
    left = [forward for way, forward in there.items() if way not in wanted]
    _close(left, utcnow(), by=by)
    missing = [way for way in wanted if way not in there]  # the way in comes first
    if missing not in ([], [_way_in(machine)]):
        _refuse_reserved(gateway, machine, len(missing))
    for way in missing:
        _take(gateway, machine, lease, way, before, by=by)


def has_port(gateway: Machine) -> bool:
    """Whether one more machine behind it could get its way in."""
    return _count_free(gateway) > 0


def _refuse_reserved(gateway: Machine, machine: Machine, count: int) -> None:
    """One port is kept for the way in of each other machine behind it that holds none now. Raises NoPortLeft.

    Otherwise the openings of a few customers would keep everybody else out. A machine whose lease has ended holds that
    lease's until they were seen closed, and then has one again.
    """
    holding = Forward.select(Forward.machine).where(Forward.gateway == gateway, Forward.released_at.is_null())
    without = network_machines.behind(gateway).where(Machine.id != machine.id, Machine.id.not_in(holding)).count()
    if count > _count_free(gateway) - without:
        raise NoPortLeft(
            f"{gateway.name} has no port left in {gateway.forward_ports} for openings: it keeps {without} for the ways "
            "in of other machines behind it. Close openings that go through it, or give it a larger pool."
        )


def _count_free(gateway: Machine) -> int:
    """Ports that nobody has; one that was not seen closed is somebody's still."""
    ports = network_machines.pool(gateway)
    within = (Forward.public_port >= ports.start) & (Forward.public_port < ports.stop)
    held = Forward.select(Forward.public_port).where(Forward.gateway == gateway, Forward.released_at.is_null(), within)
    return len(ports) - int(held.distinct().count())


def _ends(lease: Lease, machine: Machine, openings: Iterable[Opening]) -> dict[Way, datetime]:
    """What is led to the machine, each way until when: the way in until the lease ends, any other until the last of the
    openings that want it does.
    """
    found = {_way_in(machine): lease.ends_at}
    for opening in openings:
        ends_at = min(opening.ends_at or lease.ends_at, lease.ends_at)
        for way in _ways_of(opening, machine):
            found[way] = max(found.get(way, ends_at), ends_at)
    return found


def _way_in(machine: Machine) -> Way:
    address = network_places.find_address(machine)
    return Way("tcp", machine.ssh_port, EVERYBODY[address.version if address is not None else 4])


def _ways_of(opening: Opening, machine: Machine) -> Iterator[Way]:
    """Each port of an opening, from its source. A wide range is for those who reach the machine itself."""
    address = network_places.find_address(machine)
    is_same_family = address is not None and (":" in opening.source) == (address.version == 6)
    if is_same_family and opening.last_port - opening.first_port < MOST_OF_OPENING:
        for port in range(opening.first_port, opening.last_port + 1):
            yield Way(opening.protocol, port, opening.source)


def _way_of(forward: Forward) -> Way:
    return Way(forward.protocol, forward.target_port, forward.source)


def _take(gateway: Machine, machine: Machine, lease: Lease, way: Way, before: Lease | None, *, by: Actor) -> Forward:
    wanted = {"gateway": gateway, "machine": machine, "lease": lease, **way._asdict()}
    for port in _free(gateway, before, way):
        try:
            with atomic():  # a savepoint: whoever was first keeps the port, and this transaction goes on
                forward: Forward = Forward.create(public_port=port, **wanted)
        except peewee.IntegrityError:
            continue
        _tell("forward.taken", forward, lease, by=by)
        return forward
    raise NoPortLeft(f"{gateway.name} has no port left in {gateway.forward_ports}. Give it a larger pool.")


def _free(gateway: Machine, before: Lease | None, way: Way) -> Iterator[int]:
    """Ports that were free a moment ago, in turn: one that was just released is given away as late as can be."""
    ports, mine = network_machines.pool(gateway), Forward.gateway == gateway
    taken = {each.public_port for each in Forward.select().where(mine, Forward.released_at.is_null())}
    if before is not None:
        same = (Forward.lease == before) & (Forward.protocol == way.protocol) & (Forward.target_port == way.target_port)
        had = Forward.select().where(mine, same).order_by(Forward.id.desc()).first()
        if had is not None and had.public_port in ports and had.public_port not in taken:
            yield had.public_port
    newest = Forward.select().where(mine).order_by(Forward.id.desc()).first()
    start = newest.public_port + 1 if newest is not None and newest.public_port + 1 in ports else ports.start
    for port in (*range(start, ports.stop), *range(ports.start, start)):
        if port not in taken:
            yield port


def close_all(lease: Lease, now: datetime, *, by: Actor) -> None:
    """With the lease, inside its transaction."""
    _close(wanted_of(lease), now, by=by)


def _close(forwards: Sequence[Forward], now: datetime, *, by: Actor) -> None:
    for forward in forwards:
        Forward.update(closed_at=now).where(Forward.id == forward.id, Forward.closed_at.is_null()).execute()
        _tell("forward.closed", forward, forward.lease, by=by)
    for gateway_id in sorted({forward.gateway_id for forward in forwards}):
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
    wanted = (Forward.gateway == gateway) & Forward.closed_at.is_null()
    rows = (
        Forward.select(Forward, Lease, Machine)
        .join(Lease)
        .switch(Forward)
        .join(Machine, on=Forward.machine)
        .where(wanted, Lease.state == "active", Lease.ends_at > now)
        .order_by(Forward.id)
    )
    openings = defaultdict[int | None, list[Opening]](list)
    of_leases = Opening.lease << Forward.select(Forward.lease).where(wanted)
    for opening in Opening.select().where(of_leases, Opening.closed_at.is_null()):
        openings[opening.lease_id].append(opening)
    forwards = list(rows)
    by_lease = {each.lease_id: each for each in forwards}
    ends = {each.lease_id: _ends(each.lease, each.machine, openings[each.lease_id]) for each in by_lease.values()}
    return [_sent(each, end) for each in forwards if (end := ends[each.lease_id].get(_way_of(each), now)) > now]


def _sent(forward: Forward, ends_at: datetime) -> dict[str, Any]:
    return {
        "id": forward.id,
        "lease": forward.lease.host_id,
        "protocol": forward.protocol,
        "public_port": forward.public_port,
        "source": forward.source,
        "target_address": str(ipaddress.ip_address(forward.machine.address)),
        "target_port": forward.target_port,
        "ends_at": format_time(ends_at),
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


def release(lease: Lease) -> None:
    """Give the ports of a lease back unseen: an operator waits for the gateway no longer."""
    closed = (Forward.lease == lease) & Forward.closed_at.is_null(False) & Forward.released_at.is_null()
    Forward.update(released_at=utcnow()).where(closed).execute()


def of_lease(lease: Lease) -> list[Forward]:
    """Those that hold a port now, with their gateways."""
    held = Forward.select(Forward, Machine).join(Machine, on=Forward.gateway)
    return list(held.where(Forward.lease == lease, Forward.released_at.is_null()).order_by(Forward.id))


def search_of(lease: Lease) -> peewee.ModelSelect[Forward]:
    """Those of a lease that hold a port now, with their gateways, by port."""
    held = Forward.select(Forward, Machine).join(Machine, on=Forward.gateway)
    return held.where(Forward.lease == lease, Forward.released_at.is_null()).order_by(Forward.public_port)


def wanted_of(lease: Lease) -> list[Forward]:
    """Those that are wanted, with the lease."""
    rows = Forward.select(Forward, Lease).join(Lease)
    return list(rows.where(Forward.lease == lease, Forward.closed_at.is_null()).order_by(Forward.id))


def find_ssh(lease: Lease) -> Forward | None:
    """The one by which its customers sign in, with its gateway, while it is wanted."""
    to_ssh = Forward.target_port == lease.machine.ssh_port
    wanted = Forward.select(Forward, Machine).join(Machine, on=Forward.gateway)
    mine = wanted.where(Forward.lease == lease, Forward.closed_at.is_null(), to_ssh, Forward.protocol == "tcp")
    found: Forward | None = mine.order_by(Forward.id).first()
    return found


def search(*, gateway_id: int | None = None) -> peewee.ModelSelect[Forward]:
    """Forwards that hold a port, by gateway and port."""
    rows = Forward.select().where(Forward.released_at.is_null()).order_by(Forward.gateway, Forward.public_port)
    return rows if gateway_id is None else rows.where(Forward.gateway == gateway_id)


def _tell(action: str, forward: Forward, lease: Lease, *, by: Actor) -> None:
    """The audit entry and the event of one change."""
    told = {"gateway_id": forward.gateway_id, "machine_id": forward.machine_id, "lease_id": lease.id}
    told |= {"public_port": forward.public_port, "target_port": forward.target_port, "source": forward.source}
    audit.record(action, forward, by=by, tenant_id=lease.tenant_id, **told)
    events.write(action, machine_id=forward.machine_id, tenant_id=lease.tenant_id, resource_id=forward.id)
