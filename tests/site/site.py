"""A site as an operator makes it: a release, an inventory of its own, bare machines, one run of `site.yml`.

Told in order: what is said of the site, the run, the first admin, the hosts onboarded through the portal, a customer
with work on one of them. Only the front doors are used: the playbook, HTTPS, SSH. What stands in for something else is
in STAND_INS, and the summary of `make test` says so.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.world import PROVISION_TIMEOUT_S, Person, World
from tests.hosts import Host
from tests.support.portal import Client, Portal
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
CONTROL_SUITE = "trixie"
GPU_SUITES = ("bookworm", "trixie")
LEASED = "trixie"  # a customer works on this one; the other is free

# The one variable: every `for:`, scrape, evaluation, notice and silence takes a tenth of its time.
TIME_SCALE = 0.1
OFFLINE_AFTER_S = 10  # not 6: a busy machine misses a report now and then
CONVERGE_TIMEOUT_S = 1500.0
# A machine that is busy with other tests lets Ansible in late, and that is no reason to take anything back.
PATIENT = {
    "ansible_timeout": 60,
    **{f"{role}_rollback_after": 300 for role in ("base", "firewall", "ssh_hardening")},
}
LEASE_S = 5 * 86400  # in its last day a lease is an alert
WORK = "while true; do date; sleep 1; done"

REAL_EXPORTER = "NVIDIA_GPU_EXPORTER_ARCHIVE"  # of a release: where it is named, it runs instead of the stub
STUB = ROOT / "molecule" / "nvidia_gpu_exporter" / "files" / "nvidia_gpu_exporter.py"
STAND_INS = (
    "site: the GPUs are a fake NVML and nvidia-smi that answer as recorded",
    "site: NVIDIA's driver and container toolkit are empty packages of the real names and versions",
    "site: what hosts would fetch from Debian and the Python index is in their images already",
    "site: Grafana, guacd and Harbor are left out; `make test-slow` converges their roles, with stand-ins for them",
)


def exporter_archive(folder: Path) -> tuple[Path, str]:
    """The archive of nvidia_gpu_exporter, and a sentence that says which one it is."""
    if named := os.environ.get(REAL_EXPORTER):
        return Path(named), f"site: nvidia_gpu_exporter is the real one, {Path(named).name}"
    archive = folder / "nvidia_gpu_exporter.tar.gz"
    content = STUB.read_bytes()
    with tarfile.open(archive, "w:gz") as packed:
        entry = tarfile.TarInfo("nvidia_gpu_exporter")
        entry.size, entry.mode = len(content), 0o755
        packed.addfile(entry, io.BytesIO(content))
    return (
        archive,
        "site: nvidia_gpu_exporter is a stub that names what nvidia-smi says as release 1.14.0 does",
    )


@dataclass
class ControlPlane(Portal):
    """The portal of a host that `control_plane.yml` made: its processes are systemd's, its command line is there."""

    host: Host = field(kw_only=True)

    UNITS = {"web": "remotegpu-web@*.service", "worker": "remotegpu-worker.service"}

    @property
    def url(self) -> str:
        return f"https://{self.host.address}"

    def command(self, *argv: str, check: bool = True) -> str:
        done = self.host.run(["remotegpu-portal", *argv], check=check)
        return done.stdout + done.stderr

    def start(self, *names: str) -> None:
        self.host.run(["systemctl", "start", *(self.UNITS[name] for name in names)])

    def stop(self, *names: str) -> None:
        self.host.run(["systemctl", "stop", *(self.UNITS[name] for name in names or self.UNITS)])

    def tail(self, lines: int = 40) -> str:
        units = "--unit=remotegpu-* --unit=prometheus* --unit=nginx --unit=redis* --unit=postgresql*"
        return self.host.run(f"journalctl --no-pager --lines={lines} {units}", check=False).stdout


@dataclass
class Site:
    """The machines, and the world of people and leases on them."""

    folder: Path
    control: Host
    hosts: Mapping[str, Host]  # by suite
    operator_key: Path
    world: World = field(init=False)
    worker: Person = field(init=False)
    output: str = field(init=False, default="")

    # -- what is said of it

    @property
    def release(self) -> Path:
        """The unpacked release with this site's own inventory: an operator's checkout."""
        return self.folder / "release"

    def describe(self, archive: Path) -> None:
        """Build a release, write the site's inventory into it and pack it again, as whoever builds their own does."""
        subprocess.run([ROOT / "portal" / "build"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        self.release.mkdir()
        subprocess.run(["tar", "-xf", ROOT / "build" / "remotegpu-portal.tar.gz", "-C", self.release], check=True)
        inventory = self.release / "inventory"
        (inventory / "artifacts").mkdir()
        (inventory / "artifacts" / "nvidia_gpu_exporter.tar.gz").write_bytes(archive.read_bytes())
        write(inventory / "group_vars" / "gpu_hosts.yml", self._of_gpu_hosts(hashlib.sha256(archive.read_bytes())))
        of_control = inventory / "group_vars" / "control_plane.yml"
        delivered = yaml.safe_load(of_control.read_text())
        write(of_control, {**delivered, **self._of_control_plane(delivered)})
        with tarfile.open(self.folder / "remotegpu-portal.tar.gz", "w:gz") as packed:
            packed.add(self.release, ".")
        # What no release may hold: where the machines are for this run, and secrets.
        write(inventory / "hosts.yml", self._machines())
        write(inventory / "group_vars" / "all.yml", self._for_this_run())
        (self.folder / "known_hosts").write_text("".join(host.known_hosts for host in self._every()))

    def _every(self) -> Sequence[Host]:
        return (self.control, *self.hosts.values())

    def _machines(self) -> dict[str, Any]:
        groups = {"control_plane": [self.control], "gpu_hosts": list(self.hosts.values())}
        return {
            group: {"hosts": {host.name: {"ansible_host": host.address} for host in hosts}}
            for group, hosts in groups.items()
        }

    def _for_this_run(self) -> dict[str, Any]:
        pinned = f"-o StrictHostKeyChecking=yes -o UserKnownHostsFile={self.folder / 'known_hosts'}"
        return {
            "ansible_user": "ops",
            "ansible_ssh_private_key_file": str(self.operator_key),
            "ansible_ssh_common_args": f"{pinned} -o GlobalKnownHostsFile=/dev/null",
            "portal_archive": str(self.folder / "remotegpu-portal.tar.gz"),
            "postgresql_password": "site-k8Rz4QpWx91@7:%?LongEnough",
            "redis_password": "site-k8Rz4QpWx91@7:%?LongEnoughAsWell",
        }

    def _of_gpu_hosts(self, exporter: Any) -> dict[str, Any]:
        """Prometheus comes from the control plane alone; the rest says where the stand-ins of the cards are."""
        sha256 = exporter.hexdigest()
        keys = {suite: key_hashes(host) for suite, host in self.hosts.items()}
        here = "ansible_facts['distribution_release']"
        return {
            "firewall_allow": [
                {"port": port, "sources": [self.control.address], "comment": "Prometheus"} for port in (9100, 9835)
            ],
            "node_exporter_listen_address": "{{ ansible_host }}",
            "nvidia_gpu_exporter_listen_address": "{{ ansible_host }}",
            "nvidia_gpu_exporter_artifact": "{{ playbook_dir }}/../inventory/artifacts/nvidia_gpu_exporter.tar.gz",
            "nvidia_gpu_exporter_sha256": {"x86_64": sha256, "aarch64": sha256},
            "nvidia_gpu_exporter_nvidia_smi": "/usr/local/bin/nvidia-smi",
            "nvidia_gpu_exporter_collect_interval": 3,
            "nvidia_gpu_exporter_collect_timeout": 2,
            "nvidia_gpu_exporter_recover_interval": 5,
            "nvidia_driver_root": "/opt/fake-root",
            "nvidia_driver_source": f"{{{{ 'distribution' if {here} == 'bookworm' else 'nvidia' }}}}",
            "nvidia_driver_branch": f"{{{{ '' if {here} == 'bookworm' else '570' }}}}",
            "nvidia_driver_repository_url": "file:///srv/nvidia/",
            "nvidia_driver_repository_key_url": "file:///srv/nvidia/key.asc",
            "nvidia_driver_repository_key_sha256": f"{{{{ site_keys[{here}].driver }}}}",
            "nvidia_container_toolkit_repository_url": "file:///srv/toolkit",
            "nvidia_container_toolkit_repository_key_url": "file:///srv/toolkit/key.asc",
            "nvidia_container_toolkit_repository_key_sha256": f"{{{{ site_keys[{here}].toolkit }}}}",
            "site_keys": keys,
            **PATIENT,
            "base_time_sync_started": False,  # molecule/image/README.md
        }

    def _of_control_plane(self, delivered: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "portal_public_url": f"https://{self.control.address}",
            "portal_settings": {
                **delivered["portal_settings"],
                "REPORT_INTERVAL_S": 15 * TIME_SCALE,
                "OFFLINE_AFTER_S": OFFLINE_AFTER_S,
                "MONITORING_SILENT_S": 360 * TIME_SCALE,
                "PEOPLE_LIMIT": "100000 per minute",  # whoever waits for five faults at once asks often
            },
            "portal_web_processes": 2,
            "portal_drain_s": 5,
            "prometheus_time_scale": TIME_SCALE,
            "alertmanager_group_wait": shorter(10),
            "alertmanager_group_interval": shorter(30),
            "alertmanager_watchdog_interval": shorter(60),
            "base_time_sync_started": False,  # molecule/image/README.md
            "redis_overcommit_set": False,  # molecule/image/README.md
            **PATIENT,
        }

    # -- the run

    def converge(self, *options: str) -> None:
        """One run of site.yml over all machines, from the release, as an operator starts it."""
        argv = ["ansible-playbook", "-i", "inventory/hosts.yml", "playbooks/site.yml", *options]
        bin_folder = str(Path(sys.executable).parent)
        environ = {
            **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "ANSIBLE_HOME": str(self.folder / "ansible"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_tasks",
        }
        log = self.folder / "site.log"
        with log.open("wb") as file:
            process = subprocess.Popen(argv, cwd=self.release, env=environ, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(CONVERGE_TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.terminate()  # it ends its workers; killed it would leave them
                process.wait()
        self.output = log.read_text(errors="replace")
        assert code == 0, self.output[-8000:]

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        """host → what the run counted there."""
        lines = re.findall(r"^(\S+) +: (ok=.*)$", self.output, re.MULTILINE)
        return {name: {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", counts)} for name, counts in lines}

    # -- people and machines

    def open(self) -> None:
        """The first admin, the hosts by their fingerprints and one more run of the portal's own, a customer at work."""
        ca_file = self.folder / "instance" / "ca" / "ca.pem"
        ca_file.parent.mkdir(parents=True)
        ca_file.write_text(self.control.read("/var/lib/remotegpu/ca/ca.pem"))
        portal = ControlPlane(self.folder / "instance", address=self.control.address, port=443, host=self.control)
        shown = portal.command("create-admin", "admin")
        found = re.search(r"password\S*:?\s+(\S+)", shown, re.IGNORECASE)
        assert found, shown
        admin = Client(portal)
        admin.sign_in_first_time("admin", found[1])
        self.world = World(portal, admin, self.folder)
        for host in self.hosts.values():
            self._onboard(host)
        for host in self.hosts.values():
            self.world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S)
            self.world.wait_until_healthy(host)
        tenant = self.world.tenant("Acme")
        self.worker = self.world.person("carol", tenant, "owner")
        self.world.allocate(self.hosts[LEASED], tenant, lasts_s=LEASE_S)
        until(self.is_watched, "Prometheus to see every machine", timeout_s=120, also=self.tell)

    def _onboard(self, host: Host) -> None:
        """With the operator's key for the first contact: passwords are refused since the run."""
        machine = self.world.admin.post(
            "admin/machines",
            name=host.name,
            address=host.address,
            ssh_user="ops",
            credential={"private_key": self.operator_key.read_text()},
        )
        self.world.machines[host.name] = int(machine["id"])
        self.world.confirm(host)
        self.world.provision(host)

    # -- what is seen

    def prometheus(self, query: str) -> list[dict[str, Any]]:
        """The series of an instant query, asked on the control plane: from outside nobody may."""
        asked = ["curl", "--fail", "--silent", "--show-error", "--get", "--data-urlencode", f"query={query}"]
        answer = self.control.run([*asked, "http://127.0.0.1:9090/api/v1/query"])
        result: list[dict[str, Any]] = json.loads(answer.stdout)["data"]["result"]
        return result

    def is_watched(self) -> bool:
        """Every exporter of every host answers, and every card has a value."""
        expected = {(host.name, job) for host in self.hosts.values() for job in ("node", "nvidia_gpu")}
        up = {(each["metric"].get("host"), each["metric"]["job"]) for each in self.prometheus("up == 1")}
        cards = self.prometheus("count by (host) (nvidia_smi_temperature_gpu)")
        return expected <= up and [each["value"][1] for each in cards] == ["2", "2"]

    def alerts(self, *, is_open: bool = True, **filters: Any) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.world.admin.get(
            "admin/alerts", is_open=str(is_open).lower(), page_size=200, **filters
        )["items"]
        return items

    def verdict(self, host: Host) -> dict[str, Any]:
        """What the newest reclaim of a host was proven by, from its signed report."""
        (reclaim, *_) = self.world.admin.get("admin/reclaims", machine_id=self.world.machines[host.name])["items"]
        report = json.loads(self.world.admin.download(f"admin/reclaims/{reclaim['id']}/report"))
        verdict: dict[str, Any] = report["report"]["verification"]["verdict"]
        return verdict

    def page(self, path: str) -> str:
        """A page of the portal as the admin sees it."""
        return self.world.admin.page(path)

    def sign_in_again(self) -> None:
        """Before several ask at once: two that renew one sign-in at the same moment would end it."""
        for client in (self.world.admin, self.worker.client):
            client.sign_in_again()

    def task_at_work(self) -> int:
        """A task of the customer that runs, begun now if there is none."""
        mine = self.worker.client.get("customer/tasks", state="running")["items"]
        if mine:
            return int(mine[0]["id"])
        task = self.world.task(self.worker, self.hosts[LEASED], WORK)
        self.world.wait_for_task(self.worker, task, "running")
        return task

    def tell(self) -> str:
        """What is wrong by everybody's word, for a failure's text."""
        alerts = [(each["name"], each["machine_name"], each["state"], each["source"]) for each in self.alerts()]
        firing = [each["metric"] for each in self.prometheus("ALERTS")] if self._prometheus_answers() else "no answer"
        down = [each["metric"] for each in self.prometheus("up == 0")] if self._prometheus_answers() else "no answer"
        return f"\n--- open: {alerts}\n--- Prometheus: {firing}\n--- down: {down}\n{self.world.portal.tail()}"

    def _prometheus_answers(self) -> bool:
        return self.control.run(["systemctl", "is-active", "--quiet", "prometheus"], check=False).ok


def shorter(seconds: float) -> str:
    """As Alertmanager writes it."""
    return f"{round(seconds * 1000 * TIME_SCALE)}ms"


def key_hashes(host: Host) -> dict[str, str]:
    """Of the keys that sign the repositories of the host's image."""
    lines = host.run("sha256sum /srv/nvidia/key.asc /srv/toolkit/key.asc").stdout.splitlines()
    return dict(zip(("driver", "toolkit"), (line.split()[0] for line in lines), strict=True))


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, width=200))
