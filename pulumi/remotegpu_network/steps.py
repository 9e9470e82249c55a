"""What cannot be done in one apply, because an engine deletes last: the step that goes first.

A record that takes the place of another one (A and AAAA become a CNAME; two leases swap their names) is refused by
the cloud while the other is still there. Within one resource delete-before-replace sees to it; between two, only two
applies do. The first step is an export like any other: what is in the way is gone in it, and what wants the place
waits, as it was. It is of the generation before: a stack that broke there has not applied the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from remotegpu_network import document
from remotegpu_network.document import Document, Name
from remotegpu_network.records import Value
from remotegpu_network.settings import Settings

ONE_RESOURCE = ("aws",)  # holds all values of a name: they cannot get in each other's way


def first_step(before: Document, after: Document, settings: Settings) -> Document | None:
    """The export to be applied first, or None if one apply does. Apply it, and ask again with it as `before`."""
    had = _by_key(before, after)
    sitting = _seats(had.values())
    chosen: list[Name] = []
    waiting: list[Name] = []
    for entry in after.names:
        old = had.get(entry.key)
        cloud = after.zones[entry.zone].cloud
        if cloud not in settings.clouds:
            chosen.append(entry)
        elif _is_taken(entry, old, sitting) or (old is not None and cloud not in ONE_RESOURCE and _tangled(old, entry)):
            waiting.append(entry)
            chosen += [] if old is None else [_meanwhile(old, entry)]
        else:
            chosen.append(entry)
    if not waiting:
        return None
    if _same(chosen, list(had.values())):  # they wait for each other in a ring: one is gone for an apply
        dark = min(entry.key for entry in waiting if entry.key in had)
        chosen = [entry for entry in chosen if entry.key != dark]
    rows = [_row(entry) for entry in chosen]
    told = {**_places(before, after), "names": rows, "generation": before.generation}
    return document.parse(document.seal({**after.raw, **told}))


def _by_key(before: Document, after: Document) -> dict[str, Name]:
    """What was applied, under the keys of today."""
    renamed = {previous: entry.key for entry in after.names for previous in entry.previous_keys}
    now = (replace(entry, key=renamed[entry.key]) if entry.key in renamed else entry for entry in before.names)
    return {entry.key: entry for entry in now}


def _seats(entries: Iterable[Name]) -> dict[tuple[str, str], list[Name]]:
    found: dict[tuple[str, str], list[Name]] = {}
    for entry in entries:
        found.setdefault((entry.zone, entry.name), []).append(entry)
    return found


def _is_taken(entry: Name, old: Name | None, sitting: Mapping[tuple[str, str], list[Name]]) -> bool:
    """Does it want a seat that another entry had at the last apply? That one leaves, but only at the end."""
    if old is not None and (old.zone, old.name, old.type) == (entry.zone, entry.name, entry.type):
        return False
    there = sitting.get((entry.zone, entry.name), [])
    return any(
        other.key != entry.key and (other.type == entry.type or "CNAME" in (other.type, entry.type)) for other in there
    )


def _tangled(old: Name, new: Name) -> bool:
    """Do its own values get in each other's way: the principal takes over what another one had, or the other way
    round?"""
    if (old.zone, old.name) != (new.zone, new.name):
        return False
    if old.type != new.type:
        return "CNAME" in (old.type, new.type) and len(old.values) > 1
    return old.values[0] != new.values[0] and (new.values[0] in old.values[1:] or old.values[0] in new.values[1:])


def _meanwhile(old: Name, new: Name) -> Name:
    """The entry as it waits: at its old seat, without what stands in the way."""
    same = (old.zone, old.name, old.type) == (new.zone, new.name, new.type)
    if same and new.values[0] not in old.values[1:]:
        return replace(new, values=tuple(value for value in new.values if value != old.values[0]))
    kept = tuple(value for value in old.values[1:] if same and value in new.values[1:])
    return replace(old, values=(old.values[0], *kept), previous_keys=new.previous_keys)


def _same(chosen: Sequence[Name], had: Sequence[Name]) -> bool:
    def seats(entries: Sequence[Name]) -> dict[str, Any]:
        return {entry.key: (entry.zone, entry.name, entry.type, entry.values) for entry in entries}

    return seats(chosen) == seats(had)


def _row(entry: Name) -> dict[str, Any]:
    return {
        **{field: getattr(entry, field) for field in entry.__dataclass_fields__},
        "values": [_written(value) for value in entry.values],
        "previous_keys": list(entry.previous_keys),
    }


def _written(value: Value) -> Any:
    if isinstance(value, str):
        return value
    return {field: getattr(value, field) for field in value.__dataclass_fields__}


def _places(before: Document, after: Document) -> dict[str, Any]:
    """Zones and machines that the waiting entries still need."""
    merged = {}
    for name in ("zones", "machines"):
        now = {row["key"] for row in after.raw[name]}
        merged[name] = [*after.raw[name], *(row for row in before.raw[name] if row["key"] not in now)]
    return merged
