"""Openings become the fewest rules that let in the same."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_network import openings
from remotegpu_network.openings import BadOpening, Opening, Rule

SMALL_NETWORKS = st.builds(
    lambda value, length: str(ipaddress.ip_network((value << 4, 24 + length), strict=False)),
    st.integers(0x0A0000 << 4, (0x0A0000 << 4) + 15),
    st.integers(0, 8),
)
PORTS = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def some_openings(draw: st.DrawFn) -> list[Opening]:
    made = []
    for number in range(draw(st.integers(0, 12))):
        protocol = draw(st.sampled_from(["tcp", "udp", "icmp", "all"]))
        ports = draw(PORTS) if protocol in openings.WITH_PORTS else None
        source = draw(st.one_of(SMALL_NETWORKS, st.sampled_from(["sg-1", "sg-2", "pl-1"])))
        made.append(openings.opening(f"o{number}", protocol, ports, source))
    return made


def lets_in(rules: list[Opening] | list[Rule]) -> set[tuple[str, int, str]]:
    """Every (protocol, port, source) let in, written out."""
    found = set()
    for rule in rules:
        protocols = ["tcp", "udp", "icmp"] if rule.protocol == "all" else [rule.protocol]
        sources = [str(address) for address in rule.source.network] if rule.source.network else [rule.source.text]
        for protocol in protocols:
            ports = range(1, 13) if rule.ports is None and protocol != "icmp" else range(1)
            ports = range(rule.ports[0], rule.ports[1] + 1) if rule.ports else ports
            found |= {(protocol, port, source) for port in ports for source in sources}
    return found


@given(some_openings())
def test_merged_rules_let_in_exactly_what_the_openings_did(made: list[Opening]) -> None:
    assert lets_in(openings.merge(made)) == lets_in(made)


@given(some_openings(), st.randoms())
def test_the_order_of_the_openings_does_not_matter(made: list[Opening], random: object) -> None:
    shuffled = list(made)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert openings.merge(made) == openings.merge(shuffled)


@given(some_openings())
def test_no_rule_is_in_another_and_every_owner_has_one(made: list[Opening]) -> None:
    rules = openings.merge(made)
    for rule in rules:
        others = [other for other in rules if other is not rule]
        assert not lets_in([rule]) <= set().union(
            *(lets_in([other]) for other in others if _is_wider(other, rule)), set()
        )
    assert {owner for rule in rules for owner in rule.owners} == {each.owner for each in made}
    assert len({rule.name for rule in rules}) == len(rules)


def _is_wider(one: Rule, other: Rule) -> bool:
    return lets_in([other]) <= lets_in([one])


def test_duplicates_overlaps_and_neighbours_become_one_rule_with_all_owners() -> None:
    made = [
        openings.opening(f"o{low}", "tcp", (low, high), "10.0.0.0/8")
        for low, high in ((80, 90), (85, 100), (101, 101), (200, 200))
    ]
    again = openings.opening("o9", "6", (80, 90), "10.0.0.0/8")
    assert [(rule.ports, rule.owners) for rule in openings.merge([*made, again])] == [
        ((80, 101), ("o101", "o80", "o85", "o9")),
        ((200, 200), ("o200",)),
    ]


def test_a_source_inside_a_wider_one_needs_no_rule_of_its_own() -> None:
    made = [openings.opening("a", "tcp", (22, 22), "10.1.0.0/16"), openings.opening("b", "tcp", (1, 100), "10.0.0.0/8")]
    assert [(str(rule), rule.owners) for rule in openings.merge(made)] == [("tcp 1-100 from 10.0.0.0/8", ("a", "b"))]


@pytest.mark.parametrize(
    ("protocol", "ports", "source", "why"),
    [
        ("tcp", (22, 22), "10.0.0.1/8", "host bits"), ("tcp", (22, 22), "2001:db8::1/32", "host bits"),
        ("tcp", (22, 22), "1.2.3.4/99", "does not appear"), ("tcp", (0, 22), "10.0.0.0/8", "from 1 to 65535"),
        ("tcp", (22, 70000), "10.0.0.0/8", "from 1 to 65535"), ("tcp", (90, 80), "10.0.0.0/8", "lower one first"),
        ("tcp", None, "10.0.0.0/8", "needs ports"), ("icmp", (1, 1), "10.0.0.0/8", "has no ports"),
        ("icmp", None, "2001:db8::/32", "icmp is of IPv4"), ("icmpv6", None, "10.0.0.0/8", "icmpv6 of IPv6"),
        ("gre", None, "10.0.0.0/8", "protocol 'gre'"), ("", None, "10.0.0.0/8", "protocol ''"),
        ("tcp", (22, 22), "::ffff:10.0.0.0/104", "IPv4 in disguise"),
        ("tcp", (22, 22), "example.org", "does not appear"),
        ("tcp", (22, 22), "fe80::1%eth0", "names an interface"),
        ("tcp", (22, 22), "2001:db8::%x } ; y/64", "names an interface"),
        ("tcp", (22, 22), "１０.0.0.0/8", "does not appear"), ("tcp", (22, 22), "10.0.0.0/８", "does not appear"),
        ("tcp", (22, 22), "１２３４５６７８９０１２/sg-0abc", "does not appear"),
    ],
)  # fmt: skip
def test_what_makes_no_rule_is_refused(protocol: str, ports: tuple[int, int] | None, source: str, why: str) -> None:
    with pytest.raises(BadOpening, match=why):
        openings.opening("o", protocol, ports, source)


def test_a_bare_address_is_a_network_of_one() -> None:
    assert openings.source("203.0.113.7").text == "203.0.113.7/32"
    assert openings.source("2001:DB8:0::7").text == "2001:db8::7/128"


def test_the_name_of_a_rule_says_what_it_lets_in_and_never_splits_a_urn() -> None:
    (rule,) = openings.merge([openings.opening("o", "tcp", (8000, 8010), "2001:db8::/32")])
    assert rule.name == "in.tcp.8000-8010.2001_db8__-32"
