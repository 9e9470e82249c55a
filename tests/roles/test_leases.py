"""Whether a lease is open on a host: its own agent's word beside the inventory's, and what silence means.

The tasks are played on this machine, with a program that answers as the agent does. What a playbook then refuses is for
molecule/gpu_hosts to say, with the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.hosts

PLAYBOOKS = Path(__file__).parents[2] / "playbooks"

OPEN = {"leases": [{"lease_id": 6, "state": "closed"}, {"lease_id": 7, "state": "open"}]}
CLOSED = {"leases": [{"lease_id": 6, "state": "closed"}]}
SAYS_OPEN, SAYS_CLOSED, SAYS_NONE = (f"echo '{json.dumps(each)}'" for each in (OPEN, CLOSED, {"leases": []}))
IS_BROKEN = "echo 'no state' >&2; exit 2"


def leased(folder: Path, agent: str, *options: str, enrolled: bool = True, **inventory: Any) -> bool:
    """Whether the roles take the host for leased, once it was asked. `inventory` is what that says."""
    if agent:
        (folder / "agent").write_text(f'#!/bin/sh\n[ "$*" = "status --json" ] || exit 9\n{agent}\n')
        (folder / "agent").chmod(0o755)
    if enrolled:
        (folder / "credential.json").write_text("{}")
    told = {"agent_command": f"{folder}/agent", "agent_credential": f"{folder}/credential.json"}
    tasks = [
        {"ansible.builtin.import_tasks": str(PLAYBOOKS / "tasks/leases.yml")},
        {"ansible.builtin.debug": {"msg": "{{ remotegpu_lease_active | default(false) }}"}},
    ]
    (folder / "play.yml").write_text(yaml.safe_dump([{"hosts": "gpu", "gather_facts": False, "tasks": tasks}]))
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, **inventory}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"gpu": host}}}))
    argv = ["ansible-playbook", "-i", "hosts.yml", "-e", json.dumps(told), *options, "play.yml"]
    environ = {
        **os.environ,
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    run = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return bool(json.loads(run.stdout)["plays"][0]["tasks"][-1]["hosts"]["gpu"]["msg"])


@pytest.mark.parametrize("inventory", [{}, {"remotegpu_lease_active": False}])
def test_an_open_lease_of_which_only_the_agent_knows_is_one(inventory: dict[str, Any], tmp_path: Path) -> None:
    """An inventory by hand says nothing of leases, and the portal's was read before this one began."""
    assert leased(tmp_path, SAYS_OPEN, **inventory)


@pytest.mark.parametrize("agent", [SAYS_CLOSED, SAYS_NONE])
def test_a_host_without_an_open_lease_is_free(agent: str, tmp_path: Path) -> None:
    assert not leased(tmp_path, agent)


def test_the_inventorys_word_that_there_is_a_lease_stands(tmp_path: Path) -> None:
    assert leased(tmp_path, SAYS_NONE, remotegpu_lease_active=True)


@pytest.mark.parametrize("agent", [IS_BROKEN, ""])
def test_where_the_agent_should_know_and_cannot_be_asked_a_lease_is_feared(agent: str, tmp_path: Path) -> None:
    assert leased(tmp_path, agent)


@pytest.mark.parametrize("agent", [IS_BROKEN, ""])
def test_a_host_with_a_broken_agent_is_repaired_if_the_portal_knows_of_no_lease(agent: str, tmp_path: Path) -> None:
    assert not leased(tmp_path, agent, remotegpu_lease_active=False)


@pytest.mark.parametrize("agent", [IS_BROKEN, ""])
def test_a_host_that_never_served_a_portal_is_free(agent: str, tmp_path: Path) -> None:
    assert not leased(tmp_path, agent, enrolled=False)


def test_looking_is_allowed_under_a_lease(tmp_path: Path) -> None:
    assert not leased(tmp_path, SAYS_OPEN, "--check")


def test_who_knows_better_has_the_last_word(tmp_path: Path) -> None:
    assert not leased(tmp_path, IS_BROKEN, "-e", '{"remotegpu_lease_active": false}')


def test_every_play_that_could_take_cards_from_a_lease_asks_before_its_roles() -> None:
    """A lease may begin between two plays of one run, while packages come."""
    takes = {"nvidia_driver", "nvidia_container_toolkit", "docker"}
    plays = yaml.safe_load((PLAYBOOKS / "gpu_hosts.yml").read_text())
    taking = [play for play in plays if takes & {each["role"] for each in play["roles"]}]
    assert [play["hosts"] for play in taking] == ["gpu_hosts", "with_nvidia_gpus"]
    for play in taking:
        asks = [task for task in play["pre_tasks"] if task.get("ansible.builtin.import_tasks") == "tasks/leases.yml"]
        assert [task["tags"] for task in asks] == ["always"], play["name"]
