"""The process that speaks with NVML, and nothing else: a hung driver hangs it alone.

It answers each line on its input with one line of JSON, drops root's rights before it loads the driver's library, and
ends with its parent. Every field is read by itself: an error is that field's null and a note, never another field's.
Here are the oddities of nvidia-ml-py 13.615 and of old drivers; gpu.py keeps the deadline and checks the process ids.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

DRIVER_STATES = {9: "driver_not_loaded", 12: "no_library", 18: "mismatch"}
GPU_IS_LOST = 15
UNINITIALIZED = 1
NOT_SUPPORTED = 3
UNKNOWN = 999
_PR_SET_PDEATHSIG = 1


def main(user: str) -> None:
    """Answer probes until the input ends."""
    with contextlib.suppress(ImportError):
        import pynvml  # noqa: F401 - now: the unpacked program is out of reach for anybody but root
    drop_privileges(user)
    is_ready = False
    for _ in sys.stdin:
        answer, is_ready = probe(is_ready)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if answer["state"] == "mismatch":
            return  # the old library stays in this process for ever: the next probe needs a new one


def drop_privileges(user: str) -> None:
    """Become this user for good. A no-op where we are not root."""
    if os.geteuid() == 0:
        import pwd

        account = pwd.getpwnam(user)
        os.setgroups([])
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    # After the change of user, which would clear it. TERM: an NVML client that is killed outright can leave the
    # GPU unusable.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        raise SystemExit("the agent is gone")


def probe(is_ready: bool) -> tuple[dict[str, Any], bool]:
    """One look at all GPUs: the protocol's `gpu_report` without `sampled_at`, and whether NVML stays initialised."""
    try:
        import pynvml
    except ImportError as error:
        return _nothing("no_library", f"nvidia-ml-py is missing: {error}"), False
    try:
        if not is_ready:
            pynvml.nvmlInit()
        return _read_all(pynvml), True
    except (pynvml.NVMLError, OSError) as error:
        code = code_of(error)
        if is_ready and code == UNINITIALIZED:
            return probe(False)
        return _nothing(DRIVER_STATES.get(code, "error"), describe(error)), is_ready and code not in DRIVER_STATES


def _nothing(state: str, message: str) -> dict[str, Any]:
    return {"state": state, "message": message[:400], "driver_version": None, "nvml_version": None, "gpus": []}


def _read_all(nvml: Any) -> dict[str, Any]:
    errors: list[dict[str, Any]] = []
    count = nvml.nvmlDeviceGetCount()
    gpus = [gpu for gpu in (_read_gpu(nvml, index) for index in range(count)) if gpu is not None]
    unnamed = count - len(gpus)
    return {
        "state": "ok",
        "message": f"{unnamed} of {count} GPUs do not tell their UUID" if unnamed else None,
        "driver_version": _text(Reader(errors).read("driver_version", nvml.nvmlSystemGetDriverVersion), 80),
        "nvml_version": _text(Reader(errors).read("nvml_version", nvml.nvmlSystemGetNVMLVersion), 80),
        "gpus": gpus[:64],
    }


_uuids: dict[int, str] = {}  # index → UUID at the last good look: a GPU that is lost no longer tells its own


def _read_gpu(nvml: Any, index: int) -> dict[str, Any] | None:
    reader = Reader([])
    handle = reader.read("handle", nvml.nvmlDeviceGetHandleByIndex, index)
    uuid = _text(reader.read("uuid", nvml.nvmlDeviceGetUUID, handle), 96) if handle is not None else None
    if uuid is not None:
        _uuids[index] = uuid
    uuid = uuid or _uuids.get(index)
    if uuid is None:
        return None
    gpu: dict[str, Any] = {"index": index, "uuid": uuid} | dict.fromkeys(FIELDS)
    if handle is not None:
        gpu |= _read_fields(nvml, reader, handle)
    lost = any(error["code"] == GPU_IS_LOST for error in reader.errors)
    return gpu | {"errors": reader.errors[:64], "state": "lost" if lost else "error" if handle is None else "ok"}


FIELDS = (
    "name",
    "serial",
    "pci_bus_id",
    "memory_total_bytes",
    "memory_used_bytes",
    "memory_reserved_bytes",
    "utilization_percent",
    "memory_bandwidth_percent",
    "temperature_c",
    "power_w",
    "power_limit_w",
    "ecc_uncorrected",
    "mig",
    "processes",
)


def _read_fields(nvml: Any, reader: "Reader", handle: Any) -> dict[str, Any]:
    memory = read_memory(nvml, reader, handle)
    use = reader.read("utilization_percent", nvml.nvmlDeviceGetUtilizationRates, handle)
    pci = reader.read("pci_bus_id", nvml.nvmlDeviceGetPciInfo, handle)
    mig = reader.read("mig", nvml.nvmlDeviceGetMigMode, handle)
    return {
        "name": _text(reader.read("name", nvml.nvmlDeviceGetName, handle), 96),
        "serial": _text(reader.read("serial", nvml.nvmlDeviceGetSerial, handle), 64),
        "pci_bus_id": _text(getattr(pci, "busId", None), 32),
        **memory,
        "utilization_percent": getattr(use, "gpu", None),
        "memory_bandwidth_percent": getattr(use, "memory", None),
        "temperature_c": reader.read("temperature_c", nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "power_w": _watts(reader.read("power_w", nvml.nvmlDeviceGetPowerUsage, handle)),
        "power_limit_w": _watts(reader.read("power_limit_w", nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
        "ecc_uncorrected": reader.read(
            "ecc_uncorrected",
            nvml.nvmlDeviceGetTotalEccErrors,
            handle,
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        ),
        "mig": bool(mig[0]) if mig is not None else None,
        "processes": read_processes(nvml, reader, handle),
    }


def read_memory(nvml: Any, reader: "Reader", handle: Any) -> dict[str, int | None]:
    """Version 2 keeps the driver's own reserve apart, as nvidia-smi does; version 1 hides it in "used", so used is
    then unknown.
    """
    memory = reader.read("memory_used_bytes", nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    if memory is not None:
        return {
            "memory_total_bytes": memory.total,
            "memory_used_bytes": memory.used,
            "memory_reserved_bytes": memory.reserved,
        }
    old = reader.read("memory_total_bytes", nvml.nvmlDeviceGetMemoryInfo, handle)
    return {"memory_total_bytes": getattr(old, "total", None), "memory_used_bytes": None, "memory_reserved_bytes": None}


def read_processes(nvml: Any, reader: "Reader", handle: Any) -> list[dict[str, Any]] | None:
    """Compute and graphics processes by pid; None when the driver does not say. Unchecked: see gpu.py."""
    found: dict[int, int | None] = {}
    known = False
    for kind in ("Compute", "Graphics"):
        listed = reader.read(
            "processes",
            _first_found(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3", f"nvmlDeviceGet{kind}RunningProcesses_v2"),
            handle,
        )
        if listed is not None:
            known = True
            found |= {process.pid: process.usedGpuMemory for process in listed}
    return [{"pid": pid, "memory_bytes": used} for pid, used in sorted(found.items())] if known else None


def _first_found(nvml: Any, *names: str) -> Callable[..., Any]:
    """The first of these calls that this driver has: the binding says FunctionNotFound, or an error that is not
    NVMLError.
    """

    def call(handle: Any) -> Any:
        for name in names[:-1]:
            try:
                return getattr(nvml, name)(handle)
            except (nvml.NVMLError, nvml.NVMLLibraryMismatchError, AttributeError) as error:
                if isinstance(error, nvml.NVMLError) and error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                    raise
        return getattr(nvml, names[-1])(handle)

    return call


class Reader:
    """Calls into NVML; an error becomes None and a note. "Not supported" is no error: the card has no such thing."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        self.errors = errors

    def read(self, field: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # the binding raises what is no NVMLError, too; a monitor must outlive all of it
            code = code_of(error)
            if code != NOT_SUPPORTED:
                self.errors.append({"field": field, "code": code, "message": describe(error)[:200]})
            return None


def code_of(error: BaseException) -> int:
    """NVML's number, 999 where there is none. (NVMLError cannot be compared: __eq__ without __hash__, and it fails on
    None.)
    """
    value = getattr(error, "value", None)
    return value if isinstance(value, int) else UNKNOWN


def describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _text(value: Any, limit: int) -> str | None:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return str(value)[:limit] if value else None


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
