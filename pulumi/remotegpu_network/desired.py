"""From the document to the resources of one stack, each with a name that outlives what it stands for.

A record is called by the key of its slot, never by its name, type or address: renaming a machine touches nothing, and
an A that becomes a CNAME is the same resource, deleted before it is made again. A rule is called by what it lets in.
How a cloud writes it is in shapes/, who tells the engine in clouds/.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from remotegpu_network import openings, records, shapes
from remotegpu_network.document import BadDocument, Document, Group, Name, Wanted, Zone
from remotegpu_network.openings import Rule
from remotegpu_network.records import Value
from remotegpu_network.settings import Settings
from remotegpu_network.shapes import alicloud, alidns, aws, cloudflare, dnspod, route53, tencent

CLOUDFLARE_ZONE = "cloudflare:index/zone:Zone"
CLOUDFLARE_RECORD = "cloudflare:index/dnsRecord:DnsRecord"
ROUTE53_ZONE = "aws:route53/zone:Zone"
ROUTE53_RECORD = "aws:route53/record:Record"
ALIDNS_DOMAIN = "alicloud:dns/alidnsDomain:AlidnsDomain"
ALIDNS_RECORD = "alicloud:dns/alidnsRecord:AlidnsRecord"
DNSPOD_DOMAIN = "tencentcloud:Dnspod/domainInstance:DomainInstance"
DNSPOD_RECORD = "tencentcloud:Dnspod/record:Record"
AWS_GROUP = "aws:ec2/securityGroup:SecurityGroup"
AWS_INGRESS = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule"
AWS_EGRESS = "aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule"
ALICLOUD_GROUP = "alicloud:ecs/securityGroup:SecurityGroup"
ALICLOUD_RULE = "alicloud:ecs/securityGroupRule:SecurityGroupRule"
TENCENT_GROUP = "tencentcloud:Security/group:Group"
TENCENT_RULES = "tencentcloud:Security/groupRuleSet:GroupRuleSet"

ZONE_TOKENS = {
    "cloudflare": CLOUDFLARE_ZONE, "aws": ROUTE53_ZONE, "alicloud": ALIDNS_DOMAIN, "tencent": DNSPOD_DOMAIN,
}  # fmt: skip
CLOUD_WORDS = {"aws": "AWS", "alicloud": "Alibaba Cloud", "tencent": "Tencent Cloud"}
BY_ID = ("cloudflare", "aws")  # the others know a zone by its name


@dataclass(frozen=True, slots=True)
class ZoneShape:
    name: str
    account: str


Shape = (
    ZoneShape
    | cloudflare.Record
    | route53.Record
    | alidns.Record
    | dnspod.Record
    | aws.SecurityGroup
    | aws.SecurityGroupRule
    | alicloud.SecurityGroup
    | alicloud.SecurityGroupRule
    | tencent.SecurityGroup
    | tencent.RuleSet
)


class Resource(NamedTuple):
    """One thing in a cloud.

    `place` is the zone or group for people. `parent` is its id (or the zone's name where the cloud goes by name) if
    it is known, else `within` is the logical name of the resource of this stack that will have one. `entry` is the
    key of the document's row (for a rule: of its group).
    """

    token: str
    logical: str
    cloud: str
    region: str
    place: str
    label: str
    shape: Shape
    entry: str
    parent: str | None = None
    within: str | None = None
    aliases: tuple[str, ...] = ()
    adopt: str | None = None
    protect: bool = False
    delete_first: bool = False


@dataclass
class Desired:
    """`left_out`: cloud → how many entries of the document belong to stacks that have that cloud."""

    resources: list[Resource] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def resources(document: Document, settings: Settings) -> Desired:
    """All that this stack wants, zones and groups before what lies in them. Raises BadDocument."""
    if document.environment != settings.environment:
        raise BadDocument([f"an export of {document.environment}, but the stack is of {settings.environment}"])
    made, problems = Desired(), list[str]()
    made.resources += _checked(_zones(document, settings), problems)
    for entry in document.names:
        zone = document.zones[entry.zone]
        if zone.cloud in settings.clouds:
            try:
                made.resources += _RECORDS[zone.cloud](entry, zone, settings)
            except shapes.Unfit as error:
                problems.append(f"{entry.key}: {error}")
        else:
            made.left_out[zone.cloud] += 1
    made.resources += _checked(_groups(document, settings, made), problems)
    problems += (f"{key}: {problem}" for key, problem in proxied_to_private(document.names))
    problems += _twice(made.resources)
    if problems:
        raise BadDocument(problems)
    made.notes += _unused(made.resources, settings)
    made.notes += _perhaps_our_own(document, settings)
    return made


def _checked(found: Iterator[Resource | str], problems: list[str]) -> Iterator[Resource]:
    for each in found:
        if isinstance(each, str):
            problems.append(each)
        else:
            yield each


# -- zones


def zone_name(zone: Zone) -> str:
    return f"zone.{zone.key}"


def _zones(document: Document, settings: Settings) -> Iterator[Resource | str]:
    for zone in document.zones.values():
        if zone.cloud not in settings.clouds:
            continue
        account = settings.managed_zones.get(zone.key)
        if account is not None:
            logical = zone_name(zone)
            yield Resource(
                token=ZONE_TOKENS[zone.cloud], logical=logical, cloud=zone.cloud, region="", place=zone.name,
                label=f"zone {zone.name}", shape=ZoneShape(zone.name, account), entry=zone.key,
                adopt=settings.adopt.get(logical), protect=True,
            )  # fmt: skip
        elif zone.id is None and zone.cloud in BY_ID:
            yield (
                f"zone {zone.key} ({zone.name}) has no id: enter the one that {zone.cloud} shows, "
                f"or let the stack make it with remotegpu:managed-zones"
            )


def _parent(zone: Zone, settings: Settings) -> tuple[str | None, str | None]:
    if zone.key in settings.managed_zones:
        return None, zone_name(zone)
    return (zone.id if zone.cloud in BY_ID else zone.name), None


# -- records


def _record(
    entry: Name, zone: Zone, settings: Settings, token: str, shape: Shape, label: str, suffix: str = ""
) -> Resource:
    parent, within = _parent(zone, settings)
    logical = entry.key + suffix
    return Resource(
        token=token, logical=logical, cloud=zone.cloud, region="", place=zone.name, label=label, shape=shape,
        entry=entry.key, parent=parent, within=within,
        aliases=tuple(previous + suffix for previous in entry.previous_keys),
        adopt=settings.adopt.get(logical), protect=logical in settings.protect,
        delete_first=True,  # the same name cannot hold the old and the new at once
    )  # fmt: skip


def suffix_of(value: Value, kind: str) -> str:
    """Values behind the principal are called by what they say: adding or removing one touches no other."""
    return "." + hashlib.sha256(records.presentation(value, kind).encode()).hexdigest()[:10]


def _each_value(entry: Name) -> Iterator[tuple[Value, str]]:
    for place, value in enumerate(entry.values):
        yield value, suffix_of(value, entry.type) if place else ""


def _label(entry: Name, value: Value) -> str:
    proxied = " (proxied)" if entry.proxied else ""
    return f"{entry.type} {entry.name} → {records.presentation(value, entry.type)}{proxied}"


def _cloudflare(entry: Name, zone: Zone, settings: Settings) -> Iterator[Resource]:
    for value, suffix in _each_value(entry):
        shape = cloudflare.record(entry, value)
        yield _record(entry, zone, settings, CLOUDFLARE_RECORD, shape, _label(entry, value), suffix)


def _route53(entry: Name, zone: Zone, settings: Settings) -> Iterator[Resource]:
    shape = route53.record(entry)
    label = (
        f"{entry.type} {entry.name} → {', '.join(records.presentation(value, entry.type) for value in entry.values)}"
    )
    yield _record(entry, zone, settings, ROUTE53_RECORD, shape, label)


def _alidns(entry: Name, zone: Zone, settings: Settings) -> Iterator[Resource]:
    for value, suffix in _each_value(entry):
        shape = alidns.record(entry, value, zone.name, at_least_s=settings.alidns_ttl_s)
        yield _record(entry, zone, settings, ALIDNS_RECORD, shape, _label(entry, value), suffix)


def _dnspod(entry: Name, zone: Zone, settings: Settings) -> Iterator[Resource]:
    for value, suffix in _each_value(entry):
        shape = dnspod.record(entry, value, zone.name, at_least_s=settings.dnspod_ttl_s)
        yield _record(entry, zone, settings, DNSPOD_RECORD, shape, _label(entry, value), suffix)


_RECORDS: Mapping[str, Callable[[Name, Zone, Settings], Iterator[Resource]]] = {
    "cloudflare": _cloudflare, "aws": _route53, "alicloud": _alidns, "tencent": _dnspod,
}  # fmt: skip


def unfit_record(entry: Name, zone: Zone, settings: Settings) -> str | None:
    """Why this cloud would not take it, whatever stands beside it; None if it would."""
    try:
        for _ in _RECORDS[zone.cloud](entry, zone, settings):
            pass
    except shapes.Unfit as error:
        return str(error)
    return None


def proxied_to_private(entries: Iterable[Name]) -> Iterator[tuple[str, str]]:
    """Key and reason. A proxied CNAME whose target we know to be private flips for ever (dnsweaver#161)."""
    entries = list(entries)
    proxied = [entry for entry in entries if entry.proxied and entry.type == "CNAME"]
    targets = {entry.values[0] for entry in proxied}
    led_to = (entry for entry in entries if entry.name in targets)
    private = {entry.name for entry in led_to if not all(records.is_public(value) for value in entry.values)}
    for entry in proxied:
        if entry.values[0] in private:
            yield entry.key, f"proxied to {entry.values[0]}, which is a private address"


# -- security groups


def group_name(group: Group) -> str:
    return f"group.{group.key}"


def _groups(document: Document, settings: Settings, made: Desired) -> Iterator[Resource | str]:
    wanted: dict[str, list[Wanted]] = {key: [] for key in document.groups}
    for each in document.openings:
        wanted[each.group].append(each)
    for group in document.groups.values():
        if group.cloud not in settings.clouds:
            made.left_out[group.cloud] += len(wanted[group.key])
            continue
        try:
            yield from _group(group, wanted[group.key], settings)
        except shapes.Unfit as error:
            yield f"group {group.key}: {error}"


_GROUP_TOKENS = {"aws": AWS_GROUP, "alicloud": ALICLOUD_GROUP, "tencent": TENCENT_GROUP}
_GROUP_SHAPES: Mapping[str, Callable[[Group], Shape]] = {
    "aws": aws.group, "alicloud": alicloud.group, "tencent": tencent.group,
}  # fmt: skip


def unfit_group(group: Group) -> str | None:
    """Why its cloud would not take the group itself, without a look at its rules; None if it would."""
    try:
        if group.id is None:
            _GROUP_SHAPES[group.cloud](group)
    except shapes.Unfit as error:
        return str(error)
    return None


def _group(group: Group, wanted: list[Wanted], settings: Settings) -> Iterator[Resource]:
    place = f"{group.key} in {group.region}"
    if group.id is None:
        logical = group_name(group)
        if logical in settings.adopt:  # the import would be followed by a replacement: names and descriptions are ours
            raise shapes.Unfit(
                f"{logical} stands in remotegpu:adopt; enter {settings.adopt[logical]} as its id instead"
            )
        yield Resource(
            token=_GROUP_TOKENS[group.cloud], logical=logical, cloud=group.cloud, region=group.region, place=place,
            label=f"group {group.name}", shape=_GROUP_SHAPES[group.cloud](group), entry=group.key,
            protect=logical in settings.protect,
        )  # fmt: skip
    rules = openings.merge(each.opening for each in wanted)
    reasons = _reasons(rules, wanted)
    _refuse_too_many(rules, group.cloud, settings)
    if group.cloud == "tencent":
        yield _in_group(group, place, settings, TENCENT_RULES, "rules", tencent.rule_set(rules, reasons=reasons))
        return
    for rule, reason in zip(rules, reasons, strict=True):
        if group.cloud == "aws":
            shape: Shape = aws.rule(rule, reason=reason, account=settings.aws_account)
            yield _in_group(group, place, settings, AWS_INGRESS, rule.name, shape, str(rule))
        else:
            yield _in_group(
                group, place, settings, ALICLOUD_RULE, rule.name, alicloud.rule(rule, reason=reason), str(rule)
            )
    if group.cloud == "aws" and group.id is None and settings.aws_egress:
        for family in (4, 6):
            yield _in_group(group, place, settings, AWS_EGRESS, f"out.all.ipv{family}", aws.egress(family))


def _in_group(
    group: Group, place: str, settings: Settings, token: str, name: str, shape: Shape, label: str | None = None
) -> Resource:
    logical = f"{group.key}.{name}"
    return Resource(
        token=token, logical=logical, cloud=group.cloud, region=group.region, place=place,
        label=label or name, shape=shape, entry=group.key, parent=group.id,
        within=None if group.id else group_name(group),
        adopt=settings.adopt.get(logical), protect=logical in settings.protect,
    )  # fmt: skip


def _reasons(rules: list[Rule], wanted: list[Wanted]) -> list[str | None]:
    """Of rules that open to the world: why, by the first of those who wanted it."""
    why = {each.key: each.reason for each in wanted if each.opening.source.is_world}
    return [
        next((why[owner] or "" for owner in rule.owners if owner in why), None) if rule.source.is_world else None
        for rule in rules
    ]


def _refuse_too_many(rules: list[Rule], cloud: str, settings: Settings) -> None:
    """A cloud refuses the rule that is too many, and the whole apply ends there: it would cut traffic (tflint#268).

    Alibaba's quota holds for both directions and Tencent's for each: the rules here are all that we count against it,
    since the only ones out are Tencent's own two.
    """
    if cloud == "aws":
        for count, family in zip(_by_family(rules), ("IPv4 rules", "IPv6 rules"), strict=True):
            _refuse_more(count, family, settings.aws_rules_per_group, cloud, "put the sources into a prefix list, ")
    else:
        at_most = settings.alicloud_rules_per_group if cloud == "alicloud" else settings.tencent_rules_per_group
        _refuse_more(len(rules), "rules", at_most, cloud)


def _by_family(rules: list[Rule]) -> tuple[int, int]:
    """As AWS counts: IPv4 and IPv6 apart; groups and prefix lists in both."""
    shared = sum(rule.source.network is None for rule in rules)
    ipv6 = sum(rule.source.is_ipv6 for rule in rules)
    return len(rules) - ipv6, shared + ipv6


def _refuse_more(count: int, what: str, at_most: int, cloud: str, way_out: str = "") -> None:
    if count > at_most:
        raise shapes.Unfit(
            f"{count} {what}, but {CLOUD_WORDS[cloud]} takes {at_most}: {way_out}split the machines over two groups, "
            f"or have the quota raised and set remotegpu:{cloud}-rules-per-group"
        )


# -- what must not be


def _twice(found: list[Resource]) -> Iterator[str]:
    seen: dict[tuple[str, str], Resource] = {}
    for each in found:
        other = seen.setdefault((each.token, each.logical), each)
        if other is not each:
            yield f"{each.label}: the name {each.logical} is that of {other.label} already"


def _unused(found: list[Resource], settings: Settings) -> Iterator[str]:
    """A note, not a refusal: a record that was adopted and is gone by now must not hold up the rest."""
    there = {each.logical for each in found}
    for name in sorted((set(settings.adopt) | set(settings.protect)) - there):
        yield f"{name} stands in remotegpu:adopt or remotegpu:protect, but the stack has no such resource"


def _perhaps_our_own(document: Document, settings: Settings) -> Iterator[str]:
    """Only the stack can know its account, and does not ask the cloud for it."""
    if settings.aws_account is not None or "aws" not in settings.clouds:
        return
    of_aws = (each.opening.source for each in document.openings if document.groups[each.group].cloud == "aws")
    if named := sorted({source.text for source in of_aws if source.is_group and "/" in source.text}):
        some = ", ".join(named[:5]) + (", …" if len(named) > 5 else "")
        yield (
            f"remotegpu:aws-account is not set, and openings are from groups with an account ({some}): AWS answers a "
            f"group of the stack's own account without it, so its rules would be replaced at every apply. Set it to "
            f"the stack's own twelve digits."
        )
