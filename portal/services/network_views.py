"""The network as people look at it: where it stands, and every name, opening and forward with what was seen of it.

Read only. Desired and applied are compared in network_drift.py; what may be asked for is in network_requests.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from operator import or_
from typing import Any

import peewee

from portal.integrations.network_format import names, records
from portal.models import (
    AppliedNetwork,
    DnsRecord,
    Forward,
    Lease,
    Machine,
    NetworkState,
    Opening,
    SecurityGroup,
)
from portal.services import (
    config,
    network,
    network_applied,
    network_drift,
    network_export,
    network_forwards,
    network_machines,
    network_names,
    network_openings,
    network_switch,
)
from portal.services.network_drift import Entry
from portal.services.network_names import Row

SHOWS = ("waiting", "closed")  # of openings; without one of these all that are wanted
MOST_OF_MACHINE = 50  # openings on its page


# Where it stands


@dataclass(frozen=True)
class Stack:
    """What it applied last, and what has failed since."""

    applied: AppliedNetwork | None
    failed: AppliedNetwork | None

    @property
    def name(self) -> str:
        return str((self.applied or self.failed).stack)  # type: ignore[union-attr]  # one of them is there

    @property
    def seen(self) -> tuple[int, int]:
        """Changes with its every word."""
        return (self.applied.id if self.applied else 0, self.failed.id if self.failed else 0)


@dataclass(frozen=True)
class Standing:
    """`waits_since`: a change that some stack has not applied; None where none waits."""

    state: NetworkState
    environment: str
    stacks: tuple[Stack, ...]
    is_pipeline_called: bool

    @property
    def waits_since(self) -> datetime | None:
        since: datetime | None = self.state.behind_since
        return since


def standing() -> Standing:
    return Standing(
        network.state(), network_export.environment(), _stacks(), config.current().network_webhook_url is not None
    )


def _stacks() -> tuple[Stack, ...]:
    """By name; also one that has only failed so far."""
    applied = {row.stack: row for row in network_applied.newest_of_each()}
    return tuple(
        Stack(applied.get(row.stack), row if row.outcome == "failed" else None) for row in network_applied.last_words()
    )


def counts() -> dict[str, int]:
    """What the portal keeps, in numbers."""
    return {
        "openings": Opening.select().where(Opening.closed_at.is_null()).count(),
        "gateways": network_machines.gateways().count(),
        "forwards": Forward.select().where(Forward.released_at.is_null()).count(),
    }


# Lists


def entries(compared: network_drift.Compared, *, kind: str | None = None, keyword: str | None = None) -> list[Entry]:
    """Of what was compared: of one kind, and with the keyword in name, value, source or key."""
    word = (keyword or "").lower()
    return [each for each in compared.entries if kind in (None, each.kind) and word in _said(each)]


def _said(entry: Entry) -> str:
    """A name stands there in its own script, and as A-labels."""
    row = entry.row
    return " ".join([entry.key, entry.label, row.get("name", ""), *value_texts(row)]).lower()


def readable(name: str) -> str:
    """In its own script."""
    text: str = names.readable(name)
    return text


def value_texts(row: Mapping[str, Any]) -> list[str]:
    """The values of a name as people write them; of an opening none."""
    kind = row.get("type")
    return [] if kind is None else [value_text(kind, value) for value in row["values"]]


def value_text(kind: str, value: Any) -> str:
    return str(records.parse(kind, value)).removesuffix(".")


def openings(
    *, show: str | None = None, machine_id: int | None = None, keyword: str | None = None
) -> peewee.ModelSelect[Opening]:
    """Wanted ones, newest first; `waiting`: those that are not seen as they are wanted, `closed`: wanted no longer."""
    is_open = {"waiting": None, "closed": False}.get(show or "", True)
    rows = network_openings.search(machine_id=machine_id, is_open=is_open)
    if show == "waiting":
        is_late = Opening.closed_at.is_null() & (Opening.observed != "open")
        is_left = Opening.closed_at.is_null(False) & (Opening.observed != "closed")
        rows = rows.where(is_late | is_left)
    if keyword:
        hits = [column.contains(keyword) for column in (Machine.name, Opening.source, Opening.reason)]
        if keyword.isascii() and keyword.isdigit() and len(keyword) < 6:
            hits.append((Opening.first_port <= int(keyword)) & (Opening.last_port >= int(keyword)))
        rows = rows.where(reduce(or_, hits))
    return rows


def forwards(*, gateway_id: int | None = None, keyword: str | None = None) -> peewee.ModelSelect[Forward]:
    """Forwards that hold a port, with gateway, machine and lease, by gateway and port."""
    gateway = Machine.alias("gateway")
    rows = (
        Forward.select(Forward, gateway, Machine, Lease)
        .join(gateway, on=Forward.gateway)
        .switch(Forward)
        .join(Machine, on=Forward.machine)
        .switch(Forward)
        .join(Lease)
        .where(Forward.released_at.is_null())
        .order_by(gateway.name, Forward.public_port)
    )
    if gateway_id is not None:
        rows = rows.where(Forward.gateway == gateway_id)
    if keyword:
        hits = [Machine.name.contains(keyword), gateway.name.contains(keyword), Forward.source.contains(keyword)]
        if keyword.isascii() and keyword.isdigit() and len(keyword) < 6:
            hits.append(Forward.public_port == int(keyword))
        rows = rows.where(reduce(or_, hits))
    return rows


@dataclass(frozen=True)
class Gateway:
    """A gateway, how many ports of its pool are taken, and how many machines stand behind it."""

    machine: Machine
    ports: int
    taken: int
    behind: int


def gateways() -> list[Gateway]:
    """By name."""
    taken = _counted(Forward.gateway, Forward.released_at.is_null())
    behind = _counted(Machine.gateway, Machine.state != "retired")
    return [
        Gateway(each, len(network_machines.pool(each)), taken.get(each.id, 0), behind.get(each.id, 0))
        for each in network_machines.gateways()
    ]


def _counted(column: Any, where: Any) -> dict[int, int]:
    rows = column.model.select(column, peewee.fn.COUNT(column.model.id)).where(where, column.is_null(False))
    return dict(rows.group_by(column).tuples())


# Of one machine, and of one lease


@dataclass(frozen=True)
class Place:
    """A machine in the network. `names` lead to it now; `more`: it has more openings than are listed."""

    gateway: Machine | None
    group: SecurityGroup | None
    names: Sequence[Row]
    openings: Sequence[Opening]
    more: bool
    forwards: Sequence[Forward]


def of_machine(machine: Machine, lease: Lease | None) -> Place:
    """With those of the lease that it has now."""
    zone = network_names.find_zone(of="machines")
    own = [] if zone is None else network_names.zones().fitting(network_names.of_machine(machine, zone))
    asked = [network_names.row_of(each, None) for each in network_names.search(machine_id=machine.id)]
    leased = [] if lease is None or lease.state != "active" else network_names.of_lease_wanted(lease)
    held = list(_unsettled(network_openings.search(machine_id=machine.id)).limit(MOST_OF_MACHINE + 1))
    return Place(
        gateway=None if machine.gateway_id is None else Machine.get_by_id(machine.gateway_id),
        group=None if machine.security_group_id is None else SecurityGroup.get_by_id(machine.security_group_id),
        names=[*own, *asked, *leased],
        openings=held[:MOST_OF_MACHINE],
        more=len(held) > MOST_OF_MACHINE,
        forwards=[] if lease is None else network_forwards.of_lease(lease),
    )


def openings_of(lease: Lease) -> list[Opening]:
    """What is wanted for it, and what is still seen."""
    return list(_unsettled(network_openings.search(lease_id=lease.id)))


def openings_by_lease(leases: Sequence[Lease]) -> Mapping[int | None, list[Opening]]:
    """Lease id → its openings, for a page of leases."""
    found: dict[int | None, list[Opening]] = {lease.id: [] for lease in leases}
    for opening in _unsettled(network_openings.search()).where(Opening.lease << list(found)):
        found[opening.lease_id].append(opening)
    return found


def forwards_of(leases: Sequence[Lease]) -> list[Forward]:
    """Those of these leases that hold a port, with their gateways."""
    gateway = Machine.alias("gateway")
    rows = Forward.select(Forward, gateway).join(gateway, on=Forward.gateway).where(Forward.released_at.is_null())
    return list(rows.where(Forward.lease << [lease.id for lease in leases]).order_by(Forward.target_port, Forward.id))


def ways_of(opening: Opening, forwards: Sequence[Forward]) -> tuple[Forward, ...]:
    """The ports of a gateway, among these, by which the opening is reached."""
    said = (opening.lease_id, opening.protocol, opening.source)
    return tuple(
        each
        for each in forwards
        if said == (each.lease_id, each.protocol, each.source)
        and opening.first_port <= each.target_port <= opening.last_port
        and (each.closed_at is None) == (opening.closed_at is None)
    )


def _unsettled(rows: peewee.ModelSelect[Opening]) -> peewee.ModelSelect[Opening]:
    return rows.where(Opening.closed_at.is_null() | (Opening.observed != "closed"))


def names_of(lease: Lease) -> list[Row]:
    """The names under which an active lease is found."""
    return network_names.of_lease_wanted(lease) if lease.state == "active" else []


def value_lines(record: DnsRecord) -> list[str]:
    """The values of a record as they are typed."""
    if record.type == "CAA":  # without the quotes of a zone file
        return [f"{value['flags']} {value['tag']} {value['value']}" for value in record.values]
    return [value_text(record.type, value) for value in record.values]


def names_seen(lease: Lease) -> list[str]:
    """The names that lead to it and that the stacks have made: not one that still leads elsewhere."""
    made = network_switch.made(lease, "name")
    rows = [row for row in names_of(lease) if network_applied.word_of(row) in made]
    return sorted({readable(row["name"]) for row in rows if row["type"] in records.ADDRESS_TYPES})
