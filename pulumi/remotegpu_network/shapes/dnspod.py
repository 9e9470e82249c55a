"""DNSPod (Tencent Cloud): one resource a value; targets with a dot at the end, as its API answers them.

The line of resolution is called 默认 ("default") in every language of the API.
"""

from __future__ import annotations

from dataclasses import dataclass

from remotegpu_network import names, records
from remotegpu_network.document import Name
from remotegpu_network.records import Mx, Value
from remotegpu_network.shapes import mx_priority, ttl

DEFAULT_S = 600
AT_LEAST_S = 600  # less needs a paid plan
PRIORITIES = range(1, 21)
LINE = "默认"


@dataclass(frozen=True, slots=True)
class Record:
    sub_domain: str
    type: str
    value: str
    ttl: int
    mx: int | None
    remark: str


def record(entry: Name, value: Value, zone: str, *, at_least_s: int = AT_LEAST_S) -> Record:
    """Raises Unfit."""
    seconds = ttl(entry.ttl_s, default_s=max(DEFAULT_S, at_least_s), at_least_s=at_least_s, cloud="DNSPod")
    mx = mx_priority(value, PRIORITIES, cloud="DNSPod")
    return Record(
        names.relative(entry.name, zone), entry.type, _written(value, entry.type), seconds, mx, f"RemoteGPU {entry.key}"
    )


def _written(value: Value, kind: str) -> str:
    if isinstance(value, Mx):
        return f"{value.target}."
    return value if kind == "TXT" and isinstance(value, str) else records.presentation(value, kind)
