"""What a run does on this machine: its output, its end, what it may know, and that nothing of it stays."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peewee
import pytest

from portal.integrations import queue
from portal.models import Machine, Run
from portal.services import config, runs, vault
from portal.services.actors import SYSTEM
from portal.settings import Settings
from portal.worker.execution import Execution
from portal.worker.main import Worker
from tests.support.runs import make_machine, marked, project, start_worker
from tests.support.waiting import until

PASSWORD = "s3cret-Of-First-Contact"
Work = Callable[[str], None]

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def work(database: Any, settings: Settings, tmp_path: Path) -> Iterator[Work]:
    """`work(tasks)` starts a worker in this process, for a playbook of these tasks."""
    config.use(settings)
    queue.use(settings)
    started: list[tuple[Worker, threading.Thread]] = []

    def start(tasks: str) -> None:
        worker = Worker(settings, project=project(tmp_path / "project", tasks))
        thread = threading.Thread(target=worker.work)
        thread.start()
        started.append((worker, thread))

    yield start
    for worker, thread in started:
        worker.stop()
        thread.join()


@pytest.fixture
def machine(database: Any) -> Machine:
    return make_machine()


def ended(run: Run) -> Run:
    return until(lambda: _if_ended(run), f"run {run.id} to end", timeout_s=60, also=lambda: output(run))


def _if_ended(run: Run) -> Run | None:
    now = runs.get_run(run.id)
    return now if runs.is_ended(now) else None


def output(run: Run) -> str:
    return "\n".join(event.stdout for event in runs.output_after(run.id, 0, limit=10_000))


def test_a_run_leaves_its_output_its_numbers_and_nothing_else(work: Work, machine: Machine, settings: Settings) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Say\n  ansible.builtin.debug: {msg: hello}\n- name: Do\n  ansible.builtin.command: 'true'")
    done = ended(run)
    assert (done.state, done.exit_code, done.reason) == ("succeeded", 0, None)
    assert done.stats["gpu-1"] == {
        "ok": 2, "changed": 1, "failed": 0, "unreachable": 0, "skipped": 0, "rescued": 0, "ignored": 0,
    }  # fmt: skip
    assert "hello" in output(run)
    assert done.event_count == len(runs.output_after(run.id, 0))
    until(lambda: not list(settings.runs_dir.glob("*")), "the private directory to go")
    assert done.child["mark"] not in marked().values()


def test_a_failed_run_says_in_one_line_why(work: Work, machine: Machine) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Break\n  ansible.builtin.fail: {msg: The disk is full.}")
    done = ended(run)
    assert (done.state, done.exit_code) == ("failed", 2)
    assert done.reason == "gpu-1: Break: The disk is full."


def test_a_playbook_that_touches_no_host_is_no_success(work: Work, machine: Machine, tmp_path: Path) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Say\n  ansible.builtin.debug: {msg: hello}")
    book = tmp_path / "project" / "playbooks" / "gpu_hosts.yml"
    book.write_text(book.read_text().replace("hosts: gpu_hosts", "hosts: others"))
    done = ended(run)
    assert done.state == "failed"
    assert "Nothing was done on gpu-1" in (done.reason or "")


def test_cancel_leaves_no_process_and_names_what_may_remain(work: Work, machine: Machine) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    # A module that forks away from its session, as daemons do, must end as well.
    work("- name: Wait\n  ansible.builtin.shell: setsid sleep 600 & exec sleep 600")
    until(lambda: any(event.task == "Wait" for event in runs.output_after(run.id, 0)), "the task to begin")
    mark = runs.get_run(run.id).child["mark"]
    until(lambda: len([pid for pid, at in marked().items() if at == mark and is_sleep(pid)]) == 2, "both to sleep")
    runs.cancel(run, by=SYSTEM)
    done = ended(run)
    assert done.state == "cancelled"
    assert done.remains == "May still run on the host: gpu-1: Wait"
    assert mark not in marked().values()


def is_sleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"


def test_a_run_over_its_time_is_ended_and_does_not_hold_up_another(
    work: Work, machine: Machine, settings: Settings
) -> None:
    object.__setattr__(settings, "run_timeout_s", 15)
    stuck = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Wait\n  ansible.builtin.command: sleep 600\n  when: inventory_hostname == 'gpu-1'")
    until(lambda: runs.output_after(stuck.id, 0), "the stuck run to begin")
    object.__setattr__(settings, "run_timeout_s", 600)  # for the next run; each keeps the limit it began with
    other = runs.queue("gpu_hosts", [make_machine("gpu-2")], by=SYSTEM)
    assert ended(other).state == "succeeded"
    done = ended(stuck)
    assert (done.state, done.reason) == ("failed", "It took longer than the limit of 15 s and was ended.")
    assert done.child["mark"] not in marked().values()


def test_of_the_runs_that_are_queued_as_many_go_on_at_once_as_the_setting_says(
    work: Work, settings: Settings, tmp_path: Path
) -> None:
    object.__setattr__(settings, "runs_at_once", 2)
    queued = [runs.queue("gpu_hosts", [make_machine(f"gpu-{number}")], by=SYSTEM) for number in range(3)]
    go_on = tmp_path / "go-on"
    work(f"- name: Wait\n  ansible.builtin.wait_for: {{path: {go_on}, sleep: 1}}\n  delegate_to: localhost")
    for run in queued[:2]:
        until(lambda run=run: runs.output_after(run.id, 0), f"run {run.id} to begin")  # type: ignore[misc]
    assert runs.get_run(queued[2].id).state == "queued"
    go_on.touch()
    assert [ended(run).state for run in queued] == ["succeeded"] * 3
    first_ends = min(ended(run).ended_at for run in queued[:2])
    assert ended(queued[2]).started_at >= first_ends


DUMP = """\
- name: Tell everything
  ansible.builtin.debug: {{var: "hostvars[inventory_hostname]"}}
- name: Fail with it
  ansible.builtin.fail: {{msg: "it is {{{{ ansible_password }}}}"}}
  ignore_errors: true
- name: Look at every process of this run
  ansible.builtin.shell: |
    for process in /proc/[0-9]*; do
      grep -qsaF "$REMOTEGPU_RUN_ID" $process/environ && cat $process/cmdline $process/environ >>{seen}
    done; true
"""


def test_no_secret_is_on_a_command_line_in_an_environment_or_in_the_output(
    database: Any, settings: Settings, tmp_path: Path
) -> None:
    contact = json.dumps({"password": PASSWORD, "become_password": PASSWORD + "-root"})
    run = runs.queue("gpu_hosts", [make_machine(first_contact=vault.encrypt(contact))], by=SYSTEM)
    seen = tmp_path / "seen"
    worker = start_worker(settings, project(tmp_path / "project", DUMP.format(seen=seen)))  # secrets in its environment
    try:
        done = ended(run)
    finally:
        worker.terminate()
        worker.wait(timeout=30)
    assert done.state == "succeeded", output(run)
    told = output(run) + json.dumps([event.data for event in runs.output_after(run.id, 0)])
    assert "ansible_password" in told
    assert "•••" in told
    processes = seen.read_bytes()
    assert processes.count(b"ansible-playbook") >= 2
    secrets = (PASSWORD, settings.encryption_key, settings.secret_key, settings.jwt_secret_key, settings.database_url)
    for secret in secrets:
        assert secret.encode() not in processes
        assert secret not in told


def test_strings_from_the_portal_stay_strings(work: Work, settings: Settings, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    evil = f"{{{{ lookup('pipe', 'touch {planted}') }}}}"
    machine = make_machine(ssh_user=evil[:32])
    Machine.update(ssh_user="ops", labels={"a": evil}, remark=evil).execute()
    object.__setattr__(settings, "public_url", f"http://localhost/{evil}")
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Say\n  ansible.builtin.debug: {msg: '{{ remotegpu_portal_url }}'}")
    assert ended(run).state == "succeeded"
    assert "lookup('pipe'" in output(run)
    assert not planted.exists()


def test_a_run_knows_nothing_of_the_one_before(work: Work, machine: Machine) -> None:
    first = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Keep\n  ansible.builtin.set_fact: {of_before: 1, cacheable: true}\n  when: of_before is not defined")
    assert ended(first).state == "succeeded"
    second = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    assert "skipping" not in output(ended(second))


def test_a_large_result_reaches_the_row_cut_and_the_run_goes_on(work: Work, machine: Machine) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work(
        "- name: Much\n  ansible.builtin.command: head -c 3000000 /dev/zero\n"
        "- name: Show\n  ansible.builtin.debug: {msg: \"{{ 'x' * 200000 }}\"}"
    )
    assert ended(run).state == "succeeded"
    longest = max(len(event.stdout) for event in runs.output_after(run.id, 0))
    assert 60_000 < longest < 70_000
    assert "characters left out" in output(run)


def test_many_runs_on_one_host_follow_each_other(work: Work, machine: Machine) -> None:
    queued = [runs.queue("gpu_hosts", [machine], by=SYSTEM) for _number in range(3)]
    work("- name: Say\n  ansible.builtin.debug: {msg: hello}")
    done = [ended(run) for run in queued]
    assert [run.state for run in done] == ["succeeded"] * 3
    for before, after in itertools.pairwise(done):
        assert before.ended_at <= after.started_at


def test_the_group_variables_of_the_site_hold_for_a_run_too(work: Work, machine: Machine, tmp_path: Path) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    variables = tmp_path / "project" / "inventory" / "group_vars"
    variables.mkdir(parents=True)
    (variables / "gpu_hosts.yml").write_text("site_says: good morning\n")
    work("- name: Say\n  ansible.builtin.debug: {var: site_says}")
    ended(run)
    assert "good morning" in output(run)


def test_check_mode_changes_nothing(work: Work, machine: Machine, tmp_path: Path) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM, check=True)
    work(f"- name: Make\n  ansible.builtin.file: {{path: {tmp_path}/made, state: touch, mode: '0600'}}")
    assert ended(run).state == "succeeded"
    assert not (tmp_path / "made").exists()


def test_a_worker_hears_the_bell_at_once(work: Work, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portal.worker.main.LOOK_S", 600)
    work("- name: Say\n  ansible.builtin.debug: {msg: hello}")
    first = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    assert ended(first).state == "succeeded"
    second = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    assert ended(second).state == "succeeded"


def test_a_fault_while_looking_for_runs_does_not_end_the_worker(
    work: Work, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("portal.worker.main.LOOK_S", 0.05)
    real, faults = runs.claim, iter([OSError("no space left"), peewee.InterfaceError("connection already closed")])

    def claim(token: str, *, lock_s: float) -> Run | None:
        for fault in faults:
            raise fault
        return real(token, lock_s=lock_s)

    monkeypatch.setattr(runs, "claim", claim)
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    work("- name: Say\n  ansible.builtin.debug: {msg: hello}")
    assert ended(run).state == "succeeded"
    assert [fault in caplog.text for fault in ("no space left", "connection already closed")] == [True, True]


def test_a_fault_of_the_worker_is_told_by_its_incident_and_in_full_by_the_log(
    machine: Machine, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings.runs_dir.parent.mkdir(parents=True, exist_ok=True)
    settings.runs_dir.write_text("no folder")
    runs.queue("gpu_hosts", [machine], by=SYSTEM)
    run = runs.claim("token", lock_s=60)
    assert run is not None
    Execution(run, "token", settings, project=tmp_path, worker_stops=threading.Event()).execute()
    told = runs.get_run(run.id)
    said = re.fullmatch(
        r"The worker could not execute it: the log has why, as incident (\w{12})\. Mend that and run it again\.",
        str(told.reason),
    )
    assert told.state == "failed"
    assert said is not None
    assert f"incident {said[1]}: run {run.id} could not be executed" in caplog.text
    assert str(settings.runs_dir) in caplog.text


def test_nothing_is_started_when_no_host_is_left(work: Work, machine: Machine) -> None:
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    Machine.update(host_key=None).execute()
    work("- name: Say\n  ansible.builtin.debug: {msg: hello}")
    done = ended(run)
    assert done.state == "failed"
    assert "no host left" in (done.reason or "")
    assert "pid" not in done.child
