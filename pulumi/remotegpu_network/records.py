"""What a record holds, in the one form we compare: addresses compressed, targets canonical, text unquoted.

How a cloud wants it written (quotes, chunks, a dot at the end) is in shapes/. Here is no zone and no cloud.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from remotegpu_network import names

MAX_TEXT = 2048  # the most that we let in; docs/network.md, Unverified
MAX_CHUNK = 255  # one character-string of RFC 1035
PRINTABLE = re.compile(r"[ -~]+")
SRV_OWNER = re.compile(r"_[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\._(?:tcp|udp|tls|sctp)\..+")
CAA_TAG = re.compile(r"[a-z0-9]{1,15}")
TEXTUAL = ("A", "AAAA", "CNAME", "TXT")
ADDRESS_TYPES = ("A", "AAAA", "CNAME")


class BadRecord(ValueError):
    """The content does not fit the type. The message says why."""


@dataclass(frozen=True, slots=True, order=True)
class Mx:
    priority: int
    target: str

    def __str__(self) -> str:
        return f"{self.priority} {self.target}."


@dataclass(frozen=True, slots=True, order=True)
class Srv:
    priority: int
    weight: int
    port: int
    target: str

    def __str__(self) -> str:
        return f"{self.priority} {self.weight} {self.port} {self.target}."


@dataclass(frozen=True, slots=True, order=True)
class Caa:
    flags: int
    tag: str
    value: str

    def __str__(self) -> str:
        return f'{self.flags} {self.tag} "{escaped(self.value)}"'


Value = str | Mx | Srv | Caa


def parse(kind: str, value: Any) -> Value:
    """The content in canonical form. `kind` is one of the types that the schema allows. Raises BadRecord or BadName."""
    if isinstance(value, str) != (kind in TEXTUAL) or (kind not in TEXTUAL and set(value) != _FIELDS[kind]):
        raise BadRecord(f"{value!r} is no value of {kind}")
    return _PARSERS[kind](value)


@lru_cache(maxsize=65536)
def _a(text: str) -> str:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise BadRecord(f"{text!r} is no IPv4 address") from None
    return _routable(address)


@lru_cache(maxsize=65536)
def _aaaa(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise BadRecord(f"{text!r} is no IPv6 address") from None
    if address.scope_id is not None:
        raise BadRecord(f"{text!r} names an interface of one machine; a record cannot")
    if address.ipv4_mapped is not None:
        raise BadRecord(f"{text!r} is an IPv4 address in disguise; use an A record with {address.ipv4_mapped}")
    return _routable(address)


def _routable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Private addresses are fine (a name inside a site); those that lead nowhere or to the asker itself are not."""
    if address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local:
        raise BadRecord(f"{address} leads nobody to a machine")
    if address.version == 4 and address.is_reserved:
        raise BadRecord(f"{address} is reserved")
    return str(address)


def _target(text: str) -> str:
    name = names.canonical(text)
    if name.startswith(names.WILDCARD):
        raise BadRecord(f"{text!r}: a wildcard is no target")
    if _is_address(name):
        raise BadRecord(f"{text!r} is an address; a target is a name")
    return name


def _is_address(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _txt(text: str) -> str:
    if not PRINTABLE.fullmatch(text):
        raise BadRecord("a text is one line of printable ASCII")
    if len(text) > MAX_TEXT:
        raise BadRecord(f"a text has at most {MAX_TEXT} characters; this one has {len(text)}")
    return text


def _mx(value: Mapping[str, Any]) -> Mx:
    target = _target(value["target"])
    if not names.is_host(target):
        raise BadRecord(f"{target!r}: a mail server's name has no underscores")
    return Mx(value["priority"], target)


def _srv(value: Mapping[str, Any]) -> Srv:
    return Srv(value["priority"], value["weight"], value["port"], _target(value["target"]))


def _caa(value: Mapping[str, Any]) -> Caa:
    tag = value["tag"].lower()
    if not CAA_TAG.fullmatch(tag):
        raise BadRecord(f"{value['tag']!r} is no CAA tag")
    content = _txt(value["value"])
    if tag == "iodef" and not content.startswith(("mailto:", "http://", "https://")):
        raise BadRecord(f"iodef wants mailto:, http:// or https://, not {content!r}")
    return Caa(value["flags"], tag, content)


_PARSERS: Mapping[str, Callable[[Any], Value]] = {
    "A": _a, "AAAA": _aaaa, "CNAME": _target, "TXT": _txt, "MX": _mx, "SRV": _srv, "CAA": _caa,
}  # fmt: skip
_FIELDS: Mapping[str, set[str]] = {
    kind: set(made.__dataclass_fields__) for kind, made in (("MX", Mx), ("SRV", Srv), ("CAA", Caa))
}


def check_owner(kind: str, name: str) -> None:
    """May a record of this type stand at this name? Raises BadRecord."""
    if kind in ("A", "AAAA", "MX") and not names.is_host(name.removeprefix("*.")):
        raise BadRecord(f"{name!r}: no underscores in a name with {kind} records")
    if kind == "SRV" and not SRV_OWNER.fullmatch(name):
        raise BadRecord(f"{name!r}: an SRV record stands at _service._tcp.NAME (or _udp, _tls, _sctp)")


def is_public(value: Value) -> bool:
    """Can the internet reach this address? Names are public as far as we know."""
    if not isinstance(value, str):
        return True
    try:
        return ipaddress.ip_address(value).is_global
    except ValueError:
        return True


def escaped(text: str) -> str:
    """As between the quotes of a zone file."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def chunks(text: str) -> list[str]:
    """At most 255 characters each: what a TXT record is made of. Not yet escaped."""
    if len(text) <= MAX_CHUNK:
        return [text]
    return [text[start : start + MAX_CHUNK] for start in range(0, len(text), MAX_CHUNK)]


def presentation(value: Value, kind: str) -> str:
    """As in a zone file, targets with their dot: what people read and dnspython parses."""
    if isinstance(value, str):
        if kind == "TXT":
            return " ".join(f'"{escaped(chunk)}"' for chunk in chunks(value))
        return f"{value}." if kind == "CNAME" else value
    return str(value)
