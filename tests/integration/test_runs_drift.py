"""Drift, from the wish to the machine's page: a real playbook in check mode, heard by the product's own plugin.

The tasks are small and on this machine; that a converged host shows none, and one changed by hand does, is shown on a
real host in tests/e2e/test_operations.py.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from portal.integrations import queue
from portal.models import AuditEntry, Machine, Run
from portal.services import config, drift, runs
from portal.services.actors import SYSTEM
from portal.settings import Settings
from portal.worker.main import Worker
from tests.support.runs import ROOT, make_machine, project
from tests.support.waiting import until

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
Look = Callable[..., Run]
PASSWORD = "the-Password-nobody-may-read-7"
PLUGIN = ROOT / "playbooks" / "callback_plugins" / "drift.py"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "host"
    folder.mkdir()
    return folder


@pytest.fixture
def look(database: Any, settings: Settings, tmp_path: Path) -> Iterator[Look]:
    """`look(tasks, machine, …)` looks at these machines with a drift.yml of these tasks, and answers the ended run."""
    config.use(settings)
    queue.use(settings)
    with ExitStack() as stack:

        def start(tasks: str, *machines: Machine, more: str = "") -> Run:
            where = project(tmp_path / "project", tasks, playbook="drift")
            book = where / "playbooks" / "drift.yml"
            *_, last = yaml.safe_load((ROOT / "playbooks" / "drift.yml").read_text())
            book.write_text(book.read_text() + more + yaml.safe_dump([last]))
            (where / "playbooks" / "callback_plugins").mkdir()
            shutil.copy(PLUGIN, where / "playbooks" / "callback_plugins")
            run = runs.queue(drift.PLAYBOOK, machines, by=SYSTEM)
            worker = Worker(settings, project=where)
            thread = threading.Thread(target=worker.work)
            thread.start()
            stack.callback(thread.join)
            stack.callback(worker.stop)
            return until(lambda: _if_ended(run), "the look to end", timeout_s=90, also=lambda: output(run))

        yield start


def _if_ended(run: Run) -> Run | None:
    now = runs.get_run(run.id)
    return now if runs.is_ended(now) else None


def output(run: Run) -> str:
    return "\n".join(event.stdout for event in runs.output_after(run.id, 0, limit=10_000))


def file_task(path: Path, content: str, mode: str = "0644", **words: str) -> str:
    """A task that wants this file to be so; `words` are of the task itself."""
    copy = {"content": content, "dest": str(path), "mode": mode}
    more = "".join(f"  {name}: {value}\n" for name, value in words.items())
    return f"- name: Ensure {path.name}\n  ansible.builtin.copy: {json.dumps(copy)}\n{more}"


def test_what_differs_is_kept_with_its_time_and_nothing_is_changed(look: Look, files: Path) -> None:
    machine = make_machine("gpu-1")
    (files / "right").write_text("as it should be\n")
    (files / "wrong").write_text("kept\nby hand\n")
    for name in ("right", "wrong"):
        (files / name).chmod(0o644)
    tasks = file_task(files / "right", "as it should be\n") + file_task(files / "wrong", "kept\nby us\n")
    run = look(tasks, machine)
    assert run.state == "succeeded", output(run)
    found = drift.find(machine)
    assert found is not None
    assert (found.state, found.reason, found.run_id) == ("drifted", None, run.id)
    assert [(change["path"], change["task"]) for change in found.changes] == [(str(files / "wrong"), "Ensure wrong")]
    assert found.changes[0]["diff"].splitlines()[-2:] == ["-by hand", "+by us"]
    assert run.started_at <= found.looked_at
    assert (files / "wrong").read_text() == "kept\nby hand\n", "looking changes nothing"
    assert run.verdicts == {"gpu-1": {"state": "drifted", "reason": None, "changes": 1}}
    told = AuditEntry.get(AuditEntry.action == "machine.drift_looked_at")
    assert (told.resource_id, told.detail["state"], told.detail["changes"]) == (machine.id, "drifted", 1)


def test_no_secret_is_kept_of_what_differs(look: Look, files: Path) -> None:
    machine = make_machine("gpu-1")
    for name in ("private", "hidden", "silent", "public"):
        (files / name).write_text(f"password={PASSWORD}\nkey https://ops:{PASSWORD}@example.org\n")
    (files / "private").chmod(0o600)
    (files / "public").chmod(0o644)
    tasks = (
        file_task(files / "private", "other", "0600", diff="false")
        + file_task(files / "hidden", "other", "0644", no_log="true")
        + file_task(files / "silent", "other", "0644", diff="false")
        + file_task(files / "public", "other", "0644")
    )
    run = look(tasks, machine)
    found = drift.find(machine)
    assert found is not None
    assert {change["task"] for change in found.changes} == {
        "Ensure private",
        "Ensure hidden",
        "Ensure silent",
        "Ensure public",
    }
    assert PASSWORD not in str(found.changes), found.changes
    assert "password=•••" in str(found.changes), "that it differs is shown, the secret is not"
    assert "ops" not in str([change["diff"] for change in found.changes])
    assert PASSWORD not in str(run.verdicts)


def test_a_file_that_not_everybody_reads_is_named_and_not_shown_though_its_task_would(look: Look, files: Path) -> None:
    machine = make_machine("gpu-1")
    (files / "private").write_text("a word that looks like nothing\n")
    (files / "private").chmod(0o600)
    look(file_task(files / "private", "other", "0600"), machine)
    found = drift.find(machine)
    assert found is not None
    (change,) = found.changes
    assert change["path"] == str(files / "private")
    assert "not shown" in change["diff"]
    assert "looks like nothing" not in str(found.changes)


def test_a_host_that_cannot_be_reached_is_unknown(look: Look, files: Path) -> None:
    here, away = make_machine("gpu-1"), make_machine("gpu-2", address="192.0.2.1", ssh_port=1)
    more = """
- name: There
  hosts: gpu_hosts
  gather_facts: false
  vars:
    ansible_ssh_common_args: -o ConnectTimeout=1
    ansible_connection: "{{ 'ssh' if inventory_hostname == 'gpu-2' else 'local' }}"
  tasks:
    - name: Ask
      ansible.builtin.command: 'true'
      check_mode: false
      changed_when: false
"""
    run = look("- name: Look\n  ansible.builtin.command: 'true'\n  changed_when: false", here, away, more=more)
    assert run.state == "failed", "somebody has to look why"
    rows = {machine.name: drift.find(machine) for machine in (here, away)}
    assert rows["gpu-1"] is not None
    assert rows["gpu-1"].state == "none"
    assert rows["gpu-2"] is not None
    assert rows["gpu-2"].state == "unknown"
    assert "192.0.2.1" in rows["gpu-2"].reason
    assert [machine.name for machine in drift.search(state="unknown")] == ["gpu-2"]


def test_a_host_that_was_not_asked_any_more_since_others_failed_is_unknown(look: Look) -> None:
    """Where all hosts of a play have failed, Ansible plays no other, on nobody."""
    plain, with_card = make_machine("gpu-1"), make_machine("gpu-2")
    more = """
- name: Cards
  hosts: gpu-2
  gather_facts: false
  tasks:
    - name: Refuse
      ansible.builtin.fail: {msg: Nobody has vouched for it.}
- name: Agents
  hosts: gpu_hosts
  gather_facts: false
  tasks:
    - name: Would change it
      ansible.builtin.debug: {msg: x}
      changed_when: true
"""
    run = look("- name: Look\n  ansible.builtin.debug: {msg: fine}", plain, with_card, more=more)
    assert run.state == "failed"
    here, there = drift.find(plain), drift.find(with_card)
    assert here is not None
    assert (here.state, "not all of it was looked at" in (here.reason or "")) == ("unknown", True)
    assert there is not None
    assert (there.state, there.reason) == ("unknown", "Refuse: Nobody has vouched for it.")


def test_a_host_that_was_looked_at_in_part_is_not_without_drift(look: Look) -> None:
    whole, part = make_machine("gpu-1"), make_machine("gpu-2")
    tasks = (
        "- name: Refuse\n  ansible.builtin.fail: {msg: This host is too old.}\n"
        "  when: inventory_hostname == 'gpu-2'\n"
        "- name: Try\n  block:\n    - name: Stumble\n      ansible.builtin.fail: {msg: but get up}\n"
        "  rescue:\n    - name: Get up\n      ansible.builtin.debug: {msg: up}\n"
    )
    look(tasks, whole, part)
    found, stopped = drift.find(whole), drift.find(part)
    assert found is not None
    assert (found.state, found.reason) == ("none", None), "what was rescued is no failure"
    assert stopped is not None
    assert (stopped.state, stopped.reason) == ("unknown", "Refuse: This host is too old.")
