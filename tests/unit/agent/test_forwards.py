"""What a gateway's agent decides: pure, without a kernel. tests/gateway shows it in one."""

from __future__ import annotations

import ipaddress
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import conntrack, nft
from remotegpu_agent.forwards import Changes, Forwards, Seen, plan, way_of
from remotegpu_agent.journal import Journal
from remotegpu_agent.observe import ports
from remotegpu_agent.observe.tools import ToolFailed
from remotegpu_agent.protocol import DesiredForward, now

NOW = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)
END = NOW + timedelta(hours=2)
NETWORKS = [ipaddress.ip_network("10.0.0.0/24"), ipaddress.ip_network("fd00:5::/64")]
REST = Changes()


def forward(forward_id: int = 5, **changes: Any) -> DesiredForward:
    given: dict[str, Any] = {
        "lease_id": 7,
        "protocol": "tcp",
        "public_port": 20017,
        "source": "203.0.113.0/24",
        "target_address": "10.0.0.17",
        "target_port": 22,
        "ends_at": END,
        **changes,
    }
    given["source"] = ipaddress.ip_network(given["source"])
    given["target_address"] = ipaddress.ip_address(given["target_address"])
    return DesiredForward(forward_id=forward_id, **given)


def seen(*forwards: DesiredForward, off_s: float = 0) -> Seen:
    there = {way_of(each): each.ends_at + timedelta(seconds=off_s) for each in forwards}
    return Seen(there, dict(there))


def decide(wanted: list[DesiredForward], there: Seen, known: list[DesiredForward] | None = None) -> Changes:
    return plan(wanted, {way_of(each) for each in known or []}, there, NETWORKS, at=NOW)


def test_what_is_wanted_and_there_is_left_alone() -> None:
    five, six = forward(), forward(6, public_port=20018, source="::/0", target_address="fd00:5::17")
    assert decide([five, six], seen(five, six), [five, six]) == REST
    assert decide([five], seen(five, off_s=-1), [five]) == REST, "nft tells in whole seconds"
    assert decide([], Seen()) == REST


def test_what_is_missing_is_opened_and_what_nobody_wants_is_closed() -> None:
    five, six = forward(), forward(6, public_port=20018)
    assert decide([five], Seen()) == Changes(to_open=(five,))
    assert decide([], seen(five), [five]) == Changes(to_close=(way_of(five),))
    assert decide([six], seen(five)) == Changes(to_close=(way_of(five),), to_open=(six,)), "somebody else's, too"


def test_after_the_rules_were_flushed_it_is_made_again_until_the_same_end() -> None:
    five = forward()
    assert decide([five], Seen(), [five]) == Changes(to_open=(five,))


def test_one_that_is_in_one_place_only_is_made_whole() -> None:
    five = forward()
    whole = seen(five)
    for half in (Seen(led=whole.led), Seen(passed=whole.passed)):
        assert decide([five], half, [five]) == Changes(to_open=(five,))


def test_another_end_is_taken_over_and_no_end_is_none() -> None:
    five, later = forward(), forward(ends_at=END + timedelta(hours=1))
    assert decide([later], seen(five), [five]) == Changes(to_open=(later,))
    endless = Seen(dict.fromkeys(seen(five).led), dict.fromkeys(seen(five).led))
    assert decide([five], endless, [five]) == Changes(to_open=(five,))


def test_what_has_ended_is_closed_though_the_kernel_has_let_it_go() -> None:
    """Its connections are to be forgotten as well."""
    over = forward(ends_at=NOW)
    assert decide([over], Seen(), [over]) == Changes(to_close=(way_of(over),))
    assert decide([over], Seen()) == REST


def test_the_next_lease_gets_the_port_after_the_one_before_has_lost_it() -> None:
    before, after = forward(), forward(9, target_address="10.0.0.18")
    assert decide([after], seen(before), [before]) == Changes(to_close=(way_of(before),), to_open=(after,))
    elsewhere = forward(source="198.51.100.0/24")
    assert decide([elsewhere], seen(before), [before]) == Changes(to_close=(way_of(before),), to_open=(elsewhere,))


def test_a_target_outside_the_gateways_networks_is_refused() -> None:
    five, astray = forward(), forward(6, public_port=20018, target_address="192.0.2.1")
    changes = decide([five, astray], seen(astray))
    assert changes.to_open == (five,)
    assert changes.to_close == (way_of(astray),), "and closed, if it was open"
    assert changes.refused == {6: "192.0.2.1 is in none of this gateway's networks"}


def test_a_port_serves_one() -> None:
    five, six = forward(), forward(6, source="0.0.0.0/0")
    changes = decide([six, five], Seen())
    assert changes.to_open == (five,)
    assert changes.refused == {6: "port 20017/tcp is forward 5's"}
    assert decide([five, forward(6, protocol="udp")], Seen()).refused == {}


# --- what is said where the kernel cannot be asked, or may not be told


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """A gateway whose kernel takes everything and has nothing."""
    facts = tmp_path / "gateway.json"
    facts.write_text(json.dumps({"schema": 1, "networks": [str(each) for each in NETWORKS]}))
    monkeypatch.setattr(nft, "is_loaded", lambda _table: True)
    monkeypatch.setattr(nft, "members", lambda *_names, **_how: [])
    monkeypatch.setattr(nft, "apply", list)
    monkeypatch.setattr(conntrack, "flows", list)
    monkeypatch.setattr(conntrack, "forget", lambda ended: len(list(ended)))
    monkeypatch.setattr(ports, "sockets", list)
    return Forwards(tmp_path, Journal(tmp_path / "journal.jsonl"), facts=facts)


def lasting(forward_id: int = 5, **changes: Any) -> DesiredForward:
    return forward(forward_id, **{"ends_at": now() + timedelta(hours=1), **changes})


def refuse(*_anything: object) -> Any:
    raise ToolFailed("nft gave no answer within 30 s")


def test_what_was_not_seen_closed_is_told_as_open(gateway: Forwards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the portal would give its port to the next."""
    assert gateway.settle([lasting(5), lasting(6, public_port=20018)])
    monkeypatch.setattr(nft, "is_loaded", refuse)
    assert not gateway.settle([lasting(6, public_port=20018)])
    why = "nft gave no answer within 30 s"
    assert gateway.report() == [
        {"id": 5, "state": "open", "error": why},
        {"id": 6, "state": "failed", "error": why},
    ]


def test_by_a_clock_that_is_not_believed_nothing_is_opened_and_everything_closed(gateway: Forwards) -> None:
    five, six = lasting(5), lasting(6, public_port=20018)
    assert gateway.settle([five])
    assert gateway.settle([six], doubt="this clock is off")
    assert gateway.report() == [{"id": 6, "state": "failed", "error": "this clock is off"}]
    assert gateway.ends() == [], "it was not opened, and the other is closed"


@pytest.mark.parametrize(
    ("seen_s", "given_s"), [(7200, [3600]), (1800, []), (None, [3600])], ids=["earlier", "later", "endless"]
)
def test_by_a_clock_that_is_not_believed_no_end_is_made_later(
    gateway: Forwards, monkeypatch: pytest.MonkeyPatch, seen_s: float | None, given_s: list[float]
) -> None:
    """What the kernel has was counted by its own time, and what is led stays led."""
    five, six, told = lasting(5), lasting(6, public_port=20018), list[str]()

    def members(_table: str, name: str, kind: str = "set", *, at: datetime) -> list[nft.Member]:
        if name not in ("forwards", "flows"):
            return []
        key = tuple(str(part) for part in way_of(five))
        end = None if seen_s is None else at + timedelta(seconds=seen_s)
        return [nft.Member(key[:3], end, key[3:]) if kind == "map" else nft.Member(key, end)]

    monkeypatch.setattr(nft, "members", members)
    monkeypatch.setattr(nft, "apply", told.extend)
    assert gateway.settle([five, six], doubt="this clock went back")
    assert gateway.report() == [
        {"id": 5, "state": "open", "error": None},
        {"id": 6, "state": "failed", "error": "this clock went back"},
    ]
    added = [line for line in told if line.startswith("add element")]
    ends = [round(int(line.split("timeout ")[1].split("ms")[0]) / 1000) for line in added]
    assert ends == given_s * 2, "in both places"


def test_a_port_that_a_program_of_the_gateway_holds_is_told_beside_what_is_open(
    gateway: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        lasting(5),
        lasting(6, public_port=20018),
        lasting(7, public_port=20019),
        lasting(8, public_port=50000, protocol="udp"),
    ]

    def members(_table: str, name: str, kind: str = "set", **_how: Any) -> list[nft.Member]:
        if name not in ("forwards", "flows"):
            return []
        keys = [tuple(str(part) for part in way_of(each)) for each in wanted]
        ends = [each.ends_at for each in wanted]
        if kind == "map":
            return [nft.Member(key[:3], end, key[3:]) for key, end in zip(keys, ends, strict=True)]
        return [nft.Member(key, end) for key, end in zip(keys, ends, strict=True)]

    def listens(protocol: str, address: str, port: int) -> ports.Socket:
        state = {"tcp": 0x0A, "udp": 0x07}[protocol]
        return ports.Socket(protocol, address, port, state, uid=0, inode=1, remote="0.0.0.0:0")

    monkeypatch.setattr(nft, "members", members)
    monkeypatch.setattr(ports, "first_ephemeral", lambda: 32768)
    monkeypatch.setattr(ports, "_programs_by_inode", lambda: {1: "sshd"})
    monkeypatch.setattr(
        ports, "sockets",
        lambda: [
            listens("tcp", "0.0.0.0", 20017), listens("tcp", "127.0.0.1", 20018), listens("udp", "::", 20019),
            listens("udp", "0.0.0.0", 50000),
        ],
    )  # fmt: skip
    assert gateway.settle(wanted)
    assert [(each["id"], each["state"], each["error"]) for each in gateway.report()] == [
        (5, "open", "sshd on this gateway listens at port 20017/tcp itself"),
        (6, "open", None),
        (7, "open", None),
        (8, "open", None),
    ]


def test_no_process_is_looked_at_where_nothing_listens_at_a_forwarded_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards are looked at every few seconds, and each process has to be opened to learn what it holds."""
    other = ports.Socket("tcp", "0.0.0.0", 22, 0x0A, uid=0, inode=1, remote="0.0.0.0:0")
    monkeypatch.setattr(ports, "sockets", lambda: [other])
    monkeypatch.setattr(ports, "_programs_by_inode", lambda: pytest.fail("it costs too much"))
    assert ports.listening({("tcp", 20017)}) == []


def test_a_host_that_is_no_gateway_says_so(tmp_path: Path) -> None:
    forwards = Forwards(tmp_path, Journal(tmp_path / "journal.jsonl"), facts=tmp_path / "none.json")
    assert forwards.settle([])
    assert forwards.report() == []
    assert forwards.settle([lasting()])
    (said,) = forwards.report()
    assert (said["state"], said["error"]) == ("failed", "this host is no gateway: run playbooks/gateways.yml for it")


def test_without_orders_what_was_lasts_until_its_end(gateway: Forwards) -> None:
    """A frozen host opens and closes nothing, and after a reboot makes again what it had."""
    five = lasting(5)
    assert gateway.settle([five])
    assert gateway.settle(None)
    assert gateway.ends() == [five.ends_at]


def test_a_table_with_what_is_not_ours_is_told_and_stops_nothing_else(
    gateway: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = nft.Member(("tcp", "20000-20010", "10.0.0.1-10.0.0.9", "10.0.0.17", "22"), None)
    monkeypatch.setattr(nft, "members", lambda *_names, **_how: [odd])
    assert not gateway.settle([lasting()])
    (said,) = gateway.report()
    assert "which is not ours" in said["error"]
