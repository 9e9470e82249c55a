"""AliDNS: one resource a value; values without a dot at the end.

A value with a dot, or the same once more, is refused as DomainRecordDuplicate (terraform-provider-alicloud PR #1518).
"""

from __future__ import annotations

from dataclasses import dataclass

from remotegpu_network import names, records
from remotegpu_network.document import Name
from remotegpu_network.records import Caa, Mx, Srv, Value
from remotegpu_network.shapes import mx_priority, ttl

DEFAULT_S = 600
AT_LEAST_S = 600  # less needs a paid plan
PRIORITIES = range(1, 11)


@dataclass(frozen=True, slots=True)
class Record:
    rr: str
    type: str
    value: str
    ttl: int
    priority: int | None
    remark: str


def record(entry: Name, value: Value, zone: str, *, at_least_s: int = AT_LEAST_S) -> Record:
    """Raises Unfit."""
    seconds = ttl(entry.ttl_s, default_s=max(DEFAULT_S, at_least_s), at_least_s=at_least_s, cloud="AliDNS")
    priority = mx_priority(value, PRIORITIES, cloud="AliDNS")
    return Record(
        names.relative(entry.name, zone), entry.type, _written(value), seconds, priority, f"RemoteGPU {entry.key}"
    )


def _written(value: Value) -> str:
    if isinstance(value, Mx):
        return value.target
    if isinstance(value, Srv):
        return f"{value.priority} {value.weight} {value.port} {value.target}"
    return records.presentation(value, "CAA") if isinstance(value, Caa) else value
