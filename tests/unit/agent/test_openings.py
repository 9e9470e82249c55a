"""Openings decided: what is due, in pieces that never overlap; what must change; what nft and firewalld tell."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_agent import nft, openings, verify
from remotegpu_agent.clock import Clock
from remotegpu_agent.nft import Key
from remotegpu_agent.observe import firewall
from remotegpu_agent.observe.tools import ToolFailed
from remotegpu_agent.openings import (
    PRIORITIES,
    Close,
    Firewall,
    Firewalld,
    Move,
    Open,
    Openings,
    Sets,
    Until,
    covers,
    due,
    is_covered,
    pieces,
    plan,
)
from remotegpu_agent.protocol import Desired, DesiredOpening, now
from remotegpu_agent.state import Held
from tests.support.clocks import HostTime

NOW = datetime(2026, 5, 1, 10, 0, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)
RECORDED = Path(__file__).with_name("recorded")  # by nft 1.0.6, firewalld 2.3
FIREWALL = Firewall("nftables", "remotegpu", Path("/etc/remotegpu/firewall.nft"))
WEB = ("tcp", "8888", "203.0.113.0/24")


def opening(
    opening_id: int = 12,
    *,
    lease: int | None = 7,
    protocol: str = "tcp",
    ports: tuple[int, int] = (8888, 8888),
    source: str = "203.0.113.0/24",
    ends_at: datetime | None = NOW + HOUR,
) -> DesiredOpening:
    return DesiredOpening(opening_id, lease, protocol, *ports, ip_network(source), ends_at)


# --- what is due


def test_an_opening_is_due_while_its_lease_is_open_on_this_host_and_no_longer_than_it() -> None:
    (found,) = due([opening()], {7: NOW + HOUR / 2}, NOW)
    assert found.ends_at == NOW + HOUR / 2
    assert due([opening()], {}, NOW) == []
    assert due([opening()], {8: NOW + HOUR}, NOW) == []
    assert due([opening(ends_at=NOW)], {7: NOW + HOUR}, NOW) == []
    assert due([opening()], {7: NOW}, NOW) == []


def test_what_is_the_machines_own_is_due_without_any_lease_and_without_an_end() -> None:
    own = opening(lease=None, ends_at=None)
    assert due([own], {}, NOW) == [own]
    assert due([opening(lease=None, ends_at=NOW)], {}, NOW) == []


# --- pieces that do not overlap


def test_the_same_hole_twice_is_one_that_lasts_as_long_as_the_last_of_them() -> None:
    assert pieces([opening(1), opening(2, ends_at=NOW + 2 * HOUR)]) == {WEB: Until(NOW + 2 * HOUR, (1, 2))}


def test_a_network_within_another_is_cut_out_of_it_only_if_it_is_open_for_longer() -> None:
    wide = opening(1, source="203.0.112.0/22", ends_at=NOW + HOUR)
    assert pieces([wide, opening(2, ends_at=NOW + HOUR)]) == {
        ("tcp", "8888", "203.0.112.0/22"): Until(NOW + HOUR, (1, 2))
    }
    assert pieces([wide, opening(2, ends_at=None, lease=None)]) == {
        ("tcp", "8888", "203.0.112.0/24"): Until(NOW + HOUR, (1,)),
        ("tcp", "8888", "203.0.114.0/23"): Until(NOW + HOUR, (1,)),
        ("tcp", "8888", "203.0.113.0/24"): Until(None, (1, 2)),
    }


def test_ranges_of_ports_that_overlap_are_cut_where_the_other_begins_and_ends() -> None:
    long, short = opening(1, ports=(8000, 9000)), opening(2, ports=(8500, 9500), source="203.0.113.7/32", ends_at=None)
    assert pieces([long, short]).keys() >= {
        ("tcp", "8000-8499", "203.0.113.0/24"),
        ("tcp", "8500-9000", "203.0.113.7/32"),
        ("tcp", "9001-9500", "203.0.113.7/32"),
    }


def test_neighbouring_ports_with_the_same_word_are_one_piece() -> None:
    assert list(pieces([opening(1, ports=(80, 89)), opening(1, ports=(90, 99))])) == [("tcp", "80-99", WEB[2])]


def test_families_and_protocols_have_nothing_to_do_with_each_other() -> None:
    every = [opening(1, source="0.0.0.0/0"), opening(2, source="::/0"), opening(3, protocol="udp", source="0.0.0.0/0")]
    assert {key: until.ids for key, until in pieces(every).items()} == {
        ("tcp", "8888", "0.0.0.0/0"): (1,),
        ("tcp", "8888", "::/0"): (2,),
        ("udp", "8888", "0.0.0.0/0"): (3,),
    }


ENDS = st.sampled_from([None, *(NOW + hours * HOUR for hours in (1, 2, 3))])
SOURCES = st.builds(
    lambda bits, length: ip_network((bits >> (8 - length) << (8 - length), 24 + length)),
    st.integers(0, 255),
    st.integers(0, 8),
)
PORTS = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda both: (min(both), max(both)))
MANY = st.lists(st.tuples(PORTS, SOURCES, ENDS), max_size=6).map(
    lambda found: [
        DesiredOpening(number, None, "tcp", *ports, source, end) for number, (ports, source, end) in enumerate(found, 1)
    ]
)


def lets_in(key: Key, port: int, source: Any) -> bool:
    first, _, last = key[1].partition("-")
    return int(first) <= port <= int(last or first) and source in ip_network(key[2])


@given(MANY, st.integers(1, 6), st.integers(0, 255))
def test_who_is_let_in_and_how_long_is_as_the_openings_say(wanted: list[DesiredOpening], port: int, host: int) -> None:
    """The last end of those that let him in; and by one piece alone, or the kernel would refuse them."""
    source = ip_address(host)
    letting = [each for each in wanted if each.first_port <= port <= each.last_port and source in each.source]
    found = [until for key, until in pieces(wanted).items() if lets_in(key, port, source)]
    assert len(found) == bool(letting)
    if letting:
        ends = [each.ends_at for each in letting]
        assert found[0].ends_at == (None if None in ends else max(end for end in ends if end))
        assert set(found[0].ids) >= {each.opening_id for each in letting}


@given(MANY)
def test_every_opening_is_in_some_piece_by_its_id(wanted: list[DesiredOpening]) -> None:
    assert {each for until in pieces(wanted).values() for each in until.ids} == {each.opening_id for each in wanted}


# --- what has to change


def test_rest_is_an_empty_plan_and_a_second_more_or_less_is_rest() -> None:
    assert plan({WEB: Until(NOW, (1,))}, {WEB: Until(NOW - timedelta(seconds=1), (1,))}) == []


def test_what_is_not_wanted_is_closed_before_anything_is_opened() -> None:
    other = ("udp", "53", "::/0")
    until = Until(NOW + HOUR, (1,))
    assert plan({WEB: until}, {other: until}) == [Close(other), Open(WEB, until)]


@pytest.mark.parametrize(
    "seen",
    [
        Until(NOW + 2 * HOUR, (1,)),
        Until(NOW, (1,)),
        Until(None, (1,)),
        Until(NOW + HOUR, (2,)),
        Until(NOW + HOUR, (1,), is_whole=False),
    ],
)
def test_what_is_open_until_another_moment_is_moved_and_never_closed(seen: Until) -> None:
    wanted = Until(NOW + HOUR, (1,))
    assert plan({WEB: wanted}, {WEB: seen}) == [Move(WEB, wanted)]


@pytest.mark.parametrize(
    ("one", "is_covered"),
    [
        (("tcp", "8888", "203.0.113.0/24"), True),
        (("tcp", "8888", "203.0.112.0/22"), True),
        (("tcp", "8000-9000", "0.0.0.0/0"), True),
        (("tcp", "8888", "203.0.113.0/25"), False),
        (("tcp", "8889-9000", "203.0.113.0/24"), False),
        (("udp", "8888", "203.0.113.0/24"), False),
        (("tcp", "8888", "::/0"), False),
        (("tcp", "8888", "203.0.113.0-203.0.113.255"), False),
    ],
)
def test_a_piece_is_covered_by_one_that_lets_in_no_less(one: Key, is_covered: bool) -> None:
    assert covers(one, WEB) is is_covered


NARROW = ("tcp", "8000-8010", "203.0.113.0/24")


@pytest.mark.parametrize(
    ("others", "is_so"),
    [
        ([("tcp", "8000-8020", "203.0.113.0/24")], True),
        ([("tcp", "8000-8010", "203.0.112.0/22")], True),
        ([("tcp", "7000-8004", "203.0.113.0/24"), ("tcp", "8005-9000", "0.0.0.0/0")], True),
        ([("tcp", "8000-8010", "203.0.113.0/25"), ("tcp", "8000-8010", "203.0.113.128/25")], True),
        ([("tcp", "8000-8009", "203.0.113.0/24")], False),
        ([("tcp", "8000-8010", "203.0.113.0/25")], False),
        ([("udp", "8000-8010", "203.0.113.0/24")], False),
        ([("tcp", "8000-8010", "::/0")], False),
        ([], False),
    ],
)
def test_a_piece_is_covered_by_several_that_together_let_in_no_less(others: list[Key], is_so: bool) -> None:
    assert is_covered(NARROW, others) is is_so


@given(MANY, MANY, st.data())
def test_whoever_is_let_in_by_what_is_covered_is_let_in_by_those_that_cover_it(
    before: list[DesiredOpening], after: list[DesiredOpening], data: st.DataObject
) -> None:
    keys = sorted(pieces(before))
    if keys:
        key, others = data.draw(st.sampled_from(keys)), pieces(after)
        pairs = itertools.product(range(1, 7), ip_network(key[2]))
        said = all(any(lets_in(each, *pair) for each in others) for pair in pairs if lets_in(key, *pair))
        assert is_covered(key, others) is said


# --- what nft and firewalld tell, and are told


def listed(name: str) -> str:
    return (RECORDED / name).read_text()


def test_the_members_of_a_set_are_read_as_nft_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "run", lambda argv, **_: listed(f"nft-set-{argv[-1]}.json"))
    assert Sets(FIREWALL).look(NOW) == {
        ("tcp", "8888-8890", "203.0.113.0/24"): Until(NOW + timedelta(seconds=3599), (12, 13)),
        ("tcp", "22", "198.51.100.7/32"): Until(None, (15,)),
        ("udp", "53", "0.0.0.0/0"): Until(NOW + timedelta(seconds=1), (14,)),
        ("tcp", "8888", "::/0"): Until(NOW + timedelta(seconds=863999), (16,)),
        ("tcp", "9000-9001", "2001:db8::1/128"): Until(NOW + timedelta(seconds=3599), (17,)),
    }


def test_one_transaction_takes_out_what_goes_and_what_moves_before_it_puts_in(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def run(argv: list[str], *, stdin: str = "") -> str:
        told.append(stdin)
        return listed(f"nft-set-{argv[-1]}.json") if "-j" in argv else ""

    monkeypatch.setattr(nft, "run", run)
    owner = Sets(FIREWALL)
    owner.look(NOW)
    steps = [
        Close(("tcp", "22", "198.51.100.7/32")),
        Move(("tcp", "8888-8890", "203.0.113.0/24"), Until(NOW + 2 * HOUR, (12, 13))),
        Open(("udp", "5000", "::/0"), Until(None, (18,))),
    ]
    owner.carry_out(steps, NOW)
    assert told[-1].splitlines() == [
        "delete element inet remotegpu openings { tcp . 22 . 198.51.100.7 }",
        "delete element inet remotegpu openings { tcp . 8888-8890 . 203.0.113.0/24 }",
        'add element inet remotegpu openings { tcp . 8888-8890 . 203.0.113.0/24 timeout 7200000ms comment "12 13" }',
        'add element inet remotegpu openings6 { udp . 5000 . ::/0 comment "18" }',
    ]


FROM_EVERYBODY = ("udp", "5000-5009", "::/0")
RULE = 'family="ipv4" source address="203.0.113.0/24" port port="8888" protocol="tcp" accept'
RULE6 = 'family="ipv6" port port="5000-5009" protocol="udp" accept'


@dataclass
class Zone:
    """The rules that firewalld lists, and what it is told beside the question for them."""

    rules: list[str] = field(default_factory=list)
    told: list[list[str]] = field(default_factory=list)

    def run(self, argv: list[str]) -> str:
        assert argv[:2] == ["firewall-cmd", "--zone=remotegpu"]
        if argv[2:] == ["--list-rich-rules"]:
            return "\n".join(self.rules)
        self.told.append(argv[2:])
        return "success"


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Zone:
    found = Zone()
    monkeypatch.setattr(openings, "run", found.run)
    monkeypatch.setattr(nft, "run", Kernel().run)
    return found


IN_THE_ZONE = {
    ("tcp", "5000", "0.0.0.0/0"),
    ("udp", "5000-5009", "::/0"),
    ("tcp", "8090", "172.17.0.1/32"),
    ("tcp", "8100", "172.17.0.1/32"),
    ("udp", "8101", "172.17.0.1/32"),
    ("tcp", "8090", "fd52:4d47:5055::1/128"),
    ("tcp", "8100", "fd52:4d47:5055::1/128"),
    ("udp", "8101", "fd52:4d47:5055::1/128"),
}


def test_our_rules_of_a_real_firewalld_are_known_among_all_of_its_zone(zone: Zone) -> None:
    zone.rules += listed("firewalld-rich-rules.txt").splitlines()
    assert set(openings.zone_rules()) == IN_THE_ZONE


def test_what_firewalld_lets_in_is_named_by_verification_unless_it_is_the_machines_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openings, "machines_own", lambda: frozenset(IN_THE_ZONE - {("tcp", "8100", "172.17.0.1/32")}))
    table = listed("nft-firewalld.txt")
    assert list(verify._opened_by_firewalld(table)) == [
        "firewalld still lets in by `ip saddr 172.17.0.1 tcp dport 8100 accept`"
    ]
    assert "8100" not in firewall.without_openings(table)
    assert firewall.plain_rules(table) == firewall.plain_rules(firewall.without_openings(table))


def test_a_member_that_is_left_is_named_by_verification_unless_it_is_the_machines_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = frozenset({("tcp", "22", "198.51.100.7/32"), ("udp", "53", "0.0.0.0/0")})
    monkeypatch.setattr(openings, "machines_own", lambda: own)
    assert list(verify._openings(listed("nft-table.txt"))) == [
        "set openings still lets in tcp . 8888-8890 . 203.0.113.0/24",
        "set openings6 still lets in tcp . 8888 . ::/0",
        "set openings6 still lets in tcp . 9000-9001 . 2001:db8::1",
    ]


def test_firewalld_is_told_all_that_has_one_end_in_one_call(zone: Zone) -> None:
    owner = Firewalld(FIREWALL)
    assert owner.look(NOW) == {}
    until, ssh = Until(NOW + HOUR, (1,)), ("tcp", "22", WEB[2])
    owner.carry_out([Open(WEB, until), Open(FROM_EVERYBODY, until), Open(ssh, Until(None, (2,)))], NOW)
    assert zone.told == [
        [f'--add-rich-rule=rule priority="32001" {each}' for each in (RULE, RULE6)] + ["--timeout=3600"],
        ['--add-rich-rule=rule priority="32001" ' + RULE.replace("8888", "22")],
    ]
    zone.rules += [word.partition("=")[2] for words in zone.told for word in words if "rule" in word]
    assert owner.look(NOW) == {WEB: until, FROM_EVERYBODY: until, ssh: Until(None, (2,))}


def test_firewalld_gets_the_new_rule_before_the_old_one_goes(zone: Zone) -> None:
    zone.rules += [f'rule priority="32001" {RULE}']
    owner = Firewalld(FIREWALL)
    assert owner.look(NOW) == {WEB: Until(None, (), is_whole=False)}
    owner.carry_out([Move(WEB, Until(NOW + HOUR, (1,)))], NOW)
    assert zone.told == [
        [f'--add-rich-rule=rule priority="32002" {RULE}', "--timeout=3600"],
        [f'--remove-rich-rule=rule priority="32001" {RULE}'],
    ]


@pytest.mark.parametrize("left", list(itertools.combinations(PRIORITIES, 2)))
def test_firewalld_that_was_left_with_two_is_left_with_one_of_a_known_end(zone: Zone, left: tuple[int, int]) -> None:
    """Never with one alone in between whose end nobody knows: if this is cut off too, the next look would trust it."""
    zone.rules += [f'rule priority="{each}" {RULE}' for each in left]
    owner, (free,) = Firewalld(FIREWALL), set(PRIORITIES) - set(left)
    assert not owner.look(NOW)[WEB].is_whole
    owner.carry_out([Move(WEB, Until(NOW + HOUR, (1,)))], NOW)
    assert zone.told == [
        [f'--add-rich-rule=rule priority="{free}" {RULE}', "--timeout=3600"],
        [f'--remove-rich-rule=rule priority="{each}" {RULE}' for each in left],
    ]


def test_firewalld_that_was_left_with_all_of_them_is_left_with_one(zone: Zone) -> None:
    zone.rules += [f'rule priority="{each}" {RULE}' for each in PRIORITIES]
    owner = Firewalld(FIREWALL)
    assert not owner.look(NOW)[WEB].is_whole
    owner.carry_out([Move(WEB, Until(NOW + HOUR, (1,)))], NOW)
    assert zone.told == [
        [f'--remove-rich-rule=rule priority="32003" {RULE}'],
        [f'--add-rich-rule=rule priority="32003" {RULE}', "--timeout=3600"],
        [f'--remove-rich-rule=rule priority="{each}" {RULE}' for each in PRIORITIES[:2]],
    ]


@pytest.mark.parametrize("left_s", [0.9, -5.0])
def test_firewalld_keeps_nothing_that_is_over_within_a_second(zone: Zone, left_s: float) -> None:
    """Without a second left it would take the rule for one without an end."""
    owner = Firewalld(FIREWALL)
    owner.look(NOW)
    owner.carry_out([Open(WEB, Until(NOW + timedelta(seconds=left_s), (1,)))], NOW)
    assert zone.told == []


def test_rules_of_others_are_none_of_our_openings(zone: Zone) -> None:
    zone.rules += [
        'rule family="ipv4" source address="192.0.2.10" port port="9100" protocol="tcp" accept',
        f'rule priority="100" {RULE}',
        'rule priority="32001" family="ipv4" source address="192.0.2.10" service name="http" accept',
        'rule priority="32001" family="ipv4" source address="192.0.2.10" port port="9100" protocol="tcp" drop',
    ]
    assert Firewalld(FIREWALL).look(NOW) == {}


# --- at work


class Kernel:
    """What nft would do with our commands, told and answered in its own words."""

    def __init__(self) -> None:
        self.sets: dict[str, dict[str, tuple[float | None, str]]] = {"openings": {}, "openings6": {}}
        self.is_loaded = True
        self.loaded: list[str] = []
        self.refuses: str | None = None
        self.transactions = 0

    def run(self, argv: list[str], *, stdin: str | None = None) -> str:
        words = argv[1:]
        if words == ["list", "tables", "inet"]:
            return "table inet remotegpu\n" if self.is_loaded else ""
        if words[:2] == ["-j", "list"]:
            return json.dumps({"nftables": [{"set": {"name": words[-1], "elem": self.listed(words[-1])}}]})
        if words[:2] == ["-f", "-"]:
            if self.refuses:
                raise ToolFailed(self.refuses)
            self.transactions += 1
            for line in (stdin or "").splitlines():
                self.change(*re.findall(r"(add|delete) element inet remotegpu (\w+) { (.*) }", line)[0])
        elif words[0] == "-f":
            self.is_loaded = True
            self.loaded.append(words[1])
        return ""

    def left_s(self, key: Key) -> float | None:
        """How long what is open to IPv4 lasts."""
        return self.sets["openings"][" . ".join(key)][0]

    def passes(self, time: timedelta) -> None:
        for members in self.sets.values():
            for key, (left_s, comment) in list(members.items()):
                members[key] = (None if left_s is None else left_s - time.total_seconds(), comment)

    def change(self, what: str, name: str, element: str) -> None:
        key = element.split(" timeout")[0].split(" comment")[0]
        if what == "delete":
            del self.sets[name][key]
            return
        assert key not in self.sets[name], "the kernel would refuse it"
        timeout, comment = re.search(r"timeout (\d+)ms", element), re.search('comment "(.*)"', element)
        self.sets[name][key] = (int(timeout[1]) / 1000 if timeout else None, comment[1] if comment else "")

    def listed(self, name: str) -> list[Any]:
        found = []
        for key, (left_s, comment) in self.sets[name].items():
            ends = {} if left_s is None else {"timeout": int(left_s), "expires": int(left_s)}
            found.append({"elem": {"val": {"concat": key.split(" . ")}, "comment": comment, **ends}})
        return found


@dataclass
class AtWork:
    """A host of nftables; its portal wants `desired`."""

    kernel: Kernel
    state_dir: Path
    desired: list[DesiredOpening] = field(default_factory=list)
    frozen: str | None = None

    def __post_init__(self) -> None:
        self.told = self.state_dir / "firewall.json"
        self.told.write_text('{"backend": "nftables", "table": "remotegpu", "rules": "/etc/remotegpu/firewall.nft"}')
        self.start()

    def start(self) -> None:
        """A process that begins."""
        self.clock = Clock(self.state_dir)
        self.openings = Openings(self.held, self.clock, self.told)

    def held(self) -> Held:
        return Held("e", 1, Desired(7, "e", 1, (), (), (), 15, 1, tuple(self.desired)), frozen=self.frozen)

    def reported(self) -> list[tuple[int, str]]:
        return [(each["id"], each["state"]) for each in self.openings.report()]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AtWork:
    kernel = Kernel()
    monkeypatch.setattr(nft, "run", kernel.run)
    return AtWork(kernel, tmp_path)


def soon(**fields: Any) -> DesiredOpening:
    return opening(**{"ends_at": now() + HOUR, **fields})


LEASE = {7: now() + 2 * HOUR}


def test_what_is_due_is_opened_and_then_the_host_is_at_rest(host: AtWork) -> None:
    host.desired = [soon(), soon(opening_id=13, source="::/0", protocol="udp")]
    host.openings.settle(LEASE)
    assert host.reported() == [(12, "open"), (13, "open")]
    host.openings.settle(LEASE)
    assert host.kernel.transactions == 1


def test_an_opening_of_a_lease_that_is_not_open_here_stays_closed(host: AtWork) -> None:
    host.desired = [soon()]
    host.openings.settle({})
    assert host.reported() == [(12, "closed")]
    assert host.kernel.transactions == 0


def test_what_a_restart_of_the_firewall_dropped_is_made_again_for_the_rest_of_its_time(host: AtWork) -> None:
    host.desired = [soon(ends_at=now() + HOUR / 4)]
    host.openings.settle(LEASE)
    host.kernel.sets["openings"].clear()
    host.kernel.is_loaded = False
    host.openings.settle(LEASE)
    (left_s, _) = host.kernel.sets["openings"]["tcp . 8888 . 203.0.113.0/24"]
    assert left_s is not None
    assert 800 < left_s <= 900
    assert host.kernel.loaded == ["/etc/remotegpu/firewall.nft"]


def test_the_leases_end_closes_whatever_else_is_wanted(host: AtWork) -> None:
    host.desired = [soon(), soon(opening_id=13, lease=None, ends_at=None, source="198.51.100.0/24")]
    host.openings.settle(LEASE)
    host.openings.settle({})
    assert list(host.kernel.sets["openings"]) == ["tcp . 8888 . 198.51.100.0/24"]
    assert host.reported() == [(12, "closed"), (13, "open")]


def test_what_somebody_else_has_put_into_our_sets_is_closed(host: AtWork) -> None:
    host.kernel.sets["openings"]["tcp . 1-65535 . 0.0.0.0/0"] = (None, "")
    host.openings.settle(LEASE)
    assert host.kernel.sets["openings"] == {}


def test_what_cannot_be_closed_is_told_as_open(host: AtWork) -> None:
    host.desired = [soon()]
    host.openings.settle(LEASE)
    host.desired, host.kernel.refuses = [], "nft exited with 1: Operation not permitted"
    with pytest.raises(ToolFailed):
        host.openings.settle(LEASE)
    assert host.reported() == [(12, "open")]


def test_what_cannot_be_opened_is_told_with_the_reason(host: AtWork) -> None:
    host.desired, host.kernel.refuses = [soon()], "nft exited with 1: Operation not permitted"
    with pytest.raises(ToolFailed):
        host.openings.settle(LEASE)
    assert host.openings.report() == [{"id": 12, "state": "failed", "error": host.kernel.refuses}]


def test_a_host_without_our_firewall_says_so_and_how_it_gets_one(host: AtWork) -> None:
    host.desired = [soon()]
    host.told.unlink()
    host.openings.settle(LEASE)
    (reported,) = host.openings.report()
    assert reported["state"] == "failed"
    assert "run the role firewall" in reported["error"]


@pytest.mark.parametrize("offset_s", [61.0, -61.0])
def test_a_clock_that_is_off_opens_nothing_and_still_closes(host: AtWork, offset_s: float) -> None:
    host.kernel.sets["openings"]["tcp . 9 . 0.0.0.0/0"] = (60, "9")
    host.desired = [soon()]
    host.clock.heard(now() + timedelta(seconds=offset_s))
    host.openings.settle(LEASE)
    assert host.kernel.sets["openings"] == {}
    (reported,) = host.openings.report()
    assert (reported["state"], "clock" in reported["error"]) == ("failed", True)
    host.clock.heard(now() + timedelta(seconds=1))
    host.openings.settle(LEASE)
    assert host.reported() == [(12, "open")]


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> HostTime:
    return HostTime(NOW).in_place_of(monkeypatch, openings)


def test_a_clock_behind_what_was_known_before_a_boot_opens_nothing(host: AtWork, time: HostTime) -> None:
    """Without a battery, before the portal could be asked."""
    host.clock.heard(NOW)
    time.boots_anew(after=-HOUR)
    host.start()
    host.desired = [opening()]
    host.openings.settle({7: NOW + HOUR})
    assert host.reported() == [(12, "failed")]
    assert host.kernel.sets["openings"] == {}


@pytest.fixture
def hours_open(host: AtWork, time: HostTime) -> AtWork:
    """One is open for 8 hours, ordered by the portal; it speaks no more, and 5 hours have passed."""
    host.clock.heard(NOW)
    host.desired = [opening(ends_at=NOW + 8 * HOUR)]
    host.openings.settle({7: NOW + 9 * HOUR})
    time.passes(5 * HOUR)
    host.kernel.passes(5 * HOUR)
    host.openings.settle({7: NOW + 9 * HOUR})
    assert host.kernel.left_s(WEB) == 3 * 3600
    return host


@pytest.mark.parametrize("is_restarted", [False, True], ids=["the same process", "the next"])
def test_a_clock_that_goes_back_gives_nothing_a_later_end(
    hours_open: AtWork, time: HostTime, is_restarted: bool
) -> None:
    host, leases = hours_open, {7: NOW + 9 * HOUR}
    time.is_set(-2 * HOUR)
    if is_restarted:
        host.start()
    host.openings.settle(leases)
    assert host.kernel.left_s(WEB) == 3 * 3600
    assert host.reported() == [(12, "open")]
    host.kernel.sets["openings"].clear()
    host.openings.settle(leases)
    assert host.kernel.sets["openings"] == {}, "until when it would be open now nobody knows"
    assert host.reported() == [(12, "failed")]
    time.is_set(2 * HOUR)
    host.openings.settle(leases)
    assert host.kernel.left_s(WEB) == 3 * 3600
    assert host.reported() == [(12, "open")]


@pytest.mark.parametrize("is_restarted", [False, True], ids=["the same process", "the next"])
def test_by_a_clock_that_went_back_an_earlier_end_is_taken_over_and_what_is_over_closed(
    hours_open: AtWork, time: HostTime, is_restarted: bool
) -> None:
    host = hours_open
    time.is_set(-2 * HOUR)
    if is_restarted:
        host.start()
    host.openings.settle({7: NOW + 4 * HOUR})
    assert host.kernel.left_s(WEB) == 3600
    host.openings.settle({})
    assert host.kernel.sets["openings"] == {}


def test_a_clock_that_goes_forward_closes_what_is_over_by_it_and_opens_nothing(
    hours_open: AtWork, time: HostTime
) -> None:
    host = hours_open
    time.is_set(2 * HOUR)
    host.desired += [opening(13, source="198.51.100.0/24", ends_at=NOW + 24 * HOUR)]
    host.openings.settle({7: NOW + 24 * HOUR})
    assert host.reported() == [(12, "open"), (13, "failed")]
    time.is_set(2 * HOUR)
    host.openings.settle({7: NOW + 24 * HOUR})
    assert host.kernel.sets["openings"] == {}


def test_after_a_boot_it_is_opened_for_the_rest_of_its_time_by_a_clock_that_went_on(
    hours_open: AtWork, time: HostTime
) -> None:
    host = hours_open
    time.boots_anew(after=HOUR / 2)
    host.kernel.sets["openings"].clear()
    host.start()
    host.openings.settle({7: NOW + 9 * HOUR})
    assert host.kernel.left_s(WEB) == 2.5 * 3600


def test_a_clock_that_is_off_closes_nothing_that_is_still_due(host: AtWork) -> None:
    """Though by now its piece would be cut in another way."""
    host.desired = [soon(source="203.0.112.0/22")]
    host.openings.settle(LEASE)
    before = dict(host.kernel.sets["openings"])
    host.desired += [soon(opening_id=13, ends_at=None, lease=None)]
    host.clock.heard(now() + timedelta(seconds=90))
    host.openings.settle(LEASE)
    assert host.kernel.sets["openings"] == before
    assert host.reported() == [(12, "open"), (13, "open")]


def test_the_end_of_another_lease_opens_nothing_by_a_clock_that_was_heard_to_be_off(host: AtWork) -> None:
    host.desired = [soon()]
    host.clock.heard(now() + timedelta(seconds=90))
    host.openings.settle(LEASE)
    host.start()  # as a lease's end asks, by a process that hears no clock
    host.openings.settle(LEASE)
    assert host.reported() == [(12, "failed")]
    assert host.kernel.sets["openings"] == {}


def test_the_end_of_a_lease_on_a_frozen_host_closes_its_own_and_opens_nothing(host: AtWork) -> None:
    host.desired = [soon()]
    host.openings.settle(LEASE)
    host.desired += [soon(opening_id=13, lease=8, source="198.51.100.0/24")]
    host.frozen = "the portal was restored"
    host.openings.settle({8: LEASE[7]})
    assert host.kernel.sets["openings"] == {}


def test_a_look_tells_what_there_is_and_changes_nothing(host: AtWork) -> None:
    host.desired = [soon()]
    host.openings.settle(LEASE)
    host.desired = []
    host.openings.look(LEASE)
    assert host.reported() == [(12, "open")]
    host.kernel.sets["openings"].clear()
    host.desired = [soon()]
    host.openings.look(LEASE)
    assert host.reported() == [(12, "closed")]
    assert host.kernel.transactions == 1


# --- at work beside firewalld


@dataclass
class Daemon:
    """firewalld and the kernel of one host. Each call that changes something is counted, and one of them is cut off."""

    kernel: Kernel = field(default_factory=Kernel)
    rules: dict[str, int | None] = field(default_factory=dict)  # each with its timeout
    calls: int = 0
    cut_off_at: int | None = None
    is_carried_out: bool = False  # the one that is cut off
    after_each: Callable[[], None] = lambda: None

    def run(self, argv: list[str], *, stdin: str | None = None) -> str:
        if argv[0] == "nft" and argv[1] != "-f":
            return self.kernel.run(argv, stdin=stdin)
        if "--list-rich-rules" in argv:
            return "\n".join(self.rules)
        self.calls += 1
        is_cut_off = self.calls == self.cut_off_at
        if not is_cut_off or self.is_carried_out:
            self.kernel.run(argv, stdin=stdin) if argv[0] == "nft" else self.change(argv[2:])
            self.after_each()
        if is_cut_off:
            raise ToolFailed(f"{argv[0]} gave no answer within 30 s")
        return "success"

    def change(self, words: list[str]) -> None:
        timeouts = [int(word.removeprefix("--timeout=")) for word in words if word.startswith("--timeout=")]
        for word in words:
            what, _, rule = word.partition("=")
            if what == "--add-rich-rule":
                self.rules.setdefault(rule, *(timeouts or [None]))  # it warns of one that is there, and leaves it
            elif what == "--remove-rich-rule":
                self.rules.pop(rule, None)

    def let_in(self) -> dict[Key, list[int | None]]:
        """The timeouts under which the zone lets in each piece."""
        found: dict[Key, list[int | None]] = {}
        for rule, timeout in self.rules.items():
            (key,) = openings.read_rules(rule)
            found.setdefault(key, []).append(timeout)
        return found

    def marked(self) -> dict[Key, int | None]:
        """What the sets mark, and how long."""
        members = [each for of_family in self.kernel.sets.values() for each in of_family.items()]
        return {tuple(key.split(" . ")): None if left_s is None else int(left_s) for key, (left_s, _) in members}


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, time: HostTime) -> Daemon:
    found = Daemon()
    monkeypatch.setattr(nft, "run", found.run)
    monkeypatch.setattr(openings, "run", found.run)
    return found


@pytest.fixture
def zoned(daemon: Daemon, tmp_path: Path) -> AtWork:
    host = AtWork(daemon.kernel, tmp_path)
    host.told.write_text('{"backend": "firewalld", "table": "remotegpu", "rules": "/etc/remotegpu/firewall.nft"}')
    return host


OTHER = ("tcp", "9000", "203.0.113.0/24")
TWO_LEASES = {7: NOW + 9 * HOUR}


def settled(host: AtWork) -> bool:
    """One process looks and acts; it may be cut off."""
    host.start()
    try:
        host.openings.settle(TWO_LEASES)
    except ToolFailed:
        return False
    return True


@pytest.mark.parametrize("is_carried_out", [False, True], ids=["failed", "died after it"])
@pytest.mark.parametrize("hours", [1, 3], ids=["earlier", "later"])
def test_an_end_that_is_moved_is_the_rules_own_wherever_the_first_try_is_cut_off(
    zoned: AtWork, daemon: Daemon, hours: int, is_carried_out: bool
) -> None:
    """Also the second try, and also by the agent's death: what is on the host says that it is not done."""
    cuts = [cut for first in range(1, 6) for cut in ([first], *([first, second] for second in range(1, 6)))]
    most = 0
    for cut in cuts:
        daemon.rules.clear()
        daemon.kernel.sets["openings"].clear()
        zoned.desired = [opening(ends_at=NOW + 2 * HOUR)]
        assert settled(zoned)
        assert (daemon.let_in(), daemon.marked()) == ({WEB: [7200]}, {WEB: 7200})

        zoned.desired = [
            opening(ends_at=NOW + hours * HOUR),
            opening(13, ports=(9000, 9000), ends_at=NOW + hours * HOUR),
        ]
        for at in cut:
            daemon.calls, daemon.cut_off_at, daemon.is_carried_out = 0, at, is_carried_out
            settled(zoned)
            most = max(most, daemon.calls)
        daemon.cut_off_at = None
        assert settled(zoned)
        wanted = hours * 3600
        assert (daemon.let_in(), daemon.marked()) == (
            {WEB: [wanted], OTHER: [wanted]},
            {WEB: wanted, OTHER: wanted},
        ), cut
        daemon.calls = 0
        assert settled(zoned)
        assert daemon.calls == 0, "and then it is at rest"
    assert most == 4, "every call was cut off once"


def test_nobody_comes_in_by_firewalld_without_the_mark_by_which_he_is_cut_off(zoned: AtWork, daemon: Daemon) -> None:
    def all_is_marked() -> None:
        assert daemon.let_in().keys() <= daemon.marked().keys()

    daemon.after_each = all_is_marked
    zoned.desired = [opening(), opening(13, ports=(9000, 9000))]
    assert settled(zoned)
    zoned.desired = [opening(ends_at=NOW + 2 * HOUR)]
    assert settled(zoned)
    zoned.desired = []
    assert settled(zoned)
    assert (daemon.let_in(), daemon.marked()) == ({}, {})


def test_what_is_only_cut_in_another_way_is_never_closed(zoned: AtWork, daemon: Daemon) -> None:
    """Wider, and cut apart by one within it that is open for longer, and whole again."""
    before, wider = opening(ports=(8000, 8010)), opening(13, ports=(8000, 8020))
    within = opening(14, ports=(8005, 8005), source="203.0.113.7/32", ends_at=NOW + 2 * HOUR)

    def all_are_let_in() -> None:
        for places in (daemon.let_in(), daemon.marked()):
            for port, source in itertools.product((8000, 8005, 8010), ("203.0.113.7", "203.0.113.200")):
                assert any(lets_in(key, port, ip_address(source)) for key in places)

    zoned.desired = [before]
    assert settled(zoned)
    daemon.after_each = all_are_let_in
    for desired in ([wider], [wider, within], [wider]):
        zoned.desired = desired
        assert settled(zoned)
        assert daemon.let_in().keys() == daemon.marked().keys() == pieces(desired).keys()


def test_what_goes_is_closed_before_a_part_of_it_is_opened(zoned: AtWork, daemon: Daemon) -> None:
    """A port that goes serves nobody while the rest is opened."""
    zoned.desired = [opening(ports=(8000, 8020))]
    assert settled(zoned)
    seen: list[bool] = []
    daemon.after_each = lambda: seen.append(
        any(lets_in(key, 8015, ip_address("203.0.113.7")) for key in daemon.let_in())
    )
    zoned.desired = [opening(ports=(8000, 8010))]
    assert settled(zoned)
    assert seen == [False] * 3
