"""How addresses stand on a page, so that they can be copied from there: IPv4 and IPv6."""

from __future__ import annotations

import pytest

from portal.web import network_shapes, shapes


@pytest.mark.parametrize(
    ("address", "port", "written"),
    [
        ("198.51.100.1", 20000, "198.51.100.1:20000"),
        ("2001:db8::1", 20000, "[2001:db8::1]:20000"),
        ("gpu.example.org", 2222, "gpu.example.org:2222"),
        ("2001:db8::1", 22, "2001:db8::1"),
    ],
)
def test_an_address_of_ipv6_is_told_from_its_port(address: str, port: int, written: str) -> None:
    assert shapes.with_port(address, port) == written


@pytest.mark.parametrize(
    ("caller", "source"),
    [
        ("203.0.113.7", "203.0.113.7/32"),
        ("2001:db8::7", "2001:db8::7/128"),
        ("::ffff:203.0.113.7", "203.0.113.7/32"),
        ("fe80::7%eth0", None),
        (None, None),
    ],
)
def test_ones_own_address_is_offered_as_a_source_that_is_taken(caller: str | None, source: str | None) -> None:
    assert network_shapes.my_source(caller) == source
