"""The ruleset as it was, and no door left open behind it."""

from __future__ import annotations

import collections
import ipaddress
import json
from collections.abc import Iterator
from typing import Any

from remotegpu_agent import openings
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding, NotApplicable
from remotegpu_agent.observe import firewall, ports
from remotegpu_agent.observe.tools import ToolFailed, run

# --- firewall


def look_for_rules(scope: Scope) -> Iterator[Finding]:
    """Tables and rules that differ from the baseline; what Docker writes for its containers is Docker's."""
    now, before = firewall.look_at(), scope.sections["firewall"]
    if now is None:
        if before is None:
            raise NotApplicable("nft is not installed on this host")
        raise ToolFailed("nft is in the baseline and is not installed any more")
    known: dict[str, Any] = (before or {"tables": {}})["tables"]
    yield from _left_open()
    for key in sorted({*known, *now["tables"]}):
        yield from _differences(key, known.get(key), now["tables"].get(key))
    if now["legacy"] != (before or {"legacy": []})["legacy"]:
        yield Finding(None, f"tables of the older iptables: {', '.join(now['legacy'])}")


def _left_open() -> Iterator[Finding]:
    """Openings that are not the machine's own: no lease is left that they could be of."""
    own = openings.machines_own()
    for table, name, key in firewall.opened():
        if openings.canonical(key) not in own:
            yield Finding(("close", table, (name, key)), f"set {name} of table {table} still lets in {' '.join(key)}")
    if openings.is_firewalld_at_work():
        for key, priorities in openings.zone_rules().items():
            if key not in own:
                yield Finding(("close_zone", key, priorities), f"firewalld still lets in {' '.join(key)}")


def _differences(key: str, before: dict[str, Any] | None, now: dict[str, Any] | None) -> Iterator[Finding]:
    if "text" in (before or now or {}):
        if before is None:
            yield Finding(("delete", key, None), f"table {key} is not in the baseline")
        elif now is None or now["items"] != before["items"]:
            how = "is missing" if now is None else f"has changed: {'; '.join(_changed(before, now))}"
            yield Finding(("restore", key, before["text"]), f"table {key} {how}")
        return
    known, found = (collections.Counter(map(_text, (side or {"items": []})["items"])) for side in (before, now))
    for item in (found - known).elements():
        if before is None and ('"table"' in item or ('"chain"' in item and '"hook"' in item and '"drop"' not in item)):
            continue  # iptables makes its empty frame by being asked
        yield Finding(("item", key, item), f"table {key} has {item}")
    for item in (known - found).elements():
        yield Finding(("gone", key, item), f"table {key} lacks {item}")


def _text(item: dict[str, Any]) -> str:
    return json.dumps(item, sort_keys=True)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    known, found = (collections.Counter(map(_text, side["items"])) for side in (before, now))
    return [f"+ {each}" for each in (found - known).elements()] + [f"- {each}" for each in (known - found).elements()]


def put_back_rules(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Own tables are replaced whole in one transaction; in iptables' tables the rules that were added are deleted."""
    for finding in found:
        if finding.subject is None:
            continue
        what, key, detail = finding.subject
        try:
            yield from _put_back(what, key, detail)
        except ToolFailed as error:
            yield str(error)


def _put_back(what: str, key: Any, detail: Any) -> Iterator[str]:
    if what == "delete":
        run(["nft", "delete", "table", *key.split(" ", 1)])
        yield f"deleted table {key}"
    elif what == "restore":
        run(["nft", "-f", "-"], stdin=f"table {key} {{}}\ndelete table {key}\n{detail}")
        yield f"restored table {key}"
    elif what == "close":
        name, element = detail
        run(["nft", f"delete element {key} {name} {{ {' . '.join(element)} }}"])
        yield f"closed {' '.join(element)}"
    elif what == "close_zone":
        openings.remove_rules([(key, priority) for priority in detail])
        yield f"closed {' '.join(key)}"
    elif what == "item":
        yield from _delete_item(key, detail)


def _delete_item(key: str, wanted: str) -> Iterator[str]:
    for item in firewall.by_table(firewall.ruleset()).get(key, []):
        kind, body = next(iter(item.items()))
        if _text(firewall.normal(item)) != wanted or firewall.is_dockers(item):
            continue
        where = [body["chain"]] if kind == "rule" else []
        if kind == "chain":
            run(["nft", "flush", "chain", *key.split(" ", 1), body["name"]])
        run(["nft", "delete", kind, *key.split(" ", 1), *where, "handle", str(body["handle"])])
        yield f"deleted a {kind} from table {key}"
        return


# --- listening ports


def look_for_ports(scope: Scope) -> Iterator[Finding]:
    """Ports that nobody listened on before; where no process shows, none is named."""
    known = {_key(each) for each in ports.known(scope.sections["listening_ports"])}
    for each in ports.listening():
        if _key(each) not in known:
            program = "no process that can be seen" if each["program"] == "?" else each["program"]
            yield Finding(
                None, f"{each['protocol']} port {each['port']} on {each['address']} is open: {program} listens"
            )


def _key(port: dict[str, Any]) -> tuple[str, str, int | None, str]:
    """Programs that were given any free port before may be given another one now."""
    number = port["port"]
    if number is not None and number >= ports.first_ephemeral() and port["program"] != "?":
        number = None
    address = ipaddress.ip_address(port["address"])
    where = str(address) if address.is_loopback or address.is_unspecified else "the host's own"
    return port["protocol"], where, number, port["program"]
