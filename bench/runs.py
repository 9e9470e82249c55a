"""What a run through the portal costs: one playbook on one host, through a worker's loop and by ansible-playbook alone.

`python -m bench.runs` boots a test host (root or Docker), takes both in turns and prints the ratio of the medians; the
goal is at most 1.05. Both pay for a new SSH connection each time.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import Figure, show
from portal import db
from portal.cli.init import init
from portal.integrations import queue
from portal.migrate import migrate
from portal.models import Machine
from portal.services import config, inventory, runs, vault
from portal.services.actors import SYSTEM
from portal.settings import Settings
from portal.worker import directory
from portal.worker.main import Worker
from tests.hosts import boot, unique
from tests.support.runs import make_machine
from tests.support.waiting import until

GOAL = 1.05
ROUNDS = 3
RUN_TIMEOUT_S = 300.0
TASKS = 110  # about as many as gpu_hosts.yml has on a host where nothing is to be done


def main() -> int:
    """Print the figures; 1 if the goal is missed."""
    return show(take())


def take() -> list[Figure]:
    through, alone = measure()
    return [
        Figure("a run through the portal", through),
        Figure("ansible-playbook alone", alone),
        Figure("a run through the portal / ansible-playbook alone", through / alone, "", at_most=GOAL),
    ]


def measure(rounds: int = ROUNDS) -> tuple[float, float]:
    """Seconds through the portal and alone, medians of `rounds` taken in turns."""
    through, alone = [], []
    with tempfile.TemporaryDirectory(prefix="rgpu-bench-") as folder, host_record(Path(folder)) as (machine, settings):
        project = make_project(Path(folder) / "project")
        with worker(settings, project):
            for _round in range(rounds):
                through.append(through_portal(machine))
                alone.append(by_itself(machine, settings, project, Path(folder)))
    return statistics.median(through), statistics.median(alone)


@contextmanager
def host_record(folder: Path) -> Iterator[tuple[Machine, Settings]]:
    """A booted host with its record in a new portal, whose key it accepts."""
    os.environ["INSTANCE_DIR"] = str(folder / "i")
    settings = init()
    db.connect(settings.database_url)
    migrate()
    config.use(settings)
    vault.unlock(settings)
    queue.use(settings)
    host = boot(unique("bench-runs"), "bookworm", prepared=True)
    try:
        host.authorize("ops", settings.ssh_key_file.with_suffix(".pub").read_text())
        yield make_machine("bench-1", address=host.address, host_key=host.host_keys[0]), settings
    finally:
        host.destroy()


def make_project(folder: Path) -> Path:
    """A playbook of many small tasks, with the configuration and the inventory plugin of this repository."""
    (folder / "playbooks").mkdir(parents=True)
    for name in ("ansible.cfg", "inventory"):
        (folder / name).symlink_to(directory.PROJECT / name)
    tasks = "".join(
        f"    - name: Look {number}\n      ansible.builtin.stat: {{path: /etc/passwd}}\n" for number in range(TASKS)
    )
    book = f"- name: Look\n  hosts: gpu_hosts\n  gather_facts: true\n  tasks:\n{tasks}"
    (folder / "playbooks" / "gpu_hosts.yml").write_text(book)
    return folder


@contextmanager
def worker(settings: Settings, project: Path) -> Iterator[None]:
    """A worker in this process; it listens as a worker of its own would."""
    held = Worker(settings, project=project)
    thread = threading.Thread(target=held.work)
    thread.start()
    try:
        yield
    finally:
        held.stop()
        thread.join()


def through_portal(machine: Machine) -> float:
    began = time.monotonic()
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    until(lambda: runs.is_ended(runs.get_run(run.id)), f"run {run.id} to end", timeout_s=RUN_TIMEOUT_S, every_s=0.05)
    run = runs.get_run(run.id)
    if run.state != "succeeded":
        raise RuntimeError(f"the run is {run.state}: {run.reason}")
    return time.monotonic() - began


def by_itself(machine: Machine, settings: Settings, project: Path, folder: Path) -> float:
    source = folder / "alone"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    document = inventory.document([machine])
    document["hosts"][0]["private_key_file"] = str(settings.ssh_key_file)
    directory.write(source / "document.json", document)
    directory.write(source / "run.remotegpu.yml", {"plugin": "portal", "document": "document.json"})
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ANSIBLE_CONFIG": str(project / "ansible.cfg"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(source),
    }
    argv = ["ansible-playbook", "-i", str(source / "run.remotegpu.yml"), str(project / "playbooks" / "gpu_hosts.yml")]
    began = time.monotonic()
    subprocess.run(argv, env=environment, check=True, cwd=project, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
