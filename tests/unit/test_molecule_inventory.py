"""A scenario whose hosts are gone fails: its inventory names what was booted, not what happens to run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "molecule" / "inventory" / "booted.py"
BOOTED = [{"name": "molecule-redis-trixie-3f2a1c", "suite": "trixie", "address": "172.17.128.7", "port": 22}]


def inventory(folder: Path, scenario: str = "redis") -> dict[str, Any]:
    environ = {**os.environ, "MOLECULE_SCENARIO_NAME": scenario, "MOLECULE_EPHEMERAL_DIRECTORY": str(folder)}
    return dict(json.loads(subprocess.run([SCRIPT], env=environ, check=True, stdout=subprocess.PIPE).stdout))


@pytest.mark.parametrize(("scenario", "group"), [("redis", "gpu_hosts"), ("control_plane", "control_plane")])
def test_the_hosts_are_those_that_were_booted_for_the_scenario(tmp_path: Path, scenario: str, group: str) -> None:
    (tmp_path / f"{scenario}_hosts.json").write_text(json.dumps(BOOTED))
    (tmp_path / "another_hosts.json").write_text(json.dumps([{**BOOTED[0], "name": "another"}]))
    assert inventory(tmp_path, scenario) == {
        group: {"hosts": [BOOTED[0]["name"]]},
        "_meta": {"hostvars": {BOOTED[0]["name"]: {"ansible_host": "172.17.128.7", "testhost_suite": "trixie"}}},
    }


def test_before_create_there_is_none(tmp_path: Path) -> None:
    assert inventory(tmp_path)["gpu_hosts"]["hosts"] == []
    (tmp_path / "state.yml").write_text("---\ncreated: false\n")
    assert inventory(tmp_path)["gpu_hosts"]["hosts"] == []


def test_where_molecule_says_that_hosts_were_created_a_play_without_one_fails(tmp_path: Path) -> None:
    (tmp_path / "state.yml").write_text("---\nconverged: true\ncreated: true\ndriver: default\n")
    (tmp_path / "play.yml").write_text("- hosts: gpu_hosts\n  gather_facts: false\n  tasks: [{ping: }]\n")
    environ = {**os.environ, "MOLECULE_SCENARIO_NAME": "redis", "MOLECULE_EPHEMERAL_DIRECTORY": str(tmp_path)}
    argv = ["ansible-playbook", "-i", str(SCRIPT), "play.yml"]
    run = subprocess.run(argv, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
    assert "molecule-redis-is-gone.invalid" in run.stdout
    assert run.returncode == 4, "unreachable"
