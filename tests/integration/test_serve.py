"""`python -m portal serve`: one command starts everything, keeps it running, and one Ctrl-C ends it. And backups."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from portal.cli import serve
from portal.settings import SECRET_FILES, Settings, load
from tests.support.portal import ROOT, free_port
from tests.support.waiting import until


class Served:
    """A portal that `serve` runs, in an instance folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.instance, self.log = folder / "instance", folder / "log"
        self.url = f"https://127.0.0.1:{free_port('127.0.0.1')}"
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "INSTANCE_DIR": str(self.instance),
            "PUBLIC_URL": self.url,
            "BIND": self.url.removeprefix("https://"),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "portal", "serve", "--first-run"],
                cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.family: set[psutil.Process] = set()

    def wait_until_it_answers(self) -> None:
        until(lambda: f"answers at {self.url}" in self.said(), "serve to say where it answers", also=self.said)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def answers(self) -> bool:
        try:
            answer = requests.get(f"{self.url}/healthz", verify=str(self.instance / "ca" / "ca.pem"), timeout=2)
            return answer.status_code == 200
        except requests.RequestException:
            return False

    def children(self) -> list[psutil.Process]:
        """Every process below `serve`; those seen once are remembered, to see them end."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.family.update(found)
        return found

    def part(self, name: str) -> psutil.Process:
        """The part `name` itself, not its own children."""
        for child in psutil.Process(self.process.pid).children():
            if child.cmdline()[-1:] == [name]:
                return child
        raise LookupError(name)

    def left(self) -> list[psutil.Process]:
        return [process for process in self.family if process.is_running() and process.status() != "zombie"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    portal = Served(tmp_path)
    try:
        portal.wait_until_it_answers()
        yield portal
    finally:
        if portal.process.poll() is None:
            portal.children()
            portal.process.kill()
        portal.process.wait()
        for process in portal.left():
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_all_of_it_within_seconds(served: Served, number: signal.Signals) -> None:
    assert served.answers()
    assert len(served.children()) >= 3, "web, its worker process, and the worker"
    served.process.send_signal(number)
    assert served.process.wait(timeout=15) == 0
    assert served.left() == []
    assert "Traceback" not in served.said()


def test_parts_end_even_when_the_supervisor_is_killed(served: Served) -> None:
    served.children()
    served.process.kill()
    served.process.wait()
    until(lambda: not served.left(), "web and worker to end", timeout_s=20)


def test_a_part_that_dies_is_started_again(served: Served) -> None:
    for name in ("worker", "web"):
        before = served.part(name)
        before.kill()
        until(partial(_is_new, served, name, before), f"a new {name}", also=served.said)
    until(served.answers, "the portal to answer again", also=served.said)


def _is_new(served: Served, name: str, before: psutil.Process) -> bool:
    try:
        return served.part(name) != before
    except (LookupError, psutil.NoSuchProcess):
        return False


def test_the_first_administrator_is_told_once(served: Served, tmp_path: Path) -> None:
    assert re.search(r"one-time password: \S+", served.said())
    served.children()
    served.process.send_signal(signal.SIGINT)
    served.process.wait(timeout=15)
    (tmp_path / "log").rename(tmp_path / "first.log")
    again = Served(tmp_path)
    try:
        again.wait_until_it_answers()
        assert "password" not in again.said()
    finally:
        again.children()
        again.process.send_signal(signal.SIGINT)
        again.process.wait(timeout=15)


def test_a_port_in_use_ends_it_with_a_reason(served: Served, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "INSTANCE_DIR": str(tmp_path / "other"),
        "PUBLIC_URL": served.url,
        "BIND": served.url.removeprefix("https://"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "portal", "serve", "--first-run"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 1
    address, port = served.url.removeprefix("https://").split(":")
    assert f"something listens on port {port} of {address} already" in done.stderr
    assert f"PUBLIC_URL=https://127.0.0.1:{int(port) + 1}" in done.stderr


def test_a_part_that_ends_again_and_again_ends_the_portal_with_a_reason() -> None:
    told = "serve.MAX_FAILURES = 2; exit(serve.Supervisor([serve.Part('nonsense')]).run())"
    program = f"from portal.cli import serve; {told}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "nonsense ended with code 2; it starts again in 0 s" in done.stderr
    assert "nonsense does not keep running" in done.stderr


def test_a_machine_without_ssh_is_told_at_the_start_and_one_with_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    serve.warn_without_ssh()
    assert "apt-get install openssh-client" in capsys.readouterr().err
    for name in ("ssh", "ssh-keyscan"):
        (tmp_path / name).touch(mode=0o755)
    serve.warn_without_ssh()
    assert capsys.readouterr().err == ""


def settings_of(folder: Path, **told: str) -> Settings:
    secret = {name.upper(): secrets.token_urlsafe(48) for name in SECRET_FILES}
    return load({"INSTANCE_DIR": str(folder), **secret, **told})


def test_a_port_that_leads_nowhere_is_told_with_both_numbers_and_the_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve.warn_of_another_port(settings_of(tmp_path, PUBLIC_URL="https://portal.example.org", BIND="0.0.0.0:8443"))
    said = capsys.readouterr().err
    assert "call https://portal.example.org at port 443, and the portal listens on port 8443" in said
    assert "port 8443 in PUBLIC_URL, port 443 in BIND, or a proxy in TRUSTED_PROXIES" in said


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"PUBLIC_URL": "https://portal.example.org"},
        {"PUBLIC_URL": "https://portal.example.org:8443"},
        {"PUBLIC_URL": "https://portal.example.org", "TRUSTED_PROXIES": "127.0.0.1"},
        {"PUBLIC_URL": "https://portal.example.org", "TRUSTED_PROXIES": "unix", "BIND": "unix:/run/portal/1.sock"},
        {"PUBLIC_URL": "https://[2001:db8::1]", "BIND": "[::]:443"},
    ],
)
def test_a_port_that_is_called_or_a_proxys_is_no_news(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], told: dict[str, str]
) -> None:
    serve.warn_of_another_port(settings_of(tmp_path, **told))
    assert capsys.readouterr().err == ""


def test_an_address_of_another_machine_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not serve.may_listen(settings_of(tmp_path, PUBLIC_URL="https://192.0.2.1:8443", BIND="192.0.2.1:8443"))
    told = capsys.readouterr().err
    assert told.startswith("serve: nobody can listen on port 8443 of 192.0.2.1: Cannot assign requested address.")
    assert "BIND says where" in told


def test_a_port_that_this_user_may_not_use_ends_it_at_once_with_the_ways_out(tmp_path: Path) -> None:
    """Asked in a network of its own, where ports below 1024 are root's, by somebody without root's right to them."""
    environment = {**os.environ, "INSTANCE_DIR": str(tmp_path), "PUBLIC_URL": "https://portal.example.org"}
    room = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    nobody_special = ["setpriv", "--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service"]
    done = subprocess.run(
        [*room, *nobody_special, sys.executable, "-m", "portal", "serve", "--first-run"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "only root may listen on port 443, which https://portal.example.org needs" in done.stderr
    assert "or put a proxy in front and name it in TRUSTED_PROXIES" in done.stderr
