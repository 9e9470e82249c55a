"""What is in the cloud already: found, and offered for import by its id, never deleted and made again.

It reads a listing as the cloud's API answers it, and says which wanted records are there (import them), what the
import changes of them, and which names are taken by something else (a person decides).

Since 2025 the engine imports whatever it finds and makes it what the program says in the same apply, where it refused
before (pulumi/pulumi#19339): so what differs is told here, before, and gate.py stops what is another record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from remotegpu_network import names, records
from remotegpu_network.desired import Resource
from remotegpu_network.document import BadDocument
from remotegpu_network.shapes import cloudflare

NEEDED = {"id", "name", "type"}


@dataclass
class Found:
    """`adopt`: logical name → import id, for remotegpu:adopt. Sentences for a person: `changed`, what the import
    makes otherwise; `taken`, names for which a person has to decide; `unread`, rows that nobody could be asked for."""

    adopt: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def rows_of(answer: Any) -> list[Mapping[str, Any]]:
    """The records in what the API answered, or in a list of them. Raises BadDocument: half a zone is no listing."""
    rows = answer.get("result") if isinstance(answer, Mapping) else answer
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and row.keys() >= NEEDED for row in rows):
        raise BadDocument(["The listing holds no records: is it the answer of GET /zones/ZONE/dns_records?"])
    pages = (answer.get("result_info") or {}).get("total_pages") if isinstance(answer, Mapping) else None
    if isinstance(pages, int) and pages > 1:
        raise BadDocument([f"The listing is one page of {pages}: ask with per_page=5000, or join the pages' `result`."])
    return rows


def cloudflare_listing(wanted: Iterable[Resource], listing: Iterable[Mapping[str, Any]], zone_id: str) -> Found:
    """`listing` is `result` of GET /zones/ZONE/dns_records. Import id: ZONE/RECORD."""
    there: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    found = Found()
    for row in listing:
        try:
            there.setdefault((names.canonical(row["name"]), row["type"]), []).append(row)
        except names.BadName as error:
            found.unread.append(f"{row['type']} {row['name']!r} of the zone is passed over: {error}")
    ours = [
        (each.logical, each.shape)
        for each in wanted
        if isinstance(each.shape, cloudflare.Record) and each.parent == zone_id
    ]
    for logical, shape in ours:
        rows = there.get((shape.name, shape.type), [])
        same = next((row for row in rows if _same(shape, row)), None)
        if same is not None:
            found.adopt[logical] = f"{zone_id}/{same['id']}"
            found.changed += [f"{logical}: {change}" for change in _changes(shape, same)]
        elif rows and shape.type in records.ADDRESS_TYPES:
            contents = ", ".join(str(row.get("content")) for row in rows)
            found.taken.append(f"{logical}: {shape.type} {shape.name} is {contents} in the zone, not {shape.content}")
    found.taken += [sentence for logical, shape in ours for sentence in _in_the_way(logical, shape, there)]
    return found


def _same(shape: cloudflare.Record, row: Mapping[str, Any]) -> bool:
    data = row.get("data") or {}
    if shape.caa is not None:
        caa = (shape.caa.flags, shape.caa.tag, shape.caa.value)
        return (data.get("flags"), data.get("tag"), data.get("value")) == caa
    if shape.srv is not None:
        wanted = (shape.srv.priority, shape.srv.weight, shape.srv.port, shape.srv.target)
        target = _one_form("CNAME", data.get("target"))
        return (data.get("priority"), data.get("weight"), data.get("port"), target) == wanted
    priority = row.get("priority") if shape.type == "MX" else None
    return (_one_form(shape.type, row.get("content")), priority) == (_plain(shape.content), shape.priority)


def _changes(shape: cloudflare.Record, row: Mapping[str, Any]) -> Iterator[str]:
    """What the apply that imports it makes otherwise."""
    for name, wanted in (("ttl", shape.ttl), ("proxied", shape.proxied), ("comment", shape.comment)):
        if name in row and (row[name] or None) != (wanted or None):
            yield f"{name} {row[name]!r} becomes {wanted!r}"
    if row.get("tags"):
        yield f"its tags {', '.join(map(str, row['tags']))} go"


def _one_form(kind: str, content: Any) -> str:
    """As we write it: addresses in their shortest form, targets as A-labels; what is none of these as it is."""
    text = _plain(content)
    try:
        if kind in ("A", "AAAA"):
            return str(records.parse(kind, text))
        return names.canonical(text) if kind in ("CNAME", "MX") else text
    except (names.BadName, records.BadRecord):
        return text


def _plain(content: Any) -> str:
    """With or without quotes it is the same text."""
    text = str(content or "")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _in_the_way(logical: str, shape: cloudflare.Record, there: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    """A CNAME beside anything else, in either direction."""
    for kind in ("A", "AAAA") if shape.type == "CNAME" else ("CNAME",):
        if (shape.name, kind) in there:
            yield f"{logical}: {shape.name} has {kind} records already, and nothing stands beside a CNAME"
