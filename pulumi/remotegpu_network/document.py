"""The portal's export: one JSON document that says which names and openings are wanted, and proves that it is whole.

The portal writes it (`seal`), the stacks and `make network-plan` read it (`read`). Format: network.schema.json; the
meaning that a schema cannot say is checked here, and every fault is named, not just the first. Which resources it
makes is in desired.py. Here is no cloud, no engine and nothing of the portal.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import fastjsonschema
import orjson

from remotegpu_network import names, openings, records
from remotegpu_network.openings import Opening
from remotegpu_network.records import Value

FORMAT = "remotegpu-network"
VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("network.schema.json")
COUNTED = ("machines", "zones", "groups", "names", "openings")
APEX_CNAME = ("cloudflare",)  # flattens it; all others refuse it
PROXIES = ("cloudflare",)
MAX_TOLD = 20


class BadDocument(ValueError):
    """The document must not be applied. `problems` holds a sentence for each fault."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        more = len(self.problems) - MAX_TOLD
        told = self.problems[:MAX_TOLD] + ([f"… and {more} more"] if more > 0 else [])
        super().__init__("\n".join(told))


@dataclass(frozen=True, slots=True)
class Zone:
    key: str
    name: str
    cloud: str
    id: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """A security group. With an `id` it exists already, and only its rules are ours."""

    key: str
    name: str
    cloud: str
    region: str
    vpc: str | None
    id: str | None


@dataclass(frozen=True, slots=True)
class Name:
    """What stands at one name under one type. `ttl_s` None: what the cloud does by itself. `values[0]` is the
    principal."""

    key: str
    machine: str | None
    lease: str | None
    zone: str
    name: str
    type: str
    ttl_s: int | None
    proxied: bool
    purpose: str
    values: tuple[Value, ...]
    previous_keys: tuple[str, ...]


class Wanted(NamedTuple):
    """An opening, in which group, and why."""

    opening: Opening
    group: str
    machine: str | None
    lease: str | None
    reason: str | None

    @property
    def key(self) -> str:
        return self.opening.owner


@dataclass(frozen=True)
class Document:
    """A checked export. `ended`: leases whose rows are gone because they have ended. `raw` is what was read, for those
    who write a changed one (steps.py)."""

    environment: str
    generation: int
    generated_at: str
    checksum: str
    machines: Mapping[str, str]
    zones: Mapping[str, Zone]
    groups: Mapping[str, Group]
    names: tuple[Name, ...]
    openings: tuple[Wanted, ...]
    ended: frozenset[str]
    raw: Mapping[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.raw["counts"])


# -- writing


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its format, counts and checksum. `body` holds environment, generation, generated_at and the
    lists."""
    counts = {name: len(body[name]) for name in COUNTED}
    sealed = {**body, "format": FORMAT, "version": VERSION, "counts": counts}
    sealed.pop("checksum", None)
    return {**sealed, "checksum": checksum(sealed)}


def checksum(document: Mapping[str, Any]) -> str:
    """Over everything but the checksum itself: sorted keys, no spaces, UTF-8.

    Raises TypeError for what has no such form: half a surrogate pair, a number of more than 64 bits.
    """
    rest = {name: value for name, value in document.items() if name != "checksum"}
    return "sha256:" + hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()


# -- reading


def read(text: bytes | str) -> Document:
    """The document in `text`, checked in form, wholeness and meaning. Raises BadDocument."""
    try:
        raw = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_refuse_constant)
    except ValueError as error:  # also of bytes that are no UTF-8
        raise BadDocument([f"no JSON document, or cut off: {error}"]) from None
    return parse(raw)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON")


def parse(raw: Any) -> Document:
    """The same, of what json.loads returned. Raises BadDocument."""
    if isinstance(raw, dict) and raw.get("format") == FORMAT and raw.get("version") != VERSION:
        raise BadDocument([f"version {raw.get('version')!r} of the export; this program reads version {VERSION}"])
    try:
        _validator()(raw)
    except fastjsonschema.JsonSchemaException as error:
        raise BadDocument([str(error)]) from None
    if problems := list(_broken(raw)):
        raise BadDocument(problems)
    return _meaning(raw)


@cache
def _validator() -> Callable[[Any], Any]:
    compiled: Callable[[Any], Any] = fastjsonschema.compile(json.loads(SCHEMA_FILE.read_bytes()))
    return compiled


def _broken(raw: Mapping[str, Any]) -> Iterator[str]:
    """Cut off, edited by hand, or glued together from two."""
    for name in COUNTED:
        if raw["counts"][name] != len(raw[name]):
            yield f"counts.{name} says {raw['counts'][name]}, but there are {len(raw[name])}: the export is not whole"
    try:
        found = checksum(raw)
    except TypeError as error:
        yield f"the content is none that an export can have: {error}"
        return
    if not hmac.compare_digest(found, raw["checksum"]):
        yield f"checksum {raw['checksum']} does not fit the content ({found}): damaged, or edited by hand"


Item = TypeVar("Item")


def _meaning(raw: Mapping[str, Any]) -> Document:
    problems: list[str] = []
    machines = {each["key"]: each["name"] for each in raw["machines"]}
    zones = {zone.key: zone for zone in _each(raw["zones"], zone_of, problems)}
    groups = {each["key"]: Group(**each) for each in raw["groups"]}
    entries = _each(raw["names"], name_of, problems)
    wanted = _each(raw["openings"], _wanted, problems)
    for list_name in COUNTED:
        problems += _repeated(list_name, [each["key"] for each in raw[list_name]])
    problems += _lost_machines(machines, entries, wanted)
    problems += _zone_problems(zones, entries)
    problems += _twice_at_a_name(entries)
    problems += _opening_problems(groups, wanted)
    if problems:
        raise BadDocument(problems)
    return Document(
        environment=raw["environment"],
        generation=raw["generation"],
        generated_at=raw["generated_at"],
        checksum=raw["checksum"],
        machines=machines,
        zones=zones,
        groups=groups,
        names=tuple(entries),
        openings=tuple(wanted),
        ended=frozenset(raw.get("ended", ())),
        raw=raw,
    )


def _each(rows: list[dict[str, Any]], make: Callable[[dict[str, Any]], Item], problems: list[str]) -> list[Item]:
    made = []
    for row in rows:
        try:
            made.append(make(row))
        except (names.BadName, records.BadRecord, openings.BadOpening) as error:
            problems.append(f"{row['key']}: {error}")
    return made


def zone_of(row: Mapping[str, Any]) -> Zone:
    """Raises BadName."""
    return Zone(**{**row, "name": names.canonical(row["name"])})


def name_of(row: Mapping[str, Any]) -> Name:
    """A row of `names`, whatever stands beside it. Raises BadName, BadRecord."""
    name, kind = names.canonical(row["name"]), row["type"]
    records.check_owner(kind, name)
    values = tuple(dict.fromkeys(records.parse(kind, value) for value in row["values"]))  # each is said once
    if kind == "CNAME" and len(values) > 1:
        raise records.BadRecord("a CNAME has one target")
    if kind == "CNAME" and values == (name,):
        raise records.BadRecord(f"{name} is a name for itself")
    return Name(**{**row, "name": name, "values": values, "previous_keys": tuple(row["previous_keys"])})


def _wanted(row: dict[str, Any]) -> Wanted:
    ports = None if row["ports"] is None else (row["ports"][0], row["ports"][1])
    opened = openings.opening(row["key"], row["protocol"], ports, row["source"])
    if opened.source.is_world and not (row["reason"] or "").strip():
        raise openings.BadOpening(f"{opened.source.text} opens to the world, and that needs a reason")
    return Wanted(opened, row["group"], row["machine"], row["lease"], row["reason"])


def _repeated(what: str, keys: list[str]) -> Iterator[str]:
    if len(set(keys)) == len(keys):
        return
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            yield f"{what}: the key {key} stands twice"
        seen.add(key)


def _lost_machines(machines: Mapping[str, str], entries: list[Name], wanted: list[Wanted]) -> Iterator[str]:
    named = [(each.key, each.machine) for each in entries] + [(each.key, each.machine) for each in wanted]
    for key, machine in named:
        if machine is not None and machine not in machines:
            yield f"{key}: machine {machine} is not in the export"


def _zone_problems(zones: Mapping[str, Zone], entries: list[Name]) -> Iterator[str]:
    yield from _repeated("zones", [f"{zone.cloud} {zone.name}" for zone in zones.values()])
    by_name = by_cloud_and_name(zones.values())
    for entry in entries:
        zone = zones.get(entry.zone)
        if zone is None:
            yield f"{entry.key}: zone {entry.zone} is not in the export"
        else:
            yield from (f"{entry.key}: {problem}" for problem in misplaced(entry, zone, by_name))


def by_cloud_and_name(zones: Iterable[Zone]) -> dict[tuple[str, str], Zone]:
    return {(zone.cloud, zone.name): zone for zone in zones}


def misplaced(entry: Name, zone: Zone, by_name: Mapping[tuple[str, str], Zone]) -> Iterator[str]:
    """What keeps an entry from standing in this zone, among all the zones that there are."""
    if not names.is_below(entry.name, zone.name):
        yield f"{entry.name} is not in the zone {zone.name}; write the full name"
        return
    below = entry.name.removesuffix(zone.name).rstrip(".")
    while below:
        closer = by_name.get((zone.cloud, f"{below}.{zone.name}"))
        if closer is not None:
            yield f"{entry.name} belongs to the zone {closer.name}; in {zone.name} nobody would find it"
            return
        below = below.partition(".")[2]
    if entry.type == "CNAME" and entry.name == zone.name and zone.cloud not in APEX_CNAME:
        yield f"no CNAME at the apex {zone.name} of a zone in {zone.cloud}"
    if entry.proxied and zone.cloud not in PROXIES:
        yield "only Cloudflare has a proxy"


def _twice_at_a_name(entries: list[Name]) -> Iterator[str]:
    """One entry a zone, name and type; nothing beside a CNAME."""
    first: dict[tuple[str, str, str], Name] = {}
    at_name: dict[tuple[str, str], list[Name]] = {}
    for entry in entries:
        other = first.setdefault((entry.zone, entry.name, entry.type), entry)
        if other is not entry:
            yield f"{entry.key}: {other.key} already says what {entry.type} records {entry.name} has"
        at_name.setdefault((entry.zone, entry.name), []).append(entry)
    for (_, name), there in at_name.items():
        if len(there) > 1 and any(entry.type == "CNAME" for entry in there):
            yield f"{', '.join(entry.key for entry in there)}: nothing can stand beside a CNAME at {name}"


def _opening_problems(groups: Mapping[str, Group], wanted: list[Wanted]) -> Iterator[str]:
    for each in wanted:
        group, source = groups.get(each.group), each.opening.source
        if group is None:
            yield f"{each.key}: group {each.group} is not in the export"
        elif group.cloud != "aws" and (source.is_prefix_list or "/sg-" in source.text):
            yield f"{each.key}: {source.text} as a source is known to AWS only"
