"""Dry runs and single tags, as far as this machine can play them: they end, and they tell of what a run would change.

Tasks files of roles are run here in check mode, with the host's programs as doubles that only say what a host would.
A whole dry run on a bare host: each scenario's `check`, in molecule/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.rendering import ROLES

TOOLKIT = [
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
]
Results = dict[str, dict[str, Any]]


def dry_run(role: str, file: str, folder: Path, programs: Mapping[str, str], **given: Any) -> Results:
    """What each task of the file, and each handler that it woke, came to in check mode. Fails if the play does.

    `programs` are the host's, as shell; what they are called with is in `folder/called`. `given` wins over all that the
    role has of its own.
    """
    (folder / "bin").mkdir()
    for name, script in programs.items():
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/called\n{script}\n')
        program.chmod(0o755)
    alone = folder / "roles" / role  # without meta/, which would bring the roles that it stands on
    alone.mkdir(parents=True)
    for part in (ROLES / role).iterdir():
        if part.name != "meta":
            (alone / part.name).symlink_to(part)
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": {"name": role, "tasks_from": file}}],
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    (folder / "given.json").write_text(json.dumps({"ansible_python_interpreter": sys.executable, **given}))
    environ = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ANSIBLE_ROLES_PATH": str(alone.parent),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
    }
    argv = ["ansible-playbook", "--check", "-i", "localhost,", "-c", "local", "-e", "@given.json", "play.yml"]
    run = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    tasks = json.loads(run.stdout)["plays"][0]["tasks"]
    return {task["task"]["name"].removeprefix(f"{role} : "): task["hosts"].get("localhost", {}) for task in tasks}


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a web server that has every file, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", asked
        listening.shutdown()


@pytest.mark.parametrize("is_there", [False, True])
def test_grafanas_package_is_asked_for_once_there_is_a_place_for_it(
    tmp_path: Path, server: tuple[str, list[str]], is_there: bool
) -> None:
    """On a bare host the place is only announced, and a file cannot be announced into it."""
    address, asked = server
    place = tmp_path / "cache"
    if is_there:
        place.mkdir()
        place.chmod(0o755)  # whatever the umask
    package = {"grafana_package": f"{address}/grafana.deb", "grafana_package_sha256": "0" * 64}
    told = dry_run("grafana", "install", tmp_path, {}, __grafana_local=str(place / "grafana.deb"), **package)
    assert asked == (["/grafana.deb"] if is_there else [])
    assert told["Fetch the package"]["changed"] is is_there


@pytest.mark.parametrize("is_there", [False, True])
def test_a_screen_is_restarted_where_its_unit_is_there(tmp_path: Path, is_there: bool) -> None:
    """Its packages may be there long before it is switched on: systemd knows of no such unit then."""
    unit = tmp_path / "remotegpu-screen.service"
    if is_there:
        unit.write_text("of before")
    told = dry_run(
        "desktop_vnc",
        "screen",
        tmp_path,
        {"systemctl": "echo LoadState=loaded; echo ActiveState=active" if is_there else ""},
        __desktop_vnc_screen_file=str(unit),
        desktop_vnc_screen=True,
        desktop_vnc_screen_password="hunter22",
        desktop_disruption_allowed=True,
    )
    assert told["Ensure the screen's unit"]["changed"]
    assert told["Desktop vnc | Restart the screen"]["changed"] is is_there


def test_a_database_server_that_would_be_started_is_not_asked_before_it_is(tmp_path: Path) -> None:
    """Its packages are there and it stands still: a dry run starts nothing, so nobody answers."""
    told = dry_run("postgresql", "database", tmp_path, {}, __postgresql_start={"changed": True})
    asking = ["Ensure the login, without any right beyond its own database", "Ensure the database"]
    assert [told[task]["skipped"] for task in asking] == [True, True]


@pytest.mark.parametrize(("held", "lost"), [(TOOLKIT, False), (TOOLKIT[1:], True)])
def test_a_toolkit_that_lost_its_hold_is_drift(tmp_path: Path, held: list[str], lost: bool) -> None:
    told = dry_run(
        "nvidia_container_toolkit",
        "install",
        tmp_path,
        {"apt-mark": f"printf '%s\\n' {' '.join(held)}"},
        __nvidia_container_toolkit_repository={"changed": True},  # so apt, which this machine may lack, is not asked
        __nvidia_container_toolkit_foreign={"files": []},
    )
    assert told["Ensure it is held"]["changed"] is lost
    assert (tmp_path / "called").read_text() == "apt-mark showhold\n", "a dry run holds nothing"


@pytest.mark.parametrize(("state", "lost"), [("hi ", False), ("ii ", True)])
def test_a_driver_that_lost_its_hold_is_drift(tmp_path: Path, state: str, lost: bool) -> None:
    told = dry_run(
        "nvidia_driver",
        "install",
        tmp_path,
        {"dpkg-query": f"echo '{state} nvidia-driver 570.133.20-1'", "apt-mark": ""},
        __nvidia_driver_waits=False,
        __nvidia_driver_missing=[],
        __nvidia_driver_held=[],
        nvidia_driver_root=str(tmp_path),
    )
    assert told["Ensure all of it is held"]["changed"] is lost
    assert "apt-mark" not in (tmp_path / "called").read_text(), "a dry run holds nothing"


def asks_of_the_installation(role: Path) -> bool:
    return any(f"__{role.name}_install is " in file.read_text() for file in role.glob("*/*.yml"))


def test_what_asks_whether_something_was_installed_gets_an_answer_where_a_tag_left_that_out() -> None:
    """Of every role but the portal's, whose settings go with the release that was installed before them."""
    asking = {role.name for role in ROLES.iterdir() if asks_of_the_installation(role)} - {"portal"}
    assert len(asking) >= 8
    for role in asking:
        known = yaml.safe_load((ROLES / role / "vars" / "main.yml").read_text())
        assert known[f"__{role}_install"] == {}, role


def test_a_tag_alone_can_be_tried(tmp_path: Path) -> None:
    """As `--check --tags redis_configure`, where nothing was asked about packages."""
    told = dry_run("redis", "service", tmp_path, {"systemctl": "echo LoadState=loaded; echo ActiveState=inactive"})
    assert told["Ensure the server runs now and at every start"]["changed"]


@pytest.mark.parametrize("is_there", [True, False])
def test_what_a_desktop_shows_its_visitors_is_compared_and_not_guessed(tmp_path: Path, is_there: bool) -> None:
    """The fingerprint goes into a file: one that a dry run leaves unread would differ on every host, for ever."""
    certificate = tmp_path / "cert.pem"
    if is_there:
        certificate.write_text("of the site")
    openssl = 'test -e "$3" && echo sha256 Fingerprint=2E:0A'
    told = dry_run(
        "desktop_xrdp",
        "certificate",
        tmp_path,
        {"openssl": openssl},
        __desktop_xrdp_certificate=str(certificate),
        __desktop_xrdp_own=True,
        ansible_facts={"fqdn": "gpu-1.example.org"},
        __desktop_xrdp_install={"changed": False},
    )
    assert told["Read its fingerprint"].get("stdout", "") == ("sha256 Fingerprint=2E:0A" if is_there else "")


@pytest.mark.parametrize("is_there", [True, False])
def test_how_persistence_starts_can_be_tried_on_a_bare_host(tmp_path: Path, is_there: bool) -> None:
    """Ubuntu's way alone wants the file, and no test host is one."""
    place = tmp_path / "nvidia-persistenced.service.d"
    if is_there:
        place.mkdir()
        place.chmod(0o755)
    told = dry_run(
        "nvidia_driver",
        "configure",
        tmp_path,
        {},
        __nvidia_driver_persistence_off=True,
        __nvidia_driver_persistenced_dropin=str(place / "remotegpu.conf"),
        __nvidia_driver_persistenced_user="nvidia-persistenced",
        __nvidia_driver_initramfs={"stat": {"exists": False}},
        __nvidia_driver_nvlink5=False,
        nvidia_driver_root=str(tmp_path),
    )
    assert told["Ensure the place for another start of persistence"]["changed"] is not is_there
    assert told["Ensure persistence is what its daemon starts with"].get("changed", False) is is_there
