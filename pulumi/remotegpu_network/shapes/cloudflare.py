"""Cloudflare, by provider 6 (Terraform's 5).

`name` is always full: "www" and "@" come back as the full name and differ for ever
(terraform-provider-cloudflare#5440). There is `content` and no `value` but the one inside CAA's data
(pulumi-cloudflare#952).
"""

from __future__ import annotations

from dataclasses import dataclass

from remotegpu_network import names, records
from remotegpu_network.document import Name
from remotegpu_network.records import Caa, Mx, Srv, Value
from remotegpu_network.shapes import Unfit, ttl

AUTOMATIC = 1  # the only ttl of a proxied record; with another the API differs for ever (pulumi-cloudflare#669)
AT_LEAST_S = 60  # 30 on Enterprise


@dataclass(frozen=True, slots=True)
class Record:
    """One record. Exactly one of `content`, `caa`, `srv` is set; `priority` belongs to MX and SRV."""

    name: str
    type: str
    ttl: int
    proxied: bool
    comment: str
    content: str | None = None
    priority: int | None = None
    caa: Caa | None = None
    srv: Srv | None = None


def record(entry: Name, value: Value) -> Record:
    """Raises Unfit."""
    seconds = _ttl(entry, value)
    comment = f"RemoteGPU {entry.key}"
    if isinstance(value, Caa):  # as content it is refused: "flags is a required data field" (#5383)
        return Record(entry.name, entry.type, seconds, entry.proxied, comment, caa=value)
    if isinstance(value, Srv):  # service and protocol are in the name (#3192); priority beside the data and in it
        return Record(entry.name, entry.type, seconds, entry.proxied, comment, priority=value.priority, srv=value)
    if isinstance(value, Mx):
        return Record(entry.name, "MX", seconds, entry.proxied, comment, value.target, value.priority)
    content = records.presentation(value, "TXT") if entry.type == "TXT" else value
    return Record(entry.name, entry.type, seconds, entry.proxied, comment, content)


def _ttl(entry: Name, value: Value) -> int:
    if not entry.proxied:
        return ttl(entry.ttl_s, default_s=AUTOMATIC, at_least_s=AT_LEAST_S, cloud="Cloudflare")
    if entry.type not in records.ADDRESS_TYPES:
        raise Unfit(f"{entry.type} cannot be proxied: only {', '.join(records.ADDRESS_TYPES)} can")
    if entry.purpose == "ssh":
        raise Unfit(f"{names.readable(entry.name)} is for SSH, which does not pass the proxy")
    if not records.is_public(value):
        raise Unfit(f"proxied to {value}, which Cloudflare cannot reach")
    if entry.ttl_s is not None:
        raise Unfit(f"proxied, and so without a ttl of its own; it says {entry.ttl_s} s")
    return AUTOMATIC
