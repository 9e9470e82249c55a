"""What the agent decides to do, in every corner, without a host."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from remotegpu_agent.plan import (
    TAKEN,
    ArmEnd,
    CloseLease,
    EndUnstarted,
    Host,
    HostAttempt,
    HostLease,
    MakeLogin,
    SetExpiry,
    StartAttempt,
    Step,
    StopAttempt,
    WriteKeys,
    expiry_day,
    plan,
)
from remotegpu_agent.protocol import Desired, DesiredAttempt, DesiredLease, Key

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)
END = NOW + timedelta(hours=5)
KEY = Key("SHA256:a", "ssh-ed25519 AAAA a")


def lease(
    lease_id: int = 17, *, is_open: bool = True, ends_at: datetime = END, keys: tuple[Key, ...] = (KEY,)
) -> DesiredLease:
    return DesiredLease(lease_id, f"lease{lease_id}", 20000 + lease_id, is_open, ends_at, keys)


def render(order: DesiredLease) -> str:
    return "".join(f"{order.ends_at} {key.line}\n" for key in order.keys)


def there(order: DesiredLease) -> HostLease:
    """The host as it is when the lease is open and nothing is left to do."""
    return HostLease(
        lease_id=order.lease_id,
        login=order.login,
        uid=order.uid,
        exists=True,
        is_closed=False,
        ends_at=order.ends_at,
        keys=render(order),
        expires_on=expiry_day(order.ends_at),
        armed_at=order.ends_at,
        processes=3,
    )


def closed(order: DesiredLease) -> HostLease:
    return replace(there(order), is_closed=True, keys="", processes=0, armed_at=None)


def attempt(attempt_id: int = 5, lease_id: int = 17, *, is_wanted: bool = True) -> DesiredAttempt:
    return DesiredAttempt(attempt_id, 3, lease_id, is_wanted, "true", {}, None, None, 30, None)


def running(attempt_id: int = 5, lease_id: int = 17, *, is_stopping: bool = False) -> HostAttempt:
    return HostAttempt(attempt_id, lease_id, False, is_stopping)


def desired(*leases: DesiredLease, attempts: tuple[DesiredAttempt, ...] = ()) -> Desired:
    return Desired(1, "e", 4, leases, attempts, (), 15.0, 1000)


def decide(wanted: Desired | None, host: Host, *, at: datetime = NOW, frozen: bool = False) -> list[Step]:
    return plan(wanted, host, at=at, frozen=frozen, render_keys=render)


def on_host(
    *leases: HostLease, attempts: tuple[HostAttempt, ...] = (), obstacles: dict[int, str] | None = None
) -> Host:
    return Host({each.lease_id: each for each in leases}, {each.attempt_id: each for each in attempts}, obstacles or {})


def test_a_host_that_is_as_wanted_is_left_alone() -> None:
    wanted = desired(lease(), attempts=(attempt(),))
    assert decide(wanted, on_host(there(lease()), attempts=(running(),))) == []
    assert decide(desired(), on_host()) == []


def test_no_key_is_written_before_the_end_is_armed() -> None:
    assert decide(desired(lease()), on_host()) == [
        MakeLogin(lease()),
        ArmEnd(lease()),
        SetExpiry(lease()),
        WriteKeys(lease()),
    ]


def test_an_extension_moves_the_end_first_and_the_keys_last() -> None:
    later = lease(ends_at=END + timedelta(days=2))
    assert decide(desired(later), on_host(there(lease()))) == [ArmEnd(later), SetExpiry(later), WriteKeys(later)]


def test_a_change_of_keys_changes_the_keys_alone() -> None:
    changed = lease(keys=())
    assert decide(desired(changed), on_host(there(lease()))) == [WriteKeys(changed)]


def test_a_timer_that_vanished_is_armed_again() -> None:
    assert decide(desired(lease()), on_host(replace(there(lease()), armed_at=None))) == [ArmEnd(lease())]


def test_an_account_that_somebody_removed_is_made_again() -> None:
    steps = decide(desired(lease()), on_host(replace(there(lease()), exists=False, expires_on=None)))
    assert steps == [MakeLogin(lease()), ArmEnd(lease()), SetExpiry(lease()), WriteKeys(lease())]


def test_a_closed_lease_that_is_wanted_again_is_opened_again() -> None:
    assert decide(desired(lease()), on_host(closed(lease()))) == [ArmEnd(lease()), WriteKeys(lease())]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (lease(is_open=False), "the portal closed it"),
        (lease(ends_at=NOW), "its end has come"),
        (None, "the portal no longer names it"),
    ],
)
def test_what_is_not_wanted_open_is_closed_and_never_more(order: DesiredLease | None, reason: str) -> None:
    wanted = desired(order) if order else desired()
    assert decide(wanted, on_host(there(lease()))) == [CloseLease(17, reason)]


@pytest.mark.parametrize("trace", [{"keys": "x"}, {"processes": 1}, {"is_closed": False}])
def test_a_closed_lease_with_anything_left_is_closed_again(trace: dict[str, Any]) -> None:
    assert decide(desired(), on_host(replace(closed(lease()), **trace))) == [
        CloseLease(17, "the portal no longer names it")
    ]
    assert decide(desired(), on_host(closed(lease()))) == []


def test_one_lease_is_closed_before_another_is_opened() -> None:
    steps = decide(desired(lease(18)), on_host(there(lease(17))))
    assert steps[0] == CloseLease(17, "the portal no longer names it")
    assert steps[1:] == [MakeLogin(lease(18)), ArmEnd(lease(18)), SetExpiry(lease(18)), WriteKeys(lease(18))]


def test_a_stop_comes_before_everything_else() -> None:
    wanted = desired(lease(18), attempts=(attempt(is_wanted=False),))
    steps = decide(wanted, on_host(there(lease(17)), attempts=(running(),)))
    assert steps[0] == StopAttempt(5, "stopped by request")
    assert steps[1] == CloseLease(17, "the portal no longer names it")


def test_a_lease_that_cannot_be_opened_is_not_half_opened() -> None:
    wanted = desired(lease(), attempts=(attempt(),))
    assert decide(wanted, on_host(obstacles={17: "in the way"})) == [
        EndUnstarted(attempt(), "failed", "its lease cannot be opened: in the way")
    ]


def test_a_frozen_host_keeps_everything_but_leases_whose_end_has_come() -> None:
    wanted = desired(lease(18), attempts=(attempt(6, 18), attempt(is_wanted=False)))
    host = on_host(there(lease(17)), attempts=(running(),))
    assert decide(wanted, host, frozen=True) == []
    assert decide(wanted, host, frozen=True, at=END) == [CloseLease(17, "its end has come")]


def test_without_any_word_of_the_portal_leases_still_end() -> None:
    host = on_host(there(lease()))
    assert decide(None, host) == []
    assert decide(None, host, at=END) == [CloseLease(17, "its end has come")]


def test_an_attempt_starts_once() -> None:
    wanted = desired(lease(), attempts=(attempt(),))
    assert decide(wanted, on_host(there(lease()))) == [StartAttempt(attempt())]
    ended = HostAttempt(5, 17, True, False)
    assert decide(wanted, on_host(there(lease()), attempts=(ended,))) == []


def test_an_attempt_of_a_lease_that_has_ended_never_starts() -> None:
    wanted = desired(lease(ends_at=NOW), attempts=(attempt(),))
    assert decide(wanted, on_host()) == [EndUnstarted(attempt(), "stopped", "its lease has ended")]


def test_a_stop_is_asked_once_and_an_unstarted_attempt_gets_an_end() -> None:
    wanted = desired(lease(), attempts=(attempt(is_wanted=False),))
    host = there(lease())
    assert decide(wanted, on_host(host)) == [
        EndUnstarted(attempt(is_wanted=False), "stopped", "stopped before it started")
    ]
    assert decide(wanted, on_host(host, attempts=(running(),))) == [StopAttempt(5, "stopped by request")]
    assert decide(wanted, on_host(host, attempts=(running(is_stopping=True),))) == []
    assert decide(wanted, on_host(host, attempts=(HostAttempt(5, 17, True, False),))) == []


def test_an_attempt_that_is_no_longer_named_runs_on() -> None:
    assert decide(desired(lease()), on_host(there(lease()), attempts=(running(),))) == []


@pytest.mark.parametrize(
    ("is_wanted", "end"), [(True, ("failed", TAKEN)), (False, ("stopped", "stopped before it started"))]
)
def test_an_order_whose_id_a_lost_attempt_still_has_is_neither_started_nor_stopped(
    is_wanted: bool, end: tuple[str, str]
) -> None:
    order = attempt(is_wanted=is_wanted)
    host = on_host(there(lease()), attempts=(replace(running(), is_disowned=True),))
    assert decide(desired(lease(), attempts=(order,)), host) == [EndUnstarted(order, *end)]


def test_an_account_expires_on_the_day_after_the_end_in_utc() -> None:
    east = timezone(timedelta(hours=8))
    assert expiry_day(datetime(2026, 3, 2, 0, 30, tzinfo=east)).isoformat() == "2026-03-02"
    assert expiry_day(datetime(2026, 3, 1, 23, 59, tzinfo=timezone.utc)).isoformat() == "2026-03-02"
