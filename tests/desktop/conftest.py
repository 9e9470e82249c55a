"""Hosts with desktops of both kinds as the playbook makes them, and a lease on each: once a module.

The lease's login is made as the agent makes it, and ended by the agent's own cleaning (tests/support/cleaned_host.py).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.desktop.screen import Colour, Screen
from tests.hosts import Host
from tests.hosts.docker import boot, unique
from tests.hosts.fixtures import EACH_SUITE
from tests.hosts.owner import keeps_hosts
from tests.support.cleaned_host import LOGIN, CleanedHost, make_key
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
HOME = f"/home/{LOGIN}"
# In the terminal that opens with the session: says what was typed, in a file and in a colour that fills the screen.
PAINT = """#!/bin/sh
echo "$1 $(umask)" >"$HOME/typed"
printf '\\033[48;2;%sm\\033[2J' "$2;$3;$4"
sleep 600
"""
TERMINAL = """[Desktop Entry]
Type=Application
Name=Terminal
Exec=xfce4-terminal --fullscreen --hide-menubar --hide-scrollbar
"""


@dataclass
class DesktopHost:
    """A host with desktops, and its tenant's key."""

    cleaned: CleanedHost
    key: Path
    folder: Path

    @property
    def host(self) -> Host:
        return self.cleaned.host

    def let_in(self) -> None:
        """The lease's login with its key, and a terminal that opens with whatever desktop it gets."""
        self.cleaned.let_in()
        self.host.put(f"/etc/remotegpu/authorized_keys/{LOGIN}", self.key.with_suffix(".pub").read_text())
        for path, content in ((f"{HOME}/paint", PAINT), (f"{HOME}/.config/autostart/terminal.desktop", TERMINAL)):
            self.host.put(path, content, mode="0755", owner=f"{LOGIN}:{LOGIN}")
        self.host.run(["chown", "-R", f"{LOGIN}:{LOGIN}", f"{HOME}/.config"])

    def desktop(self, what: str, *arguments: str, user: str = LOGIN, key: Path | None = None) -> dict[str, Any]:
        """`remotegpu-desktop`, as the tenant says it through SSH, or somebody else with a key of his own."""
        said = self.host.ssh(user, key or self.key, "remotegpu-desktop", "--json", what, *arguments, timeout_s=120)
        assert said.ok, said.stderr
        answer: dict[str, Any] = json.loads(said.stdout)
        return answer

    def answers_outside(self, port: int) -> list[str]:
        """The host's addresses at which somebody outside is heard at this port."""
        addresses = [address for address in (self.host.address, self.host.address_v6) if address is not None]
        assert addresses
        return [address for address in addresses if _answers(port, address)]

    @contextmanager
    def forward(self, port: int, *, user: str = LOGIN, key: Path | None = None) -> Iterator[int]:
        """A port of this machine that leads to the host's loopback, through somebody's SSH connection."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            here = free.getsockname()[1]
        options = ["-N", "-oExitOnForwardFailure=yes", f"-L127.0.0.1:{here}:127.0.0.1:{port}"]
        argv = self.host.ssh_argv(user, key or self.key, options=options)
        tunnel = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            until(lambda: tunnel.poll() is not None or _answers(here), "the SSH forward", timeout_s=60)
            assert tunnel.poll() is None, (tunnel.stderr.read() if tunnel.stderr else b"").decode()
            yield here
        finally:
            tunnel.kill()
            tunnel.communicate()

    def paint(self, shown: Screen, colour: Colour) -> None:
        """Type the command into the terminal of the desktop until it was heard; then the picture must show it."""
        word = f"word{secrets.token_hex(4)}"
        line = f"./paint {word} {' '.join(map(str, colour))}"
        expected = f"{word} {self.host.ssh(LOGIN, self.key, 'umask').stdout}"  # files are as open as by SSH
        until(
            lambda: self.host.run(["pgrep", "-u", LOGIN, "-x", "bash"], check=False).ok,
            "a shell in the terminal", timeout_s=120, also=shown.said,
        )  # fmt: skip
        assert shown.share_of(colour) < 0.01

        def heard() -> bool:
            shown.type_line(line)
            return _within(5, lambda: self.host.run(["cat", f"{HOME}/typed"], check=False).stdout.startswith(word))

        until(heard, "the typed line to arrive", timeout_s=120, also=shown.said)
        assert self.host.read(f"{HOME}/typed") == expected
        until(lambda: shown.share_of(colour) > 0.9, f"the colour {colour}", also=lambda: shown.share_of(colour))

    def running(self) -> list[str]:
        """The names of all processes of the tenant."""
        return self.host.run(["ps", "-u", LOGIN, "-o", "comm="], check=False).stdout.split()


def _answers(port: int, address: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def _within(seconds: float, condition: Any) -> bool:
    try:
        return bool(until(condition, "it", timeout_s=seconds))
    except AssertionError:
        return False


@pytest.fixture(scope="module", params=EACH_SUITE)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DesktopHost]:
    """One host of each suite."""
    folder = tmp_path_factory.mktemp(f"desktop-{request.param}")
    operator = make_key(folder / "operator")
    host = boot(unique(f"desktop-{request.param}"), request.param, kind="desktop")
    try:
        host.authorize("ops", operator.with_suffix(".pub").read_text())
        converge(host, operator, folder)
        yield DesktopHost(CleanedHost.prepare(host, operator), make_key(folder / "tenant"), folder)
    finally:
        if not keeps_hosts():
            host.destroy()


def converge(host: Host, key: Path, folder: Path, **variables: Any) -> None:
    """What the playbook does for desktops with the variables of the site; `variables` are the host's own besides."""
    known = folder / "known_hosts"
    known.write_text(host.known_hosts)
    arguments = f"-o StrictHostKeyChecking=yes -o UserKnownHostsFile={known} -o GlobalKnownHostsFile=/dev/null"
    inventory = folder / "hosts.yml"
    said = {
        "ansible_host": host.address,
        "ansible_user": "ops",
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_common_args": arguments,
        "desktop_kinds": ["vnc", "xrdp"],
        **variables,
    }
    inventory.write_text(yaml.safe_dump({"gpu_hosts": {"hosts": {host.name: said}}}))
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "playbooks/gpu_hosts.yml", "-i", "inventory/hosts.yml",
         "-i", inventory, "--tags", "desktop_vnc,desktop_xrdp"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "ANSIBLE_HOME": str(ROOT / ".ansible"), "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
