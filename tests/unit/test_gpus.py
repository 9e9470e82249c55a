"""What a host's word about its GPUs means, whoever asks: the agent may be an old one that sorts nothing out."""

from __future__ import annotations

from typing import Any

import pytest

from portal.models import MachineReport
from portal.services import gpus
from tests.support.rental import GIB, gpu, gpu_report


def report(*seen: dict[str, Any], **changes: Any) -> MachineReport:
    return MachineReport(gpu=gpu_report(seen, **changes))


def test_what_is_told_now_is_found_by_uuid() -> None:
    told = gpus.of_now(report(gpu("GPU-a", utilization_percent=93), gpu("GPU-b", 1)))
    assert told is not None
    assert {uuid: each["utilization_percent"] for uuid, each in told.items()} == {"GPU-a": 93, "GPU-b": 0}


@pytest.mark.parametrize("state", ["stale", "driver_not_loaded", "no_library", "mismatch", "error"])
def test_nothing_is_told_where_the_driver_does_not_answer_and_so_nothing_is_missing(state: str) -> None:
    assert gpus.of_now(report(gpu("GPU-a"), state=state)) is None
    assert gpus.of_now(MachineReport(gpu=None)) is None
    assert gpus.of_now(None) is None
    assert gpus.of_now(report()) == {}, "a host that counts none is another matter"


@pytest.mark.parametrize(
    ("changes", "use"),
    [({"utilization_percent": 0}, 0), ({"utilization_percent": 100}, 100), ({"utilization_percent": 4294967295}, None),
     ({"utilization_percent": None}, None), ({"mig": True, "utilization_percent": 0}, None)],
)  # fmt: skip
def test_the_use_of_a_gpu_is_that_of_the_whole_card_or_unknown(changes: dict[str, Any], use: float | None) -> None:
    told = gpus.of_now(report(gpu("GPU-a", **changes)))
    assert told is not None
    assert told["GPU-a"]["utilization_percent"] == use


@pytest.mark.parametrize(
    ("used", "total", "percent"),
    [(0, 80 * GIB, 0), (20 * GIB, 80 * GIB, 25), (None, 80, None), (0, 0, None), (5, None, None)],
)
def test_how_full_it_is_is_of_all_its_memory(used: int | None, total: int | None, percent: float | None) -> None:
    assert gpus.memory_percent(gpu("GPU-a", memory_used_bytes=used, memory_total_bytes=total)) == percent


def test_an_agent_that_tells_no_xids_is_an_older_one() -> None:
    assert gpus.xids(gpu("GPU-a")) == {}
    told = gpu("GPU-a", xids=[{"xid": 79, "last_at": "2026-03-01T12:00:00Z"}])
    assert gpus.notes(told) == ("XID 79: 2026-03-01 12:00:00 UTC",)


@pytest.mark.parametrize(
    ("changes", "does"),
    [
        ({}, True),
        ({"state": "lost"}, False),
        ({"state": "error", "errors": [{"field": "handle", "code": 4, "message": "Insufficient Permissions"}]}, False),
        ({"state": "error", "errors": [{"field": "fabric", "code": 0, "message": "it has not joined"}]}, True),
    ],
)
def test_a_gpu_that_says_what_is_wrong_with_it_answers(changes: dict[str, Any], does: bool) -> None:
    assert gpus.answers(gpu("GPU-a", **changes)) == does


def test_each_note_is_told_once() -> None:
    note = {"field": "processes", "code": 7, "message": "Insufficient Size"}
    assert gpus.notes(gpu("GPU-a", errors=[note, note])) == ("processes: Insufficient Size",)
