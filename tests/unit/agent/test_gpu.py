"""The watch over NVML: children that hang, die, talk nonsense and grow old; and the oddities of the binding."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from remotegpu_agent import facts, gpu_child, xids
from remotegpu_agent import gpu as gpu_module
from remotegpu_agent.gpu import GpuProbe, holds_gpu
from remotegpu_agent.xids import Xids
from tests.support.waiting import until
from tests.unit.agent.test_protocol import conforms

ANSWER = '{"state": "ok", "message": null, "driver_version": "535", "nvml_version": "12", "gpus": []}'
GPU = {"index": 0, "uuid": "GPU-1", "errors": [], "state": "ok"} | dict.fromkeys(gpu_child.FIELDS)


@pytest.fixture
def probe_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GpuProbe]]:
    """Probes by children of that script. In the end they are stopped, and no child is left."""
    monkeypatch.setattr(gpu_module, "GRACE_S", 0.2)
    probes: list[GpuProbe] = []

    def make(script: str, *, deadline_s: float = 10) -> GpuProbe:
        file = tmp_path / f"child{len(probes)}.py"
        file.write_text(f"import os, sys, time\n{script}\n")
        probe = GpuProbe([sys.executable, str(file)], deadline_s=deadline_s)
        probes.append(probe)
        probe.start()
        return probe

    yield make
    for probe in probes:
        probe.stop()
    until(lambda: not _children_of(tmp_path), "the children to be gone", also=lambda: _children_of(tmp_path))


def _children_of(folder: Path) -> list[str]:
    """The command lines of our children whose script is in that folder."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is none as well, and tells no command line
            found.append(" ".join(child.cmdline()))
    return [line for line in found if str(folder) in line]


def test_a_sample_is_fresh_and_is_what_the_protocol_says(probe_of: Callable[..., GpuProbe]) -> None:
    probe = probe_of(f"for line in sys.stdin: print({ANSWER!r}, flush=True)")
    conforms("gpu_report", probe.report())
    probe.ask(wait_s=5)
    report = probe.report()
    conforms("gpu_report", report)
    assert report["state"] == "ok"
    assert report["sampled_at"] is not None


def test_a_child_that_hangs_makes_the_last_sample_stale_and_nobody_waits(probe_of: Callable[..., GpuProbe]) -> None:
    script = f"sys.stdin.readline(); print({ANSWER!r}, flush=True); sys.stdin.readline(); time.sleep(1000)"
    probe = probe_of(script, deadline_s=0.2)
    probe.ask(wait_s=5)
    good = probe.report()
    started = time.monotonic()
    probe.ask(wait_s=0.1)
    assert time.monotonic() - started < 0.5
    stale = until(lambda: (found := probe.report())["state"] == "stale" and found, "the sample to be stale")
    conforms("gpu_report", stale)
    assert stale["sampled_at"] == good["sampled_at"]
    assert "the driver hangs" in stale["message"]


def test_a_hung_child_that_ignores_term_is_killed_and_what_was_last_seen_stays_with_its_time(
    probe_of: Callable[..., GpuProbe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "PATIENCE_S", 0.2)
    answer = ANSWER.replace('"gpus": []', f'"gpus": [{_json(GPU)}]')
    pids, healed = tmp_path / "pids", tmp_path / "healed"
    probe = probe_of(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
        "sys.stdin.readline()\n"
        f"if len(open({str(pids)!r}).read().split()) == 1 or os.path.exists({str(healed)!r}):\n"
        f"    print({answer!r}, flush=True)\n"
        "    sys.stdin.readline()\n"
        "time.sleep(1000)",
        deadline_s=0.1,
    )
    probe.ask(wait_s=5)
    good = probe.report()
    assert good["state"] == "ok"
    for children in (1, 2):  # a driver that still hangs takes the next child, too
        probe.ask()
        until(partial(_is_gone, pids, children), f"child {children} to be killed", timeout_s=10)
        until(lambda: "was ended" in probe.report()["message"], "the word of it")
        stale = probe.report()
        conforms("gpu_report", stale)
        assert (stale["state"], stale["sampled_at"]) == ("stale", good["sampled_at"])
        assert [each["uuid"] for each in stale["gpus"]] == ["GPU-1"], "the GPUs are not forgotten"
        assert f"the last values are of {good['sampled_at']}" in stale["message"]
    healed.touch()
    probe.ask(wait_s=5)
    assert probe.report()["state"] == "ok"
    assert probe.report()["sampled_at"] > good["sampled_at"]


def _is_gone(pids: Path, number: int) -> bool:
    """The child of that number has been there, and is there no more."""
    started = pids.read_text().split()
    return len(started) >= number and not Path("/proc", started[number - 1]).exists()


def test_a_child_that_takes_its_time_to_end_is_gone_when_the_probe_has_stopped(
    probe_of: Callable[..., GpuProbe], tmp_path: Path
) -> None:
    probe = probe_of(
        "import signal; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.1), sys.exit()))\n"
        f"for line in sys.stdin: print({ANSWER!r}, flush=True)"
    )
    probe.ask(wait_s=5)
    assert _children_of(tmp_path)
    probe.stop()
    assert not _children_of(tmp_path)


def test_one_probe_is_in_flight_however_often_one_asks(probe_of: Callable[..., GpuProbe], tmp_path: Path) -> None:
    seen = tmp_path / "asked"
    script = f"for line in sys.stdin: open({str(seen)!r}, 'a').write('x'); time.sleep(1000)"
    probe = probe_of(script, deadline_s=0.1)
    for _ in range(5):
        probe.ask(wait_s=0.05)
    until(seen.exists, "the first probe")
    assert seen.read_text() == "x"


@pytest.mark.parametrize(
    "script", ["sys.exit(3)", "sys.stdin.readline(); print('nonsense', flush=True)", "print('x' * 2000000)"]
)
def test_a_child_that_dies_or_talks_nonsense_is_an_error_and_is_replaced(
    probe_of: Callable[..., GpuProbe], tmp_path: Path, script: str
) -> None:
    once = tmp_path / "once"
    good = f"for line in sys.stdin: print({ANSWER!r}, flush=True)"
    probe = probe_of(f"if os.path.exists({str(once)!r}):\n    {good}\nopen({str(once)!r}, 'w')\n{script}")
    probe.ask(wait_s=5)
    assert probe.report()["state"] == "error"
    conforms("gpu_report", probe.report())
    probe.ask(wait_s=5)
    assert probe.report()["state"] == "ok"


def test_a_process_speaks_for_the_module_that_it_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = load_driver(tmp_path, monkeypatch)
    spoken_for = gpu_child.Driver()
    assert not spoken_for.is_outdated(), "of nothing yet"
    spoken_for.note_module()
    assert not spoken_for.is_outdated()
    load_driver(tmp_path, monkeypatch)
    assert spoken_for.is_outdated()
    spoken_for.note_module()
    driver.rename(tmp_path / "unloaded")
    assert spoken_for.is_outdated()


def load_driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's folder of the driver, another one at each loading."""
    driver = folder / "nvidia"
    if driver.exists():
        driver.rename(folder / f"nvidia-{len(list(folder.iterdir()))}")
    driver.mkdir()
    monkeypatch.setattr(facts, "DRIVER", str(driver))
    return driver


def test_an_xid_is_forgotten_at_a_boot_and_when_the_driver_is_loaded_while_nobody_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "xids.json"
    load_driver(tmp_path, monkeypatch)
    Xids(file).hear("GPU-1", 79)
    kept = Xids(file)
    kept.settle(is_reloaded=True)
    assert [each["xid"] for each in kept.of("GPU-1")] == [79], "the kernel knows better than the library"
    load_driver(tmp_path, monkeypatch)
    kept = Xids(file)
    kept.settle()
    assert kept.of("GPU-1") == Xids(file).of("GPU-1") == []
    kept.hear("GPU-1", 79)
    monkeypatch.setattr(xids, "boot_id", lambda: "another")
    assert Xids(file).of("GPU-1") == []


def test_a_driver_that_is_not_there_now_has_not_been_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_driver(tmp_path, monkeypatch)
    kept = Xids(tmp_path / "xids.json")
    kept.hear("GPU-1", 79)
    monkeypatch.setattr(facts, "DRIVER", "/nonexistent")
    kept.settle()
    assert kept.of("GPU-1")
    load_driver(tmp_path, monkeypatch)
    kept.settle()
    assert kept.of("GPU-1") == []


def test_of_many_xids_the_newest_are_told() -> None:
    kept = Xids()
    for xid in (79, *range(100, 120), 79):
        kept.hear("GPU-1", xid)
    assert [each["xid"] for each in kept.of("GPU-1")] == [79, *range(105, 120)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"boot_id": BOOT, "driver": 1, "gpus": {"GPU-1": {"79": "now"}}}'])
def test_what_cannot_be_read_of_them_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "xids.json"
    file.write_text(text.replace("BOOT", f'"{facts.boot_id()}"'))
    kept = Xids(file)
    assert kept.of("GPU-1") == []
    kept.hear("GPU-1", 48)
    assert [each["xid"] for each in Xids(file).of("GPU-1")] == [48]


def test_where_they_cannot_be_written_they_are_told_all_the_same(tmp_path: Path) -> None:
    kept = Xids(tmp_path / "nowhere" / "xids.json")
    kept.hear("GPU-1", 48)
    assert [each["xid"] for each in kept.of("GPU-1")] == [48]


def test_a_pid_counts_only_if_it_holds_a_gpu_open(tmp_path: Path) -> None:
    assert holds_gpu(os.getpid()) is False
    assert holds_gpu(2**31 - 1) is False
    assert holds_gpu(os.getpid(), find_target=lambda _: "/dev/nvidia0") is True


def test_garbage_pids_of_old_drivers_are_dropped(probe_of: Callable[..., GpuProbe]) -> None:
    gpu = GPU | {"processes": [{"pid": os.getpid(), "memory_bytes": None}, {"pid": 2**31 - 1, "memory_bytes": 5}]}
    answer = ANSWER.replace('"gpus": []', f'"gpus": [{_json(gpu)}]')
    probe = probe_of(f"for line in sys.stdin: print({answer!r}, flush=True)")
    probe.ask(wait_s=5)
    report = probe.report()
    conforms("gpu_report", report)
    assert report["gpus"][0]["processes"] == []


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


class NvmlError(Exception):
    """As in the binding: `==` fails on whatever has no value, and there is no hash."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other.value)  # type: ignore[attr-defined]  # what the binding does

    __hash__ = None  # type: ignore[assignment]  # what the binding does

    def __str__(self) -> str:
        return f"NVML error {self.value}"


class MismatchError(Exception):
    """NVMLLibraryMismatchError is no NVMLError."""


class Fabric(ctypes.Structure):
    _fields_ = [("state", ctypes.c_ubyte), ("status", ctypes.c_int)]


class Nvml:
    """The binding as gpu_child uses it: any call may be given an answer or an error."""

    NVMLError = NvmlError
    NVMLLibraryMismatchError = MismatchError
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_TEMPERATURE_GPU = NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
    nvmlMemory_v2 = 2
    nvmlEventTypeXidCriticalError = 8

    def __init__(self, **answers: Any) -> None:
        self.answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetUUID": "GPU-1",
        } | answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            answer = self.answers.get(name, NvmlError(3))
            answer = answer(*args) if callable(answer) else answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


def read(**answers: Any) -> dict[str, Any]:
    gpu_child._uuids.clear()
    report = gpu_child._read_all(Nvml(**answers))
    for gpu in report["gpus"]:
        for process in gpu["processes"] or []:
            process["uid"] = None
    conforms("gpu_report", report | {"sampled_at": None})
    return report


def test_what_a_card_does_not_have_is_null_and_no_error() -> None:
    gpu = read()["gpus"][0]
    assert {name: gpu[name] for name in gpu_child.FIELDS} == dict.fromkeys(gpu_child.FIELDS)
    assert (gpu["errors"], gpu["state"]) == ([], "ok")


def test_an_error_is_that_fields_null_and_a_note() -> None:
    gpu = read(nvmlDeviceGetTemperature=NvmlError(999), nvmlDeviceGetPowerUsage=70_500)["gpus"][0]
    assert (gpu["temperature_c"], gpu["power_w"]) == (None, 70.5)
    assert gpu["errors"] == [{"field": "temperature_c", "code": 999, "message": "NVML error 999"}]


def test_a_zero_is_counted_and_not_unknown() -> None:
    use = SimpleNamespace(gpu=0, memory=0)
    gpu = read(nvmlDeviceGetUtilizationRates=use, nvmlDeviceGetComputeRunningProcesses_v3=[])["gpus"][0]
    assert (gpu["utilization_percent"], gpu["processes"]) == (0, [])


def test_an_old_driver_tells_total_memory_and_not_a_wrong_used() -> None:
    old = SimpleNamespace(total=100, used=30, free=70)
    answers = {"nvmlDeviceGetMemoryInfo": lambda _handle, version=None: NvmlError(13) if version else old}
    gpu = read(**answers)["gpus"][0]
    assert (gpu["memory_total_bytes"], gpu["memory_used_bytes"], gpu["memory_reserved_bytes"]) == (100, None, None)


@pytest.mark.parametrize("missing", [NvmlError(13), MismatchError("too old")])
def test_an_old_driver_lists_processes_by_the_older_call(missing: Exception) -> None:
    listed = [SimpleNamespace(pid=9, usedGpuMemory=None)]
    answers = {"nvmlDeviceGetComputeRunningProcesses_v3": missing, "nvmlDeviceGetComputeRunningProcesses_v2": listed}
    assert read(**answers)["gpus"][0]["processes"] == [{"pid": 9, "memory_bytes": None, "uid": None}]


def test_a_lost_gpu_keeps_its_name_and_the_rest_go_on() -> None:
    gpu_child._uuids.clear()
    well = Nvml(nvmlDeviceGetCount=2, nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetUUID=lambda i: f"GPU-{i}")
    assert [gpu["state"] for gpu in gpu_child._read_all(well)["gpus"]] == ["ok", "ok"]
    well.answers["nvmlDeviceGetHandleByIndex"] = lambda i: NvmlError(15) if i == 1 else i
    gpus = gpu_child._read_all(well)["gpus"]
    assert [(gpu["uuid"], gpu["state"]) for gpu in gpus] == [("GPU-0", "ok"), ("GPU-1", "lost")]
    gpu_child._uuids.clear()
    report = gpu_child._read_all(well)
    assert [gpu["uuid"] for gpu in report["gpus"]] == ["GPU-0"]
    assert report["message"] == "1 of 2 GPUs do not tell their UUID"


@pytest.mark.parametrize(
    ("answers", "field"),
    [
        ({"nvmlDeviceGetTemperature": 2147483632}, "temperature_c"),
        ({"nvmlDeviceGetPowerUsage": 2**32 - 1}, "power_w"),
        ({"nvmlDeviceGetEnforcedPowerLimit": 2**32 - 1}, "power_limit_w"),
        ({"nvmlDeviceGetTotalEccErrors": 2**64 - 1}, "ecc_uncorrected"),
        ({"nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=2**32 - 1, memory=3)}, "utilization_percent"),
        ({"nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=3, memory=101)}, "memory_bandwidth_percent"),
        ({"nvmlDeviceGetMemoryInfo": SimpleNamespace(total=2**64 - 1, used=0, reserved=0)}, "memory_total_bytes"),
        ({"nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, used=2**64 - 9, reserved=1)}, "memory_used_bytes"),
    ],
)
def test_what_cannot_be_true_is_unknown_and_costs_nothing_else(answers: dict[str, Any], field: str) -> None:
    """The protocol refuses a whole report for one number that no column holds: the host would seem to be silent."""
    gpu = read(**answers)["gpus"][0]
    assert (gpu[field], gpu["state"]) == (None, "ok")
    assert [(error["field"], error["code"]) for error in gpu["errors"]] == [(field, 0)]
    assert "cannot be true" in gpu["errors"][0]["message"]


def test_a_count_that_cannot_be_true_is_not_counted_to_its_end() -> None:
    numbers = iter(range(1000))
    answers = {"nvmlDeviceGetCount": 2**32 - 1, "nvmlDeviceGetUUID": lambda _handle: f"GPU-{next(numbers)}"}
    assert len(read(**answers)["gpus"]) == 64


def test_what_an_older_driver_has_not_is_no_news() -> None:
    old = dict.fromkeys(("nvmlDeviceGetPersistenceMode", "nvmlDeviceGetRemappedRows"), NvmlError(13))
    assert read(**old)["gpus"][0]["errors"] == []
    gpu = read(**old | {"nvmlDeviceGetRemappedRows": NvmlError(999)})["gpus"][0]
    assert (gpu["errors"][0]["field"], gpu["state"]) == ("remapped_rows", "ok"), "unknown, and not well by that"


@pytest.mark.parametrize(("count", "state"), [(1, "ok"), (8, "error")])
def test_a_gpu_that_is_alone_needs_no_fabric(count: int, state: str) -> None:
    answers = {
        "nvmlDeviceGetCount": count,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda index: f"GPU-{index}",
        "c_nvmlGpuFabricInfo_t": lambda: Fabric(state=2),
        "nvmlDeviceGetGpuFabricInfo": None,
    }
    gpus = read(**answers)["gpus"]
    assert {gpu["state"] for gpu in gpus} == {state}
    assert {error["field"] for gpu in gpus for error in gpu["errors"]} == {"fabric"}


@pytest.mark.parametrize("refused", ["nvmlEventSetCreate", "nvmlDeviceRegisterEvents", "nvmlEventSetWait"])
def test_a_card_that_tells_no_events_is_well(refused: str) -> None:
    gpu_child._xids.start_anew()
    answers = {"nvmlDeviceGetHandleByIndex": 1, "nvmlEventSetCreate": "set", "nvmlDeviceRegisterEvents": None}
    gpu = read(**answers | {refused: NvmlError(3)})["gpus"][0]
    assert (gpu["errors"], gpu["state"]) == ([], "ok")


def test_what_the_binding_raises_besides_its_own_errors_is_told() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", Nvml(nvmlInit=None, nvmlDeviceGetCount=MismatchError("too old")))
        report, is_ready = gpu_child.probe(False)
    assert (report["state"], report["message"], is_ready) == ("error", "too old", False)


def test_names_in_strange_bytes_do_not_stop_anything() -> None:
    gpu = read(nvmlDeviceGetName=b"H\xff, 100", nvmlDeviceGetSerial=UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"))[
        "gpus"
    ][0]
    assert gpu["name"] == "H�, 100"
    assert gpu["serial"] is None
    assert gpu["errors"][0]["field"] == "serial"
