"""The fake GPUs behave as NVIDIA's library and nvidia-smi do: asked by the unmodified binding, and by a shell.

What the agent makes of these answers is tested with the agent. Here is only that the double is a true one.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.gpu import Scenario

GPU_DIR = Path(__file__).parents[3] / "molecule" / "image" / "gpu"
DEADLINE_S = 20.0
MIB = 2**20

# A program over the binding: each line is an expression, each answer its value or the name of what it raised.
CLIENT = """
import json, sys
from ctypes import byref
from pynvml import *
for line in sys.stdin:
    try:
        answer = {"value": eval(line)}
    except BaseException as error:
        answer = {"error": type(error).__name__, "code": getattr(error, "value", None)}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def machine(tmp_path: Path, libraries: Path) -> Machine:
    return Machine(tmp_path / "scenario.ini", libraries / "current")


@dataclass
class Machine:
    """A machine with fake GPUs, as its programs see it."""

    file: Path
    library: Path

    def show(self, scenario: Scenario) -> None:
        scenario.write(self.file)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "FAKE_GPU_SCENARIO": str(self.file),
            "FAKE_GPU_INSTANCES": str(self.file.parent / "instances"),
            "LD_LIBRARY_PATH": str(self.library),
        }

    def smi(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, GPU_DIR / "nvidia_smi.py", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.stderr == ""
        return done.returncode, done.stdout


class Nvml:
    """One long-lived process that uses NVIDIA's own Python binding."""

    def __init__(self, machine: Machine) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=machine.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def say(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, within_s: float = DEADLINE_S) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], within_s)
        assert ready, f"no answer within {within_s} s"
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, expression: str) -> Any:
        self.say(expression)
        answer = self.hear()
        assert "value" in answer, answer
        return answer["value"]

    def error(self, expression: str) -> str:
        self.say(expression)
        return str(self.hear().get("error"))


@pytest.fixture
def nvml(machine: Machine) -> Iterator[Callable[[], Nvml]]:
    """Starts programs that use the binding; all of them are gone afterwards."""
    started: list[Nvml] = []

    def start() -> Nvml:
        started.append(Nvml(machine))
        return started[-1]

    yield start
    for client in started:
        client.process.kill()
        client.process.communicate()


def open_both(client: Nvml) -> None:
    client.ask("nvmlInit()")
    client.ask("globals().update(gpus=[nvmlDeviceGetHandleByIndex(i) for i in (0, 1)])")


# ---- the library -----------------------------------------------------------------------------------------------------


def test_the_binding_reads_two_gpus(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    scenario = Scenario.two_h100().having("gpu1", utilization_gpu="97", temperature_gpu="64")
    machine.show(scenario)
    client = nvml()
    open_both(client)
    assert client.ask("nvmlDeviceGetCount()") == 2
    assert client.ask("[nvmlDeviceGetUUID(g) for g in gpus]") == scenario.uuids
    assert client.ask("nvmlDeviceGetName(gpus[0])") == "NVIDIA H100 80GB HBM3"
    assert client.ask("nvmlSystemGetDriverVersion()") == "570.133.20"
    assert client.ask("[nvmlDeviceGetUtilizationRates(g).gpu for g in gpus]") == [0, 97]
    assert client.ask("[nvmlDeviceGetTemperature(g, NVML_TEMPERATURE_GPU) for g in gpus]") == [31, 64]
    assert client.ask("nvmlDeviceGetPowerUsage(gpus[0])") == 69540
    assert client.ask("nvmlDeviceGetPciInfo(gpus[1]).busId") == "00000000:29:00.0"
    assert client.ask("nvmlDeviceGetMigMode(gpus[0])") == [0, 0]
    assert client.ask("nvmlDeviceGetRemappedRows(gpus[0])") == [0, 0, 0, 0]
    assert client.ask("nvmlDeviceGetClockInfo(gpus[0], NVML_CLOCK_MEM)") == 2619
    assert client.ask("nvmlDeviceGetTotalEccErrors(gpus[0], 1, 0)") == 0
    assert client.ask("nvmlDeviceGetIndex(nvmlDeviceGetHandleByUUID(nvmlDeviceGetUUID(gpus[1])))") == 1
    assert client.error("nvmlDeviceGetHandleByIndex(2)") == "NVMLError_InvalidArgument"


def test_a_value_that_a_gpu_does_not_have_is_not_supported(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    machine.show(Scenario.two_h100().lacking("gpu1", "power_draw_mw"))
    client = nvml()
    open_both(client)
    assert client.error("nvmlDeviceGetFanSpeed(gpus[0])") == "NVMLError_NotSupported"
    assert client.error("nvmlDeviceGetPowerUsage(gpus[1])") == "NVMLError_NotSupported"
    assert client.ask("nvmlDeviceGetPowerUsage(gpus[0])") == 69540


def test_the_first_memory_structure_counts_the_reserved_part_as_used(
    machine: Machine, nvml: Callable[[], Nvml]
) -> None:
    machine.show(Scenario.two_h100().using(0, {4711: 1024 * MIB}))
    client = nvml()
    open_both(client)
    assert client.ask("nvmlDeviceGetMemoryInfo(gpus[0], version=nvmlMemory_v2).used") == 1024 * MIB
    assert client.ask("nvmlDeviceGetMemoryInfo(gpus[0]).used") == (1024 + 561) * MIB
    assert client.ask("nvmlDeviceGetMemoryInfo(gpus[0]).free") == (81559 - 561 - 1024) * MIB
    assert client.error("nvmlDeviceGetMemoryInfo(gpus[0], version=1)") == "NVMLError_ArgumentVersionMismatch"


def test_processes_are_listed_with_memory_or_none(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    machine.show(Scenario.two_h100().using(1, {4711: 512 * MIB, 4712: None}).having("procnames", **{"4711": "train"}))
    client = nvml()
    open_both(client)
    listing = "[[p.pid, p.usedGpuMemory] for p in nvmlDeviceGetComputeRunningProcesses(gpus[%d])]"
    assert client.ask(listing % 0) == []
    assert client.ask(listing % 1) == [[4711, 512 * MIB], [4712, None]]
    assert client.ask("nvmlSystemGetProcessName(4711)") == "train"
    assert client.error("nvmlSystemGetProcessName(4712)") == "NVMLError_NotFound"


def test_a_gpu_lost_midway_is_lost_to_a_running_program(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    scenario = Scenario.two_h100()
    machine.show(scenario)
    client = nvml()
    open_both(client)
    assert client.ask("nvmlDeviceGetTemperature(gpus[1], 0)") == 31

    machine.show(scenario.lost(1))
    assert client.error("nvmlDeviceGetTemperature(gpus[1], 0)") == "NVMLError_GpuIsLost"
    assert client.error("nvmlDeviceGetHandleByIndex(1)") == "NVMLError_GpuIsLost"
    assert client.ask("nvmlDeviceGetTemperature(gpus[0], 0)") == 31
    assert client.ask("nvmlDeviceGetCount()") == 2  # still counted: the number is no health check

    machine.show(scenario)
    assert client.ask("nvmlDeviceGetTemperature(gpus[1], 0)") == 31


def test_a_hung_driver_holds_its_caller_in_d_state_deaf_to_sigterm(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    machine.show(Scenario.two_h100().hang(1))
    client = nvml()
    client.ask("nvmlInit()")
    assert client.ask("nvmlDeviceGetUUID(nvmlDeviceGetHandleByIndex(0))")
    client.say("nvmlDeviceGetHandleByIndex(1)")
    wait_for(lambda: process_state(client.process.pid) == "D", "the caller to hang")
    client.process.send_signal(signal.SIGTERM)
    assert ignores_sigterm(client.process.pid)
    assert client.process.poll() is None
    client.process.kill()
    assert client.process.wait(DEADLINE_S) == -signal.SIGKILL


def test_a_slow_call_answers_after_its_delay(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    machine.show(Scenario.two_h100().having("gpu0", temperature_gpu="delay:0.3 47"))
    client = nvml()
    open_both(client)
    began = time.monotonic()
    assert client.ask("nvmlDeviceGetTemperature(gpus[0], 0)") == 47
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize(
    ("scenario", "error"),
    [
        (Scenario.two_h100().mismatch(), "NVMLError_LibRmVersionMismatch"),
        (Scenario.two_h100().without_driver(), "NVMLError_DriverNotLoaded"),
        (Scenario.two_h100().having("system", init="!NO_PERMISSION"), "NVMLError_NoPermission"),
        (Scenario.two_h100().having("system", init="!SOMETHING_NEW"), "NVMLError_Unknown"),
        (Scenario.two_h100().having("system", init="!4242"), "NVMLError"),  # a newer driver's, unknown to the binding
    ],
)
def test_a_driver_that_cannot_be_talked_to_fails_the_first_call(
    machine: Machine, nvml: Callable[[], Nvml], scenario: Scenario, error: str
) -> None:
    machine.show(scenario)
    client = nvml()
    assert client.error("nvmlInit()") == error
    assert client.error("nvmlDeviceGetCount()") == "NVMLError_Uninitialized"

    machine.show(Scenario.two_h100())  # the module was reloaded
    client.ask("nvmlInit()")
    assert client.ask("nvmlDeviceGetCount()") == 2


def test_the_library_has_the_drivers_own_words_for_every_error(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    """As driver 580.159 said them of an H200."""
    machine.show(Scenario.two_h100())
    client = nvml()
    client.ask("nvmlInit()")
    assert client.ask("[nvmlErrorString(code) for code in range(30)]") == [
        "Success",
        "Uninitialized",
        "Invalid Argument",
        "Not Supported",
        "Insufficient Permissions",
        "Already Initialized",
        "Not Found",
        "Insufficient Size",
        "Insufficient External Power",
        "Driver Not Loaded",
        "Timeout",
        "Interrupt Request Issue",
        "NVML Shared Library Not Found",
        "Function Not Found",
        "Corrupted infoROM",
        "GPU is lost",
        "GPU requires reset",
        "GPU access blocked by the operating system",
        "Driver/library version mismatch",
        "In use by another client",
        "Insufficient Memory",
        "No data",
        "vGPU ECC not supported",
        "Insufficient Resources",
        "Invalid Frequency",
        "Argument version mismatch",
        "Requested functionality has been deprecated",
        "System is not in ready state",
        "No supported GPUs were found",
        "Resource not in correct state to perform requested operation",
    ]


def test_init_and_shutdown_are_counted(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    machine.show(Scenario.two_h100())
    client = nvml()
    for expression in ("nvmlInit()", "nvmlInit()", "nvmlShutdown()"):
        client.ask(expression)
    assert client.ask("nvmlDeviceGetCount()") == 2
    client.ask("nvmlShutdown()")
    assert client.error("nvmlDeviceGetCount()") == "NVMLError_Uninitialized"
    assert client.error("nvmlShutdown()") == "NVMLError_Uninitialized"


def test_an_old_driver_lacks_the_newer_functions(machine: Machine, libraries: Path, nvml: Callable[[], Nvml]) -> None:
    machine.library = libraries / "old-driver"
    machine.show(Scenario.two_h100().using(0, {4711: MIB}))
    client = nvml()
    open_both(client)
    missing = "NVMLError_FunctionNotFound"
    assert client.error("nvmlDeviceGetComputeRunningProcesses_v3(gpus[0])") == missing
    assert client.error("nvmlDeviceGetMemoryInfo(gpus[0], version=nvmlMemory_v2)") == missing
    assert client.error("nvmlDeviceGetCurrentClocksEventReasons(gpus[0])") == missing
    assert client.ask("[p.pid for p in nvmlDeviceGetComputeRunningProcesses_v2(gpus[0])]") == [4711]
    assert client.ask("nvmlDeviceGetMemoryInfo(gpus[0]).total") == 81559 * MIB


def test_a_driver_that_is_loaded_again_knows_none_of_its_clients(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    scenario = Scenario.two_h100().having("system", loaded="1")
    machine.show(scenario)
    client = nvml()
    open_both(client)
    machine.show(scenario.having("system", loaded="2"))
    assert client.error("nvmlDeviceGetUUID(gpus[0])") == "NVMLError_Uninitialized"
    client.ask("nvmlInit()")
    assert client.ask("nvmlDeviceGetUUID(gpus[0])") == scenario.uuids[0]


def test_an_early_driver_writes_wider_entries_than_the_binding_reads(
    machine: Machine, libraries: Path, nvml: Callable[[], Nvml]
) -> None:
    """With no error at all: the first process is right, and what follows is rubbish."""
    machine.library = libraries / "early-535"
    machine.show(Scenario.two_h100().using(0, {4711: MIB, 4712: MIB, 4713: MIB}))
    client = nvml()
    open_both(client)
    pids = client.ask("[p.pid for p in nvmlDeviceGetComputeRunningProcesses_v3(gpus[0])]")
    assert (len(pids), pids[0]) == (3, 4711)
    assert pids[1:] != [4712, 4713]


@pytest.mark.parametrize(
    ("keys", "told", "cells"),
    [
        ({}, "NVMLError_NotSupported", "N/A, N/A"),
        ({"fabric_state": "2"}, [2, 0], "In Progress, N/A"),
        ({"fabric_state": "3"}, [3, 0], "Completed, Success"),
        ({"fabric_state": "3", "fabric_status": "!UNKNOWN"}, [3, 999], "Completed, Unknown Error"),
    ],
)
def test_the_fabric_is_joined_or_not(
    machine: Machine, nvml: Callable[[], Nvml], keys: dict[str, str], told: Any, cells: str
) -> None:
    machine.show(TWO.having("gpu0", **keys))
    client = nvml()
    open_both(client)
    client.say(
        "(lambda i: (nvmlDeviceGetGpuFabricInfo(gpus[0], byref(i)), [i.state, i.status])[1])(c_nvmlGpuFabricInfo_t())"
    )
    answer = client.hear()
    assert answer.get("value", answer.get("error")) == told
    asked = machine.smi("-i", "0", "--query-gpu=fabric.state,fabric.status", "--format=csv,noheader")
    assert asked == (0, f"{cells}\n")


def test_an_xid_is_delivered_once_and_only_what_comes_after_the_wait_began(
    machine: Machine, nvml: Callable[[], Nvml]
) -> None:
    scenario = Scenario.two_h100().xid(0, 13)
    machine.show(scenario)
    client = nvml()
    open_both(client)
    client.ask("globals().update(events=nvmlEventSetCreate())")
    client.ask("nvmlDeviceRegisterEvents(gpus[1], nvmlEventTypeXidCriticalError, events)")
    assert client.error("nvmlEventSetWait(events, 10)") == "NVMLError_Timeout"

    client.say("(lambda e: [e.eventType, e.eventData])(nvmlEventSetWait(events, 20000))")
    machine.show(scenario.xid(1, 79))
    assert client.hear()["value"] == [8, 79]
    assert client.error("nvmlEventSetWait(events, 10)") == "NVMLError_Timeout"


# ---- nvidia-smi ------------------------------------------------------------------------------------------------------

QUERY = ("--query-gpu=index,temperature.gpu", "--format=csv,noheader")
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n\n"
)
LOST = "Unable to determine the device handle for GPU1: GPU is lost.  Reboot the system to recover this GPU\n"
TWO = Scenario.two_h100(seed="smi")


@pytest.mark.parametrize(
    ("scenario", "arguments", "status", "output"),
    [
        pytest.param(TWO, QUERY, 0, "0, 31\n1, 31\n", id="healthy"),
        pytest.param(TWO.without_driver(), QUERY, 9, NO_DRIVER, id="no-driver"),
        pytest.param(TWO.without_driver(), ("--help-query-gpu",), 9, NO_DRIVER, id="no-driver-help"),
        pytest.param(
            TWO.mismatch(),
            QUERY,
            18,
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.133\n",
            id="mismatch",
        ),
        pytest.param(
            TWO.having("system", init="!UNKNOWN"), QUERY, 255, "Failed to initialize NVML: Unknown Error\n", id="init"
        ),
        pytest.param(
            TWO.having("system", init="!NO_PERMISSION"),
            QUERY,
            4,
            "Failed to initialize NVML: Insufficient Permissions\n",
            id="no-permission",
        ),
        pytest.param(TWO.lost(1), QUERY, 15, LOST, id="lost-hides-all"),
        pytest.param(TWO.lost(1), ("-i", "0", *QUERY), 0, "0, 31\n", id="lost-other-by-index"),
        pytest.param(
            TWO.lost(0),
            ("-i", TWO.uuids[1], *QUERY),
            255,
            "Problem with GPU 0: GPU is lost.  Reboot the system to recover this GPU\n",
            id="lost-other-by-uuid",
        ),
        pytest.param(
            TWO.lost(1), ("-L",), 15, f"GPU 0: NVIDIA H100 80GB HBM3 (UUID: {TWO.uuids[0]})\n{LOST}", id="lost-list"
        ),
        pytest.param(
            TWO.failing(1, "UNKNOWN"),
            QUERY,
            255,
            "Unable to determine the device handle for GPU1: Unknown Error\n",
            id="unknown",
        ),
        pytest.param(
            TWO.failing(1, "RESET_REQUIRED"),
            QUERY,
            255,
            "Unable to determine the device handle for GPU1: "
            "A GPU reset must occur before this GPU can be used again.\n",
            id="reset-required",
        ),
        pytest.param(TWO.failing(1, "NO_PERMISSION"), QUERY, 0, "0, 31\n", id="row-missing-no-permission"),
        pytest.param(TWO.failing(0, "NOT_FOUND"), QUERY, 0, "1, 31\n", id="row-missing-not-found"),
        pytest.param(Scenario.h100(0), QUERY, 6, "No devices were found\n", id="none"),
        pytest.param(Scenario.h100(0), ("-L",), 0, "No devices found.\n", id="none-list"),
        pytest.param(
            TWO,
            ("--query-gpu=index,colour", "--format=csv"),
            2,
            'Field "colour" is not a valid field to query.\n\n',
            id="bad-field",
        ),
        pytest.param(
            TWO,
            ("--query-gpu=index",),
            2,
            "\"--format=\" switch is missing. Please run 'nvidia-smi -h' for help.\n\n",
            id="no-format",
        ),
    ],
)
def test_nvidia_smi_says_and_exits_with_what_the_real_one_does(
    machine: Machine, scenario: Scenario, arguments: tuple[str, ...], status: int, output: str
) -> None:
    machine.show(scenario)
    assert machine.smi(*arguments) == (status, output)


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(8, "INSUFFICIENT_POWER", "insufficiently powered"), (11, "IRQ_ISSUE", "issue with GPU interrupts")],
)
def test_nvidia_smi_explains_a_badly_connected_gpu(machine: Machine, status: int, error: str, words: str) -> None:
    machine.show(TWO.failing(0, error))
    code, output = machine.smi(*QUERY)
    assert code == status
    assert output.startswith("Unable to determine the device handle for GPU0: ")
    assert words in output


def test_nvidia_smi_without_the_library_says_so(machine: Machine, tmp_path: Path) -> None:
    machine.show(TWO)
    machine.library = tmp_path / "nothing-here"
    code, output = machine.smi("-L")
    assert code == 12
    assert output.startswith("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("NOT_SUPPORTED", "[N/A]"),
        ("UNKNOWN", "[Unknown Error]"),
        ("GPU_IS_LOST", "[GPU is lost]"),
        ("NO_PERMISSION", "[Insufficient Permissions]"),
        ("TIMEOUT", "[Timeout]"),
        ("NO_DATA", "[No data]"),
        ("NOT_FOUND", "[Not Found]"),
        ("FUNCTION_NOT_FOUND", "[Function Not Found]"),
        ("CORRUPTED_INFOROM", "[Corrupted infoROM]"),
        ("RESET_REQUIRED", "[GPU requires reset]"),
        ("INSUFFICIENT_POWER", "[Insufficient External Power]"),
        ("IRQ_ISSUE", "[Interrupt Request Issue]"),
        ("OPERATING_SYSTEM", "[GPU access blocked by the operating system]"),
        ("DRIVER_NOT_LOADED", "[Driver Not Loaded]"),
        ("LIB_RM_VERSION_MISMATCH", "[Driver/library version mismatch]"),
        ("DEPRECATED", "[Requested functionality has been deprecated]"),
        ("4242", "[Unknown Error]"),
    ],
)
def test_a_failed_cell_holds_the_error_and_spoils_nothing_else(machine: Machine, error: str, words: str) -> None:
    machine.show(TWO.having("gpu0", power_draw_mw=f"!{error}"))
    query = "--query-gpu=index,power.draw,memory.total"
    assert machine.smi(query, "--format=csv,noheader,nounits") == (0, f"0, {words}, 81559\n1, 69.54, 81559\n")


def test_a_cell_can_be_what_only_the_program_prints(machine: Machine) -> None:
    machine.show(
        TWO.having("smi gpu0", **{"temperature.gpu": "", "power.draw": "ERR!"}).lacking("gpu1", "temperature_memory")
    )
    asked = machine.smi(
        "--query-gpu=index,temperature.gpu,power.draw,temperature.memory", "--format=csv,noheader,nounits"
    )
    assert asked == (0, "0, , ERR!, 38\n1, 31, 69.54, N/A\n")  # bare, as drivers from 550 on have it


def test_an_older_driver_has_older_names(machine: Machine) -> None:
    old, new = TWO.having("system", driver_version="525.147.05"), TWO.having("system", driver_version="535.309.01")
    query = "--query-gpu=clocks_throttle_reasons.active"
    machine.show(new)
    assert machine.smi(query, "--format=csv")[1].splitlines()[0] == "clocks_event_reasons.active"
    machine.show(old)
    assert machine.smi(query, "--format=csv")[1].splitlines()[0] == "clocks_throttle_reasons.active"
    for field in ("clocks_event_reasons.active", "power.draw.instant"):
        assert machine.smi(f"--query-gpu={field}", "--format=csv") == (
            2,
            f'Field "{field}" is not a valid field to query.\n\n',
        )
    assert "clocks_event" not in machine.smi("--help-query-gpu")[1]


def test_instances_are_made_listed_and_gone_after_a_reboot(machine: Machine, tmp_path: Path) -> None:
    divided = TWO.having("gpu0", mig_mode_current="1", mig_mode_pending="1")
    machine.show(divided)
    assert machine.smi("mig", "-i", "1", "-lgi") == (0, "No MIG-enabled devices found.\n")
    assert machine.smi("mig", "-i", "0", "-lgi") == (6, "No GPU instances found: Not Found\n")
    code, output = machine.smi("mig", "-i", "0", "-cgi", "3g.40gb,9", "-C")
    assert code == 0
    assert (
        output.splitlines()[0] == "Successfully created GPU instance ID  1 on GPU  0 using profile MIG 3g.40gb (ID  9)"
    )
    assert machine.smi("mig", "-i", "0", "-lgi")[1].count("MIG 3g.40gb") == 2
    assert machine.smi("-L")[1].count("  MIG 3g.40gb     Device") == 2
    code, output = machine.smi("mig", "-i", "0", "-cgi", "1g.10gb,1g.10gb", "-C")
    assert code == 23
    assert "Insufficient Resources" in output
    shutil.rmtree(tmp_path / "instances")  # what a boot does
    assert machine.smi("mig", "-i", "0", "-lgi")[0] == 6


def test_the_header_has_the_fields_own_names_and_their_units(machine: Machine) -> None:
    machine.show(TWO)
    code, output = machine.smi("--query-gpu=gpu_uuid,memory.used,clocks_throttle_reasons.active", "--format=csv")
    header, first, _ = output.splitlines()
    assert code == 0
    assert header == "uuid, memory.used [MiB], clocks_event_reasons.active"
    assert first == f"{TWO.uuids[0]}, 0 MiB, 0x0000000000000001"


def test_every_field_that_help_lists_can_be_queried_at_once(machine: Machine) -> None:
    machine.show(TWO)
    _, text = machine.smi("--help-query-gpu")
    fields = [block.split('"')[1] for block in text.split("\n\n")[1:] if block.startswith('"')]
    assert len(fields) > 100
    code, output = machine.smi(f"--query-gpu={','.join(fields)}", "--format=csv")
    assert code == 0
    assert {len(row.split(", ")) for row in output.splitlines()} == {len(fields)}


def test_names_are_printed_raw_with_their_commas_and_bytes(machine: Machine) -> None:
    machine.show(TWO.having("gpu0", name="Tesla, the \udcff card"))
    code, output = machine.smi("-i", "0", "--query-gpu=name,index", "--format=csv,noheader")
    assert (code, output) == (0, "Tesla, the \udcff card, 0\n")


def test_compute_apps_tell_what_is_known_of_each(machine: Machine) -> None:
    machine.show(TWO.using(1, {4711: 512 * MIB, 4712: None}).having("procnames", **{"4711": "train"}))
    code, output = machine.smi("--query-compute-apps=gpu_uuid,pid,process_name,used_gpu_memory", "--format=csv")
    uuid = TWO.uuids[1]
    assert code == 0
    assert output.splitlines() == [
        "gpu_uuid, pid, process_name, used_gpu_memory [MiB]",
        f"{uuid}, 4711, train, 512 MiB",
        f"{uuid}, 4712, [Not Found], [N/A]",
    ]


def test_the_table_is_drawn_in_one_width(machine: Machine) -> None:
    machine.show(TWO.using(1, {4711: 512 * MIB}).having("gpu0", temperature_gpu="!UNKNOWN"))
    code, output = machine.smi()
    lines = output.splitlines()[1:]
    assert code == 0
    assert {len(line) for line in lines} == {89}
    assert "512MiB / 81559MiB" in output
    assert "ERR!" in output


@pytest.mark.parametrize(("driver", "status"), [("535.309.01", 255), ("590.48.01", 0)])
def test_the_version_option_came_with_newer_drivers(machine: Machine, driver: str, status: int) -> None:
    machine.show(TWO.having("system", driver_version=driver))
    code, output = machine.smi("--version")
    assert code == status
    assert (f"DRIVER version      : {driver}" in output) == (status == 0)


def test_a_hung_nvidia_smi_heeds_no_sigterm(machine: Machine) -> None:
    machine.show(TWO.hang(1))
    process = subprocess.Popen(
        [sys.executable, GPU_DIR / "nvidia_smi.py", "-L"], env=machine.environment, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: ignores_sigterm(process.pid), "nvidia-smi to hang")
        process.terminate()
        assert process.poll() is None
    finally:
        process.kill()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL


def test_library_and_nvidia_smi_say_the_same(machine: Machine, nvml: Callable[[], Nvml]) -> None:
    machine.show(Scenario.two_h100().using(0, {4711: 3000 * MIB}))
    client = nvml()
    open_both(client)
    _, output = machine.smi(
        "--query-gpu=uuid,serial,pci.bus_id,memory.free,clocks.max.sm", "--format=csv,noheader,nounits"
    )
    asked = client.ask(
        "[[nvmlDeviceGetUUID(g), nvmlDeviceGetSerial(g), nvmlDeviceGetPciInfo(g).busId,"
        " str(nvmlDeviceGetMemoryInfo(g).free // 2**20), str(nvmlDeviceGetMaxClockInfo(g, NVML_CLOCK_SM))]"
        " for g in gpus]"
    )
    assert [row.split(", ") for row in output.splitlines()] == asked


# ---- the scenario as a value -----------------------------------------------------------------------------------------


def test_a_scenario_survives_the_file() -> None:
    scenario = TWO.lost(1).xid(0, 79).using(0, {1: None})
    assert Scenario.parse(scenario.render()) == scenario


def test_no_two_hosts_share_a_gpu() -> None:
    uuids = [*Scenario.h100(8).uuids, *Scenario.h100(8).uuids]
    assert len(set(uuids)) == 16


# ---- waiting ---------------------------------------------------------------------------------------------------------


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def ignores_sigterm(pid: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigIgn:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s in vain for {what}"
        time.sleep(0.01)
