"""Security groups of AWS: the group, and one resource for each rule, never both inline (pulumi-eks#1031).

Only name, description and VPC of a group are fixed for its life: a change replaces it, and fails for as long as a
machine uses it (terraform-provider-aws#27476). So the name is a prefix, the description says nothing that changes,
details are tags.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from remotegpu_network.document import Group
from remotegpu_network.openings import Rule
from remotegpu_network.shapes import Unfit

MAX_DESCRIPTION = 255
NOT_IN_DESCRIPTION = re.compile(r"[^a-zA-Z0-9. _\-:/()#,@\[\]+=&;{}!$*]")
NOT_IN_TAG = re.compile(r"[^\w .:/=+\-@]")
EVERYTHING = "-1"
WORLD = "RemoteGPU world:"  # and then why, in such letters as AWS takes: of a reason in Chinese none is left


@dataclass(frozen=True, slots=True)
class SecurityGroup:
    name_prefix: str
    description: str
    vpc_id: str
    tags: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SecurityGroupRule:
    """One protocol, one range, one peer: exactly one of the last four is set. `ingress` False: what machines may
    reach."""

    ingress: bool
    ip_protocol: str
    from_port: int | None
    to_port: int | None
    description: str
    cidr_ipv4: str | None = None
    cidr_ipv6: str | None = None
    prefix_list_id: str | None = None
    referenced_security_group_id: str | None = None


def group(wanted: Group) -> SecurityGroup:
    """Raises Unfit."""
    if wanted.vpc is None:
        raise Unfit("a security group of AWS needs its VPC")
    tags = (("Name", tag(wanted.name) or wanted.key), ("managed-by", "remotegpu"))
    return SecurityGroup(f"remotegpu-{wanted.key}-", f"RemoteGPU {wanted.key}", wanted.vpc, tags)


def rule(wanted: Rule, *, reason: str | None, account: str | None) -> SecurityGroupRule:
    """`reason` is told in the description of a rule that opens to the world. `account` is the stack's own."""
    described = rule_description(wanted, reason)
    protocol = EVERYTHING if wanted.protocol == "all" else wanted.protocol
    low, high = _ports(wanted)
    peer = wanted.source
    if peer.is_group:
        return SecurityGroupRule(
            True, protocol, low, high, described, referenced_security_group_id=_peer(peer.text, account)
        )
    if peer.is_prefix_list:
        return SecurityGroupRule(True, protocol, low, high, described, prefix_list_id=peer.text)
    if peer.is_ipv6:
        return SecurityGroupRule(True, protocol, low, high, described, cidr_ipv6=peer.text)
    return SecurityGroupRule(True, protocol, low, high, described, cidr_ipv4=peer.text)


def rule_description(wanted: Rule, reason: str | None) -> str:
    """For whom the rule stands; why, if it opens to the world."""
    return description(f"RemoteGPU {' '.join(wanted.owners)}" if reason is None else f"{WORLD} {reason}")


def egress(family: int) -> SecurityGroupRule:
    """Machines may reach everything: the provider takes away the rule that AWS makes by itself (its documentation)."""
    text = "RemoteGPU egress"
    if family == 6:
        return SecurityGroupRule(False, EVERYTHING, None, None, text, cidr_ipv6="::/0")
    return SecurityGroupRule(False, EVERYTHING, None, None, text, cidr_ipv4="0.0.0.0/0")


def _ports(wanted: Rule) -> tuple[int | None, int | None]:
    """Forbidden with "-1", needed with all others; icmp of every type is -1 to -1."""
    if wanted.protocol == "all":
        return None, None
    return wanted.ports or (-1, -1)


def _peer(text: str, account: str | None) -> str:
    """As the API answers it: a group of the same account without the account (hashicorp/terraform#6135)."""
    owner, _, name = text.rpartition("/")
    return name if owner == account else text


def description(text: str) -> str:
    """AWS's letters only, 255 at most: accents are dropped, and so is what has no ASCII form (Chinese, quotes, >)."""
    if text.isascii() and NOT_IN_DESCRIPTION.search(text) is None and len(text) <= MAX_DESCRIPTION:
        return " ".join(text.split())
    plain = unicodedata.normalize("NFKD", " ".join(text.split()))
    plain = NOT_IN_DESCRIPTION.sub("", "".join(c for c in plain if not unicodedata.combining(c)))
    return " ".join(plain.split())[:MAX_DESCRIPTION].rstrip()


def tag(text: str) -> str:
    """Tags take letters of every script."""
    return " ".join(NOT_IN_TAG.sub("", text).split())[:256].rstrip()
