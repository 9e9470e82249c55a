"""The exporter's role: its unit on every distribution, when it restarts the exporter, and the stub that tests run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.gpu import Scenario
from tests.roles.rendering import load_file
from tests.support.rendering import FACTS, evaluate, render
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
ROLE = "nvidia_gpu_exporter"
SUITES = ("bookworm", "trixie", "jammy", "noble")
# One that hangs is left behind on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CHECKSUM = {"x86_64": "0123456789abcdef" * 4}


FAILING = {"invocation": "a", "driver": "1", "fails": True}

recover = load_file(ROOT / "roles/nvidia_gpu_exporter/files/recover.py", "recover")
stub = load_file(ROOT / "molecule/nvidia_gpu_exporter/files/nvidia_gpu_exporter.py", "exporter_stub")


def unit(name: str, suite: str = "noble", **given: Any) -> dict[str, list[str]]:
    """The settings of a rendered unit; a setting may come more than once."""
    facts = {**FACTS, "architecture": "x86_64"}
    given = {"ansible_managed": "managed", "nvidia_gpu_exporter_sha256": CHECKSUM, "ansible_facts": facts, **given}
    text = render(ROLE, f"{name}.j2", suite, **given).replace("\\\n", " ")
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", " ")):
            settings.setdefault(key, []).append(" ".join(value.split()))
    return settings


# -- the unit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_the_unit_can_reach_the_cards_and_little_else(suite: str) -> None:
    settings = unit("nvidia-gpu-exporter.service", suite)
    assert not {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"} & set(settings)
    assert settings["User"] == ["nvidia-gpu-exporter"]
    assert settings["NoNewPrivileges"] == ["yes"]
    assert settings["ProtectSystem"] == ["strict"]
    assert settings["CapabilityBoundingSet"] == [""]
    assert "nvidia-persistenced.service" in settings["After"][0].split()
    assert settings["StartLimitIntervalSec"] == ["0"]


def test_the_exporter_is_told_what_to_ask_how_often_and_for_how_long() -> None:
    program, *arguments = unit("nvidia-gpu-exporter.service", nvidia_gpu_exporter_listen_address="::1")["ExecStart"][
        0
    ].split()
    assert program == "/opt/nvidia-gpu-exporter/1.14.0-0123456789ab/nvidia_gpu_exporter"
    said = dict(argument.split("=", 1) for argument in arguments)
    fields = said.pop("--query-field-names").split(",")
    assert said == {
        "--web.listen-address": "[::1]:9835",
        "--nvidia-smi-command": "/usr/bin/nvidia-smi",
        "--collect.interval": "15s",
        "--collect.timeout": "10s",
    }
    assert fields[0] == "uuid"
    assert len(fields) == len(set(fields)) > 25
    assert not any("histogram" in field for field in fields)


def test_every_field_is_one_that_nvidia_smi_of_535_knows(library: Path, tmp_path: Path) -> None:
    fields = evaluate("{{ __nvidia_gpu_exporter_fields }}", ROLE, "noble")
    known = nvidia_smi(library, tmp_path, "--help-query-gpu").splitlines()
    names = {name.strip('" ') for line in known if line.startswith('"') for name in line.split(" or ")}
    assert [field for field in fields if field not in names] == []


def test_there_is_no_release_without_somebody_who_vouches_for_it() -> None:
    facts = {**FACTS, "architecture": "aarch64"}
    assert evaluate("{{ __nvidia_gpu_exporter_checksum }}", ROLE, "noble", ansible_facts=facts) == ""
    assert evaluate("{{ __nvidia_gpu_exporter_archive }}", ROLE, "noble", ansible_facts=facts) == (
        "nvidia_gpu_exporter_1.14.0_linux_arm64.tar.gz"
    )


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("architecture", "digit"), [("x86_64", "1"), ("aarch64", "2")])
def test_an_architecture_has_the_checksum_of_its_own_archive(suite: str, architecture: str, digit: str) -> None:
    facts = {**FACTS, "architecture": architecture}
    vouched = {"aarch64": "2" * 64, "x86_64": "1" * 64}
    given = {"ansible_facts": facts, "nvidia_gpu_exporter_sha256": vouched}
    assert evaluate("{{ __nvidia_gpu_exporter_checksum }}", ROLE, suite, **given) == digit * 64
    assert str(evaluate("{{ __nvidia_gpu_exporter_folder }}", ROLE, suite, **given)).endswith(f"-{digit * 12}")


# -- when the exporter is restarted ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ({}, {"invocation": "a", "driver": "1", "fails": True}, None),
        ({"invocation": "a", "driver": "1", "fails": False}, {"invocation": "a", "driver": "1", "fails": True}, None),
        ({"invocation": "a", "driver": "1", "fails": True}, {"invocation": "a", "driver": "1", "fails": True}, "fails"),
        ({"invocation": "a", "driver": "1", "fails": True}, {"invocation": "b", "driver": "1", "fails": True}, None),
        (
            {"invocation": "a", "driver": "1", "fails": False},
            {"invocation": "a", "driver": "2", "fails": False},
            "changed",
        ),
        (
            {"invocation": "a", "driver": None, "fails": True},
            {"invocation": "a", "driver": "1", "fails": True},
            "changed",
        ),
        ({"invocation": "a", "driver": "1", "fails": True}, {"invocation": "a", "driver": None, "fails": False}, None),
        ({"invocation": "a", "driver": "1", "fails": True}, {"invocation": "a", "driver": "1", "fails": False}, None),
    ],
)
def test_the_exporter_is_restarted_when_the_driver_is_back_or_another(
    before: dict[str, Any], now: dict[str, Any], why: str | None
) -> None:
    assert recover.decide(before, now) == why


def test_a_driver_that_changes_again_right_after_a_restart_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemctl only says which start it is, and counts."""
    started, driver, state = tmp_path / "started", tmp_path / "driver", tmp_path / "state.json"
    started.write_text("1")
    program = tmp_path / "systemctl"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = show ] && exec cat {started}\necho $(($(cat {started}) + 1)) >{started}.new\n'
        f"mv {started}.new {started}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    argv = ["--url=http://127.0.0.1:1", f"--driver={driver}", f"--state={state}", "--timeout=1", "--", "/bin/false"]
    for release, start in (("570", "1"), ("580", "2"), ("590", "3"), ("590", "3")):
        driver.write_text(release)
        assert recover.main(argv) == 0
        assert started.read_text().strip() == start


def test_a_program_that_hangs_or_is_missing_does_not_answer(tmp_path: Path) -> None:
    asked = recover.Asked(tmp_path / "asked.json")
    assert asked.answers([sys.executable, "-c", ""], 10.0)
    assert not asked.answers([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert not asked.answers([sys.executable, "-c", "raise SystemExit(9)"], 10.0)
    assert not asked.answers([str(tmp_path / "missing")], 10.0)


def test_one_that_ends_when_it_is_told_to_keeps_no_other_from_being_asked(tmp_path: Path) -> None:
    asked = recover.Asked(tmp_path / "asked.json")
    assert not asked.hangs()
    assert not asked.answers([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    until(lambda: not asked.hangs(), "it to end")


def test_one_that_hangs_in_the_driver_is_left_alone_and_no_other_started_beside_it(
    hangs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ignores TERM stands for one in state D. The timer comes by again and again."""
    program, calls = tmp_path / "nvidia-smi", tmp_path / "calls"
    program.write_text(hangs.format(calls=calls))
    program.chmod(0o755)
    state = tmp_path / "state.json"
    state.write_text(json.dumps(FAILING))
    monkeypatch.setattr(recover, "look", lambda _: dict(FAILING))
    argv = ["--url=http://-", "--driver=/-", f"--state={state}", "--timeout=1", "--", str(program)]
    try:
        for _ in range(3):
            assert recover.main(argv) == 0
        (pid,) = until(lambda: find_text(calls), "the program to say who it is").split()
        os.kill(int(pid), 0)  # it was not killed either
    finally:
        for each in find_text(calls).split():
            os.kill(int(each), signal.SIGKILL)
    until(lambda: not recover.Asked(tmp_path / "asked.json").hangs(), "it to be gone")


def find_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_the_unit_leaves_behind_what_hangs_in_the_driver() -> None:
    settings = unit("nvidia-gpu-exporter-recover.service")
    assert (settings["KillMode"], settings["SendSIGKILL"]) == (["process"], ["no"])
    assert settings["RuntimeDirectoryPreserve"] == ["yes"], "what it knows of that process outlives its run"


@pytest.mark.parametrize("content", ["", "not json", "[1]"])
def test_a_state_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    assert recover.read(tmp_path / "state.json") == {}
    assert recover.read(tmp_path / "missing.json") == {}


# -- the stub names what the real one names ----------------------------------------------------------------------------


def test_the_stub_gives_the_names_and_values_that_an_h100_was_recorded_with(library: Path, tmp_path: Path) -> None:
    fields = evaluate("{{ __nvidia_gpu_exporter_fields }}", ROLE, "noble")
    text = stub.gpus(nvidia_smi(library, tmp_path, f"--query-gpu={','.join(fields)}", "--format=csv"))
    uuid = Scenario.h100(1, seed="a").uuids[0].lower().removeprefix("gpu-")
    series = dict(line.rsplit(" ", 1) for line in text.splitlines())
    values = {
        name.removesuffix(f'{{uuid="{uuid}"}}'): float(value)
        for name, value in series.items()
        if "gpu_info" not in name
    }
    recorded = {  # of an idle H100 under 590.48.01, by release 1.14.0, where the fake card has the same value
        "nvidia_smi_clocks_current_memory_clock_hz": 2.619e09,
        "nvidia_smi_clocks_current_sm_clock_hz": 3.45e08,
        "nvidia_smi_clocks_event_reasons_active": 1,
        "nvidia_smi_compute_mode": 0,
        "nvidia_smi_ecc_errors_corrected_volatile_total": 0,
        "nvidia_smi_ecc_errors_uncorrected_volatile_total": 0,
        "nvidia_smi_ecc_mode_current": 1,
        "nvidia_smi_enforced_power_limit_watts": 700,
        "nvidia_smi_mig_mode_current": 0,
        "nvidia_smi_persistence_mode": 1,
        "nvidia_smi_pstate": 0,
        "nvidia_smi_remapped_rows_failure": 0,
        "nvidia_smi_remapped_rows_pending": 0,
        "nvidia_smi_utilization_gpu_ratio": 0,
        "nvidia_smi_utilization_memory_ratio": 0,
    }
    assert {name: values.get(name) for name in recorded} == recorded
    assert values["nvidia_smi_memory_total_bytes"] == 85520809984 // 2**20 * 2**20
    assert values["nvidia_smi_power_draw_watts"] == 69.54
    assert not any("fan_speed" in name for name in series), "an H100 has no fan: no series, not 0"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver: without it the fake nvidia-smi says that there is none."""
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run([ROOT / "molecule/image/gpu/build", folder], check=True, stdout=subprocess.DEVNULL)
    return folder / "current"


def nvidia_smi(library: Path, folder: Path, *arguments: str) -> str:
    """What the fake program of the test hosts says of one H100."""
    Scenario.h100(1, seed="a").write(folder / "scenario.ini")
    environ = {
        "FAKE_GPU_SCENARIO": str(folder / "scenario.ini"),
        "LD_LIBRARY_PATH": str(library),
        "PATH": "/usr/bin:/bin",
    }
    argv = [sys.executable, ROOT / "molecule/image/gpu/nvidia_smi.py", *arguments]
    return subprocess.run(argv, env=environ, check=True, capture_output=True, text=True).stdout
