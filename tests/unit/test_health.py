"""Reachability and health: a function of expected GPUs, last report and time, each problem with its own message."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portal.models import Gpu, Machine, MachineReport
from portal.services import health
from portal.services.health import Health, Limits
from tests.support.rental import GIB, gpu, gpu_report, metrics

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LIMITS = Limits(report_interval_s=15, offline_after_s=60)
UUIDS = ("GPU-a", "GPU-b")


def of(
    *,
    age_s: float = 5,
    expected: tuple[str, ...] = UUIDS,
    frozen_reason: str | None = None,
    forward_ports: str | None = None,
    **report: Any,
) -> Health:
    """The health of a machine whose last report is `age_s` old and as good as can be, but for what is given."""
    machine = Machine(name="gpu-1", frozen_reason=frozen_reason, forward_ports=forward_ports)
    values = {
        "received_at": NOW - timedelta(seconds=age_s),
        "clock_offset_s": 0.2,
        "agent_version": "0.1.0",
        "boot_id": "b",
        "seq": 1,
        "frozen": False,
        "metrics": metrics(),
        "gpu": gpu_report([gpu(each, index) for index, each in enumerate(UUIDS)]),
        **report,
    }
    return health.of(machine, [Gpu(uuid=each) for each in expected], MachineReport(**values), NOW, LIMITS)


def codes(answer: Health) -> list[str]:
    return [problem.code for problem in answer.problems]


def message(answer: Health) -> str:
    (problem,) = answer.problems
    return problem.message


def test_a_machine_that_reports_and_lacks_nothing_is_online_and_healthy() -> None:
    answer = of()
    assert (answer.reachability, answer.problems, answer.is_healthy) == ("online", (), True)


def test_a_machine_that_never_reported_is_neither_online_nor_healthy() -> None:
    answer = health.of(Machine(name="gpu-1"), [], None, NOW, LIMITS)
    assert (answer.reachability, answer.is_online, answer.is_healthy) == ("never", False, False)


@pytest.mark.parametrize(("age_s", "reachability"), [(0, "online"), (16, "online"), (59, "online"), (61, "offline")])
def test_offline_begins_after_the_limit(age_s: float, reachability: str) -> None:
    assert of(age_s=age_s).reachability == reachability


def test_one_missed_report_is_not_offline_however_low_the_limit_is_set() -> None:
    low = Limits(report_interval_s=15, offline_after_s=1)
    assert low.silence_s >= 2 * 15


def test_an_offline_machine_keeps_the_problems_it_last_reported() -> None:
    answer = of(age_s=3600, clock_offset_s=60)
    assert (answer.reachability, codes(answer), answer.is_healthy) == ("offline", ["clock"], False)


def test_a_missing_gpu_is_named() -> None:
    answer = of(gpu=gpu_report([gpu("GPU-a")]))
    assert codes(answer) == ["gpu_missing"]
    assert "GPU-b" in message(answer)


def test_a_gpu_that_is_still_counted_but_lost_is_a_problem() -> None:
    trouble = {"field": "memory", "code": 15, "message": "GPU is lost"}
    answer = of(gpu=gpu_report([gpu("GPU-a"), gpu("GPU-b", 1, state="lost", errors=[trouble])]))
    assert codes(answer) == ["gpu_lost"]
    assert "GPU-b has fallen off the bus: GPU is lost." in message(answer)


@pytest.mark.parametrize(
    ("xid", "problems"),
    [
        *((xid, ["gpu_xid"]) for xid in (48, 64, 74, 79, 95, 119, 120, 140)),
        *((xid, []) for xid in (13, 31, 43, 45, 63, 94, 999)),
    ],
)
def test_a_gpu_is_had_by_nobody_after_an_xid_that_wants_a_reset(xid: int, problems: list[str]) -> None:
    told = [{"xid": 31, "last_at": "2026-03-01T11:00:00Z"}, {"xid": xid, "last_at": "2026-03-01T11:00:00Z"}]
    answer = of(gpu=gpu_report([gpu("GPU-a", xids=told), gpu("GPU-b", 1)]))
    assert codes(answer) == problems
    if problems:
        assert message(answer) == f"GPU GPU-a has reported XID {xid}; reset it or restart the machine."


def test_a_gpu_that_nobody_expects_is_a_problem() -> None:
    answer = of(expected=("GPU-a",))
    assert codes(answer) == ["gpu_unexpected"]
    assert "GPU-b" in message(answer)


def test_a_machine_whose_gpus_are_unknown_is_an_error_and_not_zero() -> None:
    assert codes(of(expected=(), gpu=gpu_report([]))) == ["gpus_unknown"]


@pytest.mark.parametrize("state", ["stale", "driver_not_loaded", "no_library", "mismatch", "error"])
def test_nvml_that_does_not_answer_is_told_with_its_own_words(state: str) -> None:
    answer = of(gpu=gpu_report([], state=state, message="the driver was upgraded"))
    assert codes(answer) == ["nvml"]
    assert state in message(answer)
    assert "the driver was upgraded" in message(answer)


def test_where_no_gpu_is_expected_a_driver_that_is_not_there_does_not_fail() -> None:
    answer = of(expected=(), gpu=gpu_report([], state="no_library", message="no libnvidia-ml.so.1"))
    assert codes(answer) == ["gpus_unknown"], "leased to anybody it is not"
    assert "no libnvidia-ml.so.1" in message(answer)
    for state in ("stale", "driver_not_loaded", "mismatch", "error"):
        assert codes(of(expected=(), gpu=gpu_report([], state=state))) == ["gpus_unknown", "nvml"], state


def test_no_gpu_data_at_all_is_not_healthy() -> None:
    assert codes(of(gpu=None)) == ["gpu_report"]


def test_of_a_gateway_nobody_expects_gpus_and_everything_else() -> None:
    gateway = {"forward_ports": "20000-20999", "expected": ()}
    without = gpu_report([], state="no_library")
    assert of(**gateway, gpu=without).is_healthy
    assert of(**gateway, gpu=None).is_healthy
    assert codes(of(**gateway, gpu=without, clock_offset_s=60.0)) == ["clock"]


def test_a_full_disk_is_told_and_a_small_one_beside_it_is_not() -> None:
    measured = metrics(free_bytes=GIB)
    boot = {"mount": "/boot", "device": "b", "total_bytes": GIB // 2, "used_bytes": 1, "free_bytes": 1000}
    answer = of(metrics={**measured, "disks": [*measured["disks"], boot]})
    assert codes(answer) == ["disk"]
    assert "/ has 1.0 GiB free" in message(answer)


def test_unknown_free_space_is_not_taken_for_enough() -> None:
    assert codes(of(metrics=metrics(free_bytes=None))) == ["disk"]


@pytest.mark.parametrize(
    ("offset_s", "problems"), [(5.0, []), (-9.0, []), (11.0, ["clock"]), (-3600.0, ["clock"]), (None, [])]
)
def test_a_clock_that_is_off_is_a_problem_and_five_seconds_of_latency_are_not(
    offset_s: float | None, problems: list[str]
) -> None:
    assert codes(of(clock_offset_s=offset_s)) == problems


@pytest.mark.parametrize(
    ("version", "problems"), [("0.1.0", []), ("0.2.3", []), ("0.0.9", ["agent_version"]), ("dev", ["agent_version"])]
)
def test_an_agent_that_is_too_old_is_a_problem(version: str, problems: list[str]) -> None:
    assert codes(of(agent_version=version)) == problems


def test_a_frozen_host_is_a_problem_whoever_of_the_two_says_so() -> None:
    assert codes(of(frozen=True)) == ["frozen"]
    assert codes(of(frozen_reason="an older backup")) == ["frozen"]


def test_all_that_is_wrong_is_told_at_once() -> None:
    answer = of(clock_offset_s=99, metrics=metrics(free_bytes=1), gpu=gpu_report([]), agent_version="0.0.1")
    assert codes(answer) == ["agent_version", "clock", "gpu_missing", "gpu_missing", "disk"]
