"""What an apply would do: create, change, replace, delete, by cloud and zone or group. No engine, no network.

It compares two exports, and so knows nothing of what somebody changed in the cloud by hand: that is what the preview
with --refresh is for. Which changes replace a resource is the providers' business; REPLACED_BY says what is known of
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from remotegpu_network import desired
from remotegpu_network.desired import Resource

REPLACED_BY: Mapping[str, frozenset[str]] = {
    desired.CLOUDFLARE_ZONE: frozenset({"name", "account"}),
    desired.CLOUDFLARE_RECORD: frozenset({"type", "parent"}),
    desired.ROUTE53_ZONE: frozenset({"name"}),
    desired.ROUTE53_RECORD: frozenset({"name", "parent"}),  # another type: one transaction of the cloud
    desired.ALIDNS_DOMAIN: frozenset({"name"}),
    desired.ALIDNS_RECORD: frozenset({"parent"}),
    desired.DNSPOD_DOMAIN: frozenset({"name"}),
    desired.DNSPOD_RECORD: frozenset({"parent"}),
    desired.AWS_GROUP: frozenset({"name_prefix", "description", "vpc_id"}),
    desired.AWS_INGRESS: frozenset({"parent"}),
    desired.AWS_EGRESS: frozenset({"parent"}),
    desired.ALICLOUD_GROUP: frozenset({"vpc_id"}),
    desired.ALICLOUD_RULE: frozenset(
        {"ip_protocol", "port_range", "cidr_ip", "ipv6_cidr_ip", "source_security_group_id", "parent"}
    ),
    desired.TENCENT_GROUP: frozenset(),
    desired.TENCENT_RULES: frozenset({"parent"}),
}


class What(Enum):
    """In the order in which people should read them: first what may hurt."""

    DELETE = "delete"
    REPLACE = "replace"
    CHANGE = "change"
    CREATE = "create"
    ADOPT = "adopt"


SIGNS = {What.DELETE: "-", What.REPLACE: "±", What.CHANGE: "~", What.CREATE: "+", What.ADOPT: "="}


@dataclass(frozen=True, slots=True)
class Change:
    """`differences`: field, before, after; empty for what is created, deleted or adopted."""

    what: What
    resource: Resource
    differences: tuple[tuple[str, Any, Any], ...] = ()


@dataclass(frozen=True)
class Plan:
    changes: tuple[Change, ...]
    same: int

    def count(self, what: What) -> int:
        return sum(change.what is what for change in self.changes)


def compare(before: Sequence[Resource], after: Sequence[Resource]) -> Plan:
    """The changes from one to the other, in a stable order."""
    old = {(each.token, each.logical): each for each in before}
    changes, same = list[Change](), 0
    for each in after:
        found = _take(old, each)
        if found is None:
            changes.append(Change(What.ADOPT if each.adopt else What.CREATE, each))
        elif differences := tuple(_differences(found, each)):
            replaced = any(name in REPLACED_BY[each.token] for name, _, _ in differences)
            changes.append(Change(What.REPLACE if replaced else What.CHANGE, each, differences))
        else:
            same += 1
    changes += [Change(What.DELETE, each) for each in old.values()]
    places = list(What)
    changes.sort(key=lambda c: (c.resource.cloud, c.resource.place, places.index(c.what), c.resource.logical))
    return Plan(tuple(changes), same)


def _take(old: dict[tuple[str, str], Resource], wanted: Resource) -> Resource | None:
    """By its name, else by one that it had before: as the engine does with aliases."""
    for name in (wanted.logical, *wanted.aliases):
        found = old.pop((wanted.token, name), None)
        if found is not None:
            return found
    return None


def _differences(old: Resource, new: Resource) -> Iterator[tuple[str, Any, Any]]:
    if (old.parent, old.within) != (new.parent, new.within):
        yield "parent", old.parent or old.within, new.parent or new.within
    if old.shape == new.shape:
        return
    for each in fields(new.shape):
        had, has = getattr(old.shape, each.name, None), getattr(new.shape, each.name)
        if had != has:
            yield each.name, had, has


# -- for people


def text(plan: Plan) -> str:
    """Lines by cloud and place, and the sum."""
    lines: list[str] = []
    place: tuple[str, str] | None = None
    for change in plan.changes:
        here = (change.resource.cloud, change.resource.place)
        if here != place:
            lines += ["", f"{here[0]}  {here[1]}"]
            place = here
        lines += _lines(change)
    return "\n".join([*lines, "", summary(plan)]).lstrip("\n")


def _lines(change: Change) -> Iterator[str]:
    each = change.resource
    what = change.what.value + (", deleted first" if change.what is What.REPLACE and each.delete_first else "")
    protected = "  PROTECTED" if each.protect and change.what in (What.DELETE, What.REPLACE) else ""
    yield f"  {SIGNS[change.what]} {each.logical}  {each.label}  ({what}){protected}"
    for name, had, has in change.differences:
        yield from (f"      {line}" for line in _difference(name, had, has))


def _difference(name: str, had: Any, has: Any) -> Iterator[str]:
    if isinstance(had, tuple) and isinstance(has, tuple):
        for gone in (each for each in had if each not in has):
            yield f"{name}: - {_short(gone)}"
        for come in (each for each in has if each not in had):
            yield f"{name}: + {_short(come)}"
        if set(had) == set(has):
            yield f"{name}: another order"
        return
    yield f"{name}: {_short(had)} → {_short(has)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if hasattr(value, "__dataclass_fields__"):
        value = " ".join(
            str(getattr(value, name)) for name in value.__dataclass_fields__ if getattr(value, name) is not None
        )
    line = str(value)
    return line if len(line) <= 120 else line[:117] + "…"


def summary(plan: Plan) -> str:
    if not plan.changes:
        return f"Nothing to do: {plan.same} resources are as they should be."
    counted = [f"{plan.count(what)} to {what.value}" for what in What if plan.count(what)]
    return f"{', '.join(counted)}; {plan.same} stay as they are."


def as_json(plan: Plan) -> dict[str, Any]:
    """For programs: the same, without prose."""
    return {
        "changes": [
            {
                "what": change.what.value,
                "cloud": change.resource.cloud,
                "place": change.resource.place,
                "logical": change.resource.logical,
                "type": change.resource.token,
                "label": change.resource.label,
                "fields": [name for name, _, _ in change.differences],
            }
            for change in plan.changes
        ],
        "counts": {what.value: plan.count(what) for what in What},
        "same": plan.same,
    }
