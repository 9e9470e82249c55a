"""What is in the cloud already: found, and offered for import by its id, never deleted and made again.

It reads a listing as the cloud's API answers it, and says which wanted records are there (import them), and which
names are taken by something else (a person decides).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from remotegpu_network import names, records
from remotegpu_network.desired import Resource
from remotegpu_network.shapes import cloudflare


@dataclass
class Found:
    """`adopt`: logical name → import id, for remotegpu:adopt. `taken`: sentences for a person."""

    adopt: dict[str, str] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)


def cloudflare_listing(wanted: Iterable[Resource], listing: Iterable[Mapping[str, Any]], zone_id: str) -> Found:
    """`listing` is `result` of GET /zones/ZONE/dns_records. Import id: ZONE/RECORD."""
    there: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in listing:
        there.setdefault((names.canonical(row["name"]), row["type"]), []).append(row)
    found = Found()
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
        target = str(data.get("target", "")).rstrip(".").lower()
        return (data.get("priority"), data.get("weight"), data.get("port"), target) == wanted
    return (_plain(row.get("content")), row.get("priority") if shape.type == "MX" else None) == (
        _plain(shape.content),
        shape.priority,
    )


def _plain(content: Any) -> str:
    """With or without quotes it is the same text."""
    text = str(content or "")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _in_the_way(logical: str, shape: cloudflare.Record, there: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    """A CNAME beside anything else, in either direction."""
    for kind in ("A", "AAAA") if shape.type == "CNAME" else ("CNAME",):
        if (shape.name, kind) in there:
            yield f"{logical}: {shape.name} has {kind} records already, and nothing stands beside a CNAME"
