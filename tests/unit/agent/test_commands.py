"""Orders: once, kept until acknowledged, and never to the wrong lease or machine."""

from __future__ import annotations

import errno
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import commands as agent_commands
from remotegpu_agent import progress
from remotegpu_agent.commands import Commands, Refusal, refuse_baseline, refuse_clean
from remotegpu_agent.leases import Entry
from remotegpu_agent.protocol import Command, Desired, DesiredLease
from tests.support.waiting import until

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
ARGS = {"machine_id": 7, "lease_id": 17, "login": "lease17", "uid": 20017}


class Operations:
    """Counts, and answers what the test says."""

    def __init__(self, answer: Any = None) -> None:
        self.done: list[int] = []
        self.answer = answer

    def carry_out(self, command: Command) -> Any:
        self.done.append(command.command_id)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def desired(*commands: Command, epoch: str = "e", leases: tuple[DesiredLease, ...] = ()) -> Desired:
    return Desired(7, epoch, 4, leases, (), commands, 15.0, 1000)


def baseline(command_id: int = 1) -> Command:
    return Command(command_id, "baseline", {"machine_id": 7})


def commands(directory: Path, operations: Operations) -> Commands:
    return Commands(directory, operations, on_result=lambda: None)  # type: ignore[arg-type]  # the part that is used


def result_of(orders: Commands, epoch: str = "e") -> dict[str, Any]:
    return until(lambda: orders.results(epoch), "a result", every_s=0.01)[0]


def test_an_order_is_carried_out_once_however_often_it_is_named(tmp_path: Path) -> None:
    operations = Operations({"a": 1})
    orders = commands(tmp_path, operations)
    orders.consider(desired(baseline()))
    orders.consider(desired(baseline()))
    assert result_of(orders) == {"command_id": 1, "ok": True, "message": None, "result": {"a": 1}}
    orders.consider(desired(baseline()))
    orders.acknowledge("e", [1])
    orders.consider(desired(baseline()))
    assert orders.results("e") == []
    assert commands(tmp_path, operations).results("e") == []
    assert operations.done == [1]


def test_a_result_survives_a_restart_until_it_is_acknowledged(tmp_path: Path) -> None:
    operations = Operations()
    orders = commands(tmp_path, operations)
    orders.consider(desired(baseline()))
    result = result_of(orders)
    again = commands(tmp_path, operations)
    again.consider(desired(baseline()))
    assert again.results("e") == [result]
    assert operations.done == [1]


@pytest.mark.parametrize("error", [Refusal("not now"), ValueError("broken")])
def test_a_failure_is_a_result_too(tmp_path: Path, error: Exception) -> None:
    orders = commands(tmp_path, Operations(error))
    orders.consider(desired(baseline()))
    result = result_of(orders)
    assert result["ok"] is False
    assert str(error) in result["message"]


def test_an_order_is_carried_out_though_the_disk_is_full_and_told_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleaning is what makes room: it must not wait for any."""
    operations = Operations()
    orders = commands(tmp_path, operations)
    write = orders._write

    def no_room(path: Path, record: dict[str, Any]) -> None:
        if len(operations.done) < 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, record)

    monkeypatch.setattr(orders, "_write", no_room)
    for _ in range(2):
        orders.consider(desired(baseline()))
        until(partial(_is_idle, orders), "the end of the attempt", every_s=0.01)
    assert result_of(orders)["ok"] is True
    assert operations.done == [1, 1]


def test_an_order_that_is_interrupted_again_and_again_is_given_up(tmp_path: Path) -> None:
    operations = Operations()
    for _ in range(3):
        orders = commands(tmp_path, operations)
        orders._keep = lambda *_: None  # type: ignore[method-assign]  # the agent dies before the result is on disk
        orders.consider(desired(baseline()))
        until(partial(_is_idle, orders), "the end of the attempt", every_s=0.01)
    orders = commands(tmp_path, operations)
    orders.consider(desired(baseline()))
    assert "interrupted 3 times" in result_of(orders)["message"]
    assert operations.done == [1, 1, 1]


def _is_idle(orders: Commands) -> bool:
    return not orders._is_working


def test_the_same_number_under_another_epoch_is_another_order(tmp_path: Path) -> None:
    operations = Operations()
    orders = commands(tmp_path, operations)
    orders.consider(desired(baseline()))
    result_of(orders)
    orders.acknowledge("e", [1])
    orders.consider(desired(baseline(), epoch="after the restore"))
    result_of(orders, "after the restore")
    assert operations.done == [1, 1]
    assert orders.results("e") == []


def a_cleaning(*, lines: int) -> dict[str, Any]:
    told = {"count": lines, "found": ["/tmp/left"] * lines}
    step = {"id": "home", "result": "failed", "reason": "/tmp/left", "before": told, "acted": ["…"], "after": told}
    return {"schema": 1, "passed": False, "steps": [step | {"duration_s": 0.1}]}


def test_a_cleaning_that_no_report_can_carry_loses_its_evidence_once_and_keeps_its_verdict(tmp_path: Path) -> None:
    orders = commands(tmp_path, Operations(a_cleaning(lines=10_000)))
    orders.consider(desired(baseline()))
    result_of(orders)
    assert orders.shorten("another epoch") is False
    assert orders.shorten("e") is True
    result = commands(tmp_path, Operations()).results("e")[0]
    [step] = result["result"]["steps"]
    assert (result["ok"], result["result"]["passed"], step["result"], step["reason"]) == (
        True,
        False,
        "failed",
        "/tmp/left",
    )
    assert (step["before"], step["after"], "left out" in step["acted"][0]) == (None, None, True)
    assert orders.shorten("e") is False, "it is small now"


def test_what_is_too_large_without_any_evidence_has_failed(tmp_path: Path) -> None:
    orders = commands(tmp_path, Operations({"sections": ["x" * 100_000]}))
    orders.consider(desired(baseline()))
    result_of(orders)
    assert orders.shorten("e") is True
    [result] = orders.results("e")
    assert (result["ok"], result["result"]) == (False, None)
    assert "larger than the portal" in result["message"]
    assert orders.shorten("e") is False


def test_a_small_result_is_not_what_makes_a_report_too_large(tmp_path: Path) -> None:
    orders = commands(tmp_path, Operations(a_cleaning(lines=10)))
    orders.consider(desired(baseline()))
    result = result_of(orders)
    assert orders.shorten("e") is False
    assert orders.results("e") == [result]


def test_a_finished_order_that_is_no_longer_named_leaves_no_file(tmp_path: Path) -> None:
    orders = commands(tmp_path, Operations())
    orders.consider(desired(baseline()))
    result_of(orders)
    orders.consider(desired())
    assert len(orders.results("e")) == 1
    orders.acknowledge("e", [1])
    orders.consider(desired())
    assert list(tmp_path.glob("*.json")) == []


def lease(lease_id: int, *, is_open: bool) -> DesiredLease:
    return DesiredLease(lease_id, f"lease{lease_id}", 20000 + lease_id, is_open, NOW, ())


def entry(lease_id: int, *, is_closed: bool, login: str | None = None, uid: int | None = None) -> Entry:
    closed_at = NOW if is_closed else None
    return Entry(lease_id, login or f"lease{lease_id}", uid or 20000 + lease_id, NOW, closed_at, (), None, False)


@pytest.mark.parametrize("is_closed", [True, False])
def test_what_a_tenant_left_never_becomes_the_baseline(is_closed: bool) -> None:
    reason = refuse_baseline([entry(17, is_closed=is_closed)])
    assert reason is not None
    assert "lease 17 has not been cleaned" in reason
    assert refuse_baseline([]) is None


def test_a_lease_that_is_closed_and_alone_may_be_cleaned() -> None:
    assert refuse_clean(ARGS, 7, desired(leases=(lease(17, is_open=False),)), [entry(17, is_closed=True)]) is None
    assert refuse_clean(ARGS, 7, None, []) is None
    # Its own end may still be under way: cleaning closes first.
    assert refuse_clean(ARGS, 7, desired(), [entry(17, is_closed=False), entry(16, is_closed=True)]) is None


@pytest.mark.parametrize(
    ("args", "wanted", "entries", "reason"),
    [
        ({"machine_id": 8}, desired(), [], "for machine 8"),
        ({}, desired(leases=(lease(17, is_open=True),)), [], "lease 17 is wanted open: close it first"),
        ({}, desired(leases=(lease(18, is_open=True),)), [], "lease 18 is wanted open"),
        ({}, desired(), [entry(18, is_closed=False)], "lease 18 is open on this machine"),
        ({}, None, [entry(18, is_closed=False)], "lease 18 is open on this machine"),
        ({"uid": 20018}, desired(), [entry(17, is_closed=True)], "the order says lease17 (UID 20018)"),
        ({"login": "lease18"}, desired(), [entry(17, is_closed=True)], "the order says lease18"),
        ({}, desired(), [entry(16, is_closed=True, login="lease17")], "is lease 16's here"),
        ({}, desired(), [entry(16, is_closed=True, uid=20017)], "is lease 16's here"),
    ],
)
def test_a_late_or_wrong_order_to_clean_meets_nobody(
    args: dict[str, Any], wanted: Desired | None, entries: list[Entry], reason: str
) -> None:
    refusal = refuse_clean(ARGS | args, 7, wanted, entries)
    assert refusal is not None
    assert reason in refusal


# --- what a tenant's tasks have written


class Backlog:
    """The logs of a lease: the portal takes `windows` of them, one a look, and the last `left` never."""

    def __init__(self, windows: int, left: int = 0) -> None:
        self.taken, self.windows, self.left = 0, windows, left

    def unsent(self, lease_id: int) -> list[int]:
        assert lease_id == 17
        return [5] if self.taken < self.windows or self.left else []

    def acknowledged_bytes(self, lease_id: int) -> int:
        assert lease_id == 17
        self.taken = min(self.taken + 1, self.windows)
        return self.taken * 1000


class Clock:
    """Time that passes while somebody sleeps, and a journal that notes when."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.noted: list[tuple[str, float, Any]] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, _: float) -> None:
        self.now_s += 30

    def record(self, kind: str, *, lease_id: int, detail: Any) -> None:
        assert lease_id == 17
        self.noted.append((kind, self.now_s, detail))


@pytest.mark.parametrize(
    ("backlog", "lost"),
    [
        (Backlog(0), []),
        (Backlog(400), []),  # over three hours, and some of it always arrives
        (Backlog(0, left=1), [("lease.logs_lost", 90.0, {"attempts": [5]})]),
        (Backlog(400, left=1), [("lease.logs_lost", 400 * 30 + 60.0, {"attempts": [5]})]),
    ],
)
def test_a_cleaning_waits_for_the_logs_as_long_as_they_arrive_and_no_longer(
    backlog: Backlog, lost: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(agent_commands, "time", clock)
    moved = progress.Progress(places=())
    parts: Any = [None, None, None, backlog, clock]
    agent_commands.Operations(*parts)._wait_until_sent(17)
    assert clock.noted == lost
    assert moved.value() == max(0, backlog.windows - 1)  # the portal sees that it moves


def test_a_portal_that_was_restored_meanwhile_is_waited_for_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds less than before, and is told again."""
    clock, held = Clock(), [9000, 1000, 2000, 3000, 4000]

    class Restored:
        def unsent(self, _lease_id: int) -> list[int]:
            return [5] if held else []

        def acknowledged_bytes(self, _lease_id: int) -> int:
            return held.pop(0)

    monkeypatch.setattr(agent_commands, "time", clock)
    parts: Any = [None, None, None, Restored(), clock]
    agent_commands.Operations(*parts)._wait_until_sent(17)
    assert clock.noted == []
