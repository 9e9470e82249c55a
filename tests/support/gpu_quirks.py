"""What GPU drivers are known to do, as scenarios of the fake one, each with what is then true.

One row is one quirk: how the fake driver shows it, and what has to be told of the two GPUs by the agent, the API, the
page and the chart. None is unknown, 0 is counted. Clocks, and what holds them down, the exporter alone can
tell. tests/integration/test_gpu_truth.py walks every row from the driver to the chart; what the fake driver itself does
is tested in tests/integration/hosts/test_fake_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.hosts.gpu import Scenario

GIB = 2**30
LIVE = ("utilization", "memory", "temperature", "power")  # what the overview and the page have a column for
OF_AGENTS = (*LIVE, "ecc")
OF_EXPORTERS = ("clock", "slowdown")
MEASURES = (*OF_AGENTS, *OF_EXPORTERS)
TOTAL, RESERVED, USED = 81559 * 2**20, 561 * 2**20, 20480 * 2**20
BUSY = {
    "utilization_gpu": "40",
    "utilization_memory": "20",
    "memory_used": str(USED),
    "temperature_gpu": "61",
    "power_draw_mw": "350000",
    "ecc_uncorrected_volatile": "0",
    "clocks_current_sm": "1980",
    "clocks_event_reasons": "0x0",
}


def busy(seed: str) -> Scenario:
    """Two H100s that are well and at work: what every row begins with."""
    return Scenario.two_h100(seed=seed).having("gpu0", **BUSY).having("gpu1", **BUSY)


@dataclass(frozen=True)
class Truth:
    """What is right for one GPU. `state` is the agent's word; None: the agent cannot tell of it.

    `exporter` is what nvidia_gpu_exporter knows although the agent does not. `gap` names why there is no value in the
    charts, where it is not that the card does not tell it.
    """

    state: str | None = "ok"
    utilization: float | None = 40
    memory: float | None = 100 * USED / TOTAL
    temperature: float | None = 61
    power: float | None = 350
    ecc: float | None = 0
    clock: float | None = 1.98e9
    slowdown: float | None = 0
    mig: bool | None = False
    notes: tuple[tuple[str, int], ...] = ()
    xids: tuple[int, ...] = ()
    problem: str | None = None  # of health, where it is not that of the state
    fields: Mapping[str, Any] = field(default_factory=dict)
    exporter: Mapping[str, float | None] = field(default_factory=dict)
    gap: str | None = None

    def value(self, measure: str) -> float | None:
        value: float | None = getattr(self, measure)
        return value

    @property
    def device(self) -> str:
        """The state in the live overview, of a host that speaks of its GPUs."""
        return self.state or "missing"


WELL = Truth()
NOTHING = Truth(
    utilization=None, memory=None, temperature=None, power=None, ecc=None, clock=None, slowdown=None, mig=None
)
GONE = replace(NOTHING, gap="gpu_gone")
UNHEARD = replace(NOTHING, gap="exporter_failing")


@dataclass(frozen=True)
class Quirk:
    """A sentence, and the driver that does so. `report` is what the agent says of NVML, `code` how nvidia-smi exits.

    `driver` is a build of the library, or none at all. `is_fresh`: the agent has not seen the GPUs before.
    `is_upgraded`: a new file lies where the library was. `fields` are what the exporter asks for besides, `spelt` what
    it calls otherwise. `spoils`: nvidia-smi exits well and the exporter can make nothing of it. `is_silent`: the agent
    said so days ago, and nothing since. `has_none`: no GPU was ever there, and none is expected. `problem` is what is
    wrong with a machine whose NVML does not answer.
    """

    sentence: str
    change: Callable[[Scenario], Scenario]
    first: Truth = WELL
    second: Truth = WELL
    report: str = "ok"
    says: str = ""
    code: int = 0
    driver: str = "current"
    is_fresh: bool = False
    is_upgraded: bool = False
    spoils: bool = False
    is_silent: bool = False
    has_none: bool = False
    problem: str = "nvml"
    fields: tuple[str, ...] = ()
    spelt: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.sentence

    def charted(self, right: Truth, measure: str, *, has_exporter: bool) -> float | None:
        """In the chart, and live where there is a Prometheus: of both sources the exporter comes first."""
        is_told = has_exporter and self.is_exported
        if not is_told and (measure in OF_EXPORTERS or self.is_silent):
            return None
        known = right.exporter.get(measure) if is_told else None
        return right.value(measure) if known is None else known

    def why_not(self, right: Truth, measure: str, *, has_exporter: bool) -> str:
        """The cause that the chart names where it has no value; divided, a card lacks its utilisation alone."""
        if self.is_silent:
            return "host_down"
        if right.gap is not None and (right.gap != "mig" or measure == "utilization"):
            return right.gap
        return "exporter_failing" if has_exporter and not self.is_exported else "not_reported"

    @property
    def is_told(self) -> bool:
        """Whether the portal knows from the agent what the GPUs do now."""
        return self.report == "ok" and not self.is_silent

    @property
    def is_exported(self) -> bool:
        return self.code == 0 and not self.spoils


def gpu0(**values: str) -> Callable[[Scenario], Scenario]:
    return lambda scenario: scenario.having("gpu0", **values)


def without(*keys: str) -> Callable[[Scenario], Scenario]:
    return lambda scenario: scenario.lacking("gpu0", *keys)


def printed(**cells: str) -> Callable[[Scenario], Scenario]:
    """Cells of nvidia-smi alone: dots are written as two underscores."""
    return lambda scenario: scenario.having("smi gpu0", **{k.replace("__", "."): v for k, v in cells.items()})


def reloaded(**system: str) -> Callable[[Scenario], Scenario]:
    return lambda scenario: scenario.having("system", loaded="2", **system)


def without_gpus(scenario: Scenario) -> Scenario:
    return replace(scenario, sections={"system": scenario.sections["system"]})


def swapped(scenario: Scenario) -> Scenario:
    """Loaded again, the driver counts the other way round."""
    one, other = scenario.sections["gpu0"], scenario.sections["gpu1"]
    return reloaded()(replace(scenario, sections={**scenario.sections, "gpu0": other, "gpu1": one}))


def divided(**values: str) -> Callable[[Scenario], Scenario]:
    mig = {"mig_mode_current": "1", "mig_mode_pending": "1"}
    if values:
        return gpu0(**mig, **values)
    return lambda scenario: gpu0(**mig)(scenario).lacking("gpu0", "utilization_gpu", "utilization_memory")


MIG = replace(WELL, utilization=None, mig=True, gap="mig")
NO_HEAT = replace(WELL, temperature=None)

OLD_REASONS = (("clocks_event_reasons.active", "clocks_throttle_reasons.active"),)

# What NVML can answer in a value's place: its code and nvidia-smi's words for it. A new driver has codes of its own.
ERRORS = {
    "NO_PERMISSION": (4, "Insufficient Permissions"),
    "NOT_FOUND": (6, "Not Found"),
    "INSUFFICIENT_SIZE": (7, "Insufficient Size"),
    "TIMEOUT": (10, "Timeout"),
    "FUNCTION_NOT_FOUND": (13, "Function Not Found"),
    "CORRUPTED_INFOROM": (14, "Corrupted infoROM"),
    "OPERATING_SYSTEM": (17, "GPU access blocked by the operating system"),
    "NO_DATA": (21, "No data"),
    "ARGUMENT_VERSION_MISMATCH": (25, "Argument version mismatch"),
    "DEPRECATED": (26, "Requested functionality has been deprecated"),
    "GPU_NOT_FOUND": (28, "No supported GPUs were found"),
    "INVALID_STATE": (29, "Resource not in correct state to perform requested operation"),
    "UNKNOWN": (999, "Unknown Error"),
    "4242": (4242, "an error of tomorrow"),
}
# What keeps a GPU from computing, wherever it is said: code, and how nvidia-smi exits if the GPU cannot be opened.
GRAVE = {"INSUFFICIENT_POWER": (8, 8), "IRQ_ISSUE": (11, 11), "RESET_REQUIRED": (16, 255)}
# What a GPU that cannot be opened says: code, and how nvidia-smi exits. Two of them it passes over in silence.
CLOSED = {
    "NO_PERMISSION": (4, 0),
    "NOT_FOUND": (6, 0),
    "CORRUPTED_INFOROM": (14, 255),
    "OPERATING_SYSTEM": (17, 255),
    "UNKNOWN": (999, 255),
    **GRAVE,
}


def rows() -> Iterator[Quirk]:
    yield from of_values()
    yield from of_events()
    yield from of_texts()
    yield from of_processes()
    yield from of_whole_gpus()
    yield from of_the_driver()
    yield from of_nvidia_smi()


def of_values() -> Iterator[Quirk]:
    yield Quirk("Two GPUs at work are told as they are", lambda scenario: scenario)
    yield Quirk(
        "A zero is counted and not unknown",
        gpu0(utilization_gpu="0", memory_used="0", temperature_gpu="0", power_draw_mw="0"),
        Truth(utilization=0, memory=0, temperature=0, power=0),
    )
    yield Quirk(
        "A value that the card does not have is unknown, and nothing to tell", without("temperature_gpu"), NO_HEAT
    )
    for error, (code, words) in ERRORS.items():
        yield Quirk(
            f"A value that answers «{words}» is unknown, says why, and spoils no other",
            gpu0(temperature_gpu=f"!{error}"),
            replace(NO_HEAT, notes=(("temperature_c", code),)),
        )
    for error, (code, _exits) in GRAVE.items():
        yield Quirk(
            f"A GPU that says {error} of one value computes nothing",
            gpu0(temperature_gpu=f"!{error}"),
            replace(NO_HEAT, state="error", notes=(("temperature_c", code),)),
        )
    # nvml-wrapper#57, gpustat#116, dcgm-exporter#136
    yield Quirk(
        "What the driver keeps for itself is not in use, and the percentage is of all",
        gpu0(memory_used=str(TOTAL - RESERVED)),
        Truth(
            memory=100 * (TOTAL - RESERVED) / TOTAL,
            fields={"memory_reserved_bytes": RESERVED, "memory_used_bytes": TOTAL - RESERVED},
        ),
    )
    yield Quirk(
        "Of an old driver that counts its own part as used, what is used is unknown",
        lambda scenario: scenario,
        replace(
            WELL,
            memory=None,
            notes=(("memory_used_bytes", 13),),
            fields={"memory_total_bytes": TOTAL, "memory_reserved_bytes": None, "processes": []},
            exporter={"memory": WELL.memory},
        ),
        replace(WELL, memory=None, notes=(("memory_used_bytes", 13),), exporter={"memory": WELL.memory}),
        driver="old-driver",
    )
    yield Quirk(
        "Memory of no bytes is a driver that measures none",  # vllm-cli#11, nv-monitor#17: a Jetson
        gpu0(memory_total="0", memory_reserved="0", memory_used="0"),
        replace(WELL, memory=None, fields={"memory_total_bytes": None, "memory_used_bytes": None}),
    )
    yield Quirk(
        "A GPU that is part of the processor is told as one that measures nothing",
        lambda scenario: scenario.having("gpu0", name="Orin (nvgpu)").lacking("gpu0", *BUSY, "memory_total"),
        replace(NOTHING, state="error", mig=False, notes=(("name", 0),)),
    )
    yield Quirk(
        "A utilisation of more than all is a driver's blank",  # DCGM#199
        gpu0(utilization_gpu=str(2**32 - 1)),
        replace(WELL, utilization=None, notes=(("utilization_percent", 0),)),
    )
    yield Quirk(
        "A number that no column holds does not cost the whole report",
        gpu0(ecc_uncorrected_volatile=str(2**63)),
        replace(WELL, ecc=None, notes=(("ecc_uncorrected", 0),)),
    )
    yield Quirk(
        "Memory errors that could not be corrected are counted, and told beside the GPU",
        gpu0(ecc_uncorrected_volatile="3"),
        Truth(ecc=3),
    )
    yield Quirk(
        "A card without ECC has no errors to count, and that is not 0",
        without("ecc_uncorrected_volatile"),
        replace(WELL, ecc=None),
    )
    # nvidia_gpu_exporter#123
    for named, spelt, change in (
        ("their name since 535", (), reloaded()),
        ("the name of before", OLD_REASONS, reloaded()),
        ("the only name that an older driver knows", OLD_REASONS, reloaded(driver_version="525.147.05")),
    ):
        yield Quirk(
            f"Clocks that the hardware holds down are told, asked for by {named}",
            lambda scenario, change=change: gpu0(clocks_event_reasons="0x8", clocks_current_sm="345")(change(scenario)),  # type: ignore[misc]
            Truth(clock=345e6, slowdown=100),
            spelt=spelt,
        )
    yield Quirk(
        "A card at its power limit, or without work, is not held down",
        lambda scenario: gpu0(clocks_event_reasons="0x4")(scenario).having("gpu1", clocks_event_reasons="0x1"),
    )
    # nvidia_gpu_exporter#203, dask/distributed#8739
    yield Quirk("A divided GPU has no utilisation, and that is not 0", divided(), MIG)
    yield Quirk("A divided GPU has none whatever its driver says", divided(utilization_gpu="0"), MIG)
    yield Quirk(
        "A division that waits for a reset is told, and changes nothing yet",
        gpu0(mig_mode_pending="1"),
        replace(WELL, notes=(("mig", 0),)),
    )
    # nvidia-docker#723, clip-as-service#254
    yield Quirk(
        "A GPU whose persistence mode is off says so, and its utilisation without a process is what it says",
        gpu0(persistence_mode="0", utilization_gpu="97"),
        Truth(utilization=97, notes=(("persistence_mode", 0),), fields={"processes": []}),
    )
    yield Quirk(
        "A row of memory that waits for a reset is told",
        gpu0(remapped_rows="0 1 1 0"),
        replace(WELL, notes=(("remapped_rows", 0),)),
    )
    yield Quirk(
        "A card whose memory cannot be mended goes to nobody",
        gpu0(remapped_rows="0 9 0 1"),
        replace(WELL, state="error", notes=(("remapped_rows", 0),)),
    )
    # gpu-operator#2511, NVSentinel#883: everything looks well but for CUDA, error 802
    yield Quirk("A GPU that has joined the fabric is well", gpu0(fabric_state="3"), replace(WELL, exporter={}))
    for words, values in (
        ("has not joined the fabric", {"fabric_state": "2"}),
        ("could not join the fabric", {"fabric_state": "3", "fabric_status": "!UNKNOWN"}),
    ):
        yield Quirk(
            f"A GPU that {words} goes to nobody",
            gpu0(**values),
            replace(WELL, state="error", notes=(("fabric", 0),)),
        )
    yield Quirk(
        "A power that moved to another field is found there",  # netdata#15755
        lambda scenario: scenario.having("gpu0", power_draw_instant_mw="350000").lacking("gpu0", "power_draw_mw"),
        replace(WELL, power=None, exporter={"power": 350}),
        fields=("power.draw.instant",),
    )


def of_events() -> Iterator[Quirk]:
    """XIDs, one or two of each kind (test_health.py has them all). The driver tells each once, so each row has another
    number of the event.
    """
    for xid in (13, 63, 999):
        yield Quirk(
            f"After XID {xid} the GPU can be had, and it is told",
            lambda scenario, xid=xid: scenario.having("events", seq=str(xid), last=f"0:8:{xid}"),  # type: ignore[misc]
            replace(WELL, xids=(xid,)),
        )
    for xid in (48, 79):
        yield Quirk(
            f"After XID {xid} nobody gets the GPU",
            lambda scenario, xid=xid: scenario.having("events", seq=str(xid), last=f"0:8:{xid}"),  # type: ignore[misc]
            replace(WELL, xids=(xid,), problem="gpu_xid"),
        )
    yield Quirk(
        "An event that is no XID is none",
        lambda scenario: scenario.having("events", seq="1000", last="0:1:79"),
    )


def of_texts() -> Iterator[Quirk]:
    yield Quirk(
        "A comma in a name shifts no value",
        gpu0(name="Tesla, the card"),
        replace(WELL, fields={"name": "Tesla, the card"}),
        spoils=True,
    )
    yield Quirk(
        "A name that is no text is unknown, and the GPU is well",
        gpu0(name="H\udcff100"),
        replace(WELL, notes=(("name", 999),), fields={"name": None}),
    )
    yield Quirk(
        "A text that is too long for its place is unknown, and the GPU is well",
        gpu0(serial="9" * 31),
        replace(WELL, notes=(("serial", 7),), fields={"serial": None}),
    )
    yield Quirk(
        "A GPU that does not tell its UUID is known by its place, and not to be trusted",
        gpu0(uuid="!UNKNOWN"),
        replace(WELL, state="error", notes=(("uuid", 999),), clock=None, slowdown=None),
    )


def of_processes() -> Iterator[Quirk]:
    rubbish = "2147483001:1024 2147483002:2048 2147483003:4096"
    # nvitop#79, nvitop#226, nvidia-docker#1483. That a true one is told is tried on a host, where it can hold a GPU.
    yield Quirk(
        "A process that holds no GPU open is none",
        gpu0(compute_processes=rubbish),
        replace(WELL, fields={"processes": []}),
    )
    yield Quirk(
        "The wider entries of an early driver make no process out of rubbish",
        gpu0(compute_processes=rubbish),
        replace(WELL, fields={"processes": []}),
        driver="early-535",
    )
    yield Quirk(
        "A process whose name is no text stops nothing",
        lambda scenario: gpu0(compute_processes=rubbish)(scenario).having("procnames", **{"2147483001": "/\udcff"}),
        replace(WELL, fields={"processes": []}),
    )
    yield Quirk(
        "Processes that are more at every look are unknown, and asked for the next time",
        gpu0(compute_processes="!INSUFFICIENT_SIZE", graphics_processes="!INSUFFICIENT_SIZE"),
        replace(WELL, notes=(("processes", 7), ("processes", 7)), fields={"processes": None}),
    )


def of_whole_gpus() -> Iterator[Quirk]:
    # dcgm-exporter#604, gpu-monitoring-tools#46. nvidia-smi then says nothing of the healthy one either.
    yield Quirk(
        "A GPU that is lost is told by its name, and the other one goes on",
        lambda scenario: scenario.lost(0),
        replace(GONE, state="lost", notes=(("handle", 15),)),
        code=15,
    )
    for error, (code, exits) in CLOSED.items():
        yield Quirk(
            f"A GPU that cannot be opened ({error}) is in error, and the other one goes on",
            lambda scenario, error=error: scenario.failing(0, error),  # type: ignore[misc]
            replace(GONE, state="error", notes=(("handle", code),)),
            code=exits,
        )
    yield Quirk(
        "A GPU that was lost before anybody saw it is missing",
        lambda scenario: scenario.lost(0),
        replace(GONE, state=None),
        says="1 of 2 GPUs do not tell their UUID",
        code=15,
        is_fresh=True,
    )
    yield Quirk(
        "A machine that counts no GPU is missing all of them",
        without_gpus,
        replace(GONE, state=None),
        replace(GONE, state=None),
        code=6,
    )
    # nvapi-rs#5, gpustack#1633
    yield Quirk(
        "GPUs that change places keep their values",
        lambda scenario: swapped(scenario.having("gpu1", temperature_gpu="45")),
        replace(WELL, fields={"index": 1}),
        replace(WELL, temperature=45, fields={"index": 0}),
    )
    yield Quirk(
        "A GPU that is lost after they changed places takes nobody's name",
        lambda scenario: swapped(scenario).lost(1),
        replace(GONE, state=None),
        says="1 of 2 GPUs do not tell their UUID",
        code=15,
    )


def of_the_driver() -> Iterator[Quirk]:
    yield Quirk("A driver that was loaded again is asked again", reloaded())
    for words, error, state, code in (
        ("is not loaded", "DRIVER_NOT_LOADED", "driver_not_loaded", 9),
        ("lets nobody in", "NO_PERMISSION", "error", 4),
        ("cannot be spoken with", "UNKNOWN", "error", 255),  # nvidia-container-toolkit#48
        ("fails in a new way", "4242", "error", 255),
    ):
        yield Quirk(
            f"A driver that {words} hides every GPU, and none is called lost",
            reloaded(init=f"!{error}"),
            UNHEARD,
            UNHEARD,
            report=state,
            code=code,
        )
    # shine-cluster#30. The agent, which runs on with the library of before, would be told nothing of it.
    yield Quirk(
        "A driver that is older than its library hides every GPU, and none is called lost",
        Scenario.mismatch,
        UNHEARD,
        UNHEARD,
        report="mismatch",
        code=18,
        is_upgraded=True,
    )
    yield Quirk(
        "Without the driver's library every GPU is unknown, and none is called lost",
        lambda scenario: scenario,
        UNHEARD,
        UNHEARD,
        report="no_library",
        code=12,
        driver="none",
        is_fresh=True,
    )
    yield Quirk(
        "On a host without GPUs the driver that is not there does not fail",
        without_gpus,
        report="no_library",
        code=12,
        driver="none",
        is_fresh=True,
        has_none=True,
        problem="gpus_unknown",
    )
    # gpud#117, nvidia-docker#377, sonar#92
    yield Quirk(
        "A driver that hangs makes the values old, and old values are none",
        lambda scenario: scenario.hang(0),
        UNHEARD,
        UNHEARD,
        report="stale",
        says="the driver hangs, a reboot may be needed",
        code=-1,
    )
    yield Quirk(
        "What a host said before it fell silent is no value of now",
        lambda scenario: scenario,
        is_silent=True,
    )
    yield Quirk(
        "A driver that is slow is waited for",  # netdata#14522
        lambda scenario: gpu0(temperature_gpu="delay:0.3 61")(scenario).having("smi", delay="0.2"),
    )


def of_nvidia_smi() -> Iterator[Quirk]:
    # i3pystatus#776, netdata#4892, telegraf#19455
    yield Quirk(
        "A cell that holds no number is no value, however it is written",
        printed(
            utilization__gpu="N/A",
            memory__used="",
            temperature__gpu="[Not Supported]",
            power__draw="[Requested functionality has been deprecated]",
        ),
    )
    yield Quirk(
        "A cell that was cut off is no value",
        printed(utilization__gpu="[Unknown", memory__used="N/A MiB", temperature__gpu="ERR!", power__draw="Requested"),
    )
    yield Quirk(
        "An nvidia-smi that hangs hides nothing from the agent",
        lambda scenario: scenario.having("smi", hang="yes"),
        code=-1,
    )
    yield Quirk(
        "A field that this driver does not know costs the exporter everything, and the agent nothing",
        lambda scenario: scenario.having("system", driver_version="525.147.05"),
        code=2,
    )


QUIRKS = tuple(rows())
