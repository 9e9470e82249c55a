"""nft, as far as openings and forwards need it: tables of our own, and sets whose members end by themselves.

A member carries its end as a timeout that the kernel keeps, so it goes with portal and agent dead. Members of a set of
ranges must not overlap: the kernel refuses them, or takes one and not the other; who makes them sees to that. Here is
no decision; what is to be open is openings.py's and forwards.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from remotegpu_agent.observe.tools import ToolFailed, run

Key = tuple[str, ...]  # the parts of a member as nft reads them: ("tcp", "8888-8890", "192.0.2.0/24")


@dataclass(frozen=True)
class Member:
    """What is in a set or a map now."""

    key: Key
    ends_at: datetime | None  # None: it has no end
    value: Key = ()  # of a map
    comment: str = ""


def is_loaded(table: str) -> bool:
    """Whether the table `inet TABLE` is there. Raises ToolFailed."""
    return f"table inet {table}" in run(["nft", "list", "tables", "inet"]).splitlines()


def load(file: Path) -> None:
    """Load a file of rules, in one transaction. Raises ToolFailed."""
    run(["nft", "-f", str(file)])


def apply(commands: Iterable[str]) -> None:
    """All of it in one transaction, or nothing: no packet sees half of a change. Raises ToolFailed."""
    text = "\n".join(commands)
    if text:
        run(["nft", "-f", "-"], stdin=text + "\n")


def members(table: str, name: str, *, kind: str = "set", at: datetime) -> list[Member]:
    """What the set or map holds; `at` is now. Raises ToolFailed, also where there is no such set."""
    listed = json.loads(run(["nft", "-j", "list", kind, "inet", table, name]))["nftables"]
    body = next((each[kind] for each in listed if kind in each), None)
    if body is None:
        raise ToolFailed(f"nft tells nothing of {kind} {name} in table inet {table}")
    return [_member(each, at) for each in body.get("elem", [])]


def adding(table: str, name: str, key: Key, *, timeout_s: float | None, value: Key = (), comment: str = "") -> str:
    """The command that adds a member which ends after so many seconds; None: it does not end by itself."""
    end = "" if timeout_s is None else f" timeout {max(1, int(timeout_s * 1000))}ms"
    said = f' comment "{comment}"' if comment else ""
    to = f" : {' . '.join(value)}" if value else ""
    return f"add element inet {table} {name} {{ {' . '.join(key)}{end}{said}{to} }}"


def deleting(table: str, name: str, key: Key) -> str:
    """The command that takes a member out."""
    return f"delete element inet {table} {name} {{ {' . '.join(key)} }}"


def _member(element: Any, at: datetime) -> Member:
    value: Key = ()
    if isinstance(element, list):  # of a map: the key, and what it leads to
        element, leads_to = element
        value = _parts(leads_to)
    body: dict[str, Any] = element["elem"] if isinstance(element, dict) and "elem" in element else {"val": element}
    ends_at = at + timedelta(seconds=body["expires"]) if "expires" in body else None
    return Member(_parts(body["val"]), ends_at, value, body.get("comment", ""))


def read_key(element: Any) -> Key:
    """The parts of a member as `nft -j` lists it."""
    return _parts(element["elem"]["val"] if isinstance(element, dict) and "elem" in element else element)


def _parts(value: Any) -> Key:
    if isinstance(value, dict) and "concat" in value:
        return tuple(_part(each) for each in value["concat"])
    return (_part(value),)


def _part(value: Any) -> str:
    """One part as nft reads it: a number, a name, a network, a range."""
    if isinstance(value, dict) and "prefix" in value:
        return f"{value['prefix']['addr']}/{value['prefix']['len']}"
    if isinstance(value, dict) and "range" in value:
        return "-".join(str(each) for each in value["range"])
    return str(value)
