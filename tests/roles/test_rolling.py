"""Playbooks that go from host to host: in which batches, who is left out, and where they stop.

The playbooks are the real ones, played over names of an inventory. Their roles are doubles that do as they are told:
here it is only decided who gets a turn. What a role does in its turn is the scenarios' business, and tests/e2e's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

PLAYBOOKS = Path(__file__).parents[2] / "playbooks"
ROLES = PLAYBOOKS.with_name("roles")
NO_FACTS = """#!/bin/sh
echo '{"ansible_facts": {}}'
"""
# A host that answers late: gpu-04 leaves `group_by` when gpu-05 has. It is a callback: they come before the workers.
LATE = """
import time
from pathlib import Path

from ansible.plugins.callback import CallbackBase
from ansible.plugins.loader import action_loader

action = action_loader.get("ansible.builtin.group_by", class_only=True)
real = action.run

def run(self, tmp=None, task_vars=None):
    host, deadline = task_vars["inventory_hostname"], time.monotonic() + 20
    while host == "gpu-04" and not Path("gpu-05.grouped").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    Path(f"{host}.grouped").touch()
    return real(self, tmp, task_vars)

action.run = run

class CallbackModule(CallbackBase):
    CALLBACK_NAME = "late"
"""
Tasks = list[dict[str, Any]]

NOTHING_TO_REFUSE: Tasks = [{"name": "Refuse nothing", "ansible.builtin.meta": "noop"}]
REFUSALS: Tasks = [{"name": "Refuse", "ansible.builtin.assert": {"that": "inventory_hostname not in refused"}}]
# In the shape of the role: who is not heard goes back, and has failed then.
UPGRADE: Tasks = [
    {
        "name": "Start the new agent, or go back",
        "block": [{"name": "Upgrade", "ansible.builtin.assert": {"that": "inventory_hostname not in broken"}}],
        "rescue": [
            {"name": "Go back", "ansible.builtin.debug": {"msg": "the one before is back"}},
            {"name": "Refuse to go on", "ansible.builtin.fail": {"msg": "not heard"}},
        ],
    }
]
REACH: dict[str, Any] = {"name": "Reach it", "ansible.builtin.command": "true", "when": "inventory_hostname in away"}
# Of the role reboot: what it looks at beforehand and again in a host's turn, what it waits for, and what it does; the
# order of a turn is its own.
REBOOT: Mapping[str, Tasks] = {
    "reboot/tasks/ready.yml": yaml.safe_load((ROLES / "reboot" / "tasks" / "ready.yml").read_text()),
    "reboot/tasks/look.yml": [
        {"name": "Look", "ansible.builtin.assert": {"that": "inventory_hostname not in refused"}},
        {**REACH, "when": "inventory_hostname in away and not is_late"},
    ],
    "reboot/tasks/drain.yml": [{"name": "Drain", "ansible.builtin.assert": {"that": "inventory_hostname not in busy"}}],
    "reboot/tasks/boot.yml": [
        {"name": "Reboot", "ansible.builtin.assert": {"that": "inventory_hostname not in broken"}}
    ],
}


@dataclass(frozen=True)
class Played:
    """What came of a playbook."""

    rc: int
    plays: list[dict[str, Any]]  # one for each batch

    def batches(self, task: str) -> list[list[str]]:
        """The hosts that had their turn at this task, batch by batch."""
        turns = [turn for play in self.plays for turn in play["tasks"] if turn["task"]["name"].endswith(f" : {task}")]
        hosts = [sorted(name for name, told in turn["hosts"].items() if not told.get("skipped")) for turn in turns]
        return [each for each in hosts if each]


def play(playbook: str, folder: Path, roles: Mapping[str, Tasks], *options: str, hosts: int, **given: Any) -> Played:
    """Play it over gpu-01, gpu-02, … and a gateway. `roles` are files of tasks by their path below roles/."""
    files = {"tasks/preflight.yml": NOTHING_TO_REFUSE, **{f"roles/{path}": tasks for path, tasks in roles.items()}}
    gpu_hosts: dict[str, Any] = {f"gpu-{number:02}": {} for number in range(1, hosts + 1)}
    inventory = {"gpu_hosts": {"hosts": gpu_hosts}, "gateways": {"hosts": {"gateway": {}}}}
    for name, content in {**files, "hosts.yml": inventory}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(content))
    (folder / "library").mkdir()
    (folder / "library" / "no_facts").write_text(NO_FACTS)
    shutil.copy(PLAYBOOKS / playbook, folder)
    told = {
        "ansible_become": False,
        "ansible_connection": "{{ 'ssh' if inventory_hostname in away or cut_off | default(false) else 'local' }}",
        "ansible_facts_modules": ["no_facts"],  # nobody asks for any, and all of them take a second a host
        "ansible_host": "127.0.0.1",
        "ansible_port": 1,  # where nobody answers
        "ansible_python_interpreter": sys.executable,
        "away": [],
        "broken": [],
        "busy": [],
        "refused": [],
        **given,
    }
    program = Path(sys.executable).with_name("ansible-playbook")
    argv = [str(program), "-i", "hosts.yml", "-e", json.dumps(told), *options, playbook]
    environ = {**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"}
    run = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.startswith("{"), run.stdout + run.stderr
    return Played(run.returncode, json.loads(run.stdout)["plays"])


def upgrade(folder: Path, *, hosts: int, then: Tasks | None = None, **given: Any) -> Played:
    """`then` comes after it."""
    upgrade = "gpu_agent/tasks/upgrade.yml"
    roles = {"gpu_agent/tasks/upgrade_refusals.yml": REFUSALS, upgrade: [*UPGRADE, *(then or [])]}
    return play("upgrade_agent.yml", folder, roles, hosts=hosts, **given)


def reboot(folder: Path, *, hosts: int, then: Tasks | None = None, **given: Any) -> Played:
    """Each host needs one, but for those that are `fine`; `then` comes after it."""
    given = {
        "__reboot_needed": "{{ inventory_hostname not in fine }}",
        "fine": [],
        "is_late": then is not None,
        **given,
    }
    boot = "reboot/tasks/boot.yml"
    return play("reboot.yml", folder, {**REBOOT, boot: [*REBOOT[boot], *(then or [])]}, hosts=hosts, **given)


def test_an_agent_that_is_not_heard_on_the_first_host_comes_to_no_other(tmp_path: Path) -> None:
    played = upgrade(tmp_path, hosts=2, broken=["gpu-01"])
    assert played.batches("Upgrade") == [["gpu-01"]]
    assert played.rc != 0


def test_an_agent_comes_to_a_tenth_at_a_time_and_stops_with_the_batch_that_one_of_them_spoils(tmp_path: Path) -> None:
    """A refused host takes nobody's place: not that of the first one, and none in a batch. A late answer costs none."""
    (tmp_path / "callback_plugins").mkdir()
    (tmp_path / "callback_plugins" / "late.py").write_text(LATE)
    played = upgrade(tmp_path, hosts=20, refused=["gpu-01"], broken=["gpu-03"])
    assert played.batches("Upgrade") == [["gpu-02"], ["gpu-03", "gpu-04"]]
    assert played.batches("Go back") == [["gpu-03"]], "the other one of the batch keeps what it has proven"
    assert played.rc != 0


def test_a_host_that_is_refused_keeps_nobody_waiting_and_is_told_at_the_end(tmp_path: Path) -> None:
    played = upgrade(tmp_path, hosts=2, refused=["gpu-02"])
    assert played.batches("Upgrade") == [["gpu-01"], ["gateway"]]
    assert played.rc != 0


def test_a_host_that_its_new_agent_has_cut_off_is_the_last_one(tmp_path: Path) -> None:
    """Nothing has failed there, and nobody could put the agent of before back."""
    cut: dict[str, Any] = {"name": "Cut it off", "ansible.builtin.set_fact": {"cut_off": True}}
    here = {"when": "inventory_hostname == 'gpu-03'"}
    played = upgrade(tmp_path, hosts=20, then=[{**cut, **here}, {**REACH, **here}])
    assert played.batches("Upgrade") == [["gpu-01"], ["gpu-02", "gpu-03"]]
    assert played.rc != 0


def test_hosts_are_rebooted_one_after_the_other_up_to_the_first_that_is_not_well(tmp_path: Path) -> None:
    played = reboot(tmp_path, hosts=3, broken=["gpu-02"])
    assert played.batches("Reboot") == [["gpu-01"], ["gpu-02"]]
    assert played.rc != 0


def test_a_host_that_is_not_well_ends_the_reboots_where_others_of_its_batch_are(tmp_path: Path) -> None:
    played = reboot(tmp_path, hosts=4, broken=["gpu-01"], reboot_serial=2)
    assert played.batches("Reboot") == [["gpu-01", "gpu-02"]]
    assert played.rc != 0


def test_all_are_rebooted_where_all_are_well(tmp_path: Path) -> None:
    played = reboot(tmp_path, hosts=2)
    assert played.batches("Reboot") == [["gpu-01"], ["gpu-02"], ["gateway"]]
    assert played.rc == 0


@pytest.mark.parametrize("why", ["refused", "busy"])
def test_a_host_that_may_not_be_rebooted_keeps_no_other_waiting_and_is_told_at_the_end(
    tmp_path: Path, why: str
) -> None:
    """Leased, or a task that does not end: that host is not unwell, whenever it turns out."""
    played = reboot(tmp_path, hosts=3, **{why: ["gpu-01"]})
    assert played.batches("Reboot") == [["gpu-02"], ["gpu-03"], ["gateway"]]
    assert played.rc != 0


def test_a_host_that_was_leased_since_the_first_look_leaves_the_others_of_its_batch_theirs(tmp_path: Path) -> None:
    played = reboot(tmp_path, hosts=3, busy=["gpu-01"], reboot_serial=2)
    assert played.batches("Reboot") == [["gpu-02"], ["gateway", "gpu-03"]]
    assert played.rc != 0


def test_a_host_that_cannot_be_reached_keeps_no_other_waiting(tmp_path: Path) -> None:
    played = reboot(tmp_path, hosts=2, away=["gpu-01"])
    assert played.batches("Reboot") == [["gpu-02"], ["gateway"]]
    assert played.rc != 0


@pytest.mark.parametrize("serial", [1, 2])
def test_a_host_that_cannot_be_reached_after_its_reboot_ends_the_reboots(tmp_path: Path, serial: int) -> None:
    """It came back, and went again: not well, though no task has failed there."""
    played = reboot(tmp_path, hosts=4, away=["gpu-02"], reboot_serial=serial, then=[REACH])
    assert played.batches("Reboot") == ([["gpu-01"], ["gpu-02"]] if serial == 1 else [["gpu-01", "gpu-02"]])
    assert played.rc != 0


@pytest.mark.parametrize("fine", [["gpu-01"], ["gpu-01", "gpu-02", "gateway"]])
def test_who_needs_no_reboot_gets_none(tmp_path: Path, fine: list[str]) -> None:
    played = reboot(tmp_path, hosts=2, fine=fine)
    assert played.batches("Reboot") == [[name] for name in ("gpu-02", "gateway") if name not in fine]
    assert played.rc == 0


@pytest.mark.parametrize(
    "away", [["gateway"], ["gpu-01", "gpu-02"], []], ids=["the only gateway", "all hosts", "nobody"]
)
def test_drift_is_asked_of_whoever_answers_though_nobody_else_of_its_kind_does(tmp_path: Path, away: list[str]) -> None:
    """A play whose hosts have all failed is the last one, and no host would be asked any more."""
    for kind in ("gpu_hosts", "gateways"):
        asking = {"name": f"Make {kind}", "hosts": kind, "gather_facts": True, "roles": ["looked_at"]}
        (tmp_path / f"{kind}.yml").write_text(yaml.safe_dump([asking]))
    roles = {"looked_at/tasks/main.yml": [{"name": "Look", "ansible.builtin.debug": {"msg": "as it should be"}}]}
    played = play("drift.yml", tmp_path, roles, "--check", hosts=2, away=away)
    asked = [name for batch in played.batches("Look") for name in batch]
    assert asked == [name for name in ("gpu-01", "gpu-02", "gateway") if name not in away]
    assert (played.rc == 0) == (not away)
    whole = [
        turn["hosts"] for turn in played.plays[-1]["tasks"] if turn["task"]["name"] == "Note that nothing was left out"
    ]
    assert [sorted(hosts) for hosts in whole] == [sorted(asked)]
