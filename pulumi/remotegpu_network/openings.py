"""Openings become rules: duplicates and overlaps of one group are merged, and each rule says for whom it stands.

A rule is named after what it lets in, never after its place in a list: a second source makes a second rule, and a
removed one takes nothing else with it. How a cloud writes a rule is in shapes/.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

PROTOCOLS = ("tcp", "udp", "icmp", "icmpv6", "all")
NUMBERS = {"6": "tcp", "17": "udp", "1": "icmp", "58": "icmpv6", "-1": "all"}  # the clouds answer in either form
WITH_PORTS = ("tcp", "udp")
EVERY_PORT = (1, 65535)
WORLD_BELOW = {4: 8, 6: 16}  # a prefix shorter than this is the world by another name
GROUP = re.compile(r"(?:[0-9]{12}/)?sg-[a-z0-9]+")
PREFIX_LIST = re.compile(r"pl-[a-z0-9]+")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class BadOpening(ValueError):
    """No rule can be made of this. The message says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who may come in: a network, the members of another security group, or a prefix list."""

    text: str
    network: Network | None = field(default=None, compare=False)

    @property
    def is_group(self) -> bool:
        return self.network is None and self.text.rpartition("/")[2].startswith("sg-")

    @property
    def is_prefix_list(self) -> bool:
        return self.network is None and self.text.startswith("pl-")

    @property
    def is_ipv6(self) -> bool:
        return self.network is not None and self.network.version == 6

    @property
    def is_world(self) -> bool:
        return self.network is not None and self.network.prefixlen < WORLD_BELOW[self.network.version]


class Opening(NamedTuple):
    """One hole: protocol, ports (None where the protocol has none), source. `owner` is the key of the portal's row."""

    owner: str
    protocol: str
    ports: tuple[int, int] | None
    source: Source


class Rule(NamedTuple):
    """What a group lets in. `owners` are the keys of all openings that it stands for, in order."""

    protocol: str
    ports: tuple[int, int] | None
    source: Source
    owners: tuple[str, ...]

    @property
    def name(self) -> str:
        """Says what is let in, and so is the same for as long as that is. No `::`, which separates the parts of a
        URN."""
        source = self.source.text.replace(":", "_").replace("/", "-")
        ports = "" if self.ports is None else f".{self.ports[0]}" if _is_one(self.ports) else f".{_span(self.ports)}"
        return f"in.{self.protocol}{ports}.{source}"

    def __str__(self) -> str:
        ports = "" if self.ports is None else f" {_span(self.ports)}"
        return f"{self.protocol}{ports} from {self.source.text}"


def _is_one(ports: tuple[int, int]) -> bool:
    return ports[0] == ports[1]


def _span(ports: tuple[int, int]) -> str:
    return str(ports[0]) if _is_one(ports) else f"{ports[0]}-{ports[1]}"


def protocol(text: str) -> str:
    """`6` and `TCP` are tcp. Raises BadOpening: an unknown one must not become "all"."""
    name = text.strip().lower()
    name = NUMBERS.get(name, name)
    if name not in PROTOCOLS:
        raise BadOpening(f"protocol {text!r}: one of {', '.join(PROTOCOLS)}")
    return name


@lru_cache(maxsize=65536)
def source(text: str) -> Source:
    """A network in canonical form, `sg-…`, `ACCOUNT/sg-…` or `pl-…`. Raises BadOpening; host bits are refused."""
    if GROUP.fullmatch(text) or PREFIX_LIST.fullmatch(text):
        return Source(text)
    try:
        network = ipaddress.ip_network(text, strict=True)
    except ValueError as error:
        raise BadOpening(f"source {text!r}: {error}") from None
    if isinstance(network, ipaddress.IPv6Network):
        if network.network_address.ipv4_mapped is not None:
            raise BadOpening(f"source {text!r} is IPv4 in disguise; write it as IPv4")
        if network.network_address.scope_id is not None:  # Python takes any text behind the %
            raise BadOpening(f"source {text!r} names an interface of one machine; a rule cannot")
    return Source(str(network), network)


def opening(owner: str, protocol_text: str, ports: tuple[int, int] | None, source_text: str) -> Opening:
    """Checked, in canonical form. Raises BadOpening."""
    name, peer = protocol(protocol_text), source(source_text)
    if name in WITH_PORTS:
        if ports is None:
            raise BadOpening(f"{name} needs ports; for every port say {EVERY_PORT[0]} to {EVERY_PORT[1]}")
        if not 1 <= ports[0] <= ports[1] <= 65535:
            raise BadOpening(f"ports {ports[0]} to {ports[1]}: from 1 to 65535, the lower one first")
    elif ports is not None:
        raise BadOpening(f"{name} has no ports")
    if peer.network is not None and (name, peer.network.version) in (("icmp", 6), ("icmpv6", 4)):
        raise BadOpening(f"{name} from {peer.text}: icmp is of IPv4, icmpv6 of IPv6")
    return Opening(owner, name, ports, peer)


def merge(openings: Iterable[Opening]) -> list[Rule]:
    """The fewest rules of these forms that let in exactly the same, in a stable order.

    Ports of one source that overlap or touch become one range; what a wider rule lets in anyway is left out, and its
    owners are added to the wider one.
    """
    joined = [rule for same in _by_source(openings) for rule in _join(same)]
    by_peer: dict[tuple[str, str], list[Rule]] = {}
    for rule in joined:
        by_peer.setdefault((rule.protocol, rule.source.text), []).append(rule)
    networks = {rule.source.network for rule in joined if rule.source.network is not None}
    lengths = {
        version: sorted({network.prefixlen for network in networks if network.version == version}) for version in (4, 6)
    }  # fmt: skip
    stands_for: dict[Rule, list[Rule]] = {}
    for rule in joined:
        stands_for.setdefault(_widest(rule, by_peer, lengths), []).append(rule)
    return sorted((_for_all(rule, same) for rule, same in stands_for.items()), key=order)


def _for_all(rule: Rule, narrower: list[Rule]) -> Rule:
    """The rule with the owners of all those that it stands for, itself among them."""
    if narrower == [rule]:
        return rule
    return rule._replace(owners=tuple(sorted({owner for each in narrower for owner in each.owners})))


def order(rule: Rule) -> tuple[str, tuple[int, int], int, int, int, str]:
    """By protocol, ports and source, in the order of numbers; groups and prefix lists last."""
    network = rule.source.network
    place = (network.version, int(network.network_address), network.prefixlen) if network else (9, 0, 0)
    return (rule.protocol, rule.ports or (0, 0), *place, rule.source.text)


def _by_source(openings: Iterable[Opening]) -> Iterator[list[Opening]]:
    found: dict[tuple[str, str], list[Opening]] = {}
    for each in openings:
        found.setdefault((each.protocol, each.source.text), []).append(each)
    yield from found.values()


def _join(same: list[Opening]) -> Iterator[Rule]:
    """Openings of one protocol and source: port ranges that overlap or touch become one."""
    first = same[0]
    if first.ports is None or len(same) == 1:
        yield Rule(first.protocol, first.ports, first.source, tuple(sorted({each.owner for each in same})))
        return
    low, high, owners = 0, -1, set[str]()
    for each in sorted(same, key=lambda o: o.ports or EVERY_PORT):
        ports = each.ports or EVERY_PORT
        if owners and ports[0] > high + 1:
            yield Rule(first.protocol, (low, high), first.source, tuple(sorted(owners)))
            owners = set()
        low, high = (ports[0], ports[1]) if not owners else (low, max(high, ports[1]))
        owners.add(each.owner)
    yield Rule(first.protocol, (low, high), first.source, tuple(sorted(owners)))


def _widest(rule: Rule, by_peer: dict[tuple[str, str], list[Rule]], lengths: dict[int, list[int]]) -> Rule:
    """The rule that lets in all that this one does: from the shortest prefix down, `all` before the protocol itself."""
    for text in _wider_sources(rule.source, lengths):
        for name in ("all", rule.protocol):
            for candidate in by_peer.get((name, text), ()):
                if candidate.ports is None or (rule.ports is not None and _covers(candidate.ports, rule.ports)):
                    return candidate
    return rule


def _wider_sources(peer: Source, lengths: dict[int, list[int]]) -> Iterator[str]:
    if peer.network is None:
        yield peer.text
        return
    for length in lengths[peer.network.version]:
        if length > peer.network.prefixlen:
            return
        yield str(peer.network.supernet(new_prefix=length)) if length < peer.network.prefixlen else peer.text


def _covers(wide: tuple[int, int], narrow: tuple[int, int]) -> bool:
    return wide[0] <= narrow[0] and narrow[1] <= wide[1]
