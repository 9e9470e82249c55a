"""Addresses of machines, written one way only, so that the database can tell that two of them are the same.

Pure: nothing is resolved, dialled or stored here.
"""

from __future__ import annotations

import ipaddress
import re

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
MAX_LENGTH = 253


def normalise(text: str) -> str:
    """The canonical form of an IPv4 or IPv6 address or a host name.

    IPv6 loses its brackets and is compressed, IPv4 inside IPv6 becomes IPv4, host names become lower-case ASCII (IDNA)
    without the last dot. Raises ValueError with a sentence for the person who typed it.
    """
    given = text.strip()
    bare = given[1:-1] if given.startswith("[") and given.endswith("]") else given
    address = find_ip(bare)
    if address is not None:
        return _usable(address, given)
    if ":" in given:
        raise ValueError(f"{given!r} is no IPv6 address; the port goes into its own field")
    return _host_name(given)


def find_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _usable(address: ipaddress.IPv4Address | ipaddress.IPv6Address, given: str) -> str:
    if getattr(address, "scope_id", None):
        raise ValueError(f"{given!r} names an interface of one computer; use an address that works from the portal")
    if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255":
        raise ValueError(f"{given!r} is not the address of one machine")
    return str(address)


def _host_name(given: str) -> str:
    try:
        name = given.removesuffix(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise ValueError(f"{given!r} is neither an IP address nor a host name") from None
    labels = name.split(".")
    if len(name) > MAX_LENGTH or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{given!r} is neither an IP address nor a host name")
    if NUMBER.fullmatch(labels[-1]):
        # Resolvers read 127.1, 0x7f.1 and 2130706433 as IPv4: two spellings of one machine.
        raise ValueError(f"{given!r} looks like an IPv4 address that is not written out; write four decimal numbers")
    return name
