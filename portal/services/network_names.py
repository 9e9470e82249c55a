"""Names: those that machines and leases have by themselves, and the records that somebody wants besides.

Rows come out as the export writes them (network_export.py). The key of a row never changes for as long as the thing
lives: `m17.address`, `m17.address6`, `l17.address`, `n4`. A lease that continues another keeps its host id, and so the
key. What is valid is what the stacks take: a record is tried in a small document before it is written down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.integrations.network_format import names, records
from portal.models import DnsRecord, DnsZone, Lease, Machine, User
from portal.models.states import RECORD_PURPOSES, RECORD_TYPES
from portal.services import audit, events, network, network_places, network_trial
from portal.services.actors import Actor

Row = dict[str, Any]
MOST_VALUES = 100
SHORTEST_TTL_S, LONGEST_TTL_S = 30, 86400  # of any provider; what each takes, the stacks' own code says


# Those that there are by themselves


def key_of_machine(machine_id: int) -> str:
    return f"m{machine_id}"


def key_of_lease(lease: Lease) -> str:
    return f"l{lease.host_id}"


def find_zone(*, of: str) -> DnsZone | None:
    """The zone that holds the names of `machines`, or of `leases`."""
    serves = DnsZone.serves_machines if of == "machines" else DnsZone.serves_leases
    zone: DnsZone | None = DnsZone.get_or_none(serves)
    return zone


def of_machine(machine: Machine, zone: DnsZone) -> list[Row]:
    """Its name leads to its public address, or to the only one that it has."""
    key = key_of_machine(machine.id)
    first = machine.public_address or machine.address
    return _addressed(key, f"{machine.name}.{zone.name}", zone, (first, machine.address), machine=key)


def of_lease(lease: Lease, machine: Machine, gateway: Machine | None, zone: DnsZone) -> list[Row]:
    """The name of an active lease leads where its customers come in: to the gateway, where there is one."""
    inner = [] if gateway is not None else [machine.address]
    outer = gateway or machine
    where = [outer.public_address or outer.address, *inner]
    key = key_of_lease(lease)
    name = f"{lease.login}.{zone.name}"
    return _addressed(key, name, zone, where, machine=key_of_machine(machine.id), lease=key)


def _addressed(
    key: str, name: str, zone: DnsZone, where: Sequence[str], *, machine: str, lease: str | None = None
) -> list[Row]:
    """One row for each family, of the first address and of another public one; a host name stands alone, as CNAME."""
    rows: dict[str, Row] = {}
    for place, text in enumerate(where):
        address = network_places.find_ip(text)
        if address is None and place == 0:
            slot, kind, value = "address", "CNAME", text
        elif address is None or (place and not address.is_global):
            continue
        else:
            slot, kind = ("address", "A") if address.version == 4 else ("address6", "AAAA")
            value = str(address)
        if "address" in rows and rows["address"]["type"] == "CNAME":
            break
        rows.setdefault(
            slot,
            {
                "key": f"{key}.{slot}", "machine": machine, "lease": lease, "zone": zone.key, "name": name,
                "type": kind,
                "ttl_s": zone.ttl_s, "proxied": False, "purpose": "ssh", "values": [value], "previous_keys": [],
            },
        )  # fmt: skip
    return list(rows.values())


def zones() -> network_trial.Zones:
    """All zones, to ask whether a row may stand in one."""
    return network_trial.Zones(row_of_zone(zone) for zone in DnsZone.select())


# Records that somebody wants: asked for by network_requests.py


def create(
    zone: DnsZone, *, by: Actor, machine: Machine | None = None, lease: Lease | None = None, **fields: Any
) -> DnsRecord:
    """Want a record. Raises Invalid that names the field, or Conflict where the name and type are taken."""
    columns = _checked({"ttl_s": None, "proxied": False, "purpose": "other", **fields})
    try:
        with atomic():
            network.hold()
            _try_out(zone, columns)
            record = DnsRecord.create(zone=zone, machine=machine, lease=lease, requested_by=by.user, **columns)
            _tell("record.wanted", record, by=by, **columns)
            network.changed()
    except peewee.IntegrityError:
        raise _taken(columns) from None
    return record


def edit(record: DnsRecord, *, by: Actor, **changes: Any) -> DnsRecord:
    """Other values, ttl, purpose, or another name of the same zone; the key stays. Raises as `create` does."""
    try:
        with atomic():
            network.hold()
            record = get(record.id)
            columns = _checked({**_columns(record), **changes})
            news = {name: value for name, value in columns.items() if getattr(record, name) != value}
            if not news:
                return record
            _try_out(record.zone, columns, but=record)
            DnsRecord.update(**news).where(DnsRecord.id == record.id).execute()
            _tell("record.edited", record, by=by, **news)
            network.changed()
    except peewee.IntegrityError:
        raise _taken(columns) from None
    return get(record.id)


def remove(record: DnsRecord, *, by: Actor, reason: str | None = None) -> None:
    with atomic():
        network.hold()
        wanted = (DnsRecord.id == record.id) & DnsRecord.removed_at.is_null()
        if DnsRecord.update(removed_at=utcnow()).where(wanted).execute() != 1:
            raise NotFound(f"There is no record {record.id}.")
        _tell("record.removed", record, by=by, reason=reason, name=record.name)
        network.changed()


def _columns(record: DnsRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("name", "type", "values", "ttl_s", "proxied", "purpose")}


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """In canonical form. Raises Invalid with every faulty field."""
    columns, faults = dict(given), dict[str, list[str]]()
    kind = columns["type"]
    if kind not in RECORD_TYPES:
        raise Invalid({"type": [f"Choose from {', '.join(RECORD_TYPES)}."]})
    if columns["purpose"] not in RECORD_PURPOSES:
        faults["purpose"] = [f"Choose from {', '.join(RECORD_PURPOSES)}."]
    if found := ttl_faults(columns["ttl_s"]):
        faults["ttl_s"] = found
    try:
        columns["name"] = names.canonical(str(columns["name"]).strip())
        records.check_owner(kind, columns["name"])
    except (names.BadName, records.BadRecord) as error:
        faults["name"] = [str(error)]
    values, faults_of_values = _canonical(kind, columns["values"])
    columns["values"] = values
    if faults | faults_of_values:
        raise Invalid(faults | faults_of_values)
    return columns


def ttl_faults(ttl_s: int | None) -> list[str]:
    is_right = ttl_s is None or SHORTEST_TTL_S <= ttl_s <= LONGEST_TTL_S
    return [] if is_right else [
        f"Use {SHORTEST_TTL_S} to {LONGEST_TTL_S} seconds, or none for what the provider does by itself."
    ]  # fmt: skip


def _canonical(kind: str, given: Sequence[Any]) -> tuple[list[Any], dict[str, list[str]]]:
    """Each value once, in the order given, as the document writes it; faults by place."""
    if not 1 <= len(given) <= MOST_VALUES:
        return [], {"values": [f"Give 1 to {MOST_VALUES} values."]}
    kept: list[Any] = []
    faults: dict[str, list[str]] = {}
    for place, value in enumerate(given):
        try:
            parsed = records.parse(kind, value)
        except (names.BadName, records.BadRecord, KeyError, TypeError) as error:
            faults[f"values.{place}"] = [str(error)]
            continue
        plain = parsed if isinstance(parsed, str) else {name: getattr(parsed, name) for name in value}
        if plain not in kept:
            kept.append(plain)
    return kept, faults


def _try_out(zone: DnsZone, columns: Mapping[str, Any], *, but: DnsRecord | None = None) -> None:
    """Would every stack take it, beside what stands at this name? Raises Invalid in the stacks' own words, NotFound."""
    there = list(DnsZone.select())
    if zone not in there:
        raise NotFound(f"There is no zone {zone.id}.")
    beside = DnsRecord.select(DnsRecord, DnsZone).join(DnsZone).where(
        DnsRecord.zone == zone, DnsRecord.name == columns["name"], DnsRecord.removed_at.is_null()
    )  # fmt: skip
    rows = [row_of(each, None) for each in beside if but is None or each.id != but.id]
    tried: Row = {
        "key": "tried", "machine": None, "lease": None, "zone": zone.key, "previous_keys": [],
        **{name: columns[name] for name in ("name", "type", "ttl_s", "proxied", "purpose", "values")},
    }  # fmt: skip
    if problems := network_trial.problems(zones=map(row_of_zone, there), names=[*rows, tried]):
        told = [problem.removeprefix("tried: ") for problem in problems]
        raise Invalid({_field_of(told[0], columns): told})


def _field_of(problem: str, columns: Mapping[str, Any]) -> str:
    """The field that a sentence of the stacks speaks of."""
    if problem.startswith("ttl "):
        return "ttl_s"
    return "values" if columns["proxied"] else "name"


def _taken(columns: Mapping[str, Any]) -> Conflict:
    return Conflict(
        f"There is a record {columns['type']} {names.readable(columns['name'])} already; edit that one.",
        code="record_exists",
    )


# With the lease


def close_all(lease: Lease, *, by: Actor) -> None:
    """Its records go with it, inside its transaction."""
    for record in list(DnsRecord.select().where(DnsRecord.lease == lease, DnsRecord.removed_at.is_null())):
        DnsRecord.update(removed_at=utcnow()).where(DnsRecord.id == record.id).execute()
        _tell("record.removed", record, by=by, reason="The lease ends.", name=record.name)


def close_of_machine(machine: Machine, *, by: Actor) -> None:
    """It is retired: its records are wanted no longer, and their names are free for the machine that follows it."""
    for record in list(DnsRecord.select().where(DnsRecord.machine == machine, DnsRecord.removed_at.is_null())):
        DnsRecord.update(removed_at=utcnow()).where(DnsRecord.id == record.id).execute()
        _tell("record.removed", record, by=by, reason="The machine is retired.", name=record.name)


def carry_over(before: Lease, lease: Lease) -> None:
    """A lease that continues another keeps the records that one had until its end, under their keys."""
    if before.ending_at is None:
        return
    for record in list(DnsRecord.select().where(DnsRecord.lease == before, DnsRecord.removed_at >= before.ending_at)):
        same = (DnsRecord.zone == record.zone_id) & (DnsRecord.name == record.name) & (DnsRecord.type == record.type)
        if not DnsRecord.select().where(same, DnsRecord.removed_at.is_null()).exists():
            DnsRecord.update(lease=lease, removed_at=None).where(DnsRecord.id == record.id).execute()


# As the export writes them


def row_of_zone(zone: DnsZone) -> Row:
    return {"key": zone.key, "name": zone.name, "cloud": zone.cloud, "id": zone.external_id}


def row_of(record: DnsRecord, lease: Lease | None) -> Row:
    return {
        "key": record.key,
        "machine": None if record.machine_id is None else key_of_machine(record.machine_id),
        "lease": None if lease is None else key_of_lease(lease),
        "zone": f"z{record.zone_id}",
        "name": record.name,
        "type": record.type,
        "ttl_s": record.ttl_s,
        "proxied": record.proxied,
        "purpose": record.purpose,
        "values": record.values,
        "previous_keys": [],
    }


def wanted() -> Iterator[Row]:
    """Every record that is wanted now: not of a machine that is retired, nor of a lease that is not active."""
    rows: Iterable[Any] = (
        DnsRecord.select(DnsRecord, Lease.id, Lease.login, Lease.state, Machine.id, Machine.state)
        .join(Lease, peewee.JOIN.LEFT_OUTER)
        .switch(DnsRecord)
        .join(Machine, peewee.JOIN.LEFT_OUTER, on=DnsRecord.machine)
        .where(DnsRecord.removed_at.is_null())
        .order_by(DnsRecord.id)
    )
    for record in rows:
        if record.lease is not None and record.lease.state != "active":
            continue
        if record.machine is None or record.machine.state != "retired":
            yield row_of(record, record.lease)


def of_lease_wanted(lease: Lease) -> list[Row]:
    """What stands under this lease in the next export: its own name, and its records."""
    zone, machine = find_zone(of="leases"), lease.machine
    gateway = Machine.get_by_id(machine.gateway_id) if machine.gateway_id is not None else None
    own = [] if zone is None else of_lease(lease, machine, gateway, zone)
    rows = DnsRecord.select().where(DnsRecord.lease == lease, DnsRecord.removed_at.is_null()).order_by(DnsRecord.id)
    found = own + [row_of(each, lease) for each in rows]
    return zones().fitting(found)


# Look


def get(record_id: int) -> DnsRecord:
    record: DnsRecord | None = DnsRecord.get_or_none(DnsRecord.id == record_id, DnsRecord.removed_at.is_null())
    if record is None:
        raise NotFound(f"There is no record {record_id}.")
    return record


def search(
    *,
    zone_id: int | None = None,
    machine_id: int | None = None,
    lease_id: int | None = None,
    keyword: str | None = None,
) -> peewee.ModelSelect[DnsRecord]:
    """Records that are wanted, with zone and who asked, by name."""
    rows = (
        DnsRecord.select(DnsRecord, DnsZone, User)
        .join(DnsZone)
        .switch(DnsRecord)
        .join(User, peewee.JOIN.LEFT_OUTER, on=DnsRecord.requested_by)
        .where(DnsRecord.removed_at.is_null())
        .order_by(DnsRecord.name, DnsRecord.type)
    )
    for column, value in ((DnsRecord.zone, zone_id), (DnsRecord.machine, machine_id), (DnsRecord.lease, lease_id)):
        if value is not None:
            rows = rows.where(column == value)
    return rows.where(DnsRecord.name.contains(keyword)) if keyword else rows


def _tell(action: str, record: DnsRecord, *, by: Actor, **detail: Any) -> None:
    tenant_id = None if record.lease_id is None else Lease.get_by_id(record.lease_id).tenant_id
    audit.record(action, record, by=by, tenant_id=tenant_id, record=detail, key=record.key)
    events.write(action, machine_id=record.machine_id, tenant_id=tenant_id, resource_id=record.id)
