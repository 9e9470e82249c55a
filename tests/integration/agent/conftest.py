"""Hosts of both suites with the agent installed as the role installs it, each with a portal of its own.

`site` is one host, its portal, and the words that the tests speak: open a lease, sign in, run a task. Hosts live for
the session; every lease and attempt in it has an id of its own, so that no test meets another's.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from tests.hosts import Host, Result, boot, gateway_address, unique
from tests.hosts.fixtures import EACH_SUITE
from tests.integration.agent.portal_double import Portal, in_seconds
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "build" / "remotegpu-agent.pyz"
FIRST_UID = 20000

_ids = itertools.count(101)


@dataclass
class Lease:
    lease_id: int
    key: Path
    wanted: dict[str, Any]

    @property
    def login(self) -> str:
        return str(self.wanted["login"])

    @property
    def uid(self) -> int:
        return int(self.wanted["uid"])


@dataclass
class Site:
    host: Host
    portal: Portal
    directory: Path
    _keys: int = field(default=0)

    # -- leases -------------------------------------------------------------------------------------------------------

    def new_key(self) -> tuple[Path, dict[str, str]]:
        """A key pair: the private file, and the public key as the protocol writes it."""
        self._keys += 1
        path = self.directory / f"key{self._keys}"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path), "-C", "test"], check=True)
        line = path.with_suffix(".pub").read_text().strip()
        shown = subprocess.run(["ssh-keygen", "-lf", str(path)], check=True, capture_output=True, text=True).stdout
        return path, {"fingerprint": shown.split()[1], "line": line}

    def open_lease(self, *, seconds: float = 3600, wait: bool = True) -> Lease:
        lease_id = next(_ids)
        path, public = self.new_key()
        wanted = {
            "lease_id": lease_id,
            "login": f"lease{lease_id}",
            "uid": FIRST_UID + lease_id,
            "state": "open",
            "ends_at": in_seconds(seconds),
            "keys": [public],
        }
        lease = Lease(lease_id, path, wanted)
        self.portal.change(leases=[*self.portal.leases, wanted])
        if wait:
            self.wait_for_lease(lease, "open")
        return lease

    def change_lease(self, lease: Lease, **fields: Any) -> None:
        lease.wanted = lease.wanted | fields
        others = [wanted for wanted in self.portal.leases if wanted["lease_id"] != lease.lease_id]
        self.portal.change(leases=[*others, lease.wanted])

    def end_soon(self, lease: Lease, *, seconds: float = 6) -> None:
        """Move the end close, and wait until the host has it. What the test needs is set up before, at its own pace."""
        self.change_lease(lease, ends_at=in_seconds(seconds))

        def told() -> bool:
            seen = self.portal.lease(lease.lease_id)
            return seen is not None and seen["ends_at"] == lease.wanted["ends_at"]

        until(told, f"the host to know when lease {lease.lease_id} ends", also=self.agent_log)

    def wait_for_lease(self, lease: Lease, state: str, *, timeout_s: float = 45) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            seen = self.portal.lease(lease.lease_id)
            if seen is None or seen["state"] != state:
                return None
            return seen if state != "open" or seen["ends_at"] == lease.wanted["ends_at"] else None

        return until(reached, f"lease {lease.lease_id} to be {state}", timeout_s=timeout_s, also=self.agent_log)

    def sign_in(self, lease: Lease, *command: str, key: Path | None = None, options: tuple[str, ...] = ()) -> Result:
        return self.host.ssh(lease.login, key or lease.key, *(command or ("true",)), options=options)

    def processes(self, lease: Lease) -> list[str]:
        shown = self.host.run(["ps", "-o", "pid=,args=", "-u", str(lease.uid)], check=False).stdout
        return [line.strip() for line in shown.splitlines()]

    # -- openings -----------------------------------------------------------------------------------------------------

    def open_ports(self, lease: Lease | None, ports: Iterable[str], sources: Iterable[str]) -> list[int]:
        """Order an opening for each port ("tcp/8100") and source, and wait until the host has all; their ids."""
        ids = []
        for port, source in itertools.product(ports, sources):
            protocol, _, number = port.partition("/")
            ids.append(next(_ids))
            opening = {
                "id": ids[-1],
                "lease": lease.lease_id if lease else None,
                "protocol": protocol,
                "ports": [int(number), int(number)],
                "source": source,
                "ends_at": lease.wanted["ends_at"] if lease else None,
            }
            self.portal.openings = [*self.portal.openings, opening]
        self.portal.change()
        self.wait_for_openings(ids, "open")
        return ids

    def wait_for_openings(self, ids: Iterable[int], state: str | None, *, timeout_s: float = 45) -> None:
        """None: the host does not speak of them any more."""

        def reached() -> bool:
            return all((self.portal.opening(each) or {"state": None})["state"] == state for each in ids)

        until(reached, f"openings {ids} to be {state}", timeout_s=timeout_s, also=self.agent_log)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def run_task(self, lease: Lease, command: str, **fields: Any) -> int:
        attempt_id = next(_ids)
        attempt = {
            "attempt_id": attempt_id,
            "task_id": attempt_id,
            "lease_id": lease.lease_id,
            "state": "run",
            "command": command,
            "env": {},
            "workdir": None,
            "time_limit_s": None,
            "stop_grace_s": 5,
            "gpu_uuids": ["GPU-a", "GPU-b"],
        } | fields
        self.portal.change(attempts=[*self.portal.attempts, attempt])
        return attempt_id

    def stop_task(self, attempt_id: int) -> None:
        orders = self.portal.attempts
        self.portal.change(
            attempts=[order | {"state": "stop"} if order["attempt_id"] == attempt_id else order for order in orders]
        )

    def wait_for_task(self, attempt_id: int, *states: str, timeout_s: float = 45) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            seen = self.portal.states.get(attempt_id)
            return seen if seen is not None and seen["state"] in states else None

        what = f"attempt {attempt_id} to be {' or '.join(states)}"
        return until(reached, what, timeout_s=timeout_s, also=self.agent_log)

    def finished(self, attempt_id: int, *, timeout_s: float = 30) -> tuple[dict[str, Any], bytes]:
        """The end of an attempt and its whole log."""
        ended = ("succeeded", "failed", "stopped", "timed_out", "lost")
        state = self.wait_for_task(attempt_id, *ended, timeout_s=timeout_s)
        until(
            lambda: attempt_id in self.portal.ended_logs,
            f"the end of log {attempt_id}",
            timeout_s=timeout_s,
            also=self.agent_log,
        )
        return state, self.portal.log_of(attempt_id)

    # -- the agent ----------------------------------------------------------------------------------------------------

    def result(self, command_id: int, *, timeout_s: float = 30) -> dict[str, Any]:
        return until(
            lambda: self.portal.results.get(command_id),
            f"the result of command {command_id}",
            timeout_s=timeout_s,
            also=self.agent_log,
        )

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.host.run(["remotegpu-agent", "status", "--json"]).stdout)
        return status

    def agent_log(self) -> str:
        return self.host.run(["journalctl", "-u", "remotegpu-agent", "-n", "25", "--no-pager", "-o", "cat"]).stdout

    def agent_pid(self) -> int:
        return int(self.host.run(["systemctl", "show", "-P", "MainPID", "remotegpu-agent"]).stdout)

    def applied(self, generation: int, *, timeout_s: float = 15) -> None:
        until(
            lambda: self.portal.reports and self.portal.reports[-1]["applied_generation"] >= generation,
            f"generation {generation} to be applied",
            timeout_s=timeout_s,
            also=self.agent_log,
        )


def install_agent(host: Host, portal: Portal) -> None:
    """What the gpu_agent and ssh_hardening roles leave, from the roles' own templates, in a second instead of a
    minute.
    """
    assert PROGRAM.exists(), "build/remotegpu-agent.pyz is missing: run agent/build"
    host.run(["groupadd", "--system", "remotegpu-leases"])
    host.put("/opt/remotegpu/remotegpu-agent.pyz", PROGRAM.read_bytes(), mode="0755")
    host.put("/usr/local/bin/remotegpu-agent", render("gpu_agent", "remotegpu-agent.j2"), mode="0755")
    for unit in ("remotegpu-agent.service", "remotegpu-lease-guard.service"):
        host.put(f"/etc/systemd/system/{unit}", render("gpu_agent", f"{unit}.j2"))
    host.put("/etc/ssh/sshd_config.d/00-remotegpu.conf", render("ssh_hardening", "sshd.conf.j2"))
    if host.suite != "bookworm":  # from OpenSSH 9.8 on a refused sign-in makes the next ones from here wait
        host.put("/etc/ssh/sshd_config.d/01-tests.conf", "PerSourcePenalties no\n")
    host.put("/etc/remotegpu/ca.pem", portal.ca_pem)
    settings = {"portal_url": portal.url, "ca_file": "/etc/remotegpu/ca.pem", "machine_id": None}
    host.put("/etc/remotegpu/agent.json", json.dumps(settings), mode="0600")
    host.put("/etc/remotegpu/enroll-token", portal.token + "\n", mode="0600")
    host.run("install -d -m 0755 /etc/remotegpu/authorized_keys && install -d -m 0700 /var/lib/remotegpu-agent/shiv")
    host.run("systemctl reload ssh && systemctl daemon-reload && systemctl enable remotegpu-lease-guard")
    host.run("systemctl enable --now remotegpu-agent")


def render(role: str, template: str) -> str:
    folder = ROOT / "roles" / role
    values: dict[str, Any] = {"ansible_managed": "Ansible managed"}
    for file in ("defaults/main.yml", "vars/main.yml"):
        values |= yaml.safe_load((folder / file).read_text()) or {}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # noqa: S701 - unit files, not pages
    )
    environment.filters["comment"] = lambda text: f"# {text}"
    return environment.get_template(template).render(values)


@pytest.fixture(scope="session", params=EACH_SUITE)
def session_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp(f"agent-{request.param}")
    portal = Portal(gateway_address(), directory).start()
    host = boot(unique(f"agent-{request.param}"), request.param, prepared=True)
    try:
        install_agent(host, portal)
        site = Site(host, portal, directory)
        until(lambda: portal.reports, "the first report", timeout_s=30, also=site.agent_log)
        yield site
    finally:
        host.destroy()
        portal.stop()


@pytest.fixture
def site(session_site: Site) -> Iterator[Site]:
    """The host at rest: nothing wanted, and nothing that breaks the protocol was said by the end of the test."""
    yield session_site
    portal = session_site.portal
    if portal._server is None:
        portal.start()
    generation = portal.change(leases=[], attempts=[], commands=[], openings=[])
    session_site.applied(generation, timeout_s=30)
    complaints, portal.complaints = portal.complaints, []
    assert complaints == []


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return until
