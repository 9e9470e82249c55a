"""The ways back of firewall, sshd and operators' keys: a run that is cut off, a second one, and a boot in between.

The scripts are the roles' own, on files of a folder, with a systemd that does nothing and writes down what it is told.
That a locked host really opens again is for the scenarios to say.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.roles.rendering import Role

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not all(map(shutil.which, ("nft", "unshare"))), reason="needs nft and unshare"),
]
TOLD = """#!/bin/sh
echo "${{0##*/}} $*" >>{log}
case $* in *is-active*) exit 3 ;; esac
"""
every_way = pytest.mark.parametrize("way", ["firewall", "ssh_hardening", "base"], indirect=True)


@dataclass(frozen=True)
class Way:
    """One role's way back, and the file that it is about."""

    folder: Path
    name: str
    file: Path
    arguments: tuple[str, ...]

    def run(self, *words: str) -> list[str]:
        """What systemd was told meanwhile. The kernel's tables are those of a network of its own."""
        (self.folder / "log").write_text("")
        script = self.folder / f"var/lib/remotegpu-{self.name}-way-back"
        script.write_text((self.folder / "script").read_text())  # the role brings it each time
        subprocess.run(["unshare", "--net", "sh", script, *words], check=True)
        return (self.folder / "log").read_text().splitlines()

    def arm(self) -> list[str]:
        return self.run("arm", "90", *self.arguments)

    @property
    def left(self) -> list[str]:
        """What is there only while it is armed."""
        places = (self.folder / "etc/systemd/system", self.folder / "var/lib")
        return sorted(path.name for place in places for path in place.rglob("*remotegpu-*") if path.parent != self.file)


@pytest.fixture
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    for folder in ("bin", "etc/systemd/system", "etc/remotegpu", "etc/ssh/sshd_config.d", "home/.ssh", "var/lib"):
        (tmp_path / folder).mkdir(parents=True)
    for program in ("systemctl", "systemd-run"):
        (tmp_path / "bin" / program).write_text(TOLD.format(log=tmp_path / "log"))
        (tmp_path / "bin" / program).chmod(0o755)
    role = Role(request.param)
    if request.param == "firewall":
        name, file, arguments = "firewall", tmp_path / "etc/remotegpu/firewall.nft", ()
        text = (role.path / "files/way_back.sh").read_text()
    elif request.param == "ssh_hardening":
        name, file, arguments = "ssh", tmp_path / "etc/ssh/sshd_config.d/00-remotegpu.conf", ()
        text = role.template("way_back.sh.j2")
    else:
        name, file, arguments = "keys", tmp_path / "home/.ssh/authorized_keys", ("ops",)
        text = role.template("way_back.sh.j2")
    for place in ("/etc/", "/var/lib/"):
        text = text.replace(f"={place}", f"={tmp_path}{place}").replace(f" {place}", f" {tmp_path}{place}")
    text = text.replace('"$(getent passwd "$1" | cut -d: -f6)/', f'"{tmp_path}/home/').replace(
        "PATH=", f"PATH={tmp_path}/bin:", 1
    )
    (tmp_path / "script").write_text(text)
    file.write_text("proven\n")
    return Way(tmp_path, name, file, arguments)


@every_way
def test_a_second_run_leads_back_to_what_was_proven_last(way: Way) -> None:
    """And not to what the first has left, which nobody may get in by."""
    way.arm()
    way.file.write_text("left by a run that was cut off\n")
    told = way.arm()
    assert len([line for line in told if line.startswith("systemd-run ") and "--on-active=90" in line]) == 1
    way.file.write_text("of the second run\n")
    way.run("back", "0")
    assert way.file.read_text() == "proven\n"
    assert way.left == []


@every_way
def test_the_next_boot_goes_the_way_back_and_no_later_one_does(way: Way) -> None:
    way.arm()
    way.file.write_text("left by a run that was cut off\n")
    (unit,) = (way.folder / "etc/systemd/system/multi-user.target.wants").iterdir()
    (start,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
    program, script, *words = start.removeprefix("ExecStart=").split()
    assert (program, Path(script).name) == ("/bin/sh", f"remotegpu-{way.name}-way-back")
    told = way.run(*words)
    assert way.file.read_text() == "proven\n"
    assert way.left == []
    assert [line for line in told if "reload-or-restart" in line and "--no-block" not in line] == [], (
        "sshd waits for it"
    )


@every_way
def test_what_is_proven_stays(way: Way) -> None:
    way.arm()
    way.file.write_text("proven later\n")
    told = way.run("disarm")
    assert [line for line in told if line.startswith("systemctl stop ") and line.endswith("-rollback.timer")] == told
    assert len(told) == 1
    assert way.left == []
    way.arm()
    way.file.write_text("of a third run\n")
    way.run("back", "0")
    assert way.file.read_text() == "proven later\n"


@pytest.mark.parametrize("way", ["firewall", "ssh_hardening"], indirect=True)
def test_what_was_not_there_goes(way: Way) -> None:
    """But for a file of keys, which is not ours to remove."""
    way.file.unlink()
    way.arm()
    way.file.write_text("new\n")
    way.run("back", "0")
    assert not way.file.exists()


@every_way
def test_systemd_is_not_reloaded_by_being_armed(way: Way) -> None:
    """It would take the GPU from the containers of a lease."""
    told = way.arm() + way.run("disarm")
    assert {word for line in told for word in line.split()} & {"daemon-reload", "enable", "reenable"} == set()
