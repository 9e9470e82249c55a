"""The export: everything that the stacks shall make, as one sealed document. Written once a generation, and kept.

Two who ask for one generation get the same bytes, so that its checksum says what a stack has applied. What no stack
would take is left out, and named: one machine with a strange address must not hold up the fleet's names. The form is
`pulumi/remotegpu_network/document.py`'s, by which it is also read again before it is given out.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, NotFound
from portal.integrations.network_format import desired, document
from portal.integrations.network_format import openings as rules
from portal.integrations.protocol import format_time
from portal.models import AppliedNetwork, DnsZone, Grant, Lease, Machine, NetworkExport, Opening, SecurityGroup
from portal.models.states import GRANTS_BY_STACKS
from portal.services import config, network, network_names, network_openings, network_trial

LOG = logging.getLogger(__name__)

KEEP = timedelta(days=2)  # a pipeline may take long between reading the export and telling what it applied
KEEP_COUNT = 50
TRIES = 3  # to build it while nothing changes
Row = dict[str, Any]

# What is read of each row: of a fleet, the rest takes more time than all that is done with these.
OF_MACHINE = (
    Machine.id,
    Machine.name,
    Machine.address,
    Machine.public_address,
    Machine.gateway,
    Machine.security_group,
)
OF_LEASE = (Lease.id, Lease.machine, Lease.login, Lease.state, Lease.ends_at)
OF_OPENING = (
    Opening.id, Opening.machine, Opening.lease, Opening.protocol, Opening.first_port, Opening.last_port,
    Opening.source, Opening.reason, Opening.ends_at, Opening.closed_at,
)  # fmt: skip
BEHIND_GROUPS = Machine.select(Machine.id).where(Machine.security_group.is_null(False))


class ExportUnfit(Conflict):
    """Something is wanted that no stack would take, and that could not be left out by itself."""

    code = "export_unfit"


@dataclass
class Body:
    """Before it is sealed. `left_out`: key and reason of what is wanted and no stack would take."""

    rows: dict[str, Any]
    left_out: list[dict[str, str]]


# Build


def body(now: datetime) -> Body:
    """What is wanted now, without generation; in a handful of queries, whatever the size of the fleet."""
    left_out: list[dict[str, str]] = []
    fleet = _fleet()
    known = {machine.id: machine for machine in fleet}
    zones = list(DnsZone.select().order_by(DnsZone.id))
    groups = _fitting_groups(left_out)
    entries = _fitting(_names(fleet, known), network_trial.Zones(map(network_names.row_of_zone, zones)), left_out)
    holes = list(_openings(known, now, left_out, groups={row["key"] for row in groups}))
    rows = {
        "environment": environment(),
        "machines": [{"key": network_names.key_of_machine(each.id), "name": each.name} for each in fleet],
        "zones": [network_names.row_of_zone(zone) for zone in zones],
        "groups": groups,
        "names": entries,
        "openings": holes,
        "ended": _ended(),
    }
    return Body(rows, left_out)


def names_wanted() -> Iterator[Row]:
    """Every name, fit or not."""
    fleet = _fleet()
    yield from _names(fleet, {machine.id: machine for machine in fleet})


def _fleet() -> list[Machine]:
    return list(Machine.select(*OF_MACHINE).where(Machine.state != "retired").order_by(Machine.id))


def _names(fleet: list[Machine], known: dict[int, Machine]) -> Iterator[Row]:
    """What somebody asked for stands before what there is by itself: of two with one name the first stays."""
    yield from network_names.wanted()
    if zone := network_names.find_zone(of="leases"):
        active = Lease.select(*OF_LEASE).where(Lease.state == "active").order_by(Lease.id)
        for lease in active:
            machine = known[lease.machine_id]
            yield from network_names.of_lease(lease, machine, known.get(machine.gateway_id or 0), zone)
    if zone := network_names.find_zone(of="machines"):
        for machine in fleet:
            yield from network_names.of_machine(machine, zone)


def _fitting(rows: Iterator[Row], zones: network_trial.Zones, left_out: list[dict[str, str]]) -> list[Row]:
    """Those that no stack would refuse, each name and type once, and nothing beside a CNAME."""
    fit: dict[str, tuple[Row, document.Name]] = {}
    at_name: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        try:
            entry = zones.entry(row)
        except network_trial.Unfit as unfit:
            left_out.append({"key": row["key"], "reason": str(unfit)})
            continue
        there = at_name.setdefault((entry.zone, entry.name), {})
        if other := _in_the_way(entry, there):
            left_out.append({"key": row["key"], "reason": f"{other} stands at {entry.name} already."})
            continue
        there[entry.type] = entry.key
        fit[entry.key] = ({**row, "name": entry.name}, entry)
    for key, reason in list(desired.proxied_to_private(entry for _, entry in fit.values())):
        left_out.append({"key": key, "reason": reason})
        del fit[key]
    return [row for row, _ in fit.values()]


def _in_the_way(entry: document.Name, there: dict[str, str]) -> str | None:
    """The key of what stands at the same name and bears nothing of this type beside it."""
    if entry.type == "CNAME":
        return next(iter(there.values()), None)
    return there.get(entry.type) or there.get("CNAME")


def _fitting_groups(left_out: list[dict[str, str]]) -> list[Row]:
    rows = []
    for group in SecurityGroup.select().order_by(SecurityGroup.id):
        row = row_of_group(group)
        if (reason := desired.unfit_group(document.Group(**row))) is None:
            rows.append(row)
        else:
            left_out.append({"key": group.key, "reason": reason})
    return rows


def row_of_group(group: SecurityGroup) -> Row:
    """As the document writes it."""
    return {
        "key": group.key, "name": group.name, "cloud": group.cloud, "region": group.region, "vpc": group.vpc,
        "id": group.external_id,
    }  # fmt: skip


def _openings(
    known: dict[int, Machine], now: datetime, left_out: list[dict[str, str]], *, groups: Container[str]
) -> Iterator[Row]:
    """Of machines that stand behind one of these groups; the hosts' own firewalls are told by sync."""
    rows = (
        Opening.select(*OF_OPENING, *OF_LEASE)
        .join(Lease, peewee.JOIN.LEFT_OUTER)
        .where(Opening.closed_at.is_null(), Opening.machine << BEHIND_GROUPS)
        .order_by(Opening.id)
    )
    for opening in rows:
        machine = known.get(opening.machine_id)
        if machine is None or machine.security_group_id is None or not network_openings.is_wanted(opening, now):
            continue
        row = row_of_opening(opening, machine)
        if row["group"] not in groups:
            left_out.append({"key": row["key"], "reason": f"Its security group {row['group']} is left out."})
            continue
        try:
            rules.opening(row["key"], row["protocol"], (opening.first_port, opening.last_port), row["source"])
        except rules.BadOpening as error:
            left_out.append({"key": row["key"], "reason": str(error)})
            continue
        yield row


def _ended() -> list[str]:
    """Leases that have ended and of which a stack may have something still: that it goes is no loss to the guard.

    One that goes on under another, and so under its key, has not ended.
    """
    in_clouds = Grant.select(Grant.lease).where(Grant.kind << GRANTS_BY_STACKS, Grant.observed != "closed")
    continued = Lease.select(Lease.continues).where(Lease.continues.is_null(False))
    over = Lease.select(Lease.id, Lease.login).where(
        Lease.state << ("ending", "ended"), Lease.id << in_clouds, Lease.id.not_in(continued)
    )
    return [network_names.key_of_lease(lease) for lease in over.order_by(Lease.id)]


def openings_behind(group: SecurityGroup, now: datetime) -> Iterator[Row]:
    """What this group shall let in now."""
    members = list(Machine.select().where(Machine.security_group == group, Machine.state != "retired"))
    yield from _openings({machine.id: machine for machine in members}, now, [], groups={group.key})


def row_of_opening(opening: Opening, machine: Machine) -> Row:
    """As the document writes it; `opening.lease` must have been read with it."""
    end = network_openings.end_of(opening)
    return {
        "key": opening.key,
        "machine": network_names.key_of_machine(machine.id),
        "lease": None if opening.lease is None else network_names.key_of_lease(opening.lease),
        "group": f"g{machine.security_group_id}",
        "protocol": opening.protocol,
        "ports": [opening.first_port, opening.last_port],
        "source": opening.source,
        "reason": opening.reason,
        "ends_at": None if end is None else format_time(end),
    }


# Give out


def environment() -> str:
    """Of which this portal is; a stack of another one refuses its export."""
    return config.current().network_environment


def current() -> NetworkExport:
    """The document of this generation: written by whoever asks first, the same bytes for all who follow.

    Raises NetworkFrozen after a restoration, and ExportUnfit.
    """
    row = network.state()
    network.refuse_frozen(row)
    kept: NetworkExport | None = NetworkExport.get_or_none(NetworkExport.generation == row.generation)
    return kept if kept is not None else _write()


def _write() -> NetworkExport:
    """Built without holding anybody up, and kept if nothing has changed meanwhile; else built again, at last held."""
    for _ in range(TRIES):
        generation, now = network.state().generation, utcnow()
        built = body(now)
        with atomic():
            network.hold()
            if network.state().generation == generation:
                return _keep(built, now)
    with atomic():
        network.hold()  # whatever changes from here on is of a later generation
        now = utcnow()
        return _keep(body(now), now)


def _keep(built: Body, now: datetime) -> NetworkExport:
    """Inside the transaction that holds the network."""
    row = network.state()
    network.refuse_frozen(row)
    kept: NetworkExport | None = NetworkExport.get_or_none(NetworkExport.generation == row.generation)
    if kept is not None:
        return kept
    sealed = document.seal({**built.rows, "generation": row.generation, "generated_at": format_time(now)})
    try:
        document.parse(sealed)  # a fault in what was let in is found here, before it stops every stack
    except document.BadDocument as error:
        raise ExportUnfit(f"No stack would take the export, so none is given out: {error}") from None
    export: NetworkExport = NetworkExport.create(
        generation=row.generation,
        checksum=sealed["checksum"],
        counts=sealed["counts"],
        left_out=built.left_out,
        document=zlib.compress(json.dumps(sealed, ensure_ascii=False, separators=(",", ":")).encode()),
    )
    return export


def text_of(export: NetworkExport) -> bytes:
    """The document, as JSON in UTF-8."""
    return zlib.decompress(bytes(export.document))


def content_of(export: NetworkExport) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text_of(export))
    return content


def get(checksum: str) -> NetworkExport:
    """Raises NotFound for one that is not kept, or was never given out."""
    found = find(checksum)
    if found is None:
        raise NotFound("No document that is kept has this checksum.")
    return found


def find(checksum: str) -> NetworkExport | None:
    found: NetworkExport | None = NetworkExport.get_or_none(NetworkExport.checksum == checksum)
    return found


def was_given_out(*, since: int, before: int) -> bool:
    """Whether anybody can have applied a generation from `since` on and before the other."""
    between = (NetworkExport.generation >= since) & (NetworkExport.generation < before)
    return bool(NetworkExport.select().where(between).exists())


# By itself


def refresh(now: datetime | None = None) -> bool:
    """Find a change that nobody counted, and count it; returns whether there was one. For the sweep.

    So a rule that forgot to call `network.changed` costs minutes, not a name that nobody ever gets.
    """
    row = network.state()
    kept: NetworkExport | None = NetworkExport.get_or_none(NetworkExport.generation == row.generation)
    if kept is None or row.frozen_reason is not None:
        return False
    before = content_of(kept)
    now_wanted = body(now or utcnow()).rows
    if all(now_wanted[name] == before[name] for name in body_fields()):
        return False
    if not network.count_if(row.generation):
        return False  # it was counted meanwhile
    LOG.warning("the network's content changed without a new generation; counted now")
    return True


def body_fields() -> tuple[str, ...]:
    """What the stacks make something of. Which leases have ended says only what may be gone."""
    return ("environment", "machines", "zones", "groups", "names", "openings")


def prune(now: datetime | None = None) -> int:
    """Forget documents that no stack can have at hand any more; returns how many. What a stack has applied is kept."""
    newest = AppliedNetwork.select(peewee.fn.MAX(AppliedNetwork.id)).where(AppliedNetwork.export.is_null(False))
    in_use = {
        row.export_id
        for row in AppliedNetwork.select(AppliedNetwork.export).where(
            AppliedNetwork.id << newest.group_by(AppliedNetwork.stack)
        )
    }
    recent = NetworkExport.select(NetworkExport.id).order_by(NetworkExport.generation.desc()).limit(KEEP_COUNT)
    kept = {row.id for row in recent} | in_use
    old = NetworkExport.created_at < (now or utcnow()) - KEEP
    with atomic():
        return int(NetworkExport.delete().where(old, NetworkExport.id.not_in(sorted(kept) or [0])).execute())
