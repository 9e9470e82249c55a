"""The people, hosts and machines of an end-to-end test, and what they do through the front door: HTTP and SSH only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.hosts import Host
from tests.hosts.docker import Result
from tests.support.portal import ROOT, Client, Portal
from tests.support.waiting import until

INSTALLER_PASSWORD = "first contact only 7"
PROVISION_TIMEOUT_S = 900.0  # one that is only slow is another test's affair
RECLAIM_TIMEOUT_S = 240.0


@dataclass
class Person:
    """A customer with a client of their own and an SSH key on their own disk."""

    name: str
    user_id: int
    client: Client
    key: Path

    @property
    def public_key(self) -> str:
        return self.key.with_suffix(".pub").read_text().strip()


@dataclass
class World:
    """One portal, its admin, and the machines that were onboarded through it."""

    portal: Portal
    admin: Client
    folder: Path
    machines: dict[str, int] = field(default_factory=dict)

    # -- machines

    def add(self, host: Host) -> int:
        """Write the machine down by address and SSH password; nothing is trusted yet."""
        credential = {"password": INSTALLER_PASSWORD, "become_password": INSTALLER_PASSWORD}
        machine = self.admin.post(
            "admin/machines", name=host.name, address=host.address, ssh_user="installer", credential=credential
        )
        self.machines[host.name] = machine["id"]
        return int(machine["id"])

    def confirm(self, host: Host) -> None:
        """Compare the offered fingerprints with the host's own, as a person at its console does."""
        machine_id = self.machines[host.name]
        offered = self.admin.post(f"admin/machines/{machine_id}/host-key")["host_keys_offered"]
        own = host.run("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").stdout.split()[1]
        assert own in [key["fingerprint"] for key in offered], (own, offered)
        self.admin.post(f"admin/machines/{machine_id}/host-key/confirm", fingerprint=own)

    def provision(self, host: Host) -> int:
        return int(self.admin.post(f"admin/machines/{self.machines[host.name]}/provision")["id"])

    def machine(self, host: Host) -> Any:
        return self.admin.get(f"admin/machines/{self.machines[host.name]}").body

    def wait_for_state(self, host: Host, *states: str, timeout_s: float, every_s: float = 0.3) -> Any:
        """The machine once it is in one of these states. Fails at once when it got stuck elsewhere for good."""

        def reached() -> Any:
            machine = self.machine(host)
            stuck = {"failed", "quarantined"} - set(states)
            assert machine["state"] not in stuck, f"{host.name}: {machine['state']}: {machine['state_reason']}"
            return machine if machine["state"] in states else None

        wanted = f"{host.name} to be {' or '.join(states)}"
        return until(reached, wanted, timeout_s=timeout_s, every_s=every_s, also=self.tell)

    def wait_until_healthy(self, host: Host) -> Any:
        def healthy() -> Any:
            machine = self.machine(host)
            return machine if machine["reachability"] == "online" and machine["is_healthy"] else None

        return until(healthy, f"{host.name} to be healthy", timeout_s=60, also=lambda: self.machine(host))

    def run_output(self, run_id: int) -> str:
        items = self.admin.get(f"admin/runs/{run_id}/events", limit=1000)["items"]
        return "\n".join(item["stdout"] for item in items if item["stdout"])

    def tell(self) -> str:
        """What the portal and its newest run said last, for a failure's text."""
        runs = self.admin.get("admin/runs", page_size=1)["items"]
        output = self.run_output(runs[0]["id"])[-4000:] if runs else ""
        return f"\n--- newest run: {runs}\n{output}\n--- portal:\n{self.portal.tail()}"

    # -- people

    def tenant(self, name: str) -> int:
        return int(self.admin.post("admin/tenants", name=name)["id"])

    def person(self, name: str, tenant_id: int, role: str = "member") -> Person:
        made = self.admin.post("admin/customers", username=name, tenant_id=tenant_id, member_role=role)
        client = Client(self.portal)
        client.sign_in_first_time(name, made["one_time_password"])
        person = Person(name, made["user"]["id"], client, new_key(self.folder / name))
        client.post("customer/keys", name="own", key=person.public_key)
        return person

    # -- leases

    def allocate(
        self, host: Host, tenant_id: int, *, lasts_s: float, retain_s: int = 0, openings: Sequence[dict[str, Any]] = ()
    ) -> Any:
        """The lease, once all that it has on the host and its gateway is open."""
        until_at = datetime.now(UTC) + timedelta(seconds=lasts_s)
        lease = self.admin.post(
            f"admin/machines/{self.machines[host.name]}/allocate",
            tenant_id=tenant_id,
            until=until_at.isoformat(),
            retain_s=retain_s,
            openings=list(openings),
        ).body
        for kind in {grant["kind"] for grant in lease["grants"]} & {"keys", "firewall", "forward"}:
            self.wait_for_grant(lease["id"], kind, "open")
        return self.lease(lease["id"])

    def lease(self, lease_id: int) -> Any:
        return self.admin.get(f"admin/leases/{lease_id}").body

    def wait_for_grant(self, lease_id: int, kind: str, state: str, *, timeout_s: float = 30) -> None:
        def observed() -> bool:
            return any(grant["kind"] == kind and grant["observed"] == state for grant in self.lease(lease_id)["grants"])

        until(
            observed,
            f"{kind} of lease {lease_id} to be {state}",
            timeout_s=timeout_s,
            also=lambda: self.lease(lease_id),
        )

    def wait_until_acknowledged(self, lease_id: int) -> None:
        until(lambda: self.lease(lease_id)["is_end_acknowledged"], "the host to acknowledge the end", timeout_s=30)

    def probe_key(self, lease_id: int) -> Path:
        """The key that the portal tries after the lease's end: a secret that no door of the portal gives out."""
        tell = (
            "import sys; from portal.cli import open_portal; open_portal();"
            "from portal.db import connection; from portal.services import leases, vault\n"
            "with connection(): print(vault.decrypt(leases.get(int(sys.argv[1])).probe_key))"
        )
        argv, environ = [sys.executable, "-c", tell, str(lease_id)], self.portal.environment()
        told = subprocess.run(argv, cwd=ROOT, env=environ, check=True, capture_output=True, text=True).stdout
        path = self.folder / f"probe-{lease_id}"
        path.touch(mode=0o600)
        path.write_text(told)
        return path

    # -- tasks

    def task(self, person: Person, host: Host, command: str, **options: Any) -> int:
        made = person.client.post(
            "customer/tasks/training", machine_id=self.machines[host.name], name="work", command=command, **options
        )
        return int(made["id"])

    def wait_for_task(self, person: Person, task_id: int, *states: str, timeout_s: float = 60) -> Any:
        def reached() -> Any:
            task = person.client.get(f"customer/tasks/{task_id}").body
            return task if task["state"] in states else None

        also = lambda: person.client.get(f"customer/tasks/{task_id}").body  # noqa: E731 - read once, on failure
        return until(reached, f"task {task_id} to be {' or '.join(states)}", timeout_s=timeout_s, also=also)

    def log(self, person: Person, task_id: int) -> bytes:
        """The whole log, once it is complete."""
        until(
            lambda: person.client.get(f"customer/tasks/{task_id}")["attempts"][-1]["log_complete"],
            f"the log of task {task_id} to be complete",
            timeout_s=60,
        )
        return person.client.download(f"customer/tasks/{task_id}/log/download")


def new_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", path], check=True)
    return path


def can_sign_in(host: Host, login: str, key: Path) -> bool:
    """Whether OpenSSH's own client is let in with this key.

    Only a real no counts. An sshd that hangs up answers nobody: it does so to an address that was refused a few times
    before (PerSourcePenalties), so it is asked again until it has forgotten that.
    """
    said: list[Result] = []

    def has_answered() -> bool:
        said.append(host.ssh(login, key, "true"))
        return said[-1].ok or "Permission denied (publickey" in said[-1].stderr

    until(has_answered, f"{host.name} to let {login} in or to refuse the key", every_s=1, timeout_s=90, also=said.pop)
    return said[-1].ok
