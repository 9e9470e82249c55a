"""Route 53: one resource holds all values of a name and type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remotegpu_network import records
from remotegpu_network.document import Name
from remotegpu_network.records import Value
from remotegpu_network.shapes import ttl

DEFAULT_S = 300


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    type: str
    ttl: int
    records: tuple[str, ...]


def record(entry: Name) -> Record:
    """Raises Unfit."""
    seconds = ttl(entry.ttl_s, default_s=DEFAULT_S, at_least_s=1, cloud="Route 53")
    return Record(entry.name, entry.type, seconds, _values(entry.values, entry.type))


def _values(values: Sequence[Value], kind: str) -> tuple[str, ...]:
    """Sorted: it is a set, and an order of ours would be a difference."""
    if kind == "TXT":
        return tuple(sorted(text(value) for value in values if isinstance(value, str)))
    return tuple(sorted(records.presentation(value, kind) for value in values))


def text(value: str) -> str:
    """The provider adds the outer quotes; chunks are joined by two quotes inside one value.

    Two list items would be two records, and a DKIM key in two records is none (pulumi-aws#5451).
    """
    return '""'.join(records.escaped(chunk) for chunk in records.chunks(value))
