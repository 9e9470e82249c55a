"""The agent's commands that systemd calls without the agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from remotegpu_agent import cli
from remotegpu_agent.config import Config
from remotegpu_agent.observe.tools import ToolFailed

NEWER = '{"epoch": "e", "generation": 1, "frozen": null, "desired": {"of": "a newer agent"}}'


@pytest.mark.parametrize("text", ["{", "[]", NEWER], ids=["torn", "other", "newer"])
def test_a_lease_can_be_ended_whatever_the_state_file_holds(tmp_path: Path, text: str) -> None:
    """What it says of openings cannot be read then, which is one thing that resists, as a program that fails is."""
    (tmp_path / "desired.json").write_text(text)
    leases = cli._leases(
        Config("https://portal.test", state_dir=tmp_path, run_dir=tmp_path, tasks_dir=tmp_path / "tasks")
    )
    with pytest.raises(ToolFailed, match=r"desired\.json"):
        leases._openings.settle({})
