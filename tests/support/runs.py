"""Runs of small playbooks that are executed on this very machine: a project of their own, and a worker to hold them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from portal.integrations.processes import VARIABLE
from portal.models import Machine
from portal.settings import Settings

ROOT = Path(__file__).parents[2]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"

CONFIG = f"""\
[defaults]
inventory_plugins = {ROOT}/inventory/plugins
host_key_checking = True
inject_facts_as_vars = False
interpreter_python = {sys.executable}
[inventory]
enable_plugins = portal
any_unparsed_is_failed = True
[ssh_connection]
pipelining = True
"""

PLAY = """\
- name: Here
  hosts: gpu_hosts
  connection: local
  gather_facts: false
  tasks:
"""


def project(folder: Path, tasks: str, *, playbook: str = "gpu_hosts") -> Path:
    """A project whose `playbook` has these tasks (two spaces less than in the file), run over a local connection."""
    (folder / "playbooks").mkdir(parents=True, exist_ok=True)
    (folder / "ansible.cfg").write_text(CONFIG)
    indented = "".join(f"    {line}\n" for line in tasks.strip().splitlines())
    (folder / "playbooks" / f"{playbook}.yml").write_text(PLAY + indented)
    return folder


def make_machine(name: str = "gpu-1", **fields: object) -> Machine:
    """A machine whose host key is confirmed; nothing answers at its address."""
    given = {"address": f"{name}.test", "ssh_user": "ops", "host_key": KEY, "epoch": name, "state": "ready", **fields}
    return Machine.create(name=name, **given)


START = "import sys; from pathlib import Path; from tests.support.runs import work; work(Path(sys.argv[1]))"


def start_worker(settings: Settings, where: Path, *, fault: str | None = None) -> subprocess.Popen[bytes]:
    """A worker process of its own, for the project at `where`."""
    environment = {
        **os.environ,
        "INSTANCE_DIR": str(settings.instance_dir),
        "DATABASE_URL": settings.database_url,
        "PUBLIC_URL": settings.public_url,
        "SECRET_KEY": settings.secret_key,
        "JWT_SECRET_KEY": settings.jwt_secret_key,
        "ENCRYPTION_KEY": settings.encryption_key,
        "RUN_LOCK_S": str(settings.run_lock_s),
        "RUN_TIMEOUT_S": str(settings.run_timeout_s),
    }
    environment.pop(VARIABLE, None)
    if fault:
        environment["REMOTEGPU_FAULT"] = fault
    return subprocess.Popen([sys.executable, "-c", START, str(where)], cwd=ROOT, env=environment)


def work(where: Path) -> None:
    """What such a process does."""
    import logging

    from portal.settings import load
    from portal.worker.main import main

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    main(load(), project=where)
