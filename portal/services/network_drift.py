"""Desired and applied side by side: what the stacks have still to make, to change and to remove, and who asked for it.

Read only. It is computed while the network is frozen as well: that is when an operator has to compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import peewee

from portal.db import utcnow
from portal.integrations.network_format import names
from portal.models import DnsRecord, Lease, Machine, Opening, User
from portal.services import network_applied, network_export
from portal.services.network_applied import Contents, View, of_clouds

STATES = ("to_make", "to_change", "to_remove", "applied", "unknown")


@dataclass(frozen=True)
class Entry:
    """One name or opening. `desired` or `applied` is None where it is not there; `since` is the cloud's last apply."""

    kind: str  # name, security_group
    cloud: str
    key: str
    state: str
    desired: Mapping[str, Any] | None
    applied: Mapping[str, Any] | None
    since: datetime | None

    @property
    def row(self) -> Mapping[str, Any]:
        return self.desired or self.applied or {}

    @property
    def label(self) -> str:
        """For people."""
        row = self.row
        if self.kind == "name":
            return f"{row['type']} {names.readable(row['name'])}"
        ports = "-".join(str(port) for port in sorted(set(row["ports"] or ())))
        return f"{row['protocol']} {ports} {row['source']}"


@dataclass(frozen=True)
class Asked:
    """Who wanted it, and when. None: it is there by itself."""

    by: str | None
    at: datetime | None


@dataclass(frozen=True)
class Compared:
    entries: tuple[Entry, ...]
    counts: Mapping[str, int]
    left_out: tuple[Mapping[str, str], ...]


def compare(*, only: str | None = None) -> Compared:
    """All of it, in the order of cloud and key; `only` the entries in one of STATES (the counts are of all)."""
    views = network_applied.views()
    built = network_export.body(utcnow())
    found = list(_entries(network_applied.contents_of(built.rows), views))
    counts = {state: sum(each.state == state for each in found) for state in STATES}
    kept = tuple(each for each in found if only in (None, each.state))
    return Compared(kept, counts, tuple(built.left_out))


def _entries(wanted: Contents, views: Mapping[str, View]) -> Iterator[Entry]:
    places = set(wanted.rows)
    for cloud, view in views.items():
        if view.contents is not None:
            places |= {place for place in view.contents.rows if place[1] == cloud}
    for kind, cloud in sorted(places, key=lambda place: (place[1], place[0])):
        last = views.get(cloud)
        there: Mapping[str, Any] | None = {}
        if last is not None:
            there = None if last.contents is None else last.contents.rows.get((kind, cloud), {})
        since = None if last is None else last.at
        here = wanted.rows.get((kind, cloud), {})
        for key in sorted(here.keys() | (there or {}).keys()):
            applied = None if there is None else there.get(key)
            state = _state(here.get(key), applied, is_known=there is not None)
            yield Entry(kind, cloud, key, state, here.get(key), applied, since)


def _state(desired: Mapping[str, Any] | None, applied: Mapping[str, Any] | None, *, is_known: bool) -> str:
    if not is_known:
        return "unknown"
    if applied is None:
        return "to_make"
    if desired is None:
        return "to_remove"
    return "applied" if of_clouds(desired) == of_clouds(applied) else "to_change"


def who_asked(entries: Sequence[Entry]) -> dict[str, Asked]:
    """Key → who, for a page of entries, in a query for each sort of them."""
    ids: dict[str, list[int]] = {"n": [], "o": [], "l": [], "m": []}
    for entry in entries:
        head = entry.key.partition(".")[0]
        ids[head[0]].append(int(head[1:]))
    found: dict[str, Asked] = {}
    asked: tuple[tuple[str, Any, Any], ...] = (
        ("n", DnsRecord, DnsRecord.requested_by),
        ("o", Opening, Opening.requested_by),
        ("l", Lease, Lease.created_by),
    )
    for letter, table, column in asked:
        rows = table.select(table.id, table.created_at, User.username).join(User, peewee.JOIN.LEFT_OUTER, on=column)
        for row_id, at, username in rows.where(table.id << (ids[letter] or [0])).tuples():
            found[f"{letter}{row_id}"] = Asked(username, at)
    for machine in Machine.select(Machine.id, Machine.created_at).where(Machine.id << (ids["m"] or [0])):
        found[f"m{machine.id}"] = Asked(None, machine.created_at)
    return {entry.key: found.get(entry.key.partition(".")[0], Asked(None, None)) for entry in entries}
