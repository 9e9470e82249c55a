"""Each role's Molecule scenario passes: bare hosts, check mode, converge, nothing changes again, effects verified.

What a scenario converges in another thing's place is read from its own files, and the closing lines of `make test-slow`
say so.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
SCENARIOS = sorted(path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml"))
# What a scenario says where it has no real part → what is there instead.
STAND_INS = {
    "grafana_package:": "Grafana is a package of ours that reads the same provisioning",
    "guacd_image_archive:": "guacd is a program of ours that answers as its protocol begins",
    "harbor_bundle:": "Harbor's bundle is ours: an installer and containers that do as the real ones are told",
    "nvidia_gpu_exporter_artifact:": "nvidia_gpu_exporter is a stub that names what nvidia-smi says as 1.14.0 does",
    "file:///srv/nvidia": "NVIDIA's driver is small packages of ours under the real names",
    "file:///srv/toolkit": "NVIDIA's container toolkit is small packages of ours under the real names",
    "/opt/fake-root": "the loaded driver is a folder that stands for /, and cards are a fake NVML and nvidia-smi",
    "file:///srv/docker": "Docker's own repository is a folder with the distribution's engine under its names",
}

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(2400)]


def test_every_role_is_tried_by_a_scenario() -> None:
    told = "".join(path.read_text() for path in (ROOT / "molecule").glob("*/*.yml"))
    roles = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
    assert [role for role in roles if not re.search(rf"\b(role|name): {role}\b", told)] == []


def stand_ins(scenario: str) -> list[str]:
    said = "".join(path.read_text() for path in (ROOT / "molecule" / scenario).glob("*.yml"))
    return [f"{scenario}: {there}" for place, there in STAND_INS.items() if place in said]


def test_what_a_scenario_has_no_real_part_for_is_told() -> None:
    for scenario in SCENARIOS:
        about = (ROOT / "molecule" / scenario / "molecule.yml").read_text()
        is_told = re.search(r"\b(stand-in|stub|fake|stands (in )?for)\b", about) is not None
        assert stand_ins(scenario) or not is_told, about
    assert stand_ins("grafana") == [f"grafana: {STAND_INS['grafana_package:']}"]
    assert stand_ins("base") == []


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_passes(scenario: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.node.user_properties += [("stand-in", sentence) for sentence in stand_ins(scenario)]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"}
    environ.update(
        ANSIBLE_HOME=str(ROOT / ".ansible"),
        XDG_CACHE_HOME=cache_home(),
        NO_COLOR="1",
        MOLECULE_SUITES="bookworm trixie",
    )
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        status = molecule("test", scenario, environ, file)
    assert status == 0, output.read_text(errors="replace")[-6000:]


def molecule(command: str, scenario: str, environ: dict[str, str], output: IO[bytes]) -> int:
    """Its exit status. When the test is given up, no playbook goes on and no host stays."""
    process = subprocess.Popen(
        ["molecule", command, "-s", scenario],
        cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if command != "destroy":
            molecule("destroy", scenario, environ, output)
        raise


def cache_home() -> str:
    """Where the images' cache lies, which the scenario's hosts need too."""
    return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
