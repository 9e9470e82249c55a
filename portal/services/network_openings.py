"""Openings: the holes in a machine's firewall, and in the group in front of it, in the order of their life.

Asked for (network_requests.py) within what customers may; merged with what is open already; told to
the agent and to the stacks; ended by hand, with the lease, or at a time of its own; seen open and closed by the agent.
What is valid is what the stacks take (integrations/network_format.py). When a lease opens and closes is in
network_switch.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Forbidden, Invalid, NotFound
from portal.integrations.network_format import openings as rules
from portal.integrations.protocol import format_time
from portal.models import Lease, Machine, Opening, Setting, User
from portal.models.states import HOLE_PROTOCOLS
from portal.services import audit, events
from portal.services.actors import Actor

LIMITS_KEY = "network.limits"
LONGEST_REASON = 500
MOST_OF_MACHINE = 1000  # what the protocol carries
QUOTAS = {"aws": "rules_a_group", "alicloud": "alicloud_rules_a_group", "tencent": "tencent_rules_a_group"}


@dataclass(frozen=True)
class Limits:
    """What a customer may open without asking anybody."""

    openings_a_lease: int = 10
    ports_an_opening: int = 100
    first_port: int = 1024
    last_port: int = 65535
    may_open_to_world: bool = False
    rules_a_group: int = 60  # these are not of customers: AWS's quota, as the stacks count it
    alicloud_rules_a_group: int = 200
    tencent_rules_a_group: int = 100


@dataclass(frozen=True)
class Wish:
    """One opening as it was asked for, checked and in canonical form."""

    protocol: str
    ports: tuple[int, int]
    source: str
    reason: str | None
    ends_at: datetime | None
    is_world: bool


@dataclass(frozen=True)
class Joined:
    """What a wish becomes beside what is open: these `ports` instead of the `parts`, or `there`, which covers it."""

    ports: tuple[int, int]
    parts: tuple[Opening, ...]
    there: Opening | None = None


# Limits


def limits() -> Limits:
    kept = Setting.get_or_none(Setting.key == LIMITS_KEY)
    return Limits(**(kept.value if kept is not None else {}))


def set_limits(*, by: Actor, **given: Any) -> Limits:
    """What customers may open from now on; what is open stays. Raises Invalid."""
    wanted = Limits(**{**vars(limits()), **given})
    faults: dict[str, list[str]] = {}
    if not 1 <= wanted.first_port <= wanted.last_port <= 65535:
        faults["first_port"] = ["Use ports from 1 to 65535, the lower one first."]
    for name in ("openings_a_lease", "ports_an_opening", *QUOTAS.values()):
        if not 0 <= getattr(wanted, name) <= MOST_OF_MACHINE:
            faults[name] = [f"Use 0 to {MOST_OF_MACHINE}."]
    if faults:
        raise Invalid(faults)
    with atomic():
        row = {"key": LIMITS_KEY, "value": vars(wanted), "changed_at": utcnow()}
        Setting.insert(row).on_conflict(
            conflict_target=[Setting.key], preserve=[Setting.value, Setting.changed_at]
        ).execute()
        audit.record("network.limits_set", None, by=by, limits=vars(wanted))
    return wanted


# Ask


def wish(
    *,
    protocol: str,
    first_port: int,
    last_port: int | None = None,
    source: str,
    reason: str | None = None,
    ends_at: datetime | None = None,
    now: datetime | None = None,
) -> Wish:
    """Raises Invalid that names every faulty field. Who may ask for it is another question."""
    faults: dict[str, list[str]] = {}
    ports = (first_port, first_port if last_port is None else last_port)
    canonical, peer = protocol.strip().lower(), None
    if canonical not in HOLE_PROTOCOLS:
        faults["protocol"] = [f"Choose from {', '.join(HOLE_PROTOCOLS)}."]
    if not 1 <= ports[0] <= ports[1] <= 65535:
        faults["first_port"] = ["Use ports from 1 to 65535, the lower one first."]
    try:
        peer = rules.source(source.strip())
    except rules.BadOpening:
        faults["source"] = [_no_source(source.strip())]
    if peer is not None and peer.network is None:
        faults["source"] = ["Name a network, such as 203.0.113.0/24: a host's firewall knows no groups of a cloud."]
    told = (reason or "").strip() or None
    if told is not None and (len(told) > LONGEST_REASON or not told.isprintable()):
        faults["reason"] = [f"Use one line of at most {LONGEST_REASON} characters."]
    if peer is not None and peer.is_world and told is None:
        faults["reason"] = [f"{peer.text} opens to the world, and that needs a reason."]
    if ends_at is not None and ends_at <= (now or utcnow()):
        faults["ends_at"] = ["Lies in the past."]
    if faults or peer is None:
        raise Invalid(faults)
    return Wish(canonical, ports, peer.text, told, ends_at, peer.is_world)


def _no_source(text: str) -> str:
    """What is wrong with it, and what was probably meant."""
    address = text.partition("/")[0]
    try:
        host, meant = ipaddress.ip_address(address), ipaddress.ip_network(text, strict=False)
    except ValueError:
        return "Write a network, such as 203.0.113.0/24 or 2001:db8::/48."
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
        return f"{text} is IPv4 in disguise; write it as IPv4, such as {host.ipv4_mapped}/32."
    if isinstance(host, ipaddress.IPv6Address) and host.scope_id is not None:
        return "Write the network without the name of an interface, which means nothing to anybody else."
    return (
        f"{text} names one address inside a network: write {meant} for the network, {host}/{host.max_prefixlen} for it."
    )


def add(machine: Machine, wished: Wish, *, by: Actor, lease: Lease | None) -> Opening:
    """The row of it, inside the transaction that holds the machine; what covers it already is answered as it is."""
    found = joined(wished, wanted_of(machine, lease))
    if found.there is not None:
        return found.there
    if Opening.select().where(Opening.machine == machine, Opening.closed_at.is_null()).count() >= MOST_OF_MACHINE:
        raise Conflict(f"{machine.name} has {MOST_OF_MACHINE} openings; close some first.", code="too_many_openings")
    for each in found.parts:
        end(each, by=by, reason="It is part of a wider one.")
    opening: Opening = Opening.create(
        machine=machine,
        lease=lease,
        protocol=wished.protocol,
        first_port=found.ports[0],
        last_port=found.ports[1],
        source=wished.source,
        reason=wished.reason,
        ends_at=wished.ends_at,
        requested_by=by.user,
    )
    _tell("opening.asked", opening, by=by, reason=wished.reason, ends_at=wished.ends_at, **_told(opening))
    return opening


def joined(wished: Wish, beside: Sequence[Opening]) -> Joined:
    """Ports of one source that overlap or touch, with the same end, become one opening, and its parts are closed."""
    same = [each for each in beside if (each.protocol, each.source) == (wished.protocol, wished.source)]
    for each in same:
        covers = each.first_port <= wished.ports[0] and wished.ports[1] <= each.last_port
        if covers and (each.ends_at is None or (wished.ends_at is not None and wished.ends_at <= each.ends_at)):
            return Joined((each.first_port, each.last_port), (), each)
    low, high = wished.ports
    parts = []
    for each in sorted(same, key=lambda opening: opening.first_port):
        if each.ends_at == wished.ends_at and each.first_port <= high + 1 and low <= each.last_port + 1:
            low, high = min(low, each.first_port), max(high, each.last_port)
            parts.append(each)
    return Joined((low, high), tuple(parts))


def refuse_beyond(allowed: Limits, wished: Wish, beside: Sequence[Opening]) -> None:
    """What it becomes beside what is open counts, not the wish alone: many small ones must not grow into a wide one.

    Raises Invalid that names the limit, or Forbidden where there are too many.
    """
    faults: dict[str, list[str]] = {}
    found = joined(wished, beside)
    if not (allowed.first_port <= wished.ports[0] and wished.ports[1] <= allowed.last_port):
        faults["first_port"] = [
            f"You may open the ports {allowed.first_port} to {allowed.last_port}; ask your operator."
        ]
    elif _count(wished.ports) > allowed.ports_an_opening:
        faults["last_port"] = [f"You may open {allowed.ports_an_opening} ports at once; ask your operator."]
    elif found.there is None and _count(found.ports) > allowed.ports_an_opening:
        faults["last_port"] = [
            f"With those open beside it that is one opening of {_count(found.ports)} ports, and you may have "
            f"{allowed.ports_an_opening} in one. Close some of them first, or ask your operator."
        ]
    if wished.is_world and not allowed.may_open_to_world:
        faults["source"] = ["You may not open to the whole world; name your network, or ask your operator."]
    if faults:
        raise Invalid(faults)
    if found.there is None and len(beside) - len(found.parts) >= allowed.openings_a_lease:
        raise Forbidden(
            f"Your lease has {len(beside)} of {allowed.openings_a_lease} openings; close one, or ask your operator.",
            code="openings_used_up",
        )


def _count(ports: tuple[int, int]) -> int:
    return ports[1] - ports[0] + 1


# Close


def end(opening: Opening, *, by: Actor, reason: str | None, now: datetime | None = None) -> None:
    """Wanted no longer; inside the transaction that holds the machine."""
    opening.closed_at = now or utcnow()
    wanted = (Opening.id == opening.id) & Opening.closed_at.is_null()
    Opening.update(closed_at=opening.closed_at).where(wanted).execute()
    _tell("opening.closed", opening, by=by, reason=reason, **_told(opening))


def close_all(lease: Lease, now: datetime, *, by: Actor) -> None:
    """With the lease, inside its transaction."""
    for opening in list(Opening.select().where(Opening.lease == lease, Opening.closed_at.is_null())):
        end(opening, by=by, reason="The lease ends.", now=now)


def due(now: datetime) -> peewee.ModelSelect[Opening]:
    """Those whose own time is up; the host has closed them by itself already."""
    return Opening.select().where(Opening.closed_at.is_null(), Opening.ends_at <= now).order_by(Opening.id)


def carry_over(before: Lease, lease: Lease, machine: Machine, *, by: Actor) -> None:
    """A lease that continues another opens what that one had until its end."""
    if before.ending_at is None:
        return
    had = Opening.select().where(Opening.lease == before, Opening.closed_at >= before.ending_at).order_by(Opening.id)
    for opening in list(had):
        if opening.ends_at is None or opening.ends_at > utcnow():
            ports = (opening.first_port, opening.last_port)
            again = Wish(opening.protocol, ports, opening.source, opening.reason, opening.ends_at, is_world=False)
            add(machine, again, by=by, lease=lease)


# What the agent is told, and says


def to_send(machine: Machine, now: datetime) -> list[dict[str, Any]]:
    """What shall be open on the host now, in the words of the protocol."""
    rows = (
        Opening.select(Opening, Lease)
        .join(Lease, peewee.JOIN.LEFT_OUTER)
        .where(Opening.machine == machine, Opening.closed_at.is_null())
        .order_by(Opening.id)
    )
    return [_sent(each) for each in rows if is_wanted(each, now)]


def is_wanted(opening: Opening, now: datetime) -> bool:
    """Its lease, which must have been read with it, is active, and no time is up."""
    lease = opening.lease
    if lease is not None and (lease.state != "active" or lease.ends_at <= now):
        return False
    return opening.closed_at is None and (opening.ends_at is None or opening.ends_at > now)


def end_of(opening: Opening) -> datetime | None:
    """When it ends at the latest: never after its lease."""
    if opening.lease is None:
        return opening.ends_at  # type: ignore[no-any-return]  # a field, read
    ends: list[datetime] = [opening.lease.ends_at, opening.ends_at or opening.lease.ends_at]
    return min(ends)


def _sent(opening: Opening) -> dict[str, Any]:
    end = end_of(opening)
    return {
        "id": opening.id,
        "lease": None if opening.lease is None else opening.lease.host_id,
        "protocol": opening.protocol,
        "ports": [opening.first_port, opening.last_port],
        "source": opening.source,
        "ends_at": None if end is None else format_time(end),
    }


def observe(machine: Machine, seen: Sequence[Mapping[str, Any]] | None, *, is_current: bool) -> set[int]:
    """Take in what the agent says is open; returns the leases for which that is news.

    `is_current`: it has applied everything that we want, so what it does not list is not there. None: it knows no
    openings and was sent none, so what was never seen is not there. Ids that are not this machine's are not heard.
    """
    told = {entry["id"]: entry for entry in seen or ()}
    unsettled = Opening.closed_at.is_null() | (Opening.observed != "closed")
    if seen is None:
        unsettled &= Opening.observed_at.is_null()
    leases = set()
    seen_before = Opening.select().where(Opening.machine == machine, unsettled)
    for opening in list(seen_before):  # read to its end: a half read one keeps SQLite from writing
        entry = told.get(opening.id)
        if entry is None and not is_current:
            continue
        state, error = ("closed", None) if entry is None else (entry["state"], entry["error"])
        if _note(opening, state, error) and opening.lease_id is not None:
            leases.add(opening.lease_id)
    return leases


def _note(opening: Opening, state: str, error: str | None) -> bool:
    if (opening.observed, opening.error) == (state, error) and opening.observed_at is not None:
        return False
    since = opening.observed_at if opening.observed == state and opening.observed_at else utcnow()
    changes = {"observed": state, "error": error, "observed_at": since}
    with atomic():
        Opening.update(**changes).where(Opening.id == opening.id).execute()
    return True


def forget_seen(machine: Machine) -> None:
    """The host was installed anew: nothing is open there. Inside the transaction that says so."""
    of_machine = Opening.machine == machine
    Opening.update(observed="unknown", observed_at=None, error=None).where(
        of_machine, Opening.closed_at.is_null()
    ).execute()
    over = {"observed": "closed", "observed_at": utcnow(), "error": None}
    Opening.update(over).where(of_machine, Opening.closed_at.is_null(False), Opening.observed != "closed").execute()


def close_of_machine(machine: Machine, *, by: Actor) -> None:
    """It is retired: its own openings are wanted no longer."""
    for opening in list(Opening.select().where(Opening.machine == machine, Opening.closed_at.is_null())):
        end(opening, by=by, reason="The machine is retired.")


# Look


def get(opening_id: int) -> Opening:
    opening: Opening | None = Opening.get_or_none(Opening.id == opening_id)
    if opening is None:
        raise NotFound(f"There is no opening {opening_id}.")
    return opening


def get_of(lease: Lease, opening_id: int) -> Opening:
    """One of this lease's. Raises NotFound, for another lease's as well."""
    opening: Opening | None = Opening.get_or_none(Opening.id == opening_id, Opening.lease == lease)
    if opening is None:
        raise NotFound("Your lease has no such opening.")
    return opening


def wanted_of(machine: Machine, lease: Lease | None) -> list[Opening]:
    """What is wanted for this lease, or for the machine itself, with the lease."""
    mine = Opening.lease.is_null() if lease is None else Opening.lease == lease
    with_lease = Opening.select(Opening, Lease).join(Lease, peewee.JOIN.LEFT_OUTER)
    return list(with_lease.where(Opening.machine == machine, mine, Opening.closed_at.is_null()).order_by(Opening.id))


def of_lease(lease: Lease) -> list[Opening]:
    """Wanted, or still seen: what the switch looks at."""
    unsettled = Opening.closed_at.is_null() | (Opening.observed != "closed")
    return list(Opening.select().where(Opening.lease == lease, unsettled).order_by(Opening.id))


def search(
    *, machine_id: int | None = None, lease_id: int | None = None, is_open: bool | None = None
) -> peewee.ModelSelect[Opening]:
    """Openings with machine, lease and who asked, newest first."""
    rows = (
        Opening.select(Opening, Machine, Lease, User)
        .join(Machine)
        .switch(Opening)
        .join(Lease, peewee.JOIN.LEFT_OUTER)
        .switch(Opening)
        .join(User, peewee.JOIN.LEFT_OUTER, on=Opening.requested_by)
        .order_by(Opening.id.desc())
    )
    if machine_id is not None:
        rows = rows.where(Opening.machine == machine_id)
    if lease_id is not None:
        rows = rows.where(Opening.lease == lease_id)
    if is_open is not None:
        rows = rows.where(Opening.closed_at.is_null(is_open))
    return rows


def _told(opening: Opening) -> dict[str, Any]:
    ports = f"{opening.first_port}-{opening.last_port}"
    return {"protocol": opening.protocol, "ports": ports, "source": opening.source}


def _tell(action: str, opening: Opening, *, by: Actor, **detail: Any) -> None:
    """The audit entry and the event of one change."""
    tenant_id = None if opening.lease_id is None else Lease.get_by_id(opening.lease_id).tenant_id
    detail |= {"machine_id": opening.machine_id, "lease_id": opening.lease_id}
    audit.record(action, opening, by=by, tenant_id=tenant_id, **detail)
    events.write(action, machine_id=opening.machine_id, tenant_id=tenant_id, resource_id=opening.id)


def checked(given: Iterable[Mapping[str, Any]]) -> list[Wish]:
    """Several at once; a fault names the place in the list. Raises Invalid."""
    wishes, faults = [], dict[str, list[str]]()
    for place, each in enumerate(given):
        try:
            wishes.append(wish(**each))
        except Invalid as refusal:
            faults |= {f"openings.{place}.{field}": texts for field, texts in refusal.fields.items()}
    if faults:
        raise Invalid(faults)
    return wishes
