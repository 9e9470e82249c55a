"""The process that speaks with NVML, and nothing else: a hung driver hangs it alone.

It answers each line on its input with one line of JSON, drops root's rights before it loads the driver's library (in
the service; verification asks as root), and ends with its parent. Every field is read by itself: an error is that
field's null and a note, never another field's. Here are the oddities of nvidia-ml-py 13.615 and of old drivers; gpu.py
keeps the deadline and checks the process ids.

Before the answer there may be lines without a "state": an XID, as soon as it is heard; that the driver was loaded again
below us; that it was replaced, whereupon this process ends without an answer. A library stays in its process for ever:
after an upgrade by hand it would say that all is well, while everybody who starts is refused.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from remotegpu_agent.facts import driver_load

LIBRARY = "libnvidia-ml.so.1"
DRIVER_STATES = {9: "driver_not_loaded", 12: "no_library", 18: "mismatch"}
GPU_IS_LOST = 15
UNINITIALIZED = 1
NOT_SUPPORTED = 3
FUNCTION_NOT_FOUND = 13
UNKNOWN = 999
GRAVE = {8, 11, 16}  # too little power, no interrupts, in need of a reset: whatever else it says, it computes nothing
FABRIC_UNKNOWN, FABRIC_NOT_STARTED, FABRIC_IN_PROGRESS = 0, 1, 2
INTEGRATED = "(nvgpu)"
MOST_GPUS = 64  # and LARGEST: as the protocol has it, which refuses a whole report for one number that is larger
LARGEST = 2**53 - 1
HOTTEST_C, MOST_MILLIWATTS = 250, 100_000_000  # what is more is a driver's blank and no value
_PR_SET_PDEATHSIG = 1
_RTLD_DI_LINKMAP = 2


def main(user: str | None) -> None:
    """Answer probes until the input ends: as this user, or as whoever we are."""
    with contextlib.suppress(ImportError):
        import pynvml  # noqa: F401 - now: the unpacked program is out of reach for anybody but root
    if user is not None:
        drop_privileges(user)
    end_with_parent()
    is_ready = False
    for _ in sys.stdin:
        if _driver.is_outdated():
            say({"outdated": True})
            return
        answer, is_ready = probe(is_ready)
        say(answer)
        if answer["state"] == "mismatch":
            return  # the next probe needs a process that loads the library anew


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def drop_privileges(user: str) -> None:
    """Become this user for good. A no-op where we are not root."""
    if os.geteuid() == 0:
        import pwd

        account = pwd.getpwnam(user)
        os.setgroups([])
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)


def end_with_parent() -> None:
    """After a change of user, which would clear it. By TERM: an NVML client that is killed outright can leave the GPU
    unusable.
    """
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
            _driver.note_library()
            pynvml.nvmlInit()
            _driver.note_module()
            _xids.start_anew()
        return _read_all(pynvml), True
    except Exception as error:  # the binding raises what is no NVMLError, too
        code = code_of(error)
        if is_ready and code == UNINITIALIZED:
            say({"reloaded": True})
            return probe(False)
        return _nothing(DRIVER_STATES.get(code, "error"), describe(error)), is_ready and code not in DRIVER_STATES


class Driver:
    """What this process speaks for: the library that it loaded, and the module that the kernel had then."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._library: tuple[int, int, int] | None = None
        self._module: int | None = None

    def note_library(self) -> None:
        """Just before it is used: it is loaded here, so that what lies there is what was loaded."""
        if self._path is None:
            with contextlib.suppress(OSError):
                self._path = _load_library()
                self._library = _stamp_of(self._path)

    def note_module(self) -> None:
        """Once it is spoken with: the library may have had it loaded."""
        self._module = driver_load()

    def is_outdated(self) -> bool:
        """Whether a process that starts now would speak for something else. A package puts a new file in the old one's
        place, and who has the old one keeps it.
        """
        if self._path is not None and _stamp_of(self._path) != self._library:
            return True
        return self._module is not None and driver_load() != self._module


_driver = Driver()


class _LinkMap(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def _load_library() -> str:
    """The loader's own name for the file, mostly a link. (/proc/self/maps has other numbers than stat on some file
    systems.) Raises OSError where there is none.
    """
    library, found = ctypes.CDLL(LIBRARY), ctypes.POINTER(_LinkMap)()
    if ctypes.CDLL(None).dlinfo(ctypes.c_void_p(library._handle), _RTLD_DI_LINKMAP, ctypes.byref(found)) != 0:
        raise OSError(f"the loader does not tell where {LIBRARY} is")
    return os.fsdecode(found.contents.name)


def _stamp_of(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _nothing(state: str, message: str) -> dict[str, Any]:
    return {"state": state, "message": message[:400], "driver_version": None, "nvml_version": None, "gpus": []}


def _read_all(nvml: Any) -> dict[str, Any]:
    reader = Reader([])
    _xids.gather(nvml)  # first: some of them are told of a driver that answers nothing any more
    count = nvml.nvmlDeviceGetCount()
    seen = [_read_gpu(nvml, index) for index in range(min(count, MOST_GPUS))]
    _name_the_silent(seen)
    _xids.gather(nvml)
    gpus = [gpu for gpu in seen if gpu["uuid"] is not None]
    _judge_fabric(gpus)
    unnamed = count - len(gpus)
    return {
        "state": "ok",
        "message": f"{unnamed} of {count} GPUs do not tell their UUID" if unnamed else None,
        "driver_version": _text(reader.read("driver_version", nvml.nvmlSystemGetDriverVersion), 80),
        "nvml_version": _text(reader.read("nvml_version", nvml.nvmlSystemGetNVMLVersion), 80),
        "gpus": gpus,
    }


_uuids: dict[int, str] = {}  # index → UUID at the last good look: a GPU that is lost no longer tells its own


def _name_the_silent(gpus: list[dict[str, Any]]) -> None:
    """A GPU that does not tell its UUID is the one that was at its place, unless that one is at another by now: the
    order of GPUs changes when the driver is loaded again.
    """
    told = {gpu["uuid"] for gpu in gpus}
    for gpu in gpus:
        if gpu["uuid"] is not None:
            _uuids[gpu["index"]] = gpu["uuid"]
        elif (remembered := _uuids.get(gpu["index"])) not in told:
            gpu["uuid"] = remembered


def _read_gpu(nvml: Any, index: int) -> dict[str, Any]:
    reader = Reader([])
    handle = reader.read("handle", nvml.nvmlDeviceGetHandleByIndex, index)
    uuid = _text(reader.read("uuid", nvml.nvmlDeviceGetUUID, handle), 96) if handle is not None else None
    gpu: dict[str, Any] = {"index": index, "uuid": uuid} | dict.fromkeys(FIELDS)
    if handle is not None:
        if uuid is not None:
            _xids.listen(nvml, handle, uuid)
        gpu |= _read_fields(nvml, reader, handle)
        _read_warnings(nvml, reader, handle)
        if INTEGRATED in (gpu["name"] or ""):
            gpu |= dict.fromkeys(MEASURED)
            reader.note("name", "this GPU is part of the processor, and its driver measures nothing", is_grave=True)
    codes = {error["code"] for error in reader.errors}
    is_failing = uuid is None or reader.is_grave or not codes.isdisjoint(GRAVE)
    state = "lost" if GPU_IS_LOST in codes else "error" if is_failing else "ok"
    return gpu | {"errors": reader.errors[:64], "state": state}


class Xids:
    """What the driver says of a GPU besides values, said on at once. A card, or a driver, that tells no events is no
    error.
    """

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """With another session nobody listens yet."""
        self._set: Any = None
        self._uuids: dict[int | None, str] = {}  # by what the driver calls the GPU in an event

    def listen(self, nvml: Any, handle: Any, uuid: str) -> None:
        called = _address_of(handle)
        is_new = called not in self._uuids
        self._uuids[called] = uuid
        if is_new:
            with contextlib.suppress(Exception):
                self._set = self._set or nvml.nvmlEventSetCreate()
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._set)

    def gather(self, nvml: Any) -> None:
        """Say what waits to be told; never wait for more."""
        for _ in range(1000 if self._set is not None else 0):
            try:
                event = nvml.nvmlEventSetWait(self._set, 0)
            except Exception:  # a time-out: nothing more waits
                return
            uuid, xid = self._uuids.get(_address_of(event.device)), event.eventData
            if uuid is not None and event.eventType == nvml.nvmlEventTypeXidCriticalError and xid < 2**31:
                say({"uuid": uuid, "xid": xid})


_xids = Xids()


def _address_of(handle: Any) -> int | None:
    """Handles of one GPU are never equal; what they point to is."""
    return ctypes.cast(handle, ctypes.c_void_p).value


MEASURED = (
    "memory_total_bytes",
    "memory_used_bytes",
    "memory_reserved_bytes",
    "utilization_percent",
    "memory_bandwidth_percent",
    "temperature_c",
    "power_w",
    "power_limit_w",
    "ecc_uncorrected",
)
FIELDS = ("name", "serial", "pci_bus_id", *MEASURED, "mig", "processes")


def _read_fields(nvml: Any, reader: "Reader", handle: Any) -> dict[str, Any]:
    memory = read_memory(nvml, reader, handle)
    use = reader.read("utilization_percent", nvml.nvmlDeviceGetUtilizationRates, handle)
    pci = reader.read("pci_bus_id", nvml.nvmlDeviceGetPciInfo, handle)
    mig = reader.read("mig", nvml.nvmlDeviceGetMigMode, handle)
    if mig is not None and mig[0] != mig[1]:
        reader.note("mig", f"MIG is to be switched {'on' if mig[1] else 'off'}, at the GPU's next reset")
    if mig is not None and mig[0]:
        use = None  # whatever is said of a GPU that is divided, it is not the use of the whole card
    heat = reader.read("temperature_c", nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    power = reader.read("power_w", nvml.nvmlDeviceGetPowerUsage, handle)
    limit = reader.read("power_limit_w", nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    ecc = reader.read(
        "ecc_uncorrected",
        nvml.nvmlDeviceGetTotalEccErrors,
        handle,
        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        nvml.NVML_VOLATILE_ECC,
    )
    return {
        "name": _text(reader.read("name", nvml.nvmlDeviceGetName, handle), 96),
        "serial": _text(reader.read("serial", nvml.nvmlDeviceGetSerial, handle), 64),
        "pci_bus_id": _text(getattr(pci, "busId", None), 32),
        **memory,
        "utilization_percent": reader.within("utilization_percent", getattr(use, "gpu", None), 100),
        "memory_bandwidth_percent": reader.within("memory_bandwidth_percent", getattr(use, "memory", None), 100),
        "temperature_c": reader.within("temperature_c", heat, HOTTEST_C),
        "power_w": _watts(reader.within("power_w", power, MOST_MILLIWATTS)),
        "power_limit_w": _watts(reader.within("power_limit_w", limit, MOST_MILLIWATTS)),
        "ecc_uncorrected": reader.within("ecc_uncorrected", ecc, LARGEST),
        "mig": bool(mig[0]) if mig is not None else None,
        "processes": read_processes(nvml, reader, handle),
    }


def _read_warnings(nvml: Any, reader: "Reader", handle: Any) -> None:
    """What no value shows and somebody should know; what an older driver has not is no news."""
    if reader.read_if_there("persistence_mode", nvml.nvmlDeviceGetPersistenceMode, handle) == 0:
        reader.note("persistence_mode", "persistence mode is off: whoever looks first waits until the GPU is set up")
    remapped = reader.read_if_there("remapped_rows", nvml.nvmlDeviceGetRemappedRows, handle)
    if remapped is not None and remapped[3]:
        reader.note("remapped_rows", "a row of its memory could not be remapped: replace the card", is_grave=True)
    elif remapped is not None and remapped[2]:
        reader.note("remapped_rows", "a row of its memory is to be remapped, at the GPU's next reset")
    fabric = reader.read_if_there("fabric", _ask_fabric, nvml, handle)
    if fabric is None or fabric.state in (FABRIC_UNKNOWN, FABRIC_NOT_STARTED):
        return
    if fabric.state == FABRIC_IN_PROGRESS:
        reader.note("fabric", "it has not joined the NVLink fabric: see the fabric manager")
    elif fabric.status != 0:
        reader.note("fabric", f"it could not join the NVLink fabric, error {fabric.status}: see the fabric manager")


def _ask_fabric(nvml: Any, handle: Any) -> Any:
    info = nvml.c_nvmlGpuFabricInfo_t()
    nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info))
    return info


def _judge_fabric(gpus: list[dict[str, Any]]) -> None:
    """Beside others a GPU outside the fabric computes nothing (CUDA's error 802); one that is alone needs none."""
    for gpu in gpus if len(gpus) > 1 else ():
        if gpu["state"] == "ok" and any(error["field"] == "fabric" for error in gpu["errors"]):
            gpu["state"] = "error"


def read_memory(nvml: Any, reader: "Reader", handle: Any) -> dict[str, int | None]:
    """Version 2 keeps the driver's own reserve apart, as nvidia-smi does; version 1 hides it in "used", so used is
    then unknown. Memory of 0 bytes is a driver that measures none.
    """
    memory = reader.read("memory_used_bytes", nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    old = reader.read("memory_total_bytes", nvml.nvmlDeviceGetMemoryInfo, handle) if memory is None else None
    total = reader.within("memory_total_bytes", getattr(memory or old, "total", None), LARGEST) or None
    most = 0 if total is None else total
    return {
        "memory_total_bytes": total,
        "memory_used_bytes": reader.within("memory_used_bytes", memory.used, most) if memory and total else None,
        "memory_reserved_bytes": reader.within("memory_reserved_bytes", memory.reserved, most)
        if memory and total
        else None,
    }


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
    if not known:
        return None
    return [
        {"pid": pid, "memory_bytes": used if used is not None and used <= LARGEST else None}
        for pid, used in sorted(found.items())
    ]


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
    """Calls into NVML; an error becomes None and a note. "Not supported" is no error: the card has no such thing.

    A note that is not an error of NVML has code 0; a grave one means that nobody should get this GPU.
    """

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        self.errors = errors
        self.is_grave = False

    def note(self, field: str, message: str, *, code: int = 0, is_grave: bool = False) -> None:
        self.errors.append({"field": field, "code": code, "message": message[:200]})
        self.is_grave = self.is_grave or is_grave

    def within(self, field: str, value: int | None, most: int) -> int | None:
        """The value, or None and a note where it cannot be one."""
        if value is None or 0 <= value <= most:
            return value
        self.note(field, f"{value} cannot be true")
        return None

    def read_if_there(self, field: str, call: Callable[..., Any], *args: Any) -> Any:
        """As `read`, of what came with newer drivers."""
        before = len(self.errors)
        value = self.read(field, call, *args)
        self.errors[before:] = [error for error in self.errors[before:] if error["code"] != FUNCTION_NOT_FOUND]
        return value

    def read(self, field: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # the binding raises what is no NVMLError, too; a monitor must outlive all of it
            code = code_of(error)
            if code != NOT_SUPPORTED:
                self.note(field, describe(error), code=code)
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
