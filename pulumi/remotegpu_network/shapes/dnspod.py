"""DNSPod (Tencent Cloud): one resource a value; targets with a dot at the end, as its API answers them.

The line of resolution is called 默认 ("default") in every language of the API.
"""

from __future__ import annotations

from dataclasses import dataclass

from remotegpu_network import names, records
from remotegpu_network.document import Name
from remotegpu_network.records import Mx, Value
from remotegpu_network.shapes import Unfit, ttl

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
    if entry.proxied:
        raise Unfit("only Cloudflare has a proxy")
    seconds = ttl(entry.ttl_s, default_s=max(DEFAULT_S, at_least_s), at_least_s=at_least_s, cloud="DNSPod")
    mx = value.priority if isinstance(value, Mx) else None
    if mx is not None and mx not in PRIORITIES:
        raise Unfit(f"MX priority {mx}: DNSPod takes {PRIORITIES.start} to {PRIORITIES.stop - 1}")
    written = f"{value.target}." if isinstance(value, Mx) else value if entry.type == "TXT" else _written(value, entry)
    return Record(names.relative(entry.name, zone), entry.type, str(written), seconds, mx, f"RemoteGPU {entry.key}")


def _written(value: Value, entry: Name) -> str:
    return records.presentation(value, entry.type)
