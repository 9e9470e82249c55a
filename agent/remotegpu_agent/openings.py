"""Openings: holes in this host's firewall, each for one source, a range of ports and a time.

Told in order: which are due now, as pieces that do not overlap; what has to change; how each owner of a firewall is
told. Each ends in the kernel, by a timeout of its own, with portal and agent dead. The role firewall says in
/etc/remotegpu/firewall.json who owns the firewall and where the sets are; it writes the rules that ask them, for every
packet of a connection that came in by one: so a piece that goes cuts what is connected. Nobody has the kernel forget
these connections: the next packet that the host sends would begin them anew, as its own, and the answers would be let
in (seen with Linux 6.18). Ports that lead to other machines are forwards.py's.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from remotegpu_agent import nft, systemd
from remotegpu_agent.clock import Clock
from remotegpu_agent.files import find_json
from remotegpu_agent.nft import Key
from remotegpu_agent.observe.tools import ToolFailed, find_tool, run
from remotegpu_agent.protocol import PROTOCOLS, DesiredOpening, Network, format_time, now
from remotegpu_agent.state import Held, State

log = logging.getLogger(__name__)

TOLD = Path("/etc/remotegpu/firewall.json")
SETS = {4: "openings", 6: "openings6"}
ZONE = "remotegpu"
# By these firewalld's rules of ours are told from those of others: the second while the first is being replaced, and
# the third where that was cut off and both are there.
PRIORITIES = (32001, 32002, 32003)
REST_S = 30.0  # how long nobody looks again whose firewall is slow, if nothing new is wanted
END_TOLERANCE = timedelta(seconds=3)  # nft tells whole seconds, and a look takes its time


@dataclass(frozen=True)
class Until:
    """How long a piece is open, and for which openings."""

    ends_at: datetime | None  # None: until it is closed
    ids: tuple[int, ...]
    is_whole: bool = True  # False: one of the places that have to let it in does not


Pieces = Mapping[Key, Until]  # by protocol, ports, source


# --- what is due


def due(openings: Iterable[DesiredOpening], leases: Mapping[int, datetime], at: datetime) -> list[DesiredOpening]:
    """Those that are to be open now; `leases` are open on this host, each with its end, which none of its openings
    outlives.
    """
    found = []
    for opening in openings:
        if opening.lease_id is not None:
            if opening.lease_id not in leases:
                continue
            lease_ends_at = leases[opening.lease_id]
            opening = replace(opening, ends_at=min(opening.ends_at or lease_ends_at, lease_ends_at))
        if opening.ends_at is None or opening.ends_at > at:
            found.append(opening)
    return found


def pieces(openings: Iterable[DesiredOpening]) -> dict[Key, Until]:
    """The same, cut so that no two overlap: each piece is open until the last of its openings ends."""
    found: dict[Key, Until] = {}
    openings = list(openings)
    for protocol, version in itertools.product(PROTOCOLS, SETS):
        alike = [each for each in openings if (each.protocol, each.source.version) == (protocol, version)]
        for first, last, sources in _stretches(alike):
            ports = str(first) if first == last else f"{first}-{last}"
            found.update({(protocol, ports, str(source)): until for source, until in sources.items()})
    return found


def _stretches(openings: list[DesiredOpening]) -> Iterator[tuple[int, int, dict[Network, Until]]]:
    """Neighbouring ports that let in the same sources."""
    edges = sorted({each.first_port for each in openings} | {each.last_port + 1 for each in openings})
    known: tuple[int, int, dict[Network, Until]] | None = None
    for first, after in itertools.pairwise(edges):
        sources = _sources([each for each in openings if each.first_port <= first and after - 1 <= each.last_port])
        if known is not None and known[2] == sources:
            known = (known[0], after - 1, sources)
            continue
        if known is not None and known[2]:
            yield known
        known = (first, after - 1, sources)
    if known is not None and known[2]:
        yield known


def _sources(openings: list[DesiredOpening]) -> dict[Network, Until]:
    """Networks lie within each other or apart: a wide one leaves out those within it that are open for longer."""
    ends: dict[Network, datetime | None] = {}
    for each in openings:
        if each.source not in ends or _outlives(each.ends_at, ends[each.source]):
            ends[each.source] = each.ends_at
    found = {}
    for source, ends_at in ends.items():
        others = [other for other in ends if other != source]
        if any(_is_within(source, other) and not _outlives(ends_at, ends[other]) for other in others):
            continue
        for part in _without(source, [each for each in others if _outlives(ends[each], ends_at)]):
            ids = sorted(each.opening_id for each in openings if each.source.overlaps(part))
            found[part] = Until(ends_at, tuple(ids))
    return found


def _outlives(one: datetime | None, other: datetime | None) -> bool:
    return other is not None and (one is None or one > other)


def _is_within(one: Network, other: Network) -> bool:
    return one.subnet_of(other)  # type: ignore[arg-type]  # of one family


def _without(source: Network, others: list[Network]) -> list[Network]:
    rest = [source]
    for other in (each for each in others if _is_within(each, source)):
        rest = [part for each in rest for part in _split(each, other)]
    return rest


def _split(one: Network, other: Network) -> Iterable[Network]:
    if _is_within(one, other):
        return ()
    return one.address_exclude(other) if _is_within(other, one) else (one,)  # type: ignore[arg-type]  # of one family


# --- what has to change


@dataclass(frozen=True)
class Close:
    key: Key


@dataclass(frozen=True)
class Move:
    """It stays open, until another moment: at no time is it closed."""

    key: Key
    until: Until


@dataclass(frozen=True)
class Open:
    key: Key
    until: Until


Step = Close | Move | Open


def plan(wanted: Pieces, seen: Pieces) -> list[Step]:
    """What must change. Close before open."""
    return [
        *(Close(key) for key in sorted(seen) if key not in wanted),
        *(Move(key, until) for key, until in wanted.items() if key in seen and _differs(seen[key], until)),
        *(Open(key, until) for key, until in wanted.items() if key not in seen),
    ]


def _differs(seen: Until, wanted: Until) -> bool:
    if not seen.is_whole or seen.ids != wanted.ids or (seen.ends_at is None) != (wanted.ends_at is None):
        return True
    return bool(seen.ends_at and wanted.ends_at and abs(seen.ends_at - wanted.ends_at) > END_TOLERANCE)


def covers(one: Key, other: Key) -> bool:
    """Whether whoever is let in by the other piece is let in by this one."""
    if one == other:
        return True
    if one[0] != other[0] or not (_ports(one)[0] <= _ports(other)[0] and _ports(other)[1] <= _ports(one)[1]):
        return False
    try:
        wide, narrow = ip_network(one[2]), ip_network(other[2])
    except ValueError:  # a range that is no network: not by us
        return False
    return wide.version == narrow.version and _is_within(narrow, wide)


def is_covered(one: Key, others: Iterable[Key]) -> bool:
    """Whether whoever is let in by the piece is let in by these together, no two of which overlap."""
    return sum(_in_common(one, each) for each in others) == _in_common(one, one) > 0


def _in_common(one: Key, other: Key) -> int:
    """How many pairs of a port and an address both let in."""
    try:
        networks = ip_network(one[2]), ip_network(other[2])
    except ValueError:  # a range that is no network: not by us
        return 0
    if one[0] != other[0] or networks[0].version != networks[1].version or not networks[0].overlaps(networks[1]):
        return 0
    (first, last), (other_first, other_last) = _ports(one), _ports(other)
    ports = max(0, min(last, other_last) - max(first, other_first) + 1)
    return ports * min(each.num_addresses for each in networks)


def _ports(key: Key) -> tuple[int, int]:
    first, _, last = key[1].partition("-")
    return int(first), int(last or first)


# --- who is told


@dataclass(frozen=True)
class Firewall:
    """What the role has written for us."""

    backend: str
    table: str
    rules: Path  # brings the table back


def find_firewall(told: Path = TOLD) -> Firewall | None:
    """Who owns this host's firewall; None where the role firewall has not been. Raises ToolFailed."""
    try:
        value = find_json(told)
        if value is None:
            return None
        return Firewall(value["backend"], value["table"], Path(value["rules"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ToolFailed(f"{told} cannot be read ({error}): run the role firewall again") from error


class Sets:
    """Sets of nftables: all that has to be told where nftables, iptables or ufw own the firewall, whose rules let in
    what these mark.
    """

    is_slow = False

    def __init__(self, firewall: Firewall) -> None:
        self._firewall = firewall
        self._members: dict[Key, Key] = {}  # as we write it → as nft does

    def look(self, at: datetime) -> dict[Key, Until]:
        """The pieces that are open. Raises ToolFailed."""
        found = {}
        self._members = {}
        for name in SETS.values():
            for member in nft.members(self._firewall.table, name, at=at):
                key = canonical(member.key)
                self._members[key] = member.key
                found[key] = Until(member.ends_at, read_ids(member.comment))
        return found

    def carry_out(self, steps: list[Step], at: datetime) -> None:
        """In one transaction, after a look. Raises ToolFailed."""
        table = self._firewall.table
        commands = [
            nft.deleting(table, _set_of(step.key), self._members[step.key])
            for step in steps
            if isinstance(step, Close | Move) and step.key in self._members
        ]
        for step in steps:
            if isinstance(step, Move | Open):
                ids = " ".join(map(str, step.until.ids[:10]))
                timeout_s = seconds_left(step.until.ends_at, at)
                commands.append(nft.adding(table, _set_of(step.key), step.key, timeout_s=timeout_s, comment=ids))
        nft.apply(commands)


class Firewalld(Sets):
    """Where firewalld owns the firewall it lets in by rules of its zone, each with a timeout. The sets mark beside it
    what containers publish, which firewalld does not judge, and cut what is connected.
    """

    is_slow = True  # half a second of work for a question

    def __init__(self, firewall: Firewall) -> None:
        super().__init__(firewall)
        self._rules: dict[Key, set[int]] = {}

    def look(self, at: datetime) -> dict[Key, Until]:
        found = super().look(at)
        self._rules = zone_rules()
        doubled = {key for key, priorities in self._rules.items() if len(priorities) > 1}
        half = (found.keys() ^ self._rules.keys()) | doubled
        return found | {key: replace(found.get(key, Until(None, ())), is_whole=False) for key in half}

    def carry_out(self, steps: list[Step], at: datetime) -> None:
        """Few calls, since each takes half a second. firewalld cannot move an end, and does not tell it: a second rule
        comes, and the first goes last, so that wherever this is cut off, the next look sees a piece that is not whole.
        What is new is in the sets before its rule is: no connection comes in without the mark that cuts it. What is
        only cut in another way goes last as well: else it would be closed meanwhile.
        """
        moved = [step for step in steps if isinstance(step, Move)]
        opened = [step for step in steps if isinstance(step, Open)]
        closed = [step for step in steps if isinstance(step, Close)]
        full = [(step.key, PRIORITIES[-1]) for step in moved if len(self._there(step.key)) == len(PRIORITIES)]
        recut = [step for step in closed if is_covered(step.key, [each.key for each in opened])]
        remove_rules([*self._rules_of(step for step in closed if step not in recut), *full])
        for key, priority in full:
            self._rules[key].discard(priority)
        self._add(moved, at)
        super().carry_out(steps, at)
        self._add(opened, at)
        remove_rules(self._rules_of([*moved, *recut]))

    def _add(self, steps: Sequence[Move | Open], at: datetime) -> None:
        """Beside what was there. One call for all that end in the same second."""
        by_end: dict[int | None, list[str]] = {}
        for step in steps:
            left_s = seconds_left(step.until.ends_at, at)
            priority = next(each for each in PRIORITIES if each not in self._there(step.key))
            by_end.setdefault(None if left_s is None else int(left_s), []).append(rule_of(step.key, priority))
        for end, rules in by_end.items():
            if end is None or end > 0:  # 0 would be without an end, to firewalld
                timeout = [] if end is None else [f"--timeout={end}"]
                _firewalld(*(f"--add-rich-rule={rule}" for rule in rules), *timeout)

    def _rules_of(self, steps: Iterable[Step]) -> list[tuple[Key, int]]:
        return [(step.key, priority) for step in steps for priority in sorted(self._there(step.key))]

    def _there(self, key: Key) -> set[int]:
        return self._rules.get(key, set())


def owner_of(firewall: Firewall) -> Sets:
    return (Firewalld if firewall.backend == "firewalld" else Sets)(firewall)


def canonical(key: Key) -> Key:
    """A member as we write it: nft leaves out the length of a single address."""
    *parts, source = key
    try:
        return (*parts, str(ip_network(source)))
    except ValueError:  # a range that is no network: not by us
        return key


def read_ids(comment: str) -> tuple[int, ...]:
    """Our note at a member: the ids of its openings."""
    return tuple(map(int, re.findall(r"\d+", comment)))


def seconds_left(ends_at: datetime | None, at: datetime) -> float | None:
    return None if ends_at is None else (ends_at - at).total_seconds()


def rule_of(key: Key, priority: int) -> str:
    """The rule of firewalld for a piece, as firewalld writes it."""
    protocol, ports, source = key
    family = f"ipv{ip_network(source).version}"
    sender = "" if source.endswith("/0") else f' source address="{source}"'
    return f'rule priority="{priority}" family="{family}"{sender} port port="{ports}" protocol="{protocol}" accept'


_RULE = re.compile(
    r'rule priority="(?P<priority>\d+)" family="ipv(?P<version>[46])"(?: source address="(?P<source>[^"]+)")?'
    r' port port="(?P<ports>[\d-]+)" protocol="(?P<protocol>\w+)" accept'
)


def read_rules(listed: str) -> dict[Key, set[int]]:
    """Our pieces among the rules that firewalld lists, each with the priorities that it is there under."""
    found: dict[Key, set[int]] = {}
    for line in listed.splitlines():
        rule = _RULE.fullmatch(line.strip())
        if rule is not None and int(rule["priority"]) in PRIORITIES:
            source = rule["source"] or {"4": "0.0.0.0/0", "6": "::/0"}[rule["version"]]
            found.setdefault(canonical((rule["protocol"], rule["ports"], source)), set()).add(int(rule["priority"]))
    return found


def is_firewalld_at_work() -> bool:
    return find_tool("firewall-cmd") is not None and systemd.alive(["firewalld.service"]) != set()


def zone_rules() -> dict[Key, set[int]]:
    """What firewalld lets in for us. Raises ToolFailed, also where firewalld is not at work."""
    return read_rules(_firewalld("--list-rich-rules"))


def remove_rules(rules: list[tuple[Key, int]]) -> None:
    """Those that let in these pieces under these priorities. Raises ToolFailed."""
    if rules:
        _firewalld(*(f"--remove-rich-rule={rule_of(key, priority)}" for key, priority in rules))


def _firewalld(*words: str) -> str:
    return run(["firewall-cmd", f"--zone={ZONE}", *words])


def _set_of(key: Key) -> str:
    return SETS[6 if ":" in key[-1] else 4]


# --- at work

STATE_FILE = Path("/var/lib/remotegpu-agent/desired.json")


def machines_own(state_file: Path = STATE_FILE) -> frozenset[Key]:
    """What may be open while nobody has leased the machine."""
    desired = State(state_file).held.desired
    return frozenset(pieces(due(desired.openings if desired else (), {}, now())))


class Openings:
    """The openings of this host. Any thread may ask; one at a time changes."""

    def __init__(self, held: Callable[[], Held], clock: Clock, told: Path = TOLD) -> None:
        self._held = held
        self._clock = clock
        self._told = told
        self._lock = threading.Lock()
        self._wanted: Pieces = {}
        self._seen: Pieces = {}
        self._seen_at: float | None = None  # monotonic; None: it has to be looked at again
        self._trouble: str | None = None
        self._report: list[dict[str, Any]] = []

    def settle(self, leases: Mapping[int, datetime]) -> None:
        """Make the firewall let in what is due and nothing else; `leases` are open here, each with its end.

        Raises ToolFailed when something resisted.
        """
        with self._lock:
            trouble = self._clock.doubt()
            try:
                trouble = self._settle(leases, doubt=trouble)
            except ToolFailed as error:
                trouble, self._seen_at = str(error), None
                raise
            finally:
                if trouble and trouble != self._trouble:
                    log.error("openings: %s", trouble)
                self._trouble = trouble
                self._describe()

    def look(self, leases: Mapping[int, datetime]) -> None:
        """Only see what there is, and change nothing. Raises ToolFailed."""
        with self._lock:
            self._wanted = self._due(leases)
            owner = self._find_owner(brings_back=False)
            self._seen = owner.look(now()) if owner else {}
            self._seen_at = None
            self._describe()

    def _settle(self, leases: Mapping[int, datetime], *, doubt: str | None) -> str | None:
        wanted = self._due(leases)
        if wanted == self._wanted and self._is_at_rest():
            return self._trouble
        self._wanted = wanted
        owner = self._find_owner(brings_back=bool(wanted))
        if owner is None:
            self._seen = {}
            return doubt if not wanted else "this host has no firewall of RemoteGPU's: run the role firewall"
        at = now()
        self._seen = owner.look(at)
        steps = plan(wanted, self._seen)
        frozen = self._held().frozen
        if doubt or frozen:
            steps = [step for step in steps if self._is_nobodys(step) or (not frozen and self._is_sooner(step))]
        if steps:
            for step in steps:
                log.info("openings: %s", describe(step))
            owner.carry_out(steps, at)
            self._seen = owner.look(now())
        self._seen_at = time.monotonic() if owner.is_slow and not doubt else None
        return doubt

    def _due(self, leases: Mapping[int, datetime]) -> dict[Key, Until]:
        desired = self._held().desired
        return pieces(due(desired.openings if desired else (), leases, now()))

    def _is_at_rest(self) -> bool:
        return self._seen_at is not None and time.monotonic() - self._seen_at < REST_S

    def _is_nobodys(self, step: Step) -> bool:
        """Whether it closes what belongs to no opening that is due, however those are cut now."""
        alive = {each for until in self._wanted.values() for each in until.ids}
        return isinstance(step, Close) and not alive & set(self._seen[step.key].ids)

    def _is_sooner(self, step: Step) -> bool:
        """Whether what is open is to end before the kernel would end it. By a clock that went back all others would
        last for longer than they may.
        """
        if not isinstance(step, Move):
            return False
        seen = self._seen[step.key]
        return seen.is_whole and _outlives(seen.ends_at, step.until.ends_at)

    def _find_owner(self, *, brings_back: bool) -> Sets | None:
        """None where there is none, or its table is gone and nobody wants it back."""
        firewall = find_firewall(self._told)
        if firewall is None:
            return None
        if not nft.is_loaded(firewall.table):
            if not brings_back:
                return None
            log.warning("openings: the table inet %s was gone and is loaded again", firewall.table)
            nft.load(firewall.rules)
        return owner_of(firewall)

    def report(self) -> list[dict[str, Any]]:
        """What was seen on the host, as `observed_hole`; what is open without being wanted is told too."""
        return self._report

    def _describe(self) -> None:
        desired = self._held().desired
        named = [opening.opening_id for opening in desired.openings] if desired else []
        alive = {each for until in self._seen.values() for each in until.ids}
        self._report = [
            {"id": each, "state": state, "error": self._trouble_of(state)}
            for each in [*named, *sorted(alive - set(named))]
            for state in [self._state(each)]
        ]

    def _state(self, opening_id: int) -> str:
        due_pieces = [key for key, until in self._wanted.items() if opening_id in until.ids]
        let_in = {key for key, until in self._seen.items() if until.is_whole}
        if due_pieces and all(key in let_in or any(covers(each, key) for each in let_in) for key in due_pieces):
            return "open"
        if any(opening_id in until.ids for until in self._seen.values()):
            return "failed" if due_pieces else "open"
        return "failed" if due_pieces and self._trouble else "closed"

    def _trouble_of(self, state: str) -> str | None:
        return (self._trouble or "it is open in part")[:400] if state == "failed" else None


def describe(step: Step) -> str:
    """For the log."""
    protocol, ports, source = step.key
    where = f"{protocol} {ports} from {source}"
    if isinstance(step, Close):
        return f"close {where}"
    end = f"until {format_time(step.until.ends_at)}" if step.until.ends_at else "until it is closed"
    return f"{'keep' if isinstance(step, Move) else 'open'} {where} {end}"
