"""Runs of small playbooks that are executed on this very machine: a project of their own, and a worker to hold them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
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


def start_worker(
    settings: Settings, where: Path, *, fault: str | None = None, lock_s: float | None = None
) -> subprocess.Popen[bytes]:
    """A worker process of its own, for the project at `where`; `lock_s` is how long it holds a run, if not as set."""
    environment = {
        **os.environ,
        "INSTANCE_DIR": str(settings.instance_dir),
        "DATABASE_URL": settings.database_url,
        "PUBLIC_URL": settings.public_url,
        "SECRET_KEY": settings.secret_key,
        "JWT_SECRET_KEY": settings.jwt_secret_key,
        "ENCRYPTION_KEY": settings.encryption_key,
        "RUN_LOCK_S": str(lock_s or settings.run_lock_s),
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


def marked(mark_of: str = "") -> dict[int, str]:
    """Pid → mark, of every process on this machine whose mark begins with `mark_of`."""
    wanted = f"{VARIABLE}={mark_of}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            lines = [line for line in (entry / "environ").read_bytes().split(b"\0") if line.startswith(wanted)]
        except OSError:
            continue
        if lines:
            found[int(entry.name)] = lines[0].decode().partition("=")[2]
    return found


class Watch:
    """Looks all the time which attempts have an ansible-playbook of `where`, and remembers if there were ever two."""

    def __init__(self, where: Path) -> None:
        self._where = str(where).encode()
        self._stopping = threading.Event()
        self.most: set[str] = set()
        self.seen: set[str] = set()
        self._thread = threading.Thread(target=self._look, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopping.wait(0.02):
            alive = {mark for pid, mark in marked().items() if self._is_playbook(pid)}
            self.seen |= alive
            if len(alive) > len(self.most):
                self.most = alive

    def _is_playbook(self, pid: int) -> bool:
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return any(part.endswith(b"ansible-playbook") for part in argv) and any(self._where in part for part in argv)
