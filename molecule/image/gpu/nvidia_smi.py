#!/usr/bin/python3
"""nvidia-smi for machines without a GPU: the real one's texts and exit codes over the scenario file of nvml.c.

Answers -L, --query-gpu, --query-compute-apps, --help-query-gpu, --version and the table, with -i, csv, noheader and
nounits; `mig -lgi` and `mig -cgi … -C`, whose instances are gone after a reboot, as real ones are. Texts and codes are
those of NVIDIA's 535 driver; tests/integration/hosts/test_fake_gpu.py is their list. Beyond the keys that nvml.c reads,
`[smi] delay = 2.5` makes every call slow and `[smi] hang = yes` one that never ends; `[smi gpu0] temperature.memory =
N/A` is a cell of --query-gpu as it is printed, for what only the program says.
"""

from __future__ import annotations

import configparser
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator
from datetime import datetime

SCENARIO = "/etc/fake-gpu/scenario.ini"
INSTANCES = "/run/fake-gpu"  # FAKE_GPU_INSTANCES: where MIG instances lie; a file system that a boot empties

# NVML's names, their codes, and the words that nvidia-smi has for them in a cell.
ERRORS = {
    "UNINITIALIZED": (1, "Uninitialized"),
    "INVALID_ARGUMENT": (2, "Invalid Argument"),
    "NOT_SUPPORTED": (3, "N/A"),
    "NO_PERMISSION": (4, "Insufficient Permissions"),
    "NOT_FOUND": (6, "Not Found"),
    "ALREADY_INITIALIZED": (5, "Already Initialized"),
    "INSUFFICIENT_SIZE": (7, "Insufficient Size"),
    "INSUFFICIENT_POWER": (8, "Insufficient External Power"),
    "DRIVER_NOT_LOADED": (9, "Driver Not Loaded"),
    "TIMEOUT": (10, "Timeout"),
    "IRQ_ISSUE": (11, "Interrupt Request Issue"),
    "LIBRARY_NOT_FOUND": (12, "NVML Shared Library Not Found"),
    "FUNCTION_NOT_FOUND": (13, "Function Not Found"),
    "CORRUPTED_INFOROM": (14, "Corrupted infoROM"),
    "GPU_IS_LOST": (15, "GPU is lost"),
    "RESET_REQUIRED": (16, "GPU requires reset"),
    "OPERATING_SYSTEM": (17, "GPU access blocked by the operating system"),
    "LIB_RM_VERSION_MISMATCH": (18, "Driver/library version mismatch"),
    "IN_USE": (19, "In use by another client"),
    "MEMORY": (20, "Insufficient Memory"),
    "NO_DATA": (21, "No data"),
    "VGPU_ECC_NOT_SUPPORTED": (22, "vGPU ECC not supported"),
    "INSUFFICIENT_RESOURCES": (23, "Insufficient Resources"),
    "FREQ_NOT_SUPPORTED": (24, "Invalid Frequency"),
    "ARGUMENT_VERSION_MISMATCH": (25, "Argument version mismatch"),
    "DEPRECATED": (26, "Requested functionality has been deprecated"),
    "NOT_READY": (27, "System is not in ready state"),
    "GPU_NOT_FOUND": (28, "No supported GPUs were found"),
    "INVALID_STATE": (29, "Resource not in correct state to perform requested operation"),
    "UNKNOWN": (999, "Unknown Error"),
}

# What it says, and exits with, when it cannot even open a GPU. Every other error is "Unknown Error" with 255.
HANDLE_ERRORS = {
    "INSUFFICIENT_POWER": (
        8,
        "Unable to communicate with GPU because it is insufficiently powered.\n"
        "This may be because not all required external power cables are\n"
        "attached, or the attached cables are not seated properly.",
    ),
    "IRQ_ISSUE": (
        11,
        "The NVIDIA kernel module detected an issue with GPU interrupts."
        'Consult the "Common Problems" Chapter of the NVIDIA Driver README for\n'
        "details and steps that can be taken to resolve this issue.",
    ),
    "GPU_IS_LOST": (15, "GPU is lost.  Reboot the system to recover this GPU"),
    "RESET_REQUIRED": (255, "A GPU reset must occur before this GPU can be used again."),
}
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
NO_LIBRARY = (
    "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. "
    "Please make sure that the NVIDIA Display Driver is properly installed and present in your system.\n"
    "Please also try adding directory that contains libnvidia-ml.so to your system PATH."
)
BAD_ARGUMENTS = "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help."


class NvmlError(Exception):
    """An NVML error by its name, in place of a value."""


class Exit(Exception):
    """The last words and the exit status."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status


# ---- the scenario ----------------------------------------------------------------------------------------------------


class Scenario:
    """The file as it was when the program started: a run answers from one state of the machine."""

    def __init__(self, path: str) -> None:
        self._file = configparser.ConfigParser(interpolation=None, strict=False, delimiters="=")
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123 - starts 20 ms sooner
                self._file.read_file(file)
        except FileNotFoundError:
            pass  # nothing is known: no GPU, every value NOT_SUPPORTED

    def get(self, section: str, key: str) -> str:
        """The value, after its delay. Raises NvmlError for an error in its place and when there is none."""
        value = self._file.get(section, key, fallback="!NOT_SUPPORTED")
        if value.startswith("delay:"):
            seconds, _, value = value.removeprefix("delay:").partition(" ")
            time.sleep(float(seconds))
        if value == "hang":
            hang()
        if value.startswith("!"):
            raise NvmlError(value[1:] if value[1:] in ERRORS else "UNKNOWN")
        return value

    def find(self, section: str, key: str) -> str | None:
        """The value, or None where there is none to be had."""
        try:
            return self.get(section, key)
        except NvmlError as error:
            if error.args[0] == "NOT_SUPPORTED":
                return None
            raise

    def find_cell(self, gpu: str, field: str) -> str | None:
        """A cell of --query-gpu that is printed as it stands here."""
        return self._file.get(f"smi {gpu}", field, fallback=None)

    @property
    def driver(self) -> int:
        """The branch of the driver."""
        try:
            return int(self.get("system", "driver_version").split(".")[0])
        except NvmlError:
            return 535

    @property
    def gpus(self) -> list[str]:
        """The sections that are GPUs: gpu0, gpu1 and so on up to the first gap."""
        names: list[str] = []
        while self._file.has_section(f"gpu{len(names)}"):
            names.append(f"gpu{len(names)}")
        return names


def hang() -> None:
    """Deaf to all that SIGTERM stands for, as a process that waits for a hung driver is."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        signal.pause()


# ---- fields: how a cell of --query-gpu is made -----------------------------------------------------------------------

Cell = Callable[[Scenario, str], str]


def plain(key: str) -> Cell:
    return lambda scenario, gpu: scenario.get(gpu, key)


def number(key: str) -> Cell:
    return lambda scenario, gpu: str(int(scenario.get(gpu, key), 0))


def mib(key: str) -> Cell:
    return lambda scenario, gpu: str(int(scenario.get(gpu, key), 0) // 2**20)


def watts(key: str) -> Cell:
    return lambda scenario, gpu: f"{int(scenario.get(gpu, key), 0) / 1000:.2f}"


def choice(key: str, *words: str) -> Cell:
    return lambda scenario, gpu: words[int(scenario.get(gpu, key), 0)]


def switch(key: str) -> Cell:
    return choice(key, "Disabled", "Enabled")


def word(key: str, index: int) -> Cell:
    return lambda scenario, gpu: scenario.get(gpu, key).split()[index]


def bit(key: str, position: int) -> Cell:
    return lambda scenario, gpu: "Active" if int(scenario.get(gpu, key), 0) >> position & 1 else "Not Active"


def bits(key: str) -> Cell:
    return lambda scenario, gpu: f"0x{int(scenario.get(gpu, key), 0):016X}"


def pages(key: str) -> Cell:
    return lambda scenario, gpu: str(len(scenario.get(gpu, key).split()))


def pci(part: int, digits: int) -> Cell:
    """A part of `domain:bus:device.function`."""
    return lambda scenario, gpu: (
        f"0x{int(scenario.get(gpu, 'pci_bus_id').replace('.', ':').split(':')[part], 16):0{digits}X}"
    )


def system(key: str) -> Cell:
    return lambda scenario, _: scenario.get("system", key)


def memory_free(scenario: Scenario, gpu: str) -> str:
    total, reserved, used = (int(scenario.get(gpu, f"memory_{part}"), 0) for part in ("total", "reserved", "used"))
    return str((total - reserved - used) // 2**20)


def fabric_status(scenario: Scenario, gpu: str) -> str:
    """What came of joining the fabric: known once that is over."""
    if int(scenario.get(gpu, "fabric_state"), 0) != FABRIC_STATES.index("Completed"):
        raise NvmlError("NOT_SUPPORTED")
    try:
        scenario.find(gpu, "fabric_status")
    except NvmlError as error:
        return ERRORS[error.args[0]][1]
    return "Success"


def timestamp(_: Scenario, __: str) -> str:
    return datetime.now().astimezone().strftime("%Y/%m/%d %H:%M:%S.%f")[:-3]


FABRIC_STATES = ("N/A", "Not Started", "In Progress", "Completed")
BARE = ("temperature.memory", "fabric.state", "fabric.status")  # "N/A" without brackets, from 550 on

# Field: its unit, and its cell. A key that the scenario has not gives [N/A], as on a GPU that does not support it.
FIELDS: dict[str, tuple[str, Cell]] = {
    "timestamp": ("", timestamp),
    "driver_version": ("", system("driver_version")),
    "count": ("", lambda scenario, _: str(len(scenario.gpus))),
    "name": ("", plain("name")),
    "serial": ("", plain("serial")),
    "uuid": ("", plain("uuid")),
    "pci.bus_id": ("", plain("pci_bus_id")),
    "pci.domain": ("", pci(0, 4)),
    "pci.bus": ("", pci(1, 2)),
    "pci.device": ("", pci(2, 2)),
    "pci.device_id": ("", lambda scenario, gpu: f"0x{int(scenario.get(gpu, 'pci_device_id'), 0):08X}"),
    "pci.sub_device_id": ("", lambda scenario, gpu: f"0x{int(scenario.get(gpu, 'pci_sub_device_id'), 0):08X}"),
    "pcie.link.gen.current": ("", number("pcie_gen_current")),
    "pcie.link.gen.max": ("", number("pcie_gen_max")),
    "pcie.link.width.current": ("", number("pcie_width_current")),
    "pcie.link.width.max": ("", number("pcie_width_max")),
    "index": ("", lambda _, gpu: gpu.removeprefix("gpu")),
    "display_mode": ("", switch("display_mode")),
    "display_active": ("", switch("display_active")),
    "persistence_mode": ("", switch("persistence_mode")),
    "accounting.mode": ("", switch("accounting_mode")),
    "accounting.buffer_size": ("", number("accounting_buffer_size")),
    "driver_model.current": ("", plain("driver_model_current")),
    "driver_model.pending": ("", plain("driver_model_pending")),
    "vbios_version": ("", plain("vbios_version")),
    "inforom.img": ("", plain("inforom_img")),
    "inforom.oem": ("", plain("inforom_oem")),
    "inforom.ecc": ("", plain("inforom_ecc")),
    "inforom.pwr": ("", plain("inforom_pwr")),
    "gom.current": ("", plain("gom_current")),
    "gom.pending": ("", plain("gom_pending")),
    "fan.speed": ("%", number("fan_speed")),
    "pstate": ("", lambda scenario, gpu: f"P{int(scenario.get(gpu, 'pstate'), 0)}"),
    "clocks_event_reasons.supported": ("", bits("clocks_event_reasons_supported")),
    "clocks_event_reasons.active": ("", bits("clocks_event_reasons")),
    "clocks_event_reasons.gpu_idle": ("", bit("clocks_event_reasons", 0)),
    "clocks_event_reasons.applications_clocks_setting": ("", bit("clocks_event_reasons", 1)),
    "clocks_event_reasons.sw_power_cap": ("", bit("clocks_event_reasons", 2)),
    "clocks_event_reasons.hw_slowdown": ("", bit("clocks_event_reasons", 3)),
    "clocks_event_reasons.sync_boost": ("", bit("clocks_event_reasons", 4)),
    "clocks_event_reasons.sw_thermal_slowdown": ("", bit("clocks_event_reasons", 5)),
    "clocks_event_reasons.hw_thermal_slowdown": ("", bit("clocks_event_reasons", 6)),
    "clocks_event_reasons.hw_power_brake_slowdown": ("", bit("clocks_event_reasons", 7)),
    "memory.total": ("MiB", mib("memory_total")),
    "memory.reserved": ("MiB", mib("memory_reserved")),
    "memory.used": ("MiB", mib("memory_used")),
    "memory.free": ("MiB", memory_free),
    "compute_mode": ("", choice("compute_mode", "Default", "Exclusive_Thread", "Prohibited", "Exclusive_Process")),
    "utilization.gpu": ("%", number("utilization_gpu")),
    "utilization.memory": ("%", number("utilization_memory")),
    "encoder.stats.sessionCount": ("", number("encoder_sessions")),
    "encoder.stats.averageFps": ("", number("encoder_fps")),
    "encoder.stats.averageLatency": ("", number("encoder_latency")),
    "ecc.mode.current": ("", switch("ecc_mode_current")),
    "ecc.mode.pending": ("", switch("ecc_mode_pending")),
    **{
        f"ecc.errors.{kind}.{counter}.{part}": ("", number(f"ecc_{kind}_{counter}" + suffix))
        for kind in ("corrected", "uncorrected")
        for counter in ("volatile", "aggregate")
        for part, suffix in (
            ("device_memory", "_device_memory"),
            ("dram", "_dram"),
            ("register_file", "_register_file"),
            ("l1_cache", "_l1_cache"),
            ("l2_cache", "_l2_cache"),
            ("texture_memory", "_texture_memory"),
            ("cbu", "_cbu"),
            ("sram", "_sram"),
            ("total", ""),
        )
    },
    "retired_pages.single_bit_ecc.count": ("", pages("retired_pages_single_bit")),
    "retired_pages.double_bit.count": ("", pages("retired_pages_double_bit")),
    "retired_pages.pending": ("", choice("retired_pages_pending", "No", "Yes")),
    "remapped_rows.correctable": ("", word("remapped_rows", 0)),
    "remapped_rows.uncorrectable": ("", word("remapped_rows", 1)),
    "remapped_rows.pending": ("", word("remapped_rows", 2)),
    "remapped_rows.failure": ("", word("remapped_rows", 3)),
    "temperature.gpu": ("", number("temperature_gpu")),
    "temperature.memory": ("", number("temperature_memory")),
    "power.management": ("", switch("power_management")),
    "power.draw": ("W", watts("power_draw_mw")),
    "power.draw.average": ("W", watts("power_draw_average_mw")),
    "power.draw.instant": ("W", watts("power_draw_instant_mw")),
    "power.limit": ("W", watts("power_limit_mw")),
    "enforced.power.limit": ("W", watts("enforced_power_limit_mw")),
    "power.default_limit": ("W", watts("power_default_limit_mw")),
    "power.min_limit": ("W", watts("power_min_limit_mw")),
    "power.max_limit": ("W", watts("power_max_limit_mw")),
    "clocks.current.graphics": ("MHz", number("clocks_current_graphics")),
    "clocks.current.sm": ("MHz", number("clocks_current_sm")),
    "clocks.current.memory": ("MHz", number("clocks_current_mem")),
    "clocks.current.video": ("MHz", number("clocks_current_video")),
    "clocks.applications.graphics": ("MHz", number("clocks_applications_graphics")),
    "clocks.applications.memory": ("MHz", number("clocks_applications_mem")),
    "clocks.default_applications.graphics": ("MHz", number("clocks_default_applications_graphics")),
    "clocks.default_applications.memory": ("MHz", number("clocks_default_applications_mem")),
    "clocks.max.graphics": ("MHz", number("clocks_max_graphics")),
    "clocks.max.sm": ("MHz", number("clocks_max_sm")),
    "clocks.max.memory": ("MHz", number("clocks_max_mem")),
    "mig.mode.current": ("", switch("mig_mode_current")),
    "mig.mode.pending": ("", switch("mig_mode_pending")),
    "fabric.state": ("", choice("fabric_state", *FABRIC_STATES)),
    "fabric.status": ("", fabric_status),
}
# What came with 535: to an older driver these are no fields, and clocks_event_reasons has its older name.
SINCE_535 = ("power.draw.average", "power.draw.instant", "fabric.state", "fabric.status")
# Other names of the same fields; the header shows the first name.
ALIASES = {
    "gpu_name": "name",
    "gpu_serial": "serial",
    "gpu_uuid": "uuid",
    "gpu_bus_id": "pci.bus_id",
    "clocks.gr": "clocks.current.graphics",
    "clocks.sm": "clocks.current.sm",
    "clocks.mem": "clocks.current.memory",
    "clocks.video": "clocks.current.video",
    **{
        name.replace("clocks_event", "clocks_throttle"): name
        for name in FIELDS
        if name.startswith("clocks_event_reasons")
    },
}
APP_FIELDS = {
    "timestamp": "timestamp",
    "gpu_name": "gpu_name",
    "gpu_bus_id": "gpu_bus_id",
    "gpu_serial": "gpu_serial",
    "gpu_uuid": "gpu_uuid",
    "pid": "pid",
    "process_name": "process_name",
    "name": "process_name",
    "used_gpu_memory": "used_gpu_memory [MiB]",
    "used_memory": "used_gpu_memory [MiB]",
}


# ---- the program -----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr] # a TextIO in the type, a file in truth
    scenario = Scenario(os.environ.get("FAKE_GPU_SCENARIO", SCENARIO))
    try:
        for line in divide(scenario, argv[1:]) if argv[:1] == ["mig"] else answer(scenario, options_of(argv)):
            sys.stdout.write(line + "\n")
    except Exit as end:
        sys.stdout.write(f"{end}\n" if str(end) else "")
        return end.status
    return 0


def options_of(argv: list[str]) -> dict[str, str]:
    """`--query-gpu=x`, `-i 0` and `-L` by name; short and long names are one."""
    long_names = {"-L": "--list-gpus", "-i": "--id", "-h": "--help"}
    takes_value = {"--id", "--query-gpu", "--query-compute-apps", "--format"}
    options: dict[str, str] = {}
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = long_names.get(name, name)
        options[name] = value if equals or name not in takes_value else next(rest, "")
    return options


def answer(scenario: Scenario, options: dict[str, str]) -> Iterator[str]:
    if scenario.find("smi", "hang"):
        hang()
    time.sleep(float(scenario.find("smi", "delay") or 0))
    initialize(scenario)
    if "--help-query-gpu" in options:
        yield from help_query(scenario)
    elif "--version" in options:
        yield from versions(scenario)
    elif "--list-gpus" in options:
        yield from list_gpus(scenario)
    elif "--query-gpu" in options:
        yield from query_gpus(scenario, options)
    elif "--query-compute-apps" in options:
        yield from query_apps(scenario, options)
    elif set(options) <= {"--id"}:
        yield from table(scenario, options)
    else:
        raise Exit(1, BAD_ARGUMENTS)


def initialize(scenario: Scenario) -> None:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise Exit(12, NO_LIBRARY) from None
    try:
        scenario.find("system", "init")
    except NvmlError as error:
        code, text = ERRORS[error.args[0]]
        if code == 9:
            raise Exit(9, NO_DRIVER) from None
        if code == 18:
            library = ".".join(scenario.get("system", "nvml_version").split(".")[1:3])
            text += f"\nNVML library version: {library}"
        raise Exit(min(code, 255), f"Failed to initialize NVML: {text}") from None


def open_gpu(scenario: Scenario, gpu: str) -> bool:
    """Whether the GPU is there for us; ends the program when it is there and does not answer."""
    try:
        scenario.find(gpu, "state")
    except NvmlError as error:
        name = error.args[0]
        if name in ("NO_PERMISSION", "NOT_FOUND"):
            return False
        status, text = HANDLE_ERRORS.get(name, (255, "Unknown Error"))
        raise Exit(status, f"Unable to determine the device handle for {gpu.upper()}: {text}") from None
    return True


def chosen(scenario: Scenario, options: dict[str, str]) -> list[str]:
    """The GPUs to speak of, each of which answers. Without -i every one is opened first, so one lost GPU hides all."""
    if not scenario.gpus:
        raise Exit(6, "No devices were found")
    if "--id" not in options:
        return [gpu for gpu in scenario.gpus if open_gpu(scenario, gpu)]
    wanted = [part.strip() for part in options["--id"].split(",")]
    return [gpu_called(scenario, name) for name in wanted]


def gpu_called(scenario: Scenario, name: str) -> str:
    if f"gpu{name}" in scenario.gpus:
        open_gpu(scenario, f"gpu{name}")
        return f"gpu{name}"
    for gpu in scenario.gpus:
        try:
            scenario.find(gpu, "state")  # searched by UUID, every GPU is asked for its own
        except NvmlError as error:
            text = HANDLE_ERRORS.get(error.args[0], (255, "Unknown Error"))[1]
            raise Exit(255, f"Problem with GPU {gpu.removeprefix('gpu')}: {text}") from None
        if name.lower() in (scenario.get(gpu, "uuid").lower(), scenario.get(gpu, "pci_bus_id").lower()):
            return gpu
    raise Exit(6, "No devices were found")


def list_gpus(scenario: Scenario) -> Iterator[str]:
    if not scenario.gpus:
        raise Exit(0, "No devices found.")
    for gpu in scenario.gpus:
        if open_gpu(scenario, gpu):
            index = gpu.removeprefix("gpu")
            yield f"GPU {index}: {cell(scenario, gpu, 'name')} (UUID: {cell(scenario, gpu, 'uuid')})"
            for number, profile in enumerate(instances(gpu)):
                import uuid  # here: every other run starts sooner

                own = uuid.uuid5(uuid.NAMESPACE_OID, f"{cell(scenario, gpu, 'uuid')}/{number}")
                yield f"  MIG {profile:<12}Device {number:>2}: (UUID: MIG-{own})"


def query_gpus(scenario: Scenario, options: dict[str, str]) -> Iterator[str]:
    fields = [name.strip() for name in options["--query-gpu"].split(",")]
    check_query(fields, {name for name in FIELDS.keys() | ALIASES.keys() if is_known(scenario, name)}, options)
    fields = [ALIASES.get(name, name) for name in fields]
    gpus = chosen(scenario, options)
    if "noheader" not in options["--format"]:
        yield ", ".join(title(scenario, name) for name in fields)
    with_units = "nounits" not in options["--format"]
    for gpu in gpus:
        yield ", ".join(query_cell(scenario, gpu, name, with_unit=with_units) for name in fields)


def is_known(scenario: Scenario, name: str) -> bool:
    return scenario.driver >= 535 or not name.startswith(("clocks_event", *SINCE_535))


def title(scenario: Scenario, field: str) -> str:
    unit, name = FIELDS[field][0], field
    if scenario.driver < 535:
        name = name.replace("clocks_event", "clocks_throttle")
    return f"{name} [{unit}]" if unit else name


def query_cell(scenario: Scenario, gpu: str, field: str, *, with_unit: bool) -> str:
    """A cell as this very driver prints it."""
    if (printed := scenario.find_cell(gpu, field)) is not None:
        return printed
    value = cell(scenario, gpu, field, with_unit=with_unit)
    return "N/A" if value == "[N/A]" and field in BARE and scenario.driver >= 550 else value


def query_apps(scenario: Scenario, options: dict[str, str]) -> Iterator[str]:
    fields = [name.strip() for name in options["--query-compute-apps"].split(",")]
    check_query(fields, APP_FIELDS, options)
    gpus = chosen(scenario, options)
    if "noheader" not in options["--format"]:
        yield ", ".join(APP_FIELDS[name] for name in fields)
    unit = "" if "nounits" in options["--format"] else " MiB"
    for gpu in gpus:
        for pid, used in processes(scenario, gpu):
            yield ", ".join(app_cell(scenario, gpu, APP_FIELDS[name], pid, used, unit) for name in fields)


def check_query(fields: list[str], known: Container[str], options: dict[str, str]) -> None:
    for name in fields:
        if name not in known:
            raise Exit(2, f'Field "{name}" is not a valid field to query.\n')
    if "csv" not in options.get("--format", ""):
        raise Exit(2, "\"--format=\" switch is missing. Please run 'nvidia-smi -h' for help.\n")


def cell(scenario: Scenario, gpu: str, field: str, *, with_unit: bool = False) -> str:
    unit, make = FIELDS[field]
    try:
        value = make(scenario, gpu)
    except NvmlError as error:
        return f"[{ERRORS[error.args[0]][1]}]"
    return f"{value} {unit}" if unit and with_unit else value


def processes(scenario: Scenario, gpu: str) -> Iterator[tuple[str, int | None]]:
    """Pid, and bytes of GPU memory or None where the driver does not know."""
    for item in (scenario.find(gpu, "compute_processes") or "").split():
        pid, _, used = item.partition(":")
        yield pid, None if used in ("", "?") else int(used, 0)


def app_cell(scenario: Scenario, gpu: str, header: str, pid: str, used: int | None, unit: str) -> str:
    if header == "pid":
        return pid
    if header == "process_name":
        return scenario.find("procnames", pid) or "[Not Found]"
    if header.startswith("used_gpu_memory"):
        return "[N/A]" if used is None else f"{used // 2**20}{unit}"
    return cell(scenario, gpu, ALIASES.get(header, header))


# ---- MIG -------------------------------------------------------------------------------------------------------------

PROFILES = {"1g.10gb": 19, "1g.20gb": 15, "2g.20gb": 14, "3g.40gb": 9, "4g.40gb": 5, "7g.80gb": 0}  # an H100's
SLICES = 7


def divide(scenario: Scenario, argv: list[str]) -> Iterator[str]:
    initialize(scenario)
    options = dict(zip(argv, [*argv[1:], ""], strict=True))
    gpus = chosen(scenario, {"--id": options["-i"]} if "-i" in options else {})
    for gpu in gpus:
        if scenario.find(gpu, "mig_mode_current") != "1":
            raise Exit(0, "No MIG-enabled devices found.")
    if "-cgi" in options:
        for gpu in gpus:
            yield from create(gpu, options["-cgi"].split(","), has_compute="-C" in options)
    elif "-lgi" in options:
        yield from list_instances(gpus)
    else:
        raise Exit(1, BAD_ARGUMENTS)


def instances(gpu: str) -> list[str]:
    """The profiles of a GPU's instances."""
    try:
        with open(f"{os.environ.get('FAKE_GPU_INSTANCES', INSTANCES)}/{gpu}", encoding="utf-8") as file:  # noqa: PTH123
            return file.read().split()
    except FileNotFoundError:
        return []


def create(gpu: str, wanted: list[str], *, has_compute: bool) -> Iterator[str]:
    index, folder = gpu.removeprefix("gpu"), os.environ.get("FAKE_GPU_INSTANCES", INSTANCES)
    by_id = {str(number): name for name, number in PROFILES.items()}
    for name in (by_id.get(each, each) for each in wanted):
        there = instances(gpu)
        if name not in PROFILES:
            raise Exit(2, f"Unable to parse profile name {name}.\nFailed to create GPU instances: Invalid Argument")
        if sum(int(each.split("g")[0]) for each in (*there, name)) > SLICES:
            text = f"Unable to create a GPU instance on GPU {index:>2} using profile {PROFILES[name]}"
            raise Exit(23, f"{text}: Insufficient Resources\nFailed to create GPU instances: Insufficient Resources")
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - pathlib is slow to import
        with open(f"{folder}/{gpu}", "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(" ".join([*there, name]))
        number, profile = len(there) + 1, f"MIG {name}"
        using = f"using profile {profile} (ID {PROFILES[name]:>2})"
        yield f"Successfully created GPU instance ID {number:>2} on GPU {index:>2} {using}"
        if has_compute:
            yield f"Successfully created compute instance ID  0 on GPU {index:>2} GPU instance ID {number:>2} {using}"


def list_instances(gpus: list[str]) -> Iterator[str]:
    found = [(gpu.removeprefix("gpu"), number, each) for gpu in gpus for number, each in enumerate(instances(gpu), 1)]
    if not found:
        raise Exit(6, "No GPU instances found: Not Found")
    yield f"+{'-' * 55}+"
    yield f"| {'GPU instances:':<54}|"
    yield "| GPU   Name             Profile  Instance   Placement  |"
    yield "|                          ID       ID       Start:Size |"
    yield f"|{'=' * 55}|"
    for index, number, name in found:
        yield f"| {index:>3}  MIG {name:<14} {PROFILES[name]:>4} {number:>8} {f'{number - 1}:{name[0]}':>12}     |"
        yield f"+{'-' * 55}+"


def help_query(scenario: Scenario) -> Iterator[str]:
    yield 'List of valid properties to query for the switch "--query-gpu=":'
    yield ""
    for name in FIELDS:
        if not is_known(scenario, name) and name in SINCE_535:
            continue
        others = [alias for alias, of in ALIASES.items() if of == name and not alias.startswith("clocks_throttle")]
        name = title(scenario, name).partition(" [")[0]
        yield " or ".join(f'"{each}"' for each in (name, *others))
        yield f"The {name.replace('.', ' ').replace('_', ' ')} of the GPU."
        yield ""


def versions(scenario: Scenario) -> Iterator[str]:
    driver = scenario.get("system", "driver_version")
    if int(driver.split(".")[0]) < 550:
        raise Exit(255, BAD_ARGUMENTS)  # the option is newer than the driver
    yield f"NVIDIA-SMI version  : {driver}"
    yield f"NVML version        : {'.'.join(scenario.get('system', 'nvml_version').split('.')[1:3])}"
    yield f"DRIVER version      : {driver}"
    yield f"CUDA Version        : {cuda_version(scenario)}"


def cuda_version(scenario: Scenario) -> str:
    number = int(scenario.get("system", "cuda_driver_version"))
    return f"{number // 1000}.{number % 1000 // 10}"


def table(scenario: Scenario, options: dict[str, str]) -> Iterator[str]:
    gpus = chosen(scenario, options)
    driver = scenario.get("system", "driver_version")
    yield datetime.now().astimezone().strftime("%a %b %e %H:%M:%S %Y").ljust(31)
    yield f"+{'-' * 87}+"
    cuda = cuda_version(scenario)
    yield f"| NVIDIA-SMI {driver:<22} Driver Version: {driver:<12} CUDA Version: {cuda:<9}|"
    yield f"|{'-' * 41}+{'-' * 22}+{'-' * 22}+"
    yield "| GPU  Name                 Persistence-M | Bus-Id        Disp.A | Volatile Uncorr. ECC |"
    yield "| Fan  Temp   Perf          Pwr:Usage/Cap |         Memory-Usage | GPU-Util  Compute M. |"
    yield "|                                         |                      |               MIG M. |"
    yield f"|{'=' * 41}+{'=' * 22}+{'=' * 22}|"
    for gpu in gpus:
        yield from table_rows(scenario, gpu)
        yield f"+{'-' * 41}+{'-' * 22}+{'-' * 22}+"
    yield " " * 89
    yield f"+{'-' * 87}+"
    yield f"| {'Processes:':<86}|"
    yield "|  GPU   GI   CI        PID   Type   Process name                            GPU Memory |"
    yield "|        ID   ID                                                             Usage      |"
    yield f"|{'=' * 87}|"
    lines = [line for gpu in gpus for line in table_processes(scenario, gpu)]
    yield from lines or [f"|  {'No running processes found':<85}|"]
    yield f"+{'-' * 87}+"


def table_rows(scenario: Scenario, gpu: str) -> Iterator[str]:
    def show(field: str, unit: str = "") -> str:
        value = cell(scenario, gpu, field)
        return f"{value.split('.')[0]}{unit}" if not value.startswith("[") else "N/A" if value == "[N/A]" else "ERR!"

    on = {"Enabled": "On", "Disabled": "Off"}
    name = cell(scenario, gpu, "name")[:27]
    persistence = on.get(show("persistence_mode"), show("persistence_mode"))
    display = on.get(show("display_active"), show("display_active"))
    bus = cell(scenario, gpu, "pci.bus_id")
    memory = f"{show('memory.used', 'MiB')} / {show('memory.total', 'MiB')}"
    power = f"{show('power.draw', 'W')} / {show('enforced.power.limit', 'W')}"
    index = gpu.removeprefix("gpu")
    errors = show("ecc.errors.uncorrected.volatile.total")
    yield f"| {index:>3}  {name:<27}   {persistence:<4} | {bus:<16}{display:>4} | {errors:>20} |"
    yield (
        f"| {show('fan.speed', '%'):<4} {show('temperature.gpu', 'C'):>4}  {show('pstate'):>4} {power:>23} "
        f"| {memory:>20} | {show('utilization.gpu', '%'):>7} {show('compute_mode'):>12} |"
    )
    yield f"|{'':41}|{'':22}| {show('mig.mode.current'):>20} |"


def table_processes(scenario: Scenario, gpu: str) -> Iterator[str]:
    for pid, used in processes(scenario, gpu):
        name = (scenario.find("procnames", pid) or "[Not Found]")[-38:]
        memory = "N/A" if used is None else f"{used // 2**20}MiB"
        yield f"| {gpu.removeprefix('gpu'):>4}   N/A  N/A {pid:>10}      C   {name:<38}{memory:>11} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
