"""The README's commands on a machine that has nothing: a bare Debian, an ordinary user, a fresh clone.

What is typed comes from the README itself, and Ctrl-C is the byte that a terminal sends. How the packages are reached
(an index, a proxy, an authority of its own) is this machine's setting and is handed on. What the portal does beyond
answering is tested elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host
from tests.hosts.docker import Result, boot, unique
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
URL = "https://127.0.0.1:8443"
SET_UP_S = 1200.0
SETS_UP = re.compile(r"pip install|npm (ci|run)|-m venv")  # of the commands that make prints
PASSWORD = re.compile(r"one-time password: (\S+)")
# What tells pip and npm where packages come from and whom to trust for them.
PACKAGE_SETTINGS = re.compile(r"(?i)(PIP|NPM_CONFIG)_.+|(HTTPS?|ALL|NO)_PROXY|NODE_EXTRA_CA_CERTS|SSL_CERT_(FILE|DIR)")
# From the keyboard's end of a terminal: the command line, then whatever is written to `keys`.
TERMINAL = """
rm -f keys console ended && mkfifo keys
(setsid script --quiet --return --flush --command {command} console <>keys >/dev/null 2>&1; echo $? >ended) &
"""
WAIT = f"until curl -fs --cacert instance/ca/ca.pem -o /dev/null {URL}/healthz; do sleep 0.02; done"


@dataclass
class Visitor:
    """An ordinary user in a fresh clone on a bare host."""

    host: Host
    folder: str

    def run(self, command: str, *, check: bool = True, timeout_s: float = 60.0) -> Result:
        """Type a command in the clone."""
        typed = ["bash", "-lc", f"cd {self.folder} && {command}"]
        return self.host.run(typed, user="visitor", check=check, timeout_s=timeout_s)

    def start(self, *, timeout_s: float) -> float:
        """`make run` in a terminal; returns after how many seconds the portal answered."""
        began = f"began=$(date +%s%N) {TERMINAL.format(command=shlex.quote('make run'))}"
        wait = f"timeout {timeout_s:.0f} bash -c {shlex.quote(WAIT)} || {{ cat console; exit 1; }}"
        took = self.run(f"{began}\n{wait}\necho $(($(date +%s%N) - began))", timeout_s=timeout_s + 30)
        return int(took.stdout) / 1e9

    def press_ctrl_c(self) -> None:
        """In that terminal; returns when the command has ended."""
        self.run(r"printf '\003' >keys")
        until(lambda: self.run("cat ended", check=False).stdout.strip(), "make run to end", also=self.console)

    def console(self) -> str:
        """What the terminal has shown since the start."""
        return self.run("cat console").stdout

    def curl(self, path: str, *options: str) -> str:
        argv = ["curl", "-fsSL", "--cacert", "instance/ca/ca.pem", *options, URL + path]
        return self.run(shlex.join(argv)).stdout

    def sign_in(self, password: str) -> dict[str, object]:
        """The API's answer to user name and password."""
        body = json.dumps({"username": "admin", "password": password})
        answer = self.curl("/api/v1/auth/login", "-H", "Content-Type: application/json", "-d", body)
        return dict(json.loads(answer))

    def processes(self) -> list[str]:
        """Every process of this user."""
        return self.host.run("pgrep --uid visitor --list-full", check=False).stdout.splitlines()


@pytest.fixture(scope="module", params=["trixie", pytest.param("bookworm", marks=pytest.mark.slow)])
def bare_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host with the README's prerequisites, and a user who may nothing; `~/origin` is what is cloned."""
    host = boot(unique(f"fresh-{request.param}"), request.param, prepared=False, gpus=0)
    try:
        host.run(["useradd", "--create-home", "--shell", "/bin/bash", "visitor"])
        hand_on_package_settings(host)
        # This host is thrown away: no need to wait for its disk after each of the packages.
        host.put("/etc/dpkg/dpkg.cfg.d/unsafe-io", "force-unsafe-io\n")
        host.run("apt-get update -qq", timeout_s=300)
        # The least that the README's words bring: what a package only recommends is nothing to count on.
        host.run(f"DEBIAN_FRONTEND=noninteractive {prerequisites()} -y -qq --no-install-recommends", timeout_s=SET_UP_S)
        bring_source(host)
        yield host
    finally:
        host.destroy()


@pytest.fixture
def visitor(bare_host: Host) -> Visitor:
    """In a clone of this test's own."""
    clone = Visitor(bare_host, f"~/clone-{secrets.token_hex(3)}")
    bare_host.run(["bash", "-lc", f"git clone -q ~/origin {clone.folder}"], user="visitor")
    return clone


def prerequisites() -> str:
    """What the README says to install, word for word."""
    told = re.search(r"`(apt-get install [a-z0-9 -]+)`", (ROOT / "README.md").read_text())
    assert told is not None
    return told[1]


def hand_on_package_settings(host: Host) -> None:
    """Let pip and npm on the host find packages as they do here."""
    for name, value in os.environ.items():
        is_elsewhere = value.startswith("/") and not host.run(["test", "-e", value], check=False).ok
        if PACKAGE_SETTINGS.fullmatch(name) and not is_elsewhere:
            host.run(["tee", "-a", "/etc/profile.d/packages.sh"], stdin=f"export {name}={shlex.quote(value)}\n")
    if Path("/etc/pip.conf").exists():
        host.put("/etc/pip.conf", Path("/etc/pip.conf").read_text())
    lines = [file.read_text() for file in npm_settings() if file.exists()]
    host.put("/home/visitor/.npmrc", "\n".join(lines), mode="0600", owner="visitor:visitor")


def npm_settings() -> list[Path]:
    """This machine's and this user's own, where npm reads them; not the repository's."""
    ask = ["npm", "config", "get", "globalconfig"]
    told = subprocess.run(ask, capture_output=True, text=True, check=True, cwd="/").stdout
    return [Path(told.strip()), Path.home() / ".npmrc"]


def bring_source(host: Host) -> None:
    """What is committed here, as a repository to clone from; without history, which a checkout need not have."""
    ask = ["git", "-c", f"safe.directory={ROOT}", "archive", "HEAD"]  # a checkout may belong to another user
    archive = subprocess.run(ask, cwd=ROOT, capture_output=True, check=True).stdout
    script = "mkdir ~/origin && cd ~/origin && tar -x && git init -q && git add --all && git commit -q -m Fresh"
    who = "-c user.name=Visitor -c user.email=visitor@example.org"
    host.run(["bash", "-lc", script.replace("git commit", f"git {who} commit")], user="visitor", stdin=archive)


# -- the tests --------------------------------------------------------------------------------------------------------


def test_make_alone_lists_the_targets(visitor: Visitor) -> None:
    shown = visitor.run("make").stdout
    assert {"run", "test", "test-fast", "check", "demo", "demo-down"} <= set(re.findall(r"^  make (\S+)", shown, re.M))
    assert visitor.run("git status --short --ignored").stdout == ""


def test_make_run_sets_up_a_portal_and_ctrl_c_ends_all_of_it(visitor: Visitor) -> None:
    first_s = visitor.start(timeout_s=SET_UP_S)
    until(lambda: f"answers at {URL}" in visitor.console(), "the address", also=visitor.console)
    console = visitor.console()
    assert SETS_UP.search(console)
    assert console.count("user name: admin") == 1
    (password,) = PASSWORD.findall(console)
    assert console.count(password) == 1

    assert 'name="password"' in visitor.curl("/")
    assert visitor.run(f"curl -s {URL}/", check=False).returncode == 60, "nobody trusts it without its own CA"
    assert visitor.curl("/static/vendor/icons.svg").startswith("<svg")
    assert visitor.sign_in(password)["access_token"]
    assert readable_by_others(visitor) == []
    assert journal_modes(visitor) == {"remotegpu.db": "wal", "queue.db": "wal"}

    assert len(visitor.processes()) >= 5, "the terminal, make, serve, web and worker"
    visitor.press_ctrl_c()
    assert visitor.processes() == []
    assert "Traceback" not in visitor.console()

    second_s = visitor.start(timeout_s=60)
    print(f"{visitor.host.suite}: set up and answering after {first_s:.1f} s, the second time after {second_s:.1f} s")
    until(lambda: f"answers at {URL}" in visitor.console(), "the address", also=visitor.console)
    assert "password" not in visitor.console()
    assert not SETS_UP.search(visitor.console()), "nothing has changed since"
    assert visitor.sign_in(password)["access_token"], "it is the portal of before"
    visitor.press_ctrl_c()
    assert visitor.processes() == []


def readable_by_others(visitor: Visitor) -> list[str]:
    """What group or others may do anything with: nothing of the instance, in whichever folder it lay."""
    assert visitor.run("find instance/secrets instance/ca -type f | wc -l").stdout.strip() not in ("", "0")
    return visitor.run("find instance -perm /077").stdout.splitlines()


def journal_modes(visitor: Visitor) -> dict[str, str]:
    program = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('PRAGMA journal_mode').fetchone()[0])"
    files = visitor.run("ls instance | grep '[.]db$'").stdout.split()
    return {name: visitor.run(f"python3 -c {shlex.quote(program)} instance/{name}").stdout.strip() for name in files}


@pytest.mark.parametrize("word", ["test", "test-all"])
def test_without_root_and_docker_the_tests_refuse_before_anything_is_set_up(visitor: Visitor, word: str) -> None:
    refused = visitor.run(f"make {word}", check=False, timeout_s=15)
    assert refused.returncode != 0
    assert "needs root or Docker" in refused.stderr
    assert "make test-fast" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert visitor.run("ls -d .venv node_modules build", check=False).stdout == ""


@pytest.mark.slow
def test_the_fast_tests_need_nothing_more(visitor: Visitor) -> None:
    passed = visitor.run("make test-fast", check=False, timeout_s=SET_UP_S)
    assert re.search(r"^[1-9]\d* passed, 0 failed, 0 skipped$", passed.stdout, re.M), passed.stdout[-2000:]
