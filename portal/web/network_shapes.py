"""What the templates of the network are given, so that none of them computes anything; and its words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from flask_babel import lazy_gettext

from portal.models import Forward, Grant, Opening
from portal.models.states import GRANTS_BY_STACKS
from portal.services import addresses, network_openings, network_switch, network_views
from portal.services.overviews import LeaseView

CLOUD_WORDS = {
    "cloudflare": "Cloudflare",
    "aws": "AWS",
    "alicloud": lazy_gettext("Alibaba Cloud"),
    "tencent": lazy_gettext("Tencent Cloud"),
}
DNS_WORDS = {"cloudflare": "Cloudflare", "aws": "AWS Route 53", "alicloud": "AliDNS", "tencent": "DNSPod"}
CHANGE_WORDS = {
    "to_make": lazy_gettext("to be made"),
    "to_change": lazy_gettext("to be changed"),
    "to_remove": lazy_gettext("to be removed"),
    "applied": lazy_gettext("applied"),
    "unknown": lazy_gettext("unknown"),
}
KIND_WORDS = {"name": lazy_gettext("name"), "security_group": lazy_gettext("rule of a group")}
PURPOSE_WORDS = {"ssh": "SSH", "web": lazy_gettext("web pages"), "other": lazy_gettext("anything else")}


# Openings and forwards


@dataclass(frozen=True)
class HoleRow:
    """An opening or a forward. `waits`: for how long it is not seen as it is wanted; None while it is.

    `ways`: the ports of a gateway by which an opening is reached.
    """

    hole: Opening | Forward
    is_wanted: bool
    ends_at: datetime | None
    waits: timedelta | None
    ways: tuple[Forward, ...] = ()


def opening_rows(openings: Iterable[Opening], now: datetime, forwards: Sequence[Forward] = ()) -> list[HoleRow]:
    """`forwards` are those of the same leases."""
    return [_hole(each, network_openings.end_of(each), now, network_views.ways_of(each, forwards)) for each in openings]


def forward_rows(forwards: Iterable[Forward], now: datetime) -> list[HoleRow]:
    return [_hole(each, each.lease.ends_at, now) for each in forwards]


def _hole(hole: Opening | Forward, ends_at: datetime | None, now: datetime, ways: tuple[Forward, ...] = ()) -> HoleRow:
    is_wanted = hole.closed_at is None
    is_settled = hole.observed == ("open" if is_wanted else "closed")
    since: datetime = hole.closed_at or hole.created_at
    return HoleRow(hole, is_wanted, ends_at, None if is_settled else now - since, ways)


def my_source(address: str | None) -> str | None:
    """The caller alone, as a source; None where nobody can say who calls."""
    found = addresses.find_ip(address or "")
    if found is None or "%" in str(found):  # of a neighbour on the cable: no rule can name him
        return None
    return f"{found}/{found.max_prefixlen}"


# Names


@dataclass(frozen=True)
class NameRow:
    """A name as people read it. `record_id` of one that somebody asked for."""

    name: str
    type: str
    values: tuple[str, ...]
    record_id: int | None
    machine_id: int | None


def name_row(row: Mapping[str, Any]) -> NameRow:
    """Of a row of the export."""
    return NameRow(
        network_views.readable(row["name"]),
        row["type"],
        tuple(network_views.value_texts(row)),
        _number(row["key"], "n"),
        _number(row["machine"], "m"),
    )


def _number(key: str | None, letter: str) -> int | None:
    return int(key[1:]) if key is not None and key.startswith(letter) and key[1:].isdigit() else None


# Grants


@dataclass(frozen=True)
class GrantRow:
    """`waits`: for how long it is not seen as it is wanted; then `way_out` says what to do. `faults` are the host's."""

    grant: Grant
    waits: timedelta | None
    way_out: str | None
    faults: tuple[str, ...]

    @property
    def is_still_open(self) -> bool:
        return self.grant.is_still_open

    @property
    def may_be_written_off(self) -> bool:
        return self.is_still_open and self.grant.kind in network_switch.KINDS


def grant_rows(view: LeaseView, now: datetime) -> list[GrantRow]:
    return [_grant(grant, now) for grant in view.grants]


def _grant(grant: Grant, now: datetime) -> GrantRow:
    since = grant.waits_since
    holes = grant.detail.get("holes", ()) if isinstance(grant.detail, dict) else ()
    faults = tuple(f"#{each['id']}: {each['error']}" for each in holes if each.get("error"))
    if since is None:
        return GrantRow(grant, None, None, faults)
    return GrantRow(grant, now - since, _way_out(grant), faults)


def _way_out(grant: Grant) -> str:
    is_closing = grant.desired == "closed"
    if grant.kind in GRANTS_BY_STACKS:
        way_out = _STACKS_CLOSE if is_closing else _STACKS_OPEN
    else:
        way_out = _HOSTS_CLOSE.get(grant.kind, _HOST_CLOSES) if is_closing else _HOST_OPENS
    return str(way_out) % {"number": grant.generation}


_STACKS_OPEN = lazy_gettext("Waits for an apply of generation %(number)s or later.")
_STACKS_CLOSE = lazy_gettext(
    "Waits for an apply of generation %(number)s or later. Look at the pipeline's last run, or write it off."
)
_HOST_OPENS = lazy_gettext("The host has not said so yet.")
_HOST_CLOSES = lazy_gettext("The host ends it on time by itself. If it never answers again, write the lease off.")
_HOSTS_CLOSE = {
    "firewall": lazy_gettext("The host ends it on time by itself. Look at its agent there, or write it off."),
    "forward": lazy_gettext("Look at the agent of the gateway. Written off, its port goes to somebody else."),
}
