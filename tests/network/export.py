"""Exports for tests: a small fleet in a line each, filled in with what the test does not speak of."""

from __future__ import annotations

from typing import Any

from remotegpu_network import desired, document
from remotegpu_network.desired import Resource
from remotegpu_network.document import Document
from remotegpu_network.settings import CLOUDS, Settings

ZONE_ID = "023e105f4ecef8ad9ca31a8372d0c353"
ZONES = {
    "cf": ("gpu.example.org", "cloudflare", ZONE_ID),
    "r53": ("gpu.example.com", "aws", "Z0123456789ABCDEFGHIJ"),
    "ali": ("gpu.example.cn", "alicloud", None),
    "pod": ("gpu.example.net", "tencent", None),
}
GROUPS = {"g-aws": "aws", "g-ali": "alicloud", "g-ten": "tencent"}


def zone(key: str, /, **fields: Any) -> dict[str, Any]:
    name, cloud, id_ = ZONES[key]
    return {"key": key, "name": name, "cloud": cloud, "id": id_, **fields}


def group(key: str, /, **fields: Any) -> dict[str, Any]:
    region = "eu-central-1" if GROUPS[key] == "aws" else "cn-shanghai"
    return {
        "key": key,
        "name": "GPU 机器",
        "cloud": GROUPS[key],
        "region": region,
        "vpc": "vpc-1",
        "id": None,
        **fields,
    }


def name(key: str, at: str, kind: str, /, *values: Any, in_zone: str = "cf", **fields: Any) -> dict[str, Any]:
    """`at` is what stands before the zone; "@" is its apex, a name with a dot at its end is whole."""
    whole = at if at.endswith(".") else ZONES[in_zone][0] if at == "@" else f"{at}.{ZONES[in_zone][0]}"
    return {
        "key": key, "machine": None, "lease": None, "zone": in_zone, "name": whole, "type": kind, "ttl_s": None,
        "proxied": False, "purpose": "other", "values": list(values), "previous_keys": [], **fields,
    }  # fmt: skip


def opening(
    key: str, source: str, port: int | tuple[int, int] | None = 22, *, to: str = "g-aws", **fields: Any
) -> dict[str, Any]:
    ports = None if port is None else [port, port] if isinstance(port, int) else list(port)
    return {
        "key": key, "machine": None, "lease": None, "group": to, "protocol": "tcp" if ports else "all", "ports": ports,
        "source": source, "reason": None, "ends_at": None, **fields,
    }  # fmt: skip


def body(*rows: dict[str, Any], generation: int = 7, **fields: Any) -> dict[str, Any]:
    """What the portal seals. Rows are told apart by what they have; every zone and group is there unless given."""
    kinds: dict[str, list[dict[str, Any]]] = {"zones": [], "groups": [], "names": [], "openings": []}
    for row in rows:
        kind = (
            "names" if "values" in row else "openings" if "source" in row else "groups" if "region" in row else "zones"
        )
        kinds[kind].append(row)
    kinds["zones"] = kinds["zones"] or [zone(key) for key in ZONES]
    used = {row["group"] for row in kinds["openings"]} - {row["key"] for row in kinds["groups"]}
    kinds["groups"] += [group(key) for key in GROUPS if key in used]
    machines = fields.pop("machines", {"m1": "gpu-01"})
    return {
        "environment": "production", "generation": generation, "generated_at": "2026-11-26T00:00:00Z",
        "machines": [{"key": key, "name": told} for key, told in machines.items()], **kinds, **fields,
    }  # fmt: skip


def sealed(*rows: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return document.seal(body(*rows, **fields))


def parsed(*rows: dict[str, Any], **fields: Any) -> Document:
    return document.parse(sealed(*rows, **fields))


def stack(**fields: Any) -> Settings:
    return Settings(**{"environment": "production", "clouds": CLOUDS, **fields})


def resources(*rows: dict[str, Any], settings: Settings | None = None, **fields: Any) -> list[Resource]:
    return desired.resources(parsed(*rows, **fields), settings or stack()).resources


def only(*rows: dict[str, Any], **fields: Any) -> Resource:
    (found,) = resources(*rows, **fields)
    return found


# What both engines are asked of: one name, and what must not be applied, with a part of what is said of it.
ADDRESS = name("m1.address", "gpu-01", "A", "203.0.113.1", machine="m1")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "must contain"),
    ({**sealed(ADDRESS), "generation": 9}, "damaged, or edited by hand"),
    (sealed(machines={}), "The export is empty"),
    (sealed(ADDRESS, environment="staging"), "an export of staging, but the stack is of production"),
]
