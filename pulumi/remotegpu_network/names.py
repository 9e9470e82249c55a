"""DNS names in the one form we compare and emit: A-labels, lower case, no dot at the end.

People write `Größe.example.org.`, the zone list of one cloud answers in Unicode and the record list in Punycode: two
forms of one name would be deleted and created again at every run. What lies below a name is in records.py.
"""

from __future__ import annotations

import re
from functools import lru_cache

import idna

MAX_NAME = 253
MAX_LABEL = 63
WILDCARD = "*"
LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
PLAIN = re.compile(r"[a-z0-9._*-]+")


class BadName(ValueError):
    """This is no DNS name. The message says which part and why."""


@lru_cache(maxsize=65536)
def canonical(text: str) -> str:
    """The name as A-labels in lower case, without the dot at the end; a leading `*` label is kept. Raises BadName."""
    name = text if PLAIN.fullmatch(text) else _mapped(text)
    name = name.removesuffix(".")
    if not name:
        raise BadName("a name is needed")
    labels = name.split(".")
    wildcard, rest = (labels[:1], labels[1:]) if labels[0] == WILDCARD else ([], labels)
    if wildcard and not rest:
        raise BadName("a wildcard needs a name below which it stands, as in *.example.org")
    canonical_name = ".".join([*wildcard, *(_label(label, text) for label in rest)])
    if len(canonical_name) > MAX_NAME:
        raise BadName(f"{text!r} has {len(canonical_name)} characters as A-labels; at most {MAX_NAME} are allowed")
    return canonical_name


def _mapped(text: str) -> str:
    """Upper case, full-width letters and ideographic dots, as UTS 46 maps them."""
    try:
        return idna.uts46_remap(text, std3_rules=False, transitional=False)
    except idna.IDNAError as error:
        raise BadName(f"{text!r} is no DNS name: {error}") from None


def _label(label: str, whole: str) -> str:
    if not label:
        raise BadName(f"{whole!r} has an empty label between two dots")
    try:
        if not label.isascii():
            label = idna.encode(label).decode()
        elif label.startswith("xn--"):
            idna.decode(label)  # a made-up one would be refused by the cloud, after half of the rest was applied
    except (idna.IDNAError, UnicodeError) as error:
        raise BadName(f"{label!r} in {whole!r} is no IDNA label: {error}") from None
    if len(label) > MAX_LABEL:
        raise BadName(f"{label!r} in {whole!r} has {len(label)} characters; a label has at most {MAX_LABEL}")
    if not LABEL.fullmatch(label):
        raise BadName(f"{label!r} in {whole!r}: letters, digits, hyphens inside and underscores only")
    return label


def is_below(name: str, zone: str) -> bool:
    """Is `name` the zone's apex or below it? Both canonical: `notexample.org` is not below `example.org`."""
    return name == zone or name.endswith("." + zone)


def relative(name: str, zone: str) -> str:
    """What AliDNS and DNSPod call the host record: `@` at the apex, else what stands before the zone."""
    return "@" if name == zone else name.removesuffix("." + zone)


def is_host(name: str) -> bool:
    """May an address record stand here: no underscores (RFC 952)."""
    return "_" not in name


def readable(name: str) -> str:
    """For people: Unicode where the name has A-labels."""
    try:
        return ".".join(idna.decode(label) if label.startswith("xn--") else label for label in name.split("."))
    except idna.IDNAError:
        return name
