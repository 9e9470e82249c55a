"""Forwarded ports of a gateway: which port leads whom to which machine behind it, until when.

The role gateway writes the rules and two places to fill: a map (who is led where) and a set (which flows may pass).
Each packet is held against the set, so that all of it ends by the kernel's own timeouts, connections too, with portal
and agent dead. Told here in order: what must change, look, make it so, say what is. Openings of this host itself are
openings.py's.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from remotegpu_agent import conntrack, nft
from remotegpu_agent.files import Table, find_json
from remotegpu_agent.journal import Journal
from remotegpu_agent.observe import ports
from remotegpu_agent.observe.tools import ToolFailed
from remotegpu_agent.protocol import Address, DesiredForward, Network, format_time, now, parse_time

log = logging.getLogger(__name__)

TABLE = "remotegpu_gateway"
RULES = Path("/etc/remotegpu/gateway.nft")
FACTS = Path("/etc/remotegpu/gateway.json")
MAPS = {4: "forwards", 6: "forwards6"}
SETS = {4: "flows", 6: "flows6"}
TOLERANCE = timedelta(seconds=2)  # nft tells in whole seconds how long something lasts


def is_gateway(facts: Path = FACTS) -> bool:
    """The role gateway has been here."""
    return facts.exists()


def networks_behind(facts: Path = FACTS) -> list[Network]:
    """Where the machines behind this gateway are, and where forwards may lead. Raises ToolFailed."""
    try:
        return [ipaddress.ip_network(each) for each in find_json(facts)["networks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ToolFailed(f"{facts} cannot be read ({error}): run the role gateway again") from error


class Way(NamedTuple):
    """From whom, by which port, to where: what the kernel knows of a forward."""

    protocol: str
    public_port: int
    source: Network
    target_address: Address
    target_port: int


def way_of(forward: DesiredForward) -> Way:
    return Way(forward.protocol, forward.public_port, forward.source, forward.target_address, forward.target_port)


@dataclass(frozen=True)
class Seen:
    """What the kernel has: each way's end. One that is in one place only leads nowhere, and is to be made whole."""

    led: Mapping[Way, datetime | None] = field(default_factory=dict)
    passed: Mapping[Way, datetime | None] = field(default_factory=dict)

    @property
    def ways(self) -> set[Way]:
        return {*self.led, *self.passed}

    def is_open(self, forward: DesiredForward) -> bool:
        """In both places, until its end."""
        way = way_of(forward)
        return all(_is_near(place.get(way), forward.ends_at) for place in (self.led, self.passed))

    def is_led(self, forward: DesiredForward) -> bool:
        """In both places, whenever it ends."""
        return all(way_of(forward) in place for place in (self.led, self.passed))

    def outlasts(self, forward: DesiredForward) -> bool:
        """It is led, and in no place does it end before it shall."""
        ends = [place.get(way_of(forward)) for place in (self.led, self.passed)]
        return self.is_led(forward) and all(end is None or end > forward.ends_at for end in ends)


@dataclass(frozen=True)
class Changes:
    to_close: tuple[Way, ...] = ()
    to_open: tuple[DesiredForward, ...] = ()
    refused: Mapping[int, str] = field(default_factory=dict)  # forward id → why


def plan(
    wanted: Iterable[DesiredForward], known: Collection[Way], seen: Seen, networks: Collection[Network], *, at: datetime
) -> Changes:
    """What must change. `known` are the ways that were opened and not closed since: flows may be left of one that the
    kernel has let go by itself.
    """
    refused, possible = {}, dict[tuple[str, int], DesiredForward]()
    for forward in sorted(wanted, key=lambda each: each.forward_id):
        if forward.ends_at <= at:
            continue
        port = (forward.protocol, forward.public_port)
        if not any(_is_in(forward.target_address, network) for network in networks):
            refused[forward.forward_id] = f"{forward.target_address} is in none of this gateway's networks"
        elif port in possible:
            other = possible[port].forward_id
            refused[forward.forward_id] = f"port {forward.public_port}/{forward.protocol} is forward {other}'s"
        else:
            possible[port] = forward
    stay = {way_of(forward) for forward in possible.values()}
    return Changes(
        to_close=tuple(sorted({*known, *seen.ways} - stay, key=str)),
        to_open=tuple(forward for forward in possible.values() if not seen.is_open(forward)),
        refused=refused,
    )


class Forwards:
    def __init__(self, state_dir: Path, journal: Journal, *, facts: Path = FACTS) -> None:
        self._journal = journal
        self._facts = facts
        self._register = Table(state_dir / "forwards.json")
        self._observed: list[dict[str, Any]] = []

    def report(self) -> list[dict[str, Any]]:
        """As seen at the last look, not as ordered; what is there without being wanted is told too."""
        return self._observed

    def ends(self) -> list[datetime]:
        """The ends that are to come."""
        return [forward.ends_at for forward in self._known() if forward.ends_at > now()]

    def settle(self, wanted: Collection[DesiredForward] | None, *, doubt: str | None = None) -> bool:
        """Make the kernel match; None: nothing is ordered now, and what was lasts until its end. `doubt` is why nothing
        may be opened. False: try again.
        """
        known = self._known()
        forwards = known if wanted is None else wanted
        if not is_gateway(self._facts):
            self._describe_unseen(forwards, known, "this host is no gateway: run playbooks/gateways.yml for it")
            return True
        try:
            refused, failed = self._change(forwards, known, networks_behind(self._facts), doubt)
            seen = look(at=now())
        except ToolFailed as error:
            log.error("forwards: %s", error)
            self._describe_unseen(forwards, known, str(error))
            return False
        self._describe(
            forwards, seen, {**refused, **failed}, held({(way.protocol, way.public_port) for way in seen.ways})
        )
        return not failed

    # Make it so

    def _change(
        self,
        wanted: Collection[DesiredForward],
        known: Collection[DesiredForward],
        networks: list[Network],
        doubt: str | None,
    ) -> tuple[Mapping[int, str], Mapping[int, str]]:
        """Close, then open: a port never serves two, not even for a moment. The answers say which forwards are refused,
        which have failed, and why. Raises ToolFailed.
        """
        if not nft.is_loaded(TABLE):
            nft.load(RULES)
        seen = look(at=now())
        changes = plan(wanted, {way_of(forward) for forward in known}, seen, networks, at=now())
        if changes.to_close:
            nft.apply(command for way in changes.to_close for command in _removing(way, seen))
            forget_flows(changes.to_close, networks)
            self._note_closed(changes.to_close)
        to_open, refused = changes.to_open, dict(changes.refused)
        if doubt is not None:  # an earlier end is taken over all the same; what the kernel has is never given a later
            to_open = tuple(forward for forward in to_open if seen.outlasts(forward))
            refused |= {forward.forward_id: doubt for forward in changes.to_open if not seen.is_led(forward)}
        if to_open:
            self._note_opened(to_open)
        return refused, _open(to_open, seen)

    def _note_opened(self, forwards: Iterable[DesiredForward]) -> None:
        """Before they are: whatever happens next, it is known that there may be flows."""
        with self._register.change() as register:
            for forward in forwards:
                is_news = str(forward.forward_id) not in register
                register[str(forward.forward_id)] = _line(forward)
                if is_news:
                    self._journal.record("forward.opened", detail={"forward_id": forward.forward_id, **_line(forward)})

    def _note_closed(self, ways: Collection[Way]) -> None:
        with self._register.change() as register:
            for forward in self._known():
                if way_of(forward) in ways:
                    del register[str(forward.forward_id)]
                    self._journal.record("forward.closed", detail={"forward_id": forward.forward_id})

    def _known(self) -> list[DesiredForward]:
        return [_forward(int(forward_id), line) for forward_id, line in self._register.read().items()]

    # Say what is

    def _describe(
        self,
        forwards: Collection[DesiredForward],
        seen: Seen,
        errors: Mapping[int, str],
        at_home: Mapping[tuple[str, int], str],
    ) -> None:
        """`at_home`: the ports that this host's own programs hold, and which program it is. A forward leads past it,
        so it is open, and told of all the same: whoever else asks for the port gets the program.
        """
        told = {forward.forward_id: forward for forward in [*self._known(), *forwards]}
        wanted = {forward.forward_id for forward in forwards}
        observed = []
        for forward_id, forward in sorted(told.items()):
            is_there = way_of(forward) in seen.ways
            state = "failed" if forward_id in errors else "open" if is_there else "closed"
            if is_there or forward_id in wanted:
                error = errors.get(forward_id)
                program = at_home.get((forward.protocol, forward.public_port))
                if is_there and error is None and program is not None:
                    error = f"{program} on this gateway listens at port {forward.public_port}/{forward.protocol} itself"
                observed.append(_observed(forward_id, state, error))
        self._observed = observed

    def _describe_unseen(self, forwards: Collection[DesiredForward], known: Iterable[DesiredForward], why: str) -> None:
        """What nobody wants any more, and nobody has seen closed, may be open still."""
        wanted = {forward.forward_id for forward in forwards}
        unwanted = {forward.forward_id for forward in known} - wanted
        states = {**dict.fromkeys(wanted, "failed"), **dict.fromkeys(unwanted, "open")}
        self._observed = [_observed(forward_id, state, why) for forward_id, state in sorted(states.items())]


def held(public: Container[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Of these (protocol, port): the program of this host that can be reached there from outside; not what the kernel
    hands out for a while, as it does for every question to a name server.
    """
    first = ports.first_ephemeral()
    found = {}
    for each in ports.listening(public):
        protocol, port = str(each["protocol"]), int(each["port"])
        is_handed_out = protocol == "udp" and port >= first
        if not is_handed_out and not ipaddress.ip_address(each["address"]).is_loopback:
            found[protocol, port] = str(each["program"])
    return found


def look(*, at: datetime) -> Seen:
    """What the kernel has. Raises ToolFailed."""
    led = [each for name in MAPS.values() for each in nft.members(TABLE, name, kind="map", at=at)]
    passed = [each for name in SETS.values() for each in nft.members(TABLE, name, at=at)]
    return Seen(
        led={_way((*member.key, *member.value)): member.ends_at for member in led},
        passed={_way(member.key): member.ends_at for member in passed},
    )


def forget_flows(ways: Collection[Way], networks: Collection[Network]) -> int:
    """Have the kernel forget what came in by these; not what the hosts behind have begun, or what is meant for them by
    their own address. Answers how many. Raises ToolFailed.
    """

    ports = {(way.protocol, way.public_port) for way in ways}

    def is_behind(address: Address) -> bool:
        return any(_is_in(address, network) for network in networks)

    return conntrack.forget(
        flow
        for flow in conntrack.flows()
        if (flow.protocol, flow.destination_port) in ports
        and not is_behind(flow.source)
        and not is_behind(flow.destination)
    )


def _open(forwards: Sequence[DesiredForward], seen: Seen) -> dict[int, str]:
    """All at once; where the kernel refuses that, one by one, so that one does not keep the others out. The answer says
    which failed, and why.
    """
    try:
        nft.apply(command for forward in forwards for command in _making(forward, seen))
    except ToolFailed as error:
        if len(forwards) > 1:
            return {forward_id: why for each in forwards for forward_id, why in _open([each], seen).items()}
        log.error("forward %d: %s", forwards[0].forward_id, error)
        return {forwards[0].forward_id: str(error)}
    return {}


def _making(forward: DesiredForward, seen: Seen) -> Iterable[str]:
    """Also where it is there until another end: taken out and put in by one transaction, so that no packet is lost."""
    way = way_of(forward)
    left_s = (forward.ends_at - now()).total_seconds()
    yield from _removing(way, seen)
    family = way.source.version
    yield nft.adding(TABLE, MAPS[family], _key(way)[:3], timeout_s=left_s, value=_key(way)[3:])
    yield nft.adding(TABLE, SETS[family], _key(way), timeout_s=left_s)


def _removing(way: Way, seen: Seen) -> Iterable[str]:
    family = way.source.version
    if way in seen.led:
        yield nft.deleting(TABLE, MAPS[family], _key(way)[:3])
    if way in seen.passed:
        yield nft.deleting(TABLE, SETS[family], _key(way))


def _key(way: Way) -> nft.Key:
    return tuple(str(part) for part in way)


def _way(key: nft.Key) -> Way:
    try:
        protocol, public_port, source, address, target_port = key
        return Way(
            protocol, int(public_port), ipaddress.ip_network(source), ipaddress.ip_address(address), int(target_port)
        )
    except ValueError as error:
        raise ToolFailed(f"table inet {TABLE} holds {' . '.join(key)}, which is not ours: {error}") from error


def _is_near(seen: datetime | None, wanted: datetime) -> bool:
    return seen is not None and abs(seen - wanted) <= TOLERANCE


def _is_in(address: Address, network: Network) -> bool:
    return address.version == network.version and address in network


def _line(forward: DesiredForward) -> dict[str, Any]:
    return {
        "lease": forward.lease_id,
        "protocol": forward.protocol,
        "public_port": forward.public_port,
        "source": str(forward.source),
        "target_address": str(forward.target_address),
        "target_port": forward.target_port,
        "ends_at": format_time(forward.ends_at),
    }


def _forward(forward_id: int, line: Mapping[str, Any]) -> DesiredForward:
    return DesiredForward(
        forward_id=forward_id,
        lease_id=line["lease"],
        protocol=line["protocol"],
        public_port=line["public_port"],
        source=ipaddress.ip_network(line["source"]),
        target_address=ipaddress.ip_address(line["target_address"]),
        target_port=line["target_port"],
        ends_at=parse_time(line["ends_at"]),
    )


def _observed(forward_id: int, state: str, error: str | None) -> dict[str, Any]:
    return {"id": forward_id, "state": state, "error": error[:400] if error else None}
