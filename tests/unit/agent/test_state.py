"""When the agent believes the portal, and when it freezes."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import state as state_module
from remotegpu_agent.protocol import Desired, ProtocolError, read_desired
from remotegpu_agent.state import Answer, Held, State, judge

EPOCH = "epoch-a"


def raw(generation: int, *, epoch: str = EPOCH, commands: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "machine_id": 7,
        "epoch": epoch,
        "generation": generation,
        "leases": [],
        "attempts": [],
        "commands": commands or [],
        "report_interval_s": 15,
        "log_quota_bytes": 1000,
    }


def desired(generation: int, **fields: Any) -> Desired:
    return read_desired(raw(generation, **fields))


def answer(held: Held, wanted: Desired | None, *, generation: int | None = None, epoch: str | None = None) -> Answer:
    return Answer(
        epoch=epoch or (wanted.epoch if wanted else EPOCH),
        generation=generation if generation is not None else wanted.generation if wanted else held.generation,
        desired=wanted,
        asked_epoch=held.epoch,
        asked_generation=held.generation,
    )


HELD = Held(EPOCH, 5, desired(5))


def test_a_newer_state_is_adopted() -> None:
    assert judge(HELD, answer(HELD, desired(6)), machine_id=7) == Held(EPOCH, 6, desired(6))


def test_the_same_generation_changes_nothing() -> None:
    assert judge(HELD, answer(HELD, None), machine_id=7) == HELD


def test_the_first_state_after_the_enrolment_is_adopted() -> None:
    fresh = Held(EPOCH)
    assert judge(fresh, answer(fresh, desired(1)), machine_id=7).generation == 1


def test_a_lower_generation_than_the_one_told_freezes() -> None:
    after = judge(HELD, answer(HELD, desired(4)), machine_id=7)
    assert after.frozen is not None
    assert "generation 4" in after.frozen
    assert after.desired == HELD.desired


def test_another_epoch_freezes_whatever_its_generation() -> None:
    after = judge(HELD, answer(HELD, desired(9, epoch="epoch-b")), machine_id=7)
    assert after.frozen is not None
    assert "epoch-b" in after.frozen


def test_an_answer_overtaken_by_the_other_connection_is_no_restored_backup() -> None:
    asked_at_3 = Answer(EPOCH, 4, desired(4), asked_epoch=EPOCH, asked_generation=3)
    assert judge(HELD, asked_at_3, machine_id=7) == HELD


def test_an_answer_asked_before_a_thaw_has_no_say() -> None:
    thawed = Held("epoch-b", 2, desired(2, epoch="epoch-b"))
    late = Answer(EPOCH, 9, desired(9), asked_epoch=EPOCH, asked_generation=5)
    assert judge(thawed, late, machine_id=7) == thawed


def thaw(generation: int, *, epoch: str = "epoch-b", command_id: int = 1) -> dict[str, Any]:
    return {
        "command_id": command_id,
        "kind": "thaw",
        "args": {"machine_id": 7, "epoch": epoch, "generation": generation, "retained": []},
    }


def test_only_an_operators_thaw_ends_the_freeze() -> None:
    frozen = replace(HELD, frozen="why")
    assert judge(frozen, answer(frozen, desired(9)), machine_id=7).frozen == "why"
    word = desired(3, epoch="epoch-b", commands=[thaw(3)])
    assert judge(frozen, answer(frozen, word), machine_id=7) == Held("epoch-b", 3, word)


@pytest.mark.parametrize(
    "order",
    [thaw(3, epoch=EPOCH), thaw(4), {**thaw(3), "args": {**thaw(3)["args"], "machine_id": 8}}],
    ids=["another epoch", "a later state", "another machine"],
)
def test_a_thaw_for_something_else_does_not_count(order: dict[str, Any]) -> None:
    frozen = replace(HELD, frozen="why")
    word = desired(3, epoch="epoch-b", commands=[order])
    assert judge(frozen, answer(frozen, word), machine_id=7).frozen == "why"


def test_a_thaw_counts_once() -> None:
    frozen = replace(HELD, frozen="why")
    word = desired(3, epoch="epoch-b", commands=[thaw(3)])
    assert judge(frozen, answer(frozen, word), machine_id=7, thaws_done=frozenset({1})).frozen == "why"


def test_a_state_for_another_machine_is_refused() -> None:
    with pytest.raises(ProtocolError, match="this is machine 8"):
        judge(HELD, answer(HELD, desired(6)), machine_id=8)


def test_a_state_that_contradicts_its_answer_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not those of the answer"):
        judge(HELD, answer(HELD, desired(6), generation=7), machine_id=7)


def test_what_was_held_survives_a_restart_frozen_or_not(tmp_path: Path) -> None:
    state = State(tmp_path / "desired.json")
    state.begin(EPOCH)
    word = raw(4)
    state.adopt(answer(state.held, read_desired(word)), word, machine_id=7)
    assert State(tmp_path / "desired.json").held == Held(EPOCH, 4, desired(4))
    state.adopt(answer(state.held, desired(2)), raw(2), machine_id=7)
    again = State(tmp_path / "desired.json").held
    assert again.frozen is not None
    assert again.desired == desired(4)
    assert (tmp_path / "desired.json").stat().st_mode & 0o777 == 0o600


def test_what_is_wanted_counts_though_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that has filled the disk must not be out of reach by that: its Stop comes down all the same."""
    state = State(tmp_path / "desired.json")
    state.begin(EPOCH)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(state_module, "write_json", no_room)
        state.adopt(answer(state.held, desired(6)), raw(6), machine_id=7)
    assert state.held == Held(EPOCH, 6, desired(6))
    assert State(tmp_path / "desired.json").held == Held(EPOCH), "after a restart the portal sends it again"
    state.adopt(answer(state.held, None, generation=3), None, machine_id=7)
    kept = State(tmp_path / "desired.json").held
    assert (kept.generation, kept.desired) == (6, desired(6)), "what had no room then is written with what comes next"
    assert kept.frozen is not None
