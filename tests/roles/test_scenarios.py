"""Each role's Molecule scenario passes: bare hosts, check mode, converge, nothing changes again, effects verified."""

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

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1500)]


def test_every_role_is_tried_by_a_scenario() -> None:
    told = "".join(path.read_text() for path in (ROOT / "molecule").glob("*/*.yml"))
    roles = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
    assert [role for role in roles if not re.search(rf"\b(role|name): {role}\b", told)] == []


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_passes(scenario: str, tmp_path: Path) -> None:
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
