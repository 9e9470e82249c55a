"""Security groups of Alibaba Cloud: the group, and one resource for each rule; a changed rule is another rule."""

from __future__ import annotations

from dataclasses import dataclass

from remotegpu_network.document import Group
from remotegpu_network.openings import Rule
from remotegpu_network.shapes import Unfit
from remotegpu_network.shapes.aws import rule_description

NO_PORTS = "-1/-1"
VPC_NIC = "intranet"  # the default "internet" is refused inside a VPC
PRIORITY = 1  # of 1 to 100; the lower number wins


@dataclass(frozen=True, slots=True)
class SecurityGroup:
    name: str
    description: str
    vpc_id: str
    tags: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SecurityGroupRule:
    """Exactly one of the last three is set."""

    ip_protocol: str
    port_range: str
    description: str
    cidr_ip: str | None = None
    ipv6_cidr_ip: str | None = None
    source_security_group_id: str | None = None


def group(wanted: Group) -> SecurityGroup:
    """Raises Unfit."""
    if wanted.vpc is None:
        raise Unfit("a security group of Alibaba Cloud needs its VPC")
    tags = (("managed-by", "remotegpu"),)
    return SecurityGroup(f"remotegpu-{wanted.key}", f"RemoteGPU {wanted.key}", wanted.vpc, tags)


def rule(wanted: Rule, *, reason: str | None) -> SecurityGroupRule:
    """`reason` is told in the description of a rule that opens to the world."""
    described = rule_description(wanted, reason)
    ports = NO_PORTS if wanted.ports is None else f"{wanted.ports[0]}/{wanted.ports[1]}"
    peer = wanted.source
    if peer.is_group:
        return SecurityGroupRule(wanted.protocol, ports, described, source_security_group_id=peer.text)
    if peer.is_ipv6:
        return SecurityGroupRule(wanted.protocol, ports, described, ipv6_cidr_ip=peer.text)
    return SecurityGroupRule(wanted.protocol, ports, described, cidr_ip=peer.text)
