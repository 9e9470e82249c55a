"""A fleet that is kept: agents upgraded under running tasks, credentials rotated, drift found.

One real host that was onboarded through a real portal, whose worker runs the product's own playbooks; only the agent
that lies beside them is another version. The tests stand in the order of a fleet's life, but each begins where the
host is a ready one.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.world import (
    INSTALLER_PASSWORD,
    PROVISION_TIMEOUT_S,
    RECLAIM_TIMEOUT_S,
    Person,
    World,
    can_sign_in,
)
from tests.hosts import Host
from tests.hosts.docker import boot, gateway_address
from tests.support import agents
from tests.support.portal import ROOT, Portal, running
from tests.support.runs import START
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(1800)]

AUTHORIZED_KEYS = "/home/installer/.ssh/authorized_keys"
BY_HAND = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f put there by hand"
OF_A_PROJECT = ("playbooks", "roles", "inventory", "agent/protocol", "ansible.cfg")
RUN_TIMEOUT_S = 300.0
HEARD_TIMEOUT_S = 40  # a minute where nobody waits for a test
TICKS = "i=0; while [ ! -e /tmp/go ]; do i=$((i+1)); echo tick $i; sleep 0.2; done; echo over; exit 7"
# It runs, and says so to systemd, but no report of it arrives.
SPEAKS_ELSEWHERE = {"loop.py": ('SYNC_PATH = "/api/v1/agent/sync"', 'SYNC_PATH = "/api/v1/agent/nowhere"')}


@dataclass
class Site:
    """A portal, its worker's project, and one machine that was onboarded."""

    world: World
    host: Host
    project: Path
    customer: Person
    tenant_id: int
    token: str | None = None

    @property
    def machine(self) -> Any:
        return self.world.machine(self.host)

    def lies_there(self, version: str, **changes: Any) -> None:
        """Put this version of the agent beside the playbooks."""
        agents.version(self.project / "build" / "remotegpu-agent.pyz", version, **changes)

    def run(self, playbook: str, *, state: str = "succeeded", **options: Any) -> Any:
        """Start it through the API, and wait until it has ended like that."""
        queued = self.world.admin.post("admin/runs", playbook=playbook, machines=[self.host.name], **options)
        return self.ended(int(queued["id"]), state)

    def ended(self, run_id: int, state: str = "succeeded") -> Any:
        def look() -> Any:
            run = self.world.admin.get(f"admin/runs/{run_id}").body
            return run if run["ended_at"] else None

        run = until(look, f"run {run_id} to end", timeout_s=RUN_TIMEOUT_S, every_s=0.3, also=self.world.tell)
        assert run["state"] == state, f"{run['reason']}\n{self.world.run_output(run_id)[-5000:]}"
        return run

    def from_a_shell(self, playbook: str, *words: str, key: Path | None = None) -> str:
        """As the guide tells it, with an API token, by somebody whose key the host takes; answers what was printed."""
        if self.token is None:
            until_at = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
            asked = {"name": "shell", "scopes": ["inventory", "admin"], "expires_at": until_at}
            made = self.world.admin.post("auth/tokens", **asked)
            self.token = str(made["token"])
        environ = {
            **os.environ,
            "REMOTEGPU_URL": self.world.portal.url,
            "REMOTEGPU_TOKEN": self.token,
            "REMOTEGPU_CA_FILE": str(self.world.portal.ca_file),
            "ANSIBLE_PRIVATE_KEY_FILE": str(key or self.world.portal.instance / "secrets" / "ssh_ed25519"),
        }
        argv = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "inventory/portal.remotegpu.yml"]
        done = subprocess.run(
            [*argv, f"playbooks/{playbook}.yml", *words],
            cwd=self.project, env=environ, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        return done.stdout

    def program(self) -> str:
        """Which version lies on the host, with what else is there of an upgrade."""
        return self.host.run("remotegpu-agent --version; cd /opt/remotegpu && ls *.on-trial 2>/dev/null || true").stdout

    def credential(self) -> str:
        """The agent's, as it lies on the host."""
        return str(json.loads(self.host.read("/var/lib/remotegpu-agent/credential.json"))["credential"])

    def call(self, credential: str) -> int:
        """What the portal answers an agent with this credential and nothing to say."""
        url, ca = f"{self.world.portal.url}/api/v1/agent/sync", str(self.world.portal.ca_file)
        headers = {"Authorization": f"Bearer {credential}"}
        return requests.post(url, json={}, headers=headers, verify=ca, timeout=30).status_code

    def drift(self) -> tuple[str, list[str]]:
        """What the portal knows of it: the state, and the paths that differ."""
        found = self.world.admin.get(f"admin/drift/{self.world.machines[self.host.name]}").body
        return found["state"], [change["path"] or change["task"] for change in found["changes"]]


@pytest.fixture(scope="module")
def onboarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("operations")
    project = copy_of_the_product(folder / "project")
    host = boot(f"operations-trixie-{secrets.token_hex(3)}", "trixie", prepared=True, password=INSTALLER_PASSWORD)
    try:
        environ = {"REPORT_INTERVAL_S": "1", "OFFLINE_AFTER_S": "10"}
        portal = Portal(folder / "instance", address=gateway_address(), environ=environ)
        with running(portal):
            world = World(portal, portal.set_up(), folder)
            with worker(portal, project):
                world.add(host)
                world.confirm(host)
                world.provision(host)
                world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S)
                tenant_id = world.tenant("Acme")
                yield Site(world, host, project, world.person("carol", tenant_id), tenant_id)
    finally:
        host.destroy()


def copy_of_the_product(project: Path) -> Path:
    """What the worker runs, with a place of its own for the agent's program."""
    for name in OF_A_PROJECT:
        source = ROOT / name
        copied = shutil.copytree if source.is_dir() else shutil.copy
        project.mkdir(exist_ok=True)
        copied(source, project / name)
    agents.version(project / "build" / "remotegpu-agent.pyz", "1.0.0")
    with (project / "inventory" / "group_vars" / "gpu_hosts.yml").open("a") as of_the_site:
        of_the_site.write(f"gpu_agent_heard_timeout: {HEARD_TIMEOUT_S}\n")
        of_the_site.write("base_time_sync_started: false # molecule/image/README.md\n")
    return project


@contextmanager
def worker(portal: Portal, project: Path) -> Iterator[None]:
    """A worker of this portal for that project."""
    with portal.log.open("ab") as log:
        argv = [sys.executable, "-c", START, str(project)]
        process = subprocess.Popen(argv, cwd=ROOT, env=portal.environment(), stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def site(onboarded: Site) -> Site:
    """The machine is ready and runs what lies beside the playbooks, whatever a test before has left of both."""
    world, host = onboarded.world, onboarded.host
    running_there = host.run("base64 --wrap=0 /opt/remotegpu/remotegpu-agent.pyz").stdout
    (onboarded.project / "build" / "remotegpu-agent.pyz").write_bytes(base64.b64decode(running_there))
    host.run("systemctl start remotegpu-agent")
    if onboarded.machine["state"] == "leased":
        world.admin.post(f"admin/machines/{world.machines[host.name]}/reclaim", reason="the test is over")
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)
    world.wait_until_healthy(host)
    return onboarded


def test_an_agent_is_upgraded_under_a_running_task_and_a_broken_one_goes_back(site: Site) -> None:
    world, host = site.world, site.host
    world.allocate(host, site.tenant_id, lasts_s=3600)
    task = world.task(site.customer, host, TICKS)
    world.wait_for_task(site.customer, task, "running")
    unit = host.run("systemctl list-units --plain --no-legend 'remotegpu-task-*' | cut -d' ' -f1").stdout.strip()
    pid = host.run(["systemctl", "show", "-P", "MainPID", unit]).stdout

    site.lies_there("1.1.0")
    site.run("upgrade_agent")
    assert site.machine["agent_version"] == "1.1.0", "the portal has heard it before the run ended"
    assert site.program() == "1.1.0\n"
    again = site.from_a_shell("upgrade_agent")
    assert re.search(rf"{host.name} .*changed=0 .*failed=0", again), f"who has proven it is left alone: {again[-500:]}"

    site.lies_there("1.2.0", changes=SPEAKS_ELSEWHERE)
    run = site.run("upgrade_agent", state="failed")
    assert f"not heard within {HEARD_TIMEOUT_S} s" in run["reason"]
    assert "The one before is back in its place and runs." in run["reason"]
    assert site.program() == "1.1.0\n"
    until(lambda: site.machine["agent_version"] == "1.1.0", "the old one to be heard", timeout_s=30)

    assert host.run(["systemctl", "show", "-P", "MainPID", unit]).stdout == pid, "the task is the same process"
    host.run("touch /tmp/go")
    ended = world.wait_for_task(site.customer, task, "failed")
    assert ended["attempts"][-1]["exit_code"] == 7
    lines = world.log(site.customer, task).decode().splitlines()
    assert lines == [*(f"tick {n + 1}" for n in range(len(lines) - 1)), "over"], "a line was lost or came twice"


@pytest.mark.slow
def test_an_upgrade_that_was_cut_off_is_taken_up_where_it_stopped(site: Site) -> None:
    """Cut off between the new program and its proof: the next run proves it, and goes back to what was proven last."""
    host = site.host
    before = site.program()
    site.lies_there("2.0.0", changes=SPEAKS_ELSEWHERE)
    queued = site.world.admin.post("admin/runs", playbook="upgrade_agent", machines=[host.name])
    until(lambda: "on-trial" in site.program() and "2.0.0" in site.program(), "the new program", timeout_s=120)
    site.world.admin.post(f"admin/runs/{queued['id']}/cancel")
    site.ended(int(queued["id"]), "cancelled")
    assert "on-trial" in site.program(), "nobody has proven it, and it says so"

    run = site.run("upgrade_agent", state="failed")
    assert "The one before is back in its place and runs." in run["reason"]
    assert site.program() == before

    site.lies_there("2.0.1")
    site.run("upgrade_agent")
    assert site.program() == "2.0.1\n"
    assert site.machine["agent_version"] == "2.0.1"


def test_credentials_are_rotated_the_old_ones_open_nothing_and_no_cleaning_brings_them_back(site: Site) -> None:
    world, host = site.world, site.host
    old_key, new_key = world.folder / "old-key", world.portal.instance / "secrets" / "ssh_ed25519"
    shutil.copy(new_key, old_key)
    old_credential = site.credential()
    assert can_sign_in(host, "installer", old_key)
    assert site.call(old_credential) != 401
    before = host.read(AUTHORIZED_KEYS).splitlines()
    host.put(AUTHORIZED_KEYS, "\n".join([*before, BY_HAND, ""]), owner="installer:installer", mode="0600")

    run = site.run("rotate_credentials")
    assert run["verdicts"][host.name]["old_key_refused"] is True
    assert not can_sign_in(host, "installer", old_key)
    assert can_sign_in(host, "installer", new_key)
    assert BY_HAND in host.read(AUTHORIZED_KEYS).splitlines(), "a line of somebody else stays, byte for byte"
    assert site.credential() != old_credential
    assert site.call(old_credential) == 401
    assert site.call(site.credential()) != 401
    assert world.admin.get("admin/runs/login-key").body["is_rotating"] is False
    assert not new_key.with_name("ssh_ed25519.previous").exists()

    world.allocate(host, site.tenant_id, lasts_s=3600)
    world.admin.post(f"admin/machines/{world.machines[host.name]}/reclaim", reason="the lease is over")
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)
    assert not can_sign_in(host, "installer", old_key), "the cleaning has put the old key back"
    assert can_sign_in(host, "installer", new_key), "the cleaning has locked the portal out"
    by_the_portal = site.credential()
    assert "the agent uses credential" in site.from_a_shell("rotate_credentials")
    assert site.credential() != by_the_portal
    assert can_sign_in(host, "installer", new_key), "a shell without keys rotates the agent's credential alone"


def test_an_operator_replaces_his_own_key_from_a_shell_and_the_portals_next_run_leaves_it(site: Site) -> None:
    host, of_portal = site.host, site.world.portal.instance / "secrets" / "ssh_ed25519"
    old, new = (site.world.folder / f"{name}-of-an-operator" for name in ("old", "new"))
    for file in (old, new):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True, timeout=30)
    there = host.read(AUTHORIZED_KEYS)
    host.put(AUTHORIZED_KEYS, there + old.with_suffix(".pub").read_text(), owner="installer:installer", mode="0600")
    assert can_sign_in(host, "installer", old)

    words = ["-e", f"rotate_credentials_key_file={new}", "-e", f"rotate_credentials_old_key_file={old}"]
    assert "the new login key opens, the old one is refused" in site.from_a_shell("rotate_credentials", *words, key=old)
    assert not can_sign_in(host, "installer", old)
    assert can_sign_in(host, "installer", new)
    assert can_sign_in(host, "installer", of_portal), "the portal's own was not asked for"

    site.run("gpu_hosts", tags=["base"])
    assert can_sign_in(host, "installer", new), "the portal took it for its own, and has put its own in its place"
    assert not can_sign_in(host, "installer", old)


def test_drift_is_found_on_a_host_that_was_changed_by_hand_and_gone_after_the_repair(site: Site) -> None:
    world, host = site.world, site.host
    world.allocate(host, site.tenant_id, lasts_s=3600)
    site.run("drift")
    assert site.drift() == ("none", []), "a host as provisioning left it, and leased"
    world.admin.post(f"admin/machines/{world.machines[host.name]}/reclaim", reason="the lease is over")
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)

    guard, settings = "/etc/systemd/system/remotegpu-lease-guard.service", "/etc/remotegpu/agent.json"
    host.run(f"sed -i s/TimeoutStartSec=60/TimeoutStartSec=61/ {guard}")
    secret = "http://ops:hunter22@192.0.2.1:3128"
    host.run(f"""sed -i 's#^{{#{{"proxy_url": "{secret}",#' {settings}""")
    run = site.run("drift")
    state, paths = site.drift()
    assert state == "drifted"
    assert set(paths) == {guard, settings}
    found = world.admin.get(f"admin/drift/{world.machines[host.name]}").body
    shown = {change["path"]: change["diff"] or "" for change in found["changes"]}
    assert "-TimeoutStartSec=61" in shown[guard]
    assert "+TimeoutStartSec=60" in shown[guard]
    assert found["looked_at"] is not None
    assert "hunter22" not in str(found)
    assert "hunter22" not in world.run_output(run["id"])
    assert host.run(f"grep -c TimeoutStartSec=61 {guard}").stdout == "1\n", "looking repairs nothing"

    site.run("gpu_hosts", tags=["gpu_agent"])
    site.run("drift")
    assert site.drift() == ("none", [])
    looked = site.from_a_shell("drift", "--check", "--diff", "--limit", host.name)
    assert f"drift: {host.name}: no drift" in looked
    assert re.search(rf"{host.name} .*changed=0 .*failed=0", site.from_a_shell("gpu_hosts", "--limit", host.name))
    assert f"nothing was found open on {host.name}" in site.from_a_shell("verify", "--limit", host.name)

    host.run("systemctl stop ssh.socket ssh.service")
    try:
        site.run("drift", state="failed")
    finally:
        host.run("systemctl start ssh.service")
    assert site.drift() == ("unknown", []), "a host that does not answer is not without drift"
