"""Runs over real SSH: with the portal's key, with a password, cancelled at work, and on a host that is not itself."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from portal.integrations import host_keys, queue, ssh_masters
from portal.models import Machine, Run
from portal.services import config, runs, vault
from portal.services.actors import SYSTEM
from portal.settings import Settings
from portal.worker import directory
from portal.worker.main import Worker
from tests.hosts import Host
from tests.support.runs import make_machine, marked, project
from tests.support.waiting import until

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.parametrize("database_url", ["sqlite"], indirect=True),
]
Work = Callable[[str], None]
PASSWORD = "first Contact 1"


@pytest.fixture
def host(boot_host: Callable[..., Host]) -> Host:
    return boot_host("bookworm", password=PASSWORD)


@pytest.fixture
def work(database: Any, settings: Settings, operator_key: Path, tmp_path: Path) -> Iterator[Work]:
    """`work(tasks)` starts a worker in this process whose key the host accepts, for a playbook of these tasks."""
    config.use(settings)
    queue.use(settings)
    settings.ssh_key_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(operator_key, settings.ssh_key_file)
    settings.ssh_key_file.chmod(0o600)
    with ExitStack() as stack:
        yield lambda tasks: stack.enter_context(
            working(Worker(settings, project=over_ssh(tmp_path / "project", tasks)))
        )


def over_ssh(folder: Path, tasks: str) -> Path:
    """The project of these tasks, with the host's own Python and a real connection."""
    where = project(folder, tasks)
    book, settings_file = where / "playbooks" / "gpu_hosts.yml", where / "ansible.cfg"
    book.write_text(book.read_text().replace("  connection: local\n", ""))
    settings_file.write_text(settings_file.read_text().replace(sys.executable, "/usr/bin/python3"))
    return where


def machine_of(host: Host, **fields: Any) -> Machine:
    """The record of this host, with the key pinned that a scan finds."""
    keys = host_keys.scan(host.address, host.port)
    assert keys[0]["line"] in host.host_keys
    return make_machine(address=host.address, ssh_port=host.port, host_key=keys[0]["line"], **fields)


def ended(run: Run) -> Run:
    def look() -> Run | None:
        now = runs.get_run(run.id)
        return now if runs.is_ended(now) else None

    return until(look, f"run {run.id} to end", timeout_s=90, also=lambda: output(run))


def output(run: Run) -> str:
    return "\n".join(event.stdout for event in runs.output_after(run.id, 0))


def test_a_run_reaches_a_host_with_the_portals_key(work: Work, host: Host, settings: Settings) -> None:
    run = runs.queue("gpu_hosts", [machine_of(host)], by=SYSTEM)
    work("- name: Leave a mark\n  ansible.builtin.copy: {content: here, dest: /tmp/mark, mode: '0600'}")
    done = ended(run)
    assert done.state == "succeeded", output(run)
    assert host.read("/tmp/mark") == "here"
    assert done.child["mark"] not in marked().values()
    assert masters_of(ssh_masters.folder(directory.path_of(settings, done.child["mark"]))) == []


def test_a_run_reaches_a_host_with_a_password_alone_and_becomes_root(work: Work, host: Host) -> None:
    contact = vault.encrypt(json.dumps({"password": PASSWORD, "become_password": PASSWORD}))
    run = runs.queue("gpu_hosts", [machine_of(host, ssh_user="installer", first_contact=contact)], by=SYSTEM)
    work("- name: Say who\n  ansible.builtin.shell: id -un >/root/who\n  become: true")
    done = ended(run)
    assert done.state == "succeeded", output(run)
    assert host.read("/root/who") == "root\n"


def test_cancel_ends_everything_here_and_names_what_may_go_on_there(work: Work, host: Host, settings: Settings) -> None:
    run = runs.queue("gpu_hosts", [machine_of(host)], by=SYSTEM)
    work("- name: Work long\n  ansible.builtin.command: sleep 613")
    until(lambda: host.run(["pgrep", "-fx", "sleep 613"], check=False).ok, "the task to run on the host")
    sockets = ssh_masters.folder(directory.path_of(settings, runs.get_run(run.id).child["mark"]))
    assert list(sockets.glob("*")) != [], "the connection is a shared one"
    assert masters_of(sockets) != []
    runs.cancel(run, by=SYSTEM)
    done = ended(run)
    assert (done.state, done.remains) == ("cancelled", "May still run on the host: gpu-1: Work long")
    assert done.child["mark"] not in marked().values()
    assert masters_of(sockets) == []
    assert not sockets.exists()
    host.run(["pkill", "-fx", "sleep 613"], check=False)


def test_a_host_with_another_key_is_refused_and_nothing_is_done_on_it(work: Work, host: Host) -> None:
    machine = machine_of(host)
    host.run("rm /etc/ssh/ssh_host_* && ssh-keygen -A && systemctl restart ssh")
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Leave a mark\n  ansible.builtin.copy: {content: here, dest: /tmp/mark, mode: '0600'}")
    done = ended(run)
    assert done.state == "failed"
    assert "host key" in (done.reason or "").lower(), done.reason
    assert not host.run(["test", "-e", "/tmp/mark"], check=False).ok
    assert not host.run("journalctl -u ssh -o cat | grep Accepted", check=False).ok, "no sign-in was even tried"


def test_a_verify_run_keeps_each_hosts_verdict_also_when_it_fails(
    database: Any, settings: Settings, operator_key: Path, host: Host
) -> None:
    config.use(settings)
    queue.use(settings)
    settings.ssh_key_file.parent.mkdir(parents=True)
    shutil.copy(operator_key, settings.ssh_key_file)
    host.run("systemd-run --unit open-door python3 -m http.server 8099")
    until(lambda: host.run("ss -Hltn sport = :8099").stdout, "the open port")
    run = runs.queue("verify", [machine_of(host)], by=SYSTEM)
    with working(Worker(settings)):  # the product's own playbook
        done = ended(run)
    assert done.state == "failed"
    verdict = done.verdicts["gpu-1"]
    assert verdict["passed"] is False
    assert "8099" in json.dumps(verdict)
    assert (done.reason or "").startswith("gpu-1: ")


@contextmanager
def working(worker: Worker) -> Iterator[None]:
    thread = threading.Thread(target=worker.work)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        thread.join()


def masters_of(sockets: Path) -> list[str]:
    """The command lines of ssh processes that speak through sockets in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        if command.startswith(b"ssh") and str(sockets).encode() in command:
            found.append(command.decode(errors="replace"))
    return found
