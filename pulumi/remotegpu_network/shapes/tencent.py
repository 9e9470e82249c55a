"""Security groups of Tencent Cloud: the group, and one resource with all its rules in order.

Protocol and port are always spelled out: left out they come back as ALL and differ for ever; another order resets
every rule, with a gap in the traffic (terraform-provider-tencentcloudenterprise#27).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remotegpu_network.document import Group
from remotegpu_network.openings import Rule
from remotegpu_network.shapes.aws import rule_description

ACCEPT = "ACCEPT"
ALL = "ALL"
EVERY_PORT = "all"  # lower case, as the SDK says it
PROTOCOLS = {"tcp": "TCP", "udp": "UDP", "icmp": "ICMP", "icmpv6": "ICMPv6", "all": ALL}


@dataclass(frozen=True, slots=True)
class SecurityGroup:
    name: str
    description: str


@dataclass(frozen=True, slots=True)
class SecurityGroupRule:
    """Exactly one of the last three is set."""

    protocol: str
    port: str
    description: str
    cidr_block: str | None = None
    ipv6_cidr_block: str | None = None
    source_security_id: str | None = None


@dataclass(frozen=True, slots=True)
class RuleSet:
    ingresses: tuple[SecurityGroupRule, ...]
    egresses: tuple[SecurityGroupRule, ...]


def group(wanted: Group) -> SecurityGroup:
    return SecurityGroup(f"remotegpu-{wanted.key}", f"RemoteGPU {wanted.key}")


def rule_set(rules: Sequence[Rule], *, reasons: Sequence[str | None]) -> RuleSet:
    """All rules of a group, in the order in which they come; `reasons` beside them."""
    everywhere = (
        SecurityGroupRule(ALL, EVERY_PORT, "RemoteGPU egress", cidr_block="0.0.0.0/0"),
        SecurityGroupRule(ALL, EVERY_PORT, "RemoteGPU egress", ipv6_cidr_block="::/0"),
    )
    return RuleSet(tuple(_rule(rule, reason) for rule, reason in zip(rules, reasons, strict=True)), everywhere)


def _rule(wanted: Rule, reason: str | None) -> SecurityGroupRule:
    described = rule_description(wanted, reason)
    protocol, port = PROTOCOLS[wanted.protocol], _port(wanted.ports)
    peer = wanted.source
    if peer.is_group:
        return SecurityGroupRule(protocol, port, described, source_security_id=peer.text)
    if peer.is_ipv6:
        return SecurityGroupRule(protocol, port, described, ipv6_cidr_block=peer.text)
    return SecurityGroupRule(protocol, port, described, cidr_block=peer.text)


def _port(ports: tuple[int, int] | None) -> str:
    if ports is None:
        return EVERY_PORT
    return str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"
