#!/usr/bin/env python3
"""Ansible's inventory of a scenario: the hosts that `create` booted for it in this checkout, and wrote down.

What was booted, not what runs: a host that is gone is then unreachable, and so fails. Were it left out, every play
would skip it in silence, and a scenario without hosts pass. Molecule runs `create` only once, whatever became of the
hosts since; `molecule destroy` lets it begin anew.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def inventory(scenario: str, folder: Path) -> dict[str, Any]:
    group = "control_plane" if scenario == "control_plane" else "gpu_hosts"
    hosts = _hosts(scenario, folder)
    return {group: {"hosts": list(hosts)}, "_meta": {"hostvars": hosts}}


def _hosts(scenario: str, folder: Path) -> dict[str, dict[str, str]]:
    written = folder / f"{scenario}_hosts.json"
    if written.exists():
        booted = json.loads(written.read_text())
        return {host["name"]: {"ansible_host": host["address"], "testhost_suite": host["suite"]} for host in booted}
    state = folder / "state.yml"
    if state.exists() and "created: true" in state.read_text():
        # There must be hosts, and nobody knows which: this name has no address, and the plays fail on it.
        return {f"molecule-{scenario.replace('_', '-')}-is-gone.invalid": {}}
    return {}


if __name__ == "__main__":
    json.dump(
        inventory(
            os.environ.get("MOLECULE_SCENARIO_NAME", "default"), Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
        ),
        sys.stdout,
    )
