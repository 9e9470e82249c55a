"""A host that was leased, with the agent's cleaning and verification on it and no portal beside it.

It has what provisioning leaves behind (a drop-in for leases, our firewall table, an operator with a key and a container
of his own), a baseline, and one lease's login made as the agent makes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from tests.hosts import Host, boot, unique
from tests.hosts.owner import keeps_hosts
from tests.support.dirt import IMPORT_IMAGE, PACKAGES, Tenant

PACKAGE = Path(__file__).parents[2] / "agent" / "remotegpu_agent"
LOGIN, UID, LEASE_ID, MACHINE_ID = "lease17", 20017, 17, 1

_DROP_IN = "Match Group remotegpu-leases\n  AuthorizedKeysFile /etc/remotegpu/authorized_keys/%u\n"
_RULES = """
table inet remotegpu {
  set openings { type inet_service; flags timeout; }
  chain input {
    type filter hook input priority filter; policy drop;
    iif lo accept
    ct state established,related accept
    tcp dport 22 accept
    tcp dport @openings accept
  }
}
"""
_CALL = """
import json, sys
sys.path.insert(0, "/opt/remotegpu/source")
sys.dont_write_bytecode = True
from remotegpu_agent import baseline, cleaning, verify
call = {"baseline": lambda _: baseline.take(), "clean": cleaning.clean, "verify": verify.verify}[sys.argv[1]]
try:
    json.dump(call(json.load(sys.stdin)), sys.stdout)
except cleaning.Refused as refused:
    json.dump({"refused": str(refused)}, sys.stdout)
"""


_PROGRAM = """#!/usr/bin/python3 -I
import sys
sys.path.insert(0, "/opt/remotegpu/source")
sys.dont_write_bytecode = True
from remotegpu_agent import cli
sys.exit(cli.main())
"""

_HIS = (
    "getent passwd ops root installer; getent shadow ops root; cat /etc/sudoers.d/*; nft list table inet remotegpu",
    "tar -C /home/ops --numeric-owner --sort=name --mtime=@0 -cf - . | sha256sum",
    "docker inspect --format '{{.Id}} {{.State.StartedAt}} {{.State.Pid}}' kept",
    "docker volume ls -q; docker image ls -q --no-trunc",
)


@contextlib.contextmanager
def leased_host(suite: str, directory: Path) -> Iterator[CleanedHost]:
    """A new host of that suite with a lease on it; removed in the end, unless REMOTEGPU_KEEP_HOSTS is set."""
    host = boot(unique(f"clean-{suite}"), suite, prepared=True)
    try:
        yield CleanedHost.prepare(host, make_key(directory / "operator"))
    finally:
        if not keeps_hosts():
            host.destroy()


@dataclass
class CleanedHost:
    """The host, its baseline, and the tenant whose traces are to go."""

    host: Host
    baseline: dict[str, Any]
    tenant: Tenant
    rules: str = _RULES

    @classmethod
    def prepare(cls, host: Host, key: Path) -> CleanedHost:
        """Make it as provisioning would, take the baseline, and let a tenant in. `key` is the operator's."""
        missing = [name for name in PACKAGES if not host.run(["dpkg", "-s", name], check=False).ok]
        if missing:
            host.run(f"apt-get install -y -qq --no-install-recommends {' '.join(missing)}", timeout_s=300)
        host.authorize("ops", key.with_suffix(".pub").read_text())
        host.put("/etc/ssh/sshd_config.d/00-remotegpu.conf", _DROP_IN)
        host.run(
            "mkdir -p /etc/remotegpu/authorized_keys && groupadd -f --system remotegpu-leases && systemctl reload ssh"
        )
        host.run(["nft", "-f", "-"], stdin=_RULES)
        host.run("systemctl start docker")
        host.run(IMPORT_IMAGE.format(options="", tag="kept:image"))
        host.run("docker volume create kept-volume && docker run -d --name kept -v kept-volume:/data kept:image"
                 " $(command -v sleep) 80001")  # fmt: skip
        push_agent(host)
        made = cls(host, _call(host, "baseline", {}), Tenant("nobody", 0, 0, key))
        made.let_in()
        return made

    def let_in(self) -> None:
        """The lease's login, as the agent makes it; nothing where it is there already."""
        if self.host.run(["id", LOGIN], check=False).ok:
            return
        self.host.run(f"groupadd --gid {UID} {LOGIN} && useradd --uid {UID} --gid {LOGIN} --groups remotegpu-leases"
                      f" --shell /bin/bash --create-home --key HOME_MODE=0700 --password '*' {LOGIN}")  # fmt: skip
        self.tenant = Tenant.of(self.host, LOGIN)

    def order(self) -> dict[str, Any]:
        """What the portal would say to have the lease cleaned away."""
        named = {"lease_id": LEASE_ID, "machine_id": MACHINE_ID, "login": LOGIN, "uid": UID}
        return {**named, "baseline": self.baseline}

    def clean(self, **changed: Any) -> dict[str, Any]:
        return _call(self.host, "clean", {**self.order(), **changed})

    def verify(self) -> dict[str, Any]:
        asked = {"schema": 1, "machine_id": MACHINE_ID, "lease_id": LEASE_ID, "login": LOGIN, "uid": UID}
        return _call(self.host, "verify", {**asked, "baseline": self.baseline})

    def take_baseline(self) -> dict[str, Any]:
        return _call(self.host, "baseline", {})

    def what_is_the_operators(self) -> str:
        """Everything of his that cleaning must not touch, byte for byte."""
        return self.host.run("\n".join(_HIS)).stdout


def findings(items: list[dict[str, Any]]) -> list[str]:
    """What did not pass, for the message of an assertion."""
    bad = [each for each in items if each["result"] not in ("passed", "not_applicable")]
    return [f"{each['id']}: {each['result']}: {each['reason']}" for each in bad]


def result_of(items: list[dict[str, Any]], name: str) -> tuple[str, str]:
    """Result and reason of one step or check."""
    item = next(each for each in items if each["id"] == name)
    return item["result"], item["reason"] or ""


def push_agent(host: Host) -> None:
    """The agent's source with the one package that reads GPUs, and its program, which is not built for this."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(PACKAGE, "remotegpu_agent", filter=lambda each: None if "__pycache__" in each.name else each)
        archive.add(pynvml.__file__, "pynvml.py")
    host.run("rm -rf /opt/remotegpu/source && mkdir -p /opt/remotegpu/source && tar -C /opt/remotegpu/source -xf -",
             stdin=packed.getvalue())  # fmt: skip
    host.put("/usr/local/bin/remotegpu-agent", _PROGRAM, mode="0755")
    host.put("/etc/remotegpu/agent.json", '{"portal_url": ""}')


def _call(host: Host, what: str, given: dict[str, Any]) -> dict[str, Any]:
    said = host.run(["python3", "-I", "-c", _CALL, what], stdin=json.dumps(given), timeout_s=120).stdout
    answer: dict[str, Any] = json.loads(said)
    return answer


def make_key(path: Path) -> Path:
    """A new key pair; answers with the private half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "operator", "-f", path], check=True)
    return path
