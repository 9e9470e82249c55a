"""The ssh_hardening role as written: who listens on which distribution, and what makes sshd read its configuration."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.rendering import DISTRIBUTIONS, Role
from tests.support.rendering import ROLES

SERVICE_ALONE = [["systemctl", "try-reload-or-restart", "ssh.service"]]
SOCKET_TOO = [["systemctl", "daemon-reload"], ["systemctl", "restart", "ssh.socket"], *SERVICE_ALONE]


def decision(name: str) -> str:
    """The expression by which the role decides a fact of its own."""
    tasks = yaml.safe_load((ROLES / "ssh_hardening/tasks/look.yml").read_text())
    (decided,) = [task["ansible.builtin.set_fact"] for task in tasks if "ansible.builtin.set_fact" in task]
    return str(decided[name])


def moves(distribution: str, socket: str, *, written: list[int], wanted: list[int]) -> bool:
    role = Role("ssh_hardening", distribution, ssh_hardening_ports=wanted)
    seen = {
        "stdout_lines": [f"socket {socket}", *(f"Port {each}" for each in written), "first Include x", "lease lease1"]
    }
    return bool(role.expression(decision("__ssh_hardening_ports_move"), __ssh_hardening_look=seen))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_says_all_that_the_tasks_ask_for(distribution: str) -> None:
    role = Role("ssh_hardening", distribution)
    assert role.value("__ssh_hardening_packages") == ["openssh-server"]
    assert role.value("__ssh_hardening_service") == "ssh.service"
    assert role.value("__ssh_hardening_socket") == "ssh.socket"
    assert role.value("__ssh_hardening_socket_asks_sshd") is (distribution == "Ubuntu 24")


def test_files_of_distributions_name_the_same_things() -> None:
    """The narrowest file is taken alone: a name that it forgets is undefined on that distribution only."""
    files = [path for path in (ROLES / "ssh_hardening/vars").glob("*.yml") if path.name != "main.yml"]
    assert len({frozenset(yaml.safe_load(path.read_text())) for path in files}) == 1


@pytest.mark.parametrize(
    ("distribution", "socket", "written", "wanted", "moved"),
    [
        ("Ubuntu 24", "enabled", [], [], False),
        ("Ubuntu 24", "enabled", [], [22, 2222], True),
        ("Ubuntu 24", "enabled", [22, 2222], [2222, 22], False),
        ("Ubuntu 24", "enabled", [2222], [], True),
        ("Ubuntu 24", "disabled", [], [2222], False),
        ("Ubuntu 24", "masked", [], [2222], False),
        ("Ubuntu 22", "disabled", [], [2222], False),
        ("Debian 12", "", [], [2222], False),
    ],
)
def test_the_socket_moves_where_systemd_listens_and_only_with_other_ports(
    distribution: str, socket: str, written: list[int], wanted: list[int], moved: bool
) -> None:
    assert moves(distribution, socket, written=written, wanted=wanted) is moved
    reread = Role("ssh_hardening", distribution).value("__ssh_hardening_reread", __ssh_hardening_ports_move=moved)
    assert reread == (SOCKET_TOO if moved else SERVICE_ALONE)


WAY_BACK_OF = [
    ("Ubuntu 24", "Port 22\n", [*SOCKET_TOO]),
    ("Ubuntu 24", "Port 2222\n", [*SERVICE_ALONE]),
    ("Debian 13", "Port 22\n", [*SERVICE_ALONE]),
]


@pytest.mark.parametrize(("distribution", "before", "reread"), WAY_BACK_OF)
def test_the_way_back_reads_the_old_ports_the_same_way(
    distribution: str, before: str, reread: list[list[str]], tmp_path: Path
) -> None:
    """By what it finds: a second run has armed nothing anew, and knows nothing of the ports of before."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before/dropin").write_text(before)
    (tmp_path / "dropin").write_text("Port 2222\n")
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "systemctl $*" >>{tmp_path}/called\n')
    (tmp_path / "systemctl").chmod(0o755)
    places = {
        "__ssh_hardening_before": f"{tmp_path}/before",
        "__ssh_hardening_dropin": f"{tmp_path}/dropin",
        "__ssh_hardening_way_back": f"{tmp_path}/way_back",
        "__ssh_hardening_at_boot": f"{tmp_path}/remotegpu-rollback-ssh.service",
    }
    script = Role("ssh_hardening", distribution, **places).template("way_back.sh.j2")
    (tmp_path / "way_back").write_text(script.replace("PATH=", f"PATH={tmp_path}:", 1))
    subprocess.run(["sh", tmp_path / "way_back", "back", "0"], check=True)
    called = [line.split() for line in (tmp_path / "called").read_text().splitlines() if "is-enabled" not in line]
    assert called[: len(reread)] == reread
    assert called[len(reread) :] == [*SERVICE_ALONE * 2, ["systemctl", "stop", "remotegpu-ssh-rollback.timer"]]
    assert (tmp_path / "dropin").read_text() == before
    assert not (tmp_path / "before").exists()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("said", [{}, {"ssh_hardening_ports": [22, 2222]}, {"ssh_hardening_permit_root_login": "no"}])
def test_the_same_rules_are_written_on_every_distribution(distribution: str, said: dict[str, Any]) -> None:
    role = Role("ssh_hardening", distribution, **said)
    lines = role.lines("sshd.conf.j2")
    assert [line for line in lines if line.startswith("Port ")] == [
        f"Port {each}" for each in said.get("ssh_hardening_ports", [])
    ]
    assert {"PasswordAuthentication no", "KbdInteractiveAuthentication no", "PubkeyAuthentication yes"} <= set(lines)
    lease = lines[lines.index("Match Group remotegpu-leases") :]
    assert "AuthorizedKeysFile /etc/remotegpu/authorized_keys/%u" in lease
    assert "AuthenticationMethods publickey" in lease
    assert lines[-1] == "Match all", "what others write behind ours is not for leases alone"


def test_the_client_is_the_one_that_sshd_is_asked_about() -> None:
    """A Match block for one network decides for those who come from there: the loopback would not see it."""
    for file in ("gets_in.yml", "prove.yml"):
        text = (ROLES / "ssh_hardening/tasks" / file).read_text()
        assert "addr={{ __ssh_hardening_address }}" in text
        assert "addr=127.0.0.1" not in text
