"""What the role reboot refuses beforehand, by the nftables of a real kernel; a reboot itself is the scenario's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.rendering import Role
from tests.support.rendering import ROLES

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not all(map(shutil.which, ("nft", "unshare"))), reason="needs nft and unshare"),
]
KERNEL = "6.8.0-101-generic"
FORWARDS = """
add element inet remotegpu_gateway forwards { tcp . 20017 . 192.0.2.0/24 timeout 600s : 172.30.0.2 . 22 }
add element inet remotegpu_gateway flows { tcp . 20017 . 192.0.2.0/24 . 172.30.0.2 . 22 timeout 600s }
add element inet remotegpu_gateway flows6 { udp . 20018 . 2001:db8:9::/64 . 2001:db8:2::2 . 22 timeout 600s }
"""


def refusal(folder: Path, rules: str, **given: Any) -> str:
    """Why the host is not rebooted; empty where nothing speaks against it. `rules` are those of its kernel."""
    tasks = [{"ansible.builtin.include_role": {"name": "reboot", "tasks_from": "refuse.yml"}}]
    (folder / "play.yml").write_text(yaml.safe_dump([{"hosts": "gateway", "gather_facts": False, "tasks": tasks}]))
    (folder / "rules.nft").write_text(rules)
    looked = {"ansible_facts": {"nvidia": {"next_kernel": KERNEL}}, "__nvidia_driver_next_lacks_it": False}
    told = {"ansible_python_interpreter": sys.executable, **looked, **given}
    play = ["ansible-playbook", "-i", "gateway,", "-c", "local", "-e", json.dumps(told), "play.yml"]
    environ = {
        **os.environ,
        "ANSIBLE_ROLES_PATH": str(ROLES),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
    }
    argv = ["unshare", "--net", "sh", "-c", 'nft -f rules.nft && exec "$@"', "sh", *play]
    run = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.startswith("{"), run.stdout + run.stderr
    last = json.loads(run.stdout)["plays"][0]["tasks"][-1]["hosts"]["gateway"]
    assert bool(last.get("failed")) is (run.returncode != 0), run.stdout
    return str(last["msg"]) if last.get("failed") else ""


def gateways_rules() -> str:
    seen = ["network 172.30.0.0/24", "network 2001:db8:2::/64"]
    return Role("gateway", __gateway_seen=seen).template("gateway.nft.j2")


def test_a_gateway_is_not_rebooted_under_those_who_go_through_it(tmp_path: Path) -> None:
    """It is never leased itself; its kernel knows whom it leads on, with portal and agent dead."""
    said = refusal(tmp_path, gateways_rules() + FORWARDS)
    assert "gateway is a gateway, and open forwards lead through it (ports 20017, 20018)" in said
    assert "Nothing has been done" in said
    assert "reboot_disruption_allowed" in said


def test_maintenance_keeps_the_next_one_away_and_says_nothing_of_those_who_are_in(tmp_path: Path) -> None:
    assert refusal(tmp_path, gateways_rules() + FORWARDS, remotegpu_maintenance=True)


@pytest.mark.parametrize("allowed", [True, "true"])
def test_a_gateway_is_rebooted_where_it_is_said_that_they_may_be_cut_off(tmp_path: Path, allowed: bool | str) -> None:
    assert refusal(tmp_path, gateways_rules() + FORWARDS, reboot_disruption_allowed=allowed) == ""


@pytest.mark.parametrize("maintained", [True, False])
def test_no_machine_is_rebooted_under_a_lease_that_the_inventory_tells_of(tmp_path: Path, maintained: bool) -> None:
    said = refusal(tmp_path, "", remotegpu_lease_active=True, remotegpu_maintenance=maintained)
    assert "gateway is leased (as the inventory says)" in said
    assert refusal(tmp_path, "", remotegpu_lease_active=True, reboot_disruption_allowed="true") == ""


@pytest.mark.parametrize("rules", ["", "gateway"])
def test_a_host_that_leads_nobody_anywhere_is_rebooted(tmp_path: Path, rules: str) -> None:
    assert refusal(tmp_path, gateways_rules() if rules else "") == ""


def test_no_host_is_rebooted_into_a_kernel_that_has_no_driver(tmp_path: Path) -> None:
    said = refusal(tmp_path, "", __nvidia_driver_next_lacks_it=True)
    assert f"The next boot of gateway starts kernel {KERNEL}, for which there is no NVIDIA module" in said
    assert "playbooks/gpu_hosts.yml --tags nvidia_driver" in said
