"""The agent's files as written, on every distribution: no test host runs Ubuntu."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.roles.rendering import DISTRIBUTIONS, Role

pytestmark = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def test_the_command_is_for_root_alone_and_takes_nothing_from_a_home(distribution: str, tmp_path: Path) -> None:
    (tmp_path / "command").write_text(Role("gpu_agent", distribution).template("remotegpu-agent.j2"))
    subprocess.run(["sh", "-n", tmp_path / "command"], check=True)
    lines = Role("gpu_agent", distribution).lines("remotegpu-agent.j2")
    assert lines[0].startswith('[ "$(id -u)" = 0 ] ||')
    assert lines[-2:] == [
        "export SHIV_ROOT=/var/lib/remotegpu-agent/shiv",
        'exec /usr/bin/python3 -I /opt/remotegpu/remotegpu-agent.pyz "$@"',
    ]


def test_leases_that_ended_meanwhile_are_ended_before_sshd_lets_anybody_in(distribution: str) -> None:
    """The service is ssh.service on Debian and on Ubuntu, where a socket starts it: the socket must not wait."""
    (order,) = [
        line for line in Role("gpu_agent", distribution).lines("remotegpu-lease-guard.service.j2") if "Before=" in line
    ]
    assert order.removeprefix("Before=").split() == ["ssh.service", "remotegpu-agent.service"]


def test_the_agent_comes_behind_the_firewall_and_never_gives_up(distribution: str) -> None:
    lines = Role("gpu_agent", distribution).lines("remotegpu-agent.service.j2")
    (after,) = [line.removeprefix("After=").split() for line in lines if line.startswith("After=")]
    assert {"remotegpu-firewall.service", "remotegpu-lease-guard.service"} <= set(after)
    assert {"Restart=always", "StartLimitIntervalSec=0", "ExecStart=/usr/local/bin/remotegpu-agent run"} <= set(lines)


def test_a_new_agent_is_unpacked_before_it_runs_by_a_process_that_ends(distribution: str) -> None:
    lines = Role("gpu_agent", distribution).lines("remotegpu-agent.service.j2")
    assert [line for line in lines if line.startswith("ExecStart")] == [
        "ExecStartPre=-/usr/local/bin/remotegpu-agent --version",
        "ExecStart=/usr/local/bin/remotegpu-agent run",
    ]


def test_what_a_site_sets_beside_is_in_its_settings(distribution: str) -> None:
    role = Role("gpu_agent", distribution, __gpu_agent_settings={"portal_url": "https://a"}, gpu_agent_config={"x": 1})
    assert json.loads(role.template("agent.json.j2")) == {"portal_url": "https://a", "x": 1}


def test_python_and_the_systems_authorities_are_the_distributions(distribution: str) -> None:
    role = Role("gpu_agent", distribution)
    assert role.value("__gpu_agent_packages") == ["python3", "ca-certificates"]
    assert role.value("__gpu_agent_system_ca") == "/etc/ssl/certs/ca-certificates.crt"
