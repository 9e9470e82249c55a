"""Work that takes long is seen to move, and is not when it hangs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from remotegpu_agent import baseline, progress
from remotegpu_agent.cleaning import remove
from remotegpu_agent.commands import Commands
from remotegpu_agent.observe import files, mounts
from remotegpu_agent.progress import Progress
from remotegpu_agent.protocol import Command
from tests.support.waiting import until
from tests.unit.agent.test_commands import desired


def test_looking_and_removing_move_and_nothing_else_does(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / "left" / str(number)).mkdir(parents=True)
    work = Progress(places=())
    assert work.value() == 0
    list(files.below(str(tmp_path / "left")))
    looked = work.value()
    assert looked == 20
    list(remove.remove(str(tmp_path / "left")))
    assert work.value() == looked + 21
    assert work.value() == looked + 21


def test_a_baseline_moves_as_it_walks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr(mounts, "local", lambda: [str(tmp_path)])
    work = Progress(places=())
    baseline.read_special()
    assert work.value() == 20


def test_room_that_another_program_makes_is_progress_and_what_comes_and_goes_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"bytes": 10**12}
    facts = lambda _place: SimpleNamespace(f_bfree=free["bytes"], f_frsize=1, f_ffree=1000)  # noqa: E731
    monkeypatch.setattr(progress.os, "statvfs", facts)
    work = Progress(places=("/",))
    free["bytes"] -= 10**9
    assert work.value() == 0
    free["bytes"] += 10**9 + 1000  # what was there before, and a little
    assert work.value() == 0
    for step in range(1, 4):
        free["bytes"] += 2 * progress.LEAST_BYTES
        assert work.value() == step
    assert work.value() == 3


def test_a_place_that_cannot_be_asked_stops_nothing() -> None:
    assert Progress(places=("/nowhere",)).value() == 0


def test_a_place_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report waits for this, and the agent would seem to be silent."""
    answering, asked = threading.Event(), list[str]()

    def statvfs(place: str) -> Any:
        asked.append(place)
        answering.wait(30)
        return SimpleNamespace(f_bfree=0, f_frsize=1, f_ffree=0)

    monkeypatch.setattr(progress.os, "statvfs", statvfs)
    monkeypatch.setattr(progress, "LOOK_S", 0.05)
    began = time.monotonic()
    work = Progress(places=("/home",))
    progress.tick()
    assert work.value() == 1
    assert time.monotonic() - began < 10
    assert asked == ["/home"], "asked again while nobody answers"
    answering.set()
    until(lambda: work.value() == 1 and len(asked) > 1, "it to be asked once more")


def test_the_order_at_work_tells_how_far_it_has_come_until_it_has_a_result(tmp_path: Path) -> None:
    going_on = threading.Event()

    class Operations:
        def carry_out(self, _command: Command) -> Any:
            progress.tick()
            going_on.wait(30)
            return {}

    orders = Commands(tmp_path, Operations(), on_result=lambda: None)  # type: ignore[arg-type]  # the part that is used
    assert orders.at_work("e") is None
    orders.consider(desired(Command(3, "baseline", {"machine_id": 7})))
    told = until(lambda: (orders.at_work("e") or {}).get("progress") and orders.at_work("e"), "the order to move")
    assert told["command_id"] == 3
    assert orders.at_work("another epoch") is None
    going_on.set()
    until(lambda: orders.results("e"), "its result")
    assert orders.at_work("e") is None
