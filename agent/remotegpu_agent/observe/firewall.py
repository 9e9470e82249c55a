"""The ruleset of the kernel, in a form that can be compared tomorrow.

Left out are handles and counters, what comes and goes (the openings of a lease: members of sets, and what firewalld has
behind all other rules of our zone), and what Docker writes for its containers: its chains, jumps to them, and rules for
its bridges.
"""

from __future__ import annotations

import json
import re
from typing import Any

from remotegpu_agent.nft import read_key
from remotegpu_agent.observe.tools import find_tool, read_text, run

OWN_TABLES = ("inet remotegpu", "inet remotegpu_openings")  # with the sets that openings of leases are in
OPENED_BY_FIREWALLD = "filter_IN_remotegpu_post"  # in the table inet firewalld: openings.py gives its rules their place
_DOCKER_CHAIN = re.compile(r"^DOCKER(-.*)?$")
_DOCKERS_LINE = re.compile(r"\bDOCKER|\bdocker0\b|\bbr-[0-9a-f]{12}\b|\bdocker_gwbridge\b")
_BY_NUMBER = re.compile(r"^(\t+protocol )(6|17)$", re.MULTILINE)
_DOCKER_BRIDGE = re.compile(r"^(docker0|br-[0-9a-f]{12}|docker_gwbridge)$")


def ruleset() -> list[dict[str, Any]]:
    """Everything that `nft -j list ruleset` lists, as it is."""
    listed = json.loads(run(["nft", "-j", "list", "ruleset"]))["nftables"]
    return [each for each in listed if "metainfo" not in each]


def look_at() -> dict[str, Any] | None:
    """The tables, with what they hold, by "family name"; None where nft is not installed."""
    if find_tool("nft") is None:
        return None
    tables: dict[str, Any] = {}
    for key, items in sorted(by_table(ruleset()).items()):
        tables[key] = {
            "items": [normal(item) for item in items if not is_dockers(item) and not _is_opening(item)],
            "rules": plain_rules(run(["nft", "-s", "-t", "list", "table", *key.split(" ", 1)])),
        }
        if not is_written_by_iptables(items):
            # Put back, it must not open again what was closed since: no members of our sets, no rule of an opening.
            options = ["-s", "-t"] if key in OWN_TABLES else ["-s"]
            text = run(["nft", *options, "list", "table", *key.split(" ", 1)])
            tables[key]["text"] = readable(without_openings(text))
    return {"tables": tables, "legacy": legacy_tables()}


def by_table(listed: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The items of each table, under "family name"."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for item in listed:
        kind, body = next(iter(item.items()))
        key = f"{body['family']} {body['name'] if kind == 'table' else body['table']}"
        tables.setdefault(key, []).append(item)
    return tables


def normal(item: dict[str, Any]) -> dict[str, Any]:
    """The item without what changes by itself."""
    kind, body = next(iter(item.items()))
    kept = {k: _without_counts(v) for k, v in body.items() if k not in ("handle", "index")}
    if _comes_and_goes(item):
        kept.pop("elem", None)
    return {kind: kept}


def _comes_and_goes(item: dict[str, Any]) -> bool:
    kind, body = next(iter(item.items()))
    return kind in ("set", "map") and bool({"timeout", "dynamic"} & set(_as_list(body.get("flags"))))


def _is_opening(item: dict[str, Any]) -> bool:
    kind, body = next(iter(item.items()))
    return kind == "rule" and (body["table"], body["chain"]) == ("firewalld", OPENED_BY_FIREWALLD)


def without_openings(text: str) -> str:
    """A table's listing without the rules by which firewalld lets in for a while."""
    chain = re.compile(rf"(\n\tchain {OPENED_BY_FIREWALLD} {{\n).*?(\t}}\n)", re.DOTALL)
    return chain.sub(r"\1\2", text)


def readable(text: str) -> str:
    """A table's listing as nft reads it back: where /etc/protocols is missing it tells the protocol of a `ct timeout`
    by a number, which it does not read.
    """
    return _BY_NUMBER.sub(lambda found: found[1] + {"6": "tcp", "17": "udp"}[found[2]], text)


def opened() -> list[tuple[str, str, tuple[str, ...]]]:
    """Table, set and parts of each member that comes and goes in our own tables."""
    listed = [next(iter(item.values())) for item in ruleset() if _comes_and_goes(item)]
    ours = [(f"{each['family']} {each['table']}", each) for each in listed]
    return [
        (table, each["name"], read_key(member))
        for table, each in ours
        if table in OWN_TABLES
        for member in each.get("elem", [])
    ]


def _without_counts(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"counter"} and isinstance(value["counter"], dict):
            return {"counter": None}
        return {k: _without_counts(v) for k, v in value.items() if k not in ("packets", "bytes", "expires")}
    if isinstance(value, list):
        return [_without_counts(each) for each in value]
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def is_dockers(item: dict[str, Any]) -> bool:
    """Whether Docker wrote it for its own containers, and writes it anew as they come and go."""
    kind, body = next(iter(item.items()))
    if kind == "chain":
        return bool(_DOCKER_CHAIN.match(body["name"]))
    if kind != "rule" or body["family"] not in ("ip", "ip6"):
        return False
    return bool(_DOCKER_CHAIN.match(body["chain"])) or any(
        _DOCKER_CHAIN.match(word) or _DOCKER_BRIDGE.match(word) for word in _words(body["expr"])
    )


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for each in value.values() for word in _words(each)]
    if isinstance(value, list):
        return [word for each in value for word in _words(each)]
    return [value] if isinstance(value, str) else []


def is_written_by_iptables(items: list[dict[str, Any]]) -> bool:
    """Whether the table belongs to iptables: nft can neither print it whole nor read it back."""
    tables = {next(iter(item.values()))["name"] for item in items if "table" in item}
    return bool(tables & {"filter", "nat", "mangle", "raw", "security"}) and all(
        next(iter(item.values()))["family"] in ("ip", "ip6") for item in items
    )


def plain_rules(text: str) -> list[str]:
    """A table's lines as nft prints them, each with its chain, sorted; without Docker's, and without empty frames."""
    chain, found = "", []
    for line in (each.strip() for each in text.splitlines()):
        if opened := re.fullmatch(r"(chain|set|map) (\S+) \{", line):
            chain = opened.group(2)
        is_frame = line in ("", "}") or line.startswith(("table ", "chain ", "#")) or line.endswith("policy accept;")
        if not is_frame and chain != OPENED_BY_FIREWALLD and not _DOCKERS_LINE.search(f"{chain} {line}"):
            found.append(f"{chain}: {line}")
    return sorted(found)


def legacy_tables() -> list[str]:
    """Tables of the older iptables, which `nft` does not list."""
    names = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
    return sorted(f"{name.split('/')[-1]}:{line}" for name in names for line in (read_text(name) or "").split())
