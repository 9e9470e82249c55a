"""The cards of this machine, read by the agent's own code and compared with nvidia-smi.

`make test` runs this where there is /dev/nvidia0, and says where there is none that it did not. Nothing of a card is
changed, and nothing is run on it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from remotegpu_agent.protocol import format_time, now
from tests.support.real_card import ask_nvidia_smi, ask_the_agent, differences
from tests.unit.agent.test_protocol import conforms

ROLE = Path(__file__).parents[2] / "roles" / "nvidia_gpu_exporter" / "defaults" / "main.yml"

pytestmark = pytest.mark.gpu


def test_the_agent_says_of_the_cards_what_nvidia_smi_says() -> None:
    before = ask_nvidia_smi("nvidia-smi")
    report = ask_the_agent()
    assert before.cells, "nvidia-smi finds no card"
    assert differences(report, before, ask_nvidia_smi("nvidia-smi")) == []


def test_what_is_said_of_them_passes_the_portals_door() -> None:
    asked_at = format_time(now())
    report = ask_the_agent()
    conforms("gpu_report", report)
    assert (report["state"], report["message"]) == ("ok", None)
    assert report["sampled_at"] >= asked_at
    assert report["gpus"]
    assert all(error["message"] for gpu in report["gpus"] for error in gpu["errors"])


def test_their_driver_knows_every_field_that_the_exporter_asks_for() -> None:
    """One unknown name would cost every value."""
    fields: list[str] = yaml.safe_load(ROLE.read_text())["nvidia_gpu_exporter_fields"]
    argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    header, *rows = [line.split(", ") for line in done.stdout.splitlines()]
    assert [title.partition(" [")[0] for title in header] == fields
    assert {len(row) for row in rows} == {len(fields)}
