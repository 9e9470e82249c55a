"""Zones and security groups: where in the clouds names and openings are written down.

What stands in a zone is in network_names.py; which machine stands behind a group in network_machines.py. Valid is what
the stacks take: each is tried out (network_trial.py) beside what is wanted already. Nothing here speaks to a cloud.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import peewee

from portal.db import atomic
from portal.errors import Conflict, Invalid, NotFound
from portal.integrations.network_format import names
from portal.models import DnsRecord, DnsZone, Machine, SecurityGroup
from portal.models.states import DNS_CLOUDS, GROUP_CLOUDS
from portal.services import audit, network, network_export, network_names, network_trial, texts
from portal.services.actors import Actor

ZONE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
REGION = re.compile(r"[a-z0-9-]{1,40}")
VPC = re.compile(r"[A-Za-z0-9-]{1,64}")
GROUP_ID = re.compile(r"sg-[A-Za-z0-9]{1,60}")
MOST_TOLD = 5

Row = TypeVar("Row", DnsZone, SecurityGroup)
Taken = Callable[[Mapping[str, Any]], Conflict]  # what is said where these columns are somebody else's


# Zones


def get_zone(zone_id: int) -> DnsZone:
    zone: DnsZone | None = DnsZone.get_or_none(DnsZone.id == zone_id)
    if zone is None:
        raise NotFound(f"There is no zone {zone_id}.")
    return zone


def list_zones() -> peewee.ModelSelect[DnsZone]:
    return DnsZone.select().order_by(DnsZone.name, DnsZone.cloud)


def create_zone(*, name: str, cloud: str, by: Actor, **fields: Any) -> DnsZone:
    """Raises Invalid, or Conflict where this zone, or another of the same service, is there already."""
    columns = _checked_zone({"name": name, "cloud": cloud, **fields})
    return _create(DnsZone, columns, word="zone", taken=_zone_taken, fits=_refuse_unfit_zone, by=by)


def edit_zone(zone: DnsZone, *, by: Actor, **changes: Any) -> DnsZone:
    """Its name and cloud stay: another zone is another row. Raises Invalid and Conflict as `create_zone` does."""
    columns = _checked_zone(changes)
    return _edit(get_zone, zone.id, columns, word="zone", taken=_zone_taken, fits=_refuse_unfit_ttl, by=by)


def delete_zone(zone: DnsZone, *, by: Actor) -> None:
    """Only an empty one: deleting a zone never takes names along."""
    with atomic():
        network.hold()
        zone = get_zone(zone.id)
        held = DnsRecord.select().where(DnsRecord.zone == zone, DnsRecord.removed_at.is_null()).count()
        if held or zone.serves_machines or zone.serves_leases:
            raise Conflict(
                f"The zone {zone.name} still holds names. Remove its records and let it serve nothing first.",
                code="zone_in_use",
            )
        DnsRecord.delete().where(DnsRecord.zone == zone).execute()  # removed ones; the trail keeps their history
        audit.record("zone.deleted", zone, by=by, name=zone.name, cloud=zone.cloud)
        DnsZone.delete().where(DnsZone.id == zone.id).execute()
        network.changed()


def _checked_zone(given: Mapping[str, Any]) -> dict[str, Any]:
    columns, faults = dict(given), dict[str, list[str]]()
    if "name" in columns:
        try:
            columns["name"] = names.canonical(str(columns["name"]).strip())
            if columns["name"].startswith(names.WILDCARD):
                faults["name"] = ["A zone has no wildcard in its name."]
        except names.BadName as error:
            faults["name"] = [f"{error}"]
    if "cloud" in columns and columns["cloud"] not in DNS_CLOUDS:
        faults["cloud"] = [f"Choose from {', '.join(DNS_CLOUDS)}."]
    if columns.get("external_id") and not ZONE_ID.fullmatch(columns["external_id"]):
        faults["external_id"] = ["Use the provider's id of the zone: letters, digits, '_' and '-'."]
    if faults_of_ttl := network_names.ttl_faults(columns.get("ttl_s")):
        faults["ttl_s"] = faults_of_ttl
    if faults:
        raise Invalid(faults)
    if "external_id" in columns:
        columns["external_id"] = columns["external_id"] or None
    return columns


def _refuse_unfit_zone(zone: DnsZone) -> None:
    """It is in the table already, inside the transaction. Raises Invalid in the stacks' own words."""
    _refuse_unfit_ttl(zone)
    zones = [network_names.row_of_zone(each) for each in list_zones()]
    after, before = network_trial.Zones(zones), network_trial.Zones(row for row in zones if row["key"] != zone.key)
    lost = [
        f"{row['key']}: {problem}"
        for row in network_export.names_wanted()
        if row["zone"] != zone.key and before.fault_of(row) is None and (problem := after.fault_of(row)) is not None
    ]
    if lost:
        first = "; ".join(lost[:MOST_TOLD]) + (" …" if len(lost) > MOST_TOLD else "")
        raise Invalid({"name": [f"Move, rename or remove first what lies in it: {first}"]})


def _refuse_unfit_ttl(zone: DnsZone) -> None:
    """The names of machines and leases have it: tried with a text, which may stand at every name."""
    name = {
        "key": "tried", "machine": None, "lease": None, "zone": zone.key, "name": zone.name, "type": "TXT",
        "ttl_s": zone.ttl_s, "proxied": False, "purpose": "other", "values": ["tried"], "previous_keys": [],
    }  # fmt: skip
    if (problem := network_trial.Zones([network_names.row_of_zone(zone)]).fault_of(name)) is not None:
        raise Invalid({"ttl_s": [problem]})


def _zone_taken(columns: Mapping[str, Any]) -> Conflict:
    same = DnsZone.get_or_none(DnsZone.name == columns.get("name"), DnsZone.cloud == columns.get("cloud"))
    if same is not None:
        return Conflict(f"There is a zone {same.name} in {same.cloud} already.", code="zone_exists", zone_id=same.id)
    return Conflict(
        "Another zone serves them already. At most one zone holds the names of machines, and one those of leases.",
        code="zone_serves",
    )


# Security groups


def get_group(group_id: int) -> SecurityGroup:
    group: SecurityGroup | None = SecurityGroup.get_or_none(SecurityGroup.id == group_id)
    if group is None:
        raise NotFound(f"There is no security group {group_id}.")
    return group


def list_groups() -> peewee.ModelSelect[SecurityGroup]:
    return SecurityGroup.select().order_by(SecurityGroup.name, SecurityGroup.id)


def create_group(*, by: Actor, **fields: Any) -> SecurityGroup:
    """Raises Invalid, or Conflict where this cloud and region have one of this name."""
    columns = _checked_group(fields)
    return _create(SecurityGroup, columns, word="security_group", taken=_group_taken, fits=_refuse_unfit_group, by=by)


def edit_group(group: SecurityGroup, *, by: Actor, **changes: Any) -> SecurityGroup:
    """Its cloud and region stay. Raises Invalid, and Conflict where machines behind it would need another."""
    columns = _checked_group(changes)
    with atomic():
        network.hold()
        _refuse_replacement(get_group(group.id), columns)
        fits, taken = _refuse_unfit_group, _group_taken
        return _edit(get_group, group.id, columns, word="security_group", taken=taken, fits=fits, by=by)


def delete_group(group: SecurityGroup, *, by: Actor) -> None:
    with atomic():
        network.hold()
        group = get_group(group.id)
        _refuse_in_use(group)
        audit.record("security_group.deleted", group, by=by, name=group.name, cloud=group.cloud)
        SecurityGroup.delete().where(SecurityGroup.id == group.id).execute()
        network.changed()


def _refuse_replacement(group: SecurityGroup, columns: Mapping[str, Any]) -> None:
    """Another network, or another id, is another group in the cloud, and the old one stays while machines use it."""
    made_in = None if group.external_id else group.vpc  # of a group that was there before, the network says nothing
    is_other = columns.get("external_id", group.external_id) != group.external_id
    if is_other or (made_in is not None and columns.get("vpc", made_in) != made_in):
        _refuse_in_use(group)


def _refuse_in_use(group: SecurityGroup) -> None:
    behind = Machine.select().where(Machine.security_group == group).count()
    if behind:
        raise Conflict(
            f"{behind} machines stand behind {group.name}. Give them another group, or none, first.",
            code="group_in_use",
        )


def _checked_group(given: Mapping[str, Any]) -> dict[str, Any]:
    columns, faults = dict(given), dict[str, list[str]]()
    if "name" in columns and (found := texts.faults_of_line(columns["name"], 200)):
        faults["name"] = found
    if "cloud" in columns and columns["cloud"] not in GROUP_CLOUDS:
        faults["cloud"] = [f"Choose from {', '.join(GROUP_CLOUDS)}."]
    if "region" in columns and not REGION.fullmatch(columns["region"]):
        faults["region"] = ["Write the region as the cloud does, such as eu-central-1."]
    if columns.get("vpc") and not VPC.fullmatch(columns["vpc"]):
        faults["vpc"] = ["Use the cloud's id of the network, such as vpc-0a1b2c."]
    if columns.get("external_id") and not GROUP_ID.fullmatch(columns["external_id"]):
        faults["external_id"] = ["Use the cloud's id of the group, such as sg-0a1b2c."]
    if faults:
        raise Invalid(faults)
    return columns | {name: columns[name] or None for name in ("vpc", "external_id") if name in columns}


def _refuse_unfit_group(group: SecurityGroup) -> None:
    """Raises Invalid in the stacks' own words."""
    if problems := network_trial.problems(groups=[network_export.row_of_group(group)]):
        raise Invalid({"vpc": [problem.removeprefix(f"group {group.key}: ") for problem in problems]})


def _group_taken(columns: Mapping[str, Any]) -> Conflict:
    return Conflict(
        f"There is a security group {columns.get('name')} in this cloud and region already.", code="group_exists"
    )


# Both


def _create(
    table: type[Row], columns: Mapping[str, Any], *, word: str, taken: Taken, fits: Callable[[Row], None], by: Actor
) -> Row:
    try:
        with atomic():
            network.hold()
            row: Row = table.create(created_by=by.user, **columns)
            fits(row)
            audit.record(f"{word}.created", row, by=by, fields=dict(columns))
            network.changed()
    except peewee.IntegrityError:
        raise taken(columns) from None
    return row


def _edit(
    get: Callable[[int], Row],
    row_id: int,
    columns: Mapping[str, Any],
    *,
    word: str,
    taken: Taken,
    fits: Callable[[Row], None],
    by: Actor,
) -> Row:
    try:
        with atomic():
            network.hold()
            row = get(row_id)
            news = {name: value for name, value in columns.items() if getattr(row, name) != value}
            if not news:
                return row
            type(row).update(**news).where(type(row).id == row_id).execute()
            fits(get(row_id))
            audit.record(f"{word}.edited", row, by=by, fields=news)
            network.changed()
    except peewee.IntegrityError:
        raise taken(columns) from None
    return get(row_id)
