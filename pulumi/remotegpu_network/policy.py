"""What no apply may do, as plain functions over a type and its inputs, named as the engine names them.

Two callers: the policy pack (policy/), and the strict monitor and the engine double of the tests. Most of it the plan
refuses before; this is the second look, at what is really handed to the engine. Each answers sentences, none if all
is well.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from remotegpu_network import desired, names, openings, records
from remotegpu_network.settings import Settings
from remotegpu_network.shapes import aws

Inputs = Mapping[str, Any]
Check = Callable[[str, Inputs], Iterator[str]]
AWS_TEXT = re.compile(r"[a-zA-Z0-9. _\-:/()#,@\[\]+=&;{}!$*]{1,255}")
WAYS = (("inbound", "ingresses"), ("outbound", "egresses"))  # of Tencent's rules
RULES = (desired.AWS_INGRESS, desired.AWS_EGRESS, desired.ALICLOUD_RULE)


def names_are_whole(token: str, inputs: Inputs) -> Iterator[str]:
    """A relative name comes back as the full one and differs for ever."""
    if token in (desired.CLOUDFLARE_RECORD, desired.ROUTE53_RECORD):
        name = str(inputs.get("name", ""))
        if "." not in name or "@" in name:
            yield f"name {name!r} is not a full one"
        try:
            if names.canonical(name) != name:
                yield f"name {name!r} is not in the form that the cloud answers: {names.canonical(name)}"
        except names.BadName as error:
            yield str(error)


def cloudflare_content(token: str, inputs: Inputs) -> Iterator[str]:
    """`content` or `data`, and `data` for exactly those types that need it; `value` is of an older provider."""
    if token != desired.CLOUDFLARE_RECORD:
        return
    if "value" in inputs:
        yield "`value` is not read by this provider; it is `content`"
    by_data = inputs.get("type") in ("CAA", "SRV")
    if by_data == ("content" in inputs) or by_data != ("data" in inputs):
        yield f"{inputs.get('type')} by {'content' if by_data else 'data'}"
    if (
        inputs.get("type") == "CAA"
        and isinstance(inputs.get("data"), Mapping)
        and set(inputs["data"]) != {"flags", "tag", "value"}
    ):
        yield "CAA wants flags, tag and value"


def cloudflare_proxy(token: str, inputs: Inputs) -> Iterator[str]:
    if token != desired.CLOUDFLARE_RECORD:
        return
    ttl = inputs.get("ttl")
    if inputs.get("proxied"):
        if inputs.get("type") not in records.ADDRESS_TYPES:
            yield f"{inputs.get('type')} cannot be proxied"
        if ttl != 1:
            yield f"proxied with ttl {ttl}: it must be 1"
        if not records.is_public(str(inputs.get("content", ""))):
            yield f"proxied to the private address {inputs.get('content')}"
    elif not isinstance(ttl, int | float) or (ttl != 1 and not 30 <= ttl <= 86400):
        yield f"ttl {ttl}: 1 (automatic) or 30 to 86400"


def content_fits(_token: str, inputs: Inputs) -> Iterator[str]:
    """Addresses are addresses, and in the form that the cloud answers."""
    kind = inputs.get("type") or inputs.get("recordType")
    if kind not in ("A", "AAAA"):
        return
    values = inputs.get("records") or [inputs.get("content") or inputs.get("value")]
    for value in values:
        try:
            if records.parse(kind, str(value)) != value:
                yield f"{value} is not in its shortest form"
        except records.BadRecord as error:
            yield str(error)


def no_inline_rules(token: str, inputs: Inputs) -> Iterator[str]:
    """Inline rules and rule resources remove each other every other run."""
    if token == desired.AWS_GROUP and ({"ingress", "egress"} & set(inputs)):
        yield "rules inside the group: they are resources of their own"
    if token == desired.AWS_GROUP and "name" in inputs:
        yield "a fixed name: a replacement would collide with the old group; use a prefix"


def descriptions_are_plain(token: str, inputs: Inputs) -> Iterator[str]:
    if token in (desired.AWS_GROUP, desired.AWS_INGRESS, desired.AWS_EGRESS):
        text = str(inputs.get("description", ""))
        if not AWS_TEXT.fullmatch(text):
            yield f"description {text!r}: 1 to 255 of AWS's letters"


def one_peer_a_rule(token: str, inputs: Inputs) -> Iterator[str]:
    peers = {
        desired.AWS_INGRESS: ("cidrIpv4", "cidrIpv6", "prefixListId", "referencedSecurityGroupId"),
        desired.AWS_EGRESS: ("cidrIpv4", "cidrIpv6", "prefixListId", "referencedSecurityGroupId"),
        desired.ALICLOUD_RULE: ("cidrIp", "ipv6CidrIp", "sourceSecurityGroupId", "prefixListId"),
    }.get(token)
    if peers is not None and sum(inputs.get(peer) is not None for peer in peers) != 1:
        yield f"exactly one of {', '.join(peers)}"


CIDRS = ("cidrIpv4", "cidrIpv6", "cidrIp", "ipv6CidrIp", "cidrBlock", "ipv6CidrBlock")  # of all clouds


def networks_are_canonical(token: str, inputs: Inputs) -> Iterator[str]:
    """One that is not is created, and never found again (terraform-provider-aws#15982)."""
    for each in (inputs, *_rules_of(token, inputs)):
        for key in CIDRS:
            text = each.get(key)
            if text is None:
                continue
            try:
                if str(ipaddress.ip_network(text, strict=True)) != text or "%" in text:
                    yield f"{key} {text} is not in canonical form"
            except ValueError as error:
                yield f"{key}: {error}"


def the_world_has_a_reason(token: str, inputs: Inputs) -> Iterator[str]:
    """The world is what it is for the document: half of it is no smaller hole."""
    if token == desired.AWS_EGRESS:
        return
    for each in (inputs, *_rules_of(token, inputs)):
        if str(each.get("description", "")).startswith(aws.WORLD):
            continue
        for text in filter(None, map(each.get, CIDRS)):
            if _is_world(text):
                yield f"{text} is open to the world without a reason"


def _is_world(text: str) -> bool:
    try:
        return openings.source(text).is_world
    except openings.BadOpening:  # told by networks_are_canonical
        return False


def _rules_of(token: str, inputs: Inputs) -> Sequence[Inputs]:
    return list(inputs.get("ingresses") or []) if token == desired.TENCENT_RULES else []


def rules_are_spelled_out(token: str, inputs: Inputs) -> Iterator[str]:
    """What is left out becomes a default: another network card, ALL, or a port that the protocol does not have."""
    if token == desired.ALICLOUD_RULE:
        if inputs.get("nicType") != "intranet":
            yield "nicType must be intranet inside a VPC"
        if (inputs.get("portRange") == "-1/-1") == (inputs.get("ipProtocol") in ("tcp", "udp")):
            yield f"portRange {inputs.get('portRange')} with {inputs.get('ipProtocol')}"
    if token in (desired.AWS_INGRESS, desired.AWS_EGRESS):
        ports = "fromPort" in inputs or "toPort" in inputs
        if ports == (inputs.get("ipProtocol") == "-1"):
            yield (
                f"ports with protocol {inputs.get('ipProtocol')}"
                if ports
                else f"{inputs.get('ipProtocol')} without ports"
            )
        if inputs.get("ipProtocol") not in ("tcp", "udp", "icmp", "icmpv6", "-1"):
            yield f"protocol {inputs.get('ipProtocol')} comes back under another name"
    for rule in _rules_of(token, inputs):
        if not rule.get("protocol") or not rule.get("port"):
            yield "protocol and port left out"


CHECKS: tuple[Check, ...] = (
    names_are_whole,
    cloudflare_content,
    cloudflare_proxy,
    content_fits,
    no_inline_rules,
    descriptions_are_plain,
    one_peer_a_rule,
    networks_are_canonical,
    the_world_has_a_reason,
    rules_are_spelled_out,
)


def problems(token: str, inputs: Inputs) -> list[str]:
    """All checks over one resource."""
    return [f"{check.__name__}: {problem}" for check in CHECKS for problem in check(token, inputs)]


def stack_problems(resources: Iterable[tuple[str, str, Inputs]], told: Settings) -> list[str]:
    """Over all of a stack, as (token, logical, inputs): what only shows when they are seen together."""
    found: list[str] = []
    physical: dict[tuple[Any, ...], str] = {}
    rules = Counter[tuple[Any, ...]]()
    for token, logical, inputs in resources:
        identity = _identity(token, inputs)
        if identity is not None:
            other = physical.setdefault(identity, logical)
            if other != logical:
                found.append(f"{logical} and {other} are the same record or rule in the cloud")
        at_most = _quota(token, told)
        for what, count in _counted(token, inputs):
            slot = (token, _hashable(inputs.get("securityGroupId")), what)
            before = rules[slot]
            rules[slot] += count
            if before <= at_most < rules[slot]:
                found.append(f"more than {at_most} {what} in one group (at {logical})")
    return found


def _quota(token: str, told: Settings) -> int:
    if token == desired.ALICLOUD_RULE:
        return told.alicloud_rules_per_group
    return told.tencent_rules_per_group if token == desired.TENCENT_RULES else told.aws_rules_per_group


def _counted(token: str, inputs: Inputs) -> Iterator[tuple[str, int]]:
    """What of its cloud's quota a resource takes. All rules of a group of Tencent are one, counted by direction."""
    if token in (desired.AWS_INGRESS, desired.AWS_EGRESS):
        yield from ((f"{family} rules", 1) for family in _families(inputs))
    elif token == desired.ALICLOUD_RULE:
        yield "rules", 1
    elif token == desired.TENCENT_RULES:
        yield from ((f"{way} rules", len(inputs.get(key) or ())) for way, key in WAYS)


def _families(inputs: Inputs) -> tuple[str, ...]:
    if inputs.get("cidrIpv4"):
        return ("IPv4",)
    return ("IPv6",) if inputs.get("cidrIpv6") else ("IPv4", "IPv6")


def _identity(token: str, inputs: Inputs) -> tuple[Any, ...] | None:
    keys = {
        desired.CLOUDFLARE_RECORD: ("zoneId", "name", "type", "content", "data"),
        desired.ROUTE53_RECORD: ("zoneId", "name", "type", "setIdentifier"),
        desired.ALIDNS_RECORD: ("domainName", "rr", "type", "line", "value"),
        desired.DNSPOD_RECORD: ("domain", "subDomain", "recordType", "recordLine", "value", "mx"),
        desired.AWS_INGRESS: (
            "securityGroupId", "ipProtocol", "fromPort", "toPort", "cidrIpv4", "cidrIpv6", "prefixListId",
            "referencedSecurityGroupId",
        ),
        desired.ALICLOUD_RULE: (
            "securityGroupId", "type", "ipProtocol", "portRange", "cidrIp", "ipv6CidrIp", "sourceSecurityGroupId",
        ),
    }.get(token)  # fmt: skip
    return None if keys is None else (token, *(_hashable(inputs.get(key)) for key in keys))


def _hashable(value: Any) -> Any:
    """Ids that are not known yet are told apart by what they are: objects of their own."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _hashable(each)) for key, each in value.items()))
    return tuple(_hashable(each) for each in value) if isinstance(value, list) else value
