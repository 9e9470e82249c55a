"""A worker is killed at every commit and between: the run ends as lost or is taken up again, never stuck, never twice.

The list of points is integrations/faults.py; it is printed at the end, passed or not: what became of the run at each.
"""

from __future__ import annotations

import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from portal.db import atomic
from portal.integrations.faults import POINTS
from portal.models import Run, RunEvent, RunHost
from portal.services import runs
from portal.services.actors import SYSTEM
from portal.settings import Settings
from tests.factories import make_lease, make_tenant
from tests.support.runs import Watch, make_machine, marked, project, start_worker
from tests.support.waiting import until

# Of a worker that is to be late, or to renew its lock. Whoever is to be in time has the usual one of 30 s: on a busy
# machine a worker with a lock of 2 s may be late by itself, and give its run up as it should.
SHORT_LOCK_S = 2.0
TASKS = """
- name: Begin
  ansible.builtin.debug: {msg: begun}
- name: Work for longer than a renewal takes
  ansible.builtin.command: sleep 1
"""
# One of each kind; `make test-slow` walks the rest.
ALWAYS = {"claim.before_commit", "child.committed", "events.committed", "finish.before_commit", "take_over.killed"}
AFTER_A_DEATH = ("take_over.", "lose.")  # passed only by a worker that picks up after another
REFUSED = ("give_up.",)  # passed only with a run that may not begin any more

# PostgreSQL takes as long again, and differs in what a transaction is, which a few of the points show as well.
ON_BOTH = pytest.mark.parametrize(
    "database_url",
    ["sqlite", pytest.param("postgresql", marks=[pytest.mark.postgresql, pytest.mark.slow])],
    indirect=True,
)

StartWorker = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(database: Any, settings: Settings, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers for the project in `tmp_path`, and ends them with the test."""
    where = project(tmp_path / "project", TASKS)
    workers: list[subprocess.Popen[bytes]] = []

    def start(fault: str | None = None, *, lock_s: float | None = None) -> subprocess.Popen[bytes]:
        workers.append(start_worker(settings, where, fault=fault, lock_s=lock_s))
        return workers[-1]

    yield start
    for worker in workers:
        worker.send_signal(signal.SIGCONT)
        worker.terminate()
        worker.wait(timeout=30)


def let_the_lock_run_out(settings: Settings) -> None:
    """As if the time had passed that a dead worker's lock still has; a lock that never ends would stay."""
    with atomic():
        for run in Run.select().where(Run.lock_expires_at.is_null(False)):
            run.lock_expires_at -= timedelta(seconds=settings.run_lock_s)
            run.save(only=[Run.lock_expires_at])


@pytest.fixture(scope="module")
def became(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Point → what became of the run whose worker died there, for the list that is printed after the last of them."""
    became: dict[str, str] = {}
    yield became
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nA worker may die at {len(POINTS)} points, and was killed at {len(became)} of them:")
        print(*(f"  {point:<24} {what}" for point, what in became.items()), sep="\n")
        rest = "in another run: " + " ".join(point for point in POINTS if point not in became)
        print(textwrap.indent(textwrap.fill(rest, 110), "  "), flush=True)


@ON_BOTH
@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[] if point in ALWAYS else [pytest.mark.slow]) for point in POINTS]
)
def test_a_run_survives_the_death_of_its_worker(
    start: StartWorker, settings: Settings, tmp_path: Path, became: dict[str, str], point: str
) -> None:
    machine = make_machine()
    run = runs.queue("gpu_hosts", [machine], by=SYSTEM)
    if point.startswith(REFUSED):
        make_lease(machine, make_tenant("Acme"))
    with Watch(tmp_path) as watch:
        if point.startswith(AFTER_A_DEATH):
            assert start("child.committed:1").wait(timeout=60) == -signal.SIGKILL
            let_the_lock_run_out(settings)
        lock_s = SHORT_LOCK_S if point.startswith("renew.") else None  # the usual one is not renewed so soon
        assert start(f"{point}:1", lock_s=lock_s).wait(timeout=60) == -signal.SIGKILL, f"{point} was never passed"
        let_the_lock_run_out(settings)
        start()
        ended = until(lambda: _ended(run), f"run {run.id} to end", timeout_s=60, also=lambda: Run.get().__data__)
    became[point] = f"{ended.state} in attempt {ended.attempt}, {len(watch.seen)} ansible-playbook"
    if point.startswith(REFUSED):
        assert (ended.state, watch.seen) == ("cancelled", set())
        assert str(ended.reason).startswith("gpu-1: leased")
    else:
        assert ended.state == "succeeded", ended.reason
    assert len(watch.most) <= 1, "two of one host at the same time"
    assert RunHost.select().where(RunHost.active).count() == 0
    _assert_output_is_whole(ended)
    until(lambda: not list(settings.runs_dir.glob("*")), "the private directories to go")
    assert not [mark for mark in marked().values() if mark in watch.seen], "no process is left"


def _ended(run: Run) -> Run | None:
    now = runs.get_run(run.id)
    return now if runs.is_ended(now) else None


def _assert_output_is_whole(run: Run) -> None:
    counters = [event.counter for event in RunEvent.select().where(RunEvent.run == run).order_by(RunEvent.counter)]
    assert counters == list(range(1, len(counters) + 1))
    assert run.event_count == len(counters)


@ON_BOTH
def test_a_killed_executor_is_a_lost_run(start: StartWorker, tmp_path: Path) -> None:
    run = runs.queue("site", [make_machine()], by=SYSTEM)
    (tmp_path / "project" / "playbooks" / "gpu_hosts.yml").rename(tmp_path / "project" / "playbooks" / "site.yml")
    start()
    child = until(
        lambda: (Run.get().child or {}).get("pid") and Run.get().child, "the run to be under way", timeout_s=90
    )
    for pid, mark in marked(child["mark"]).items():
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if mark == child["mark"] and b"portal.worker.executor" in command and b"setpriv" not in command:
            subprocess.run(["kill", "-9", str(pid)], check=True)
    ended = until(lambda: _ended(run), "the run to end")
    assert (ended.state, ended.reason) == ("lost", "The process of the run was gone without a result.")
    assert marked(child["mark"]) == {}


@ON_BOTH
def test_a_stopped_worker_gives_its_run_back(start: StartWorker, settings: Settings) -> None:
    run = runs.queue("gpu_hosts", [make_machine()], by=SYSTEM)
    worker = start()
    child = until(
        lambda: (Run.get().child or {}).get("pid") and Run.get().child, "the run to be under way", timeout_s=90
    )
    worker.terminate()
    assert worker.wait(timeout=15) == 0
    assert runs.get_run(run.id).state == "queued"
    assert marked(child["mark"]) == {}
    assert list(settings.runs_dir.glob("*")) == []
    start()
    assert until(lambda: _ended(run), "the run to end").state == "succeeded"


def test_a_worker_that_hangs_loses_its_run_and_what_it_says_later_is_void(start: StartWorker, tmp_path: Path) -> None:
    run = runs.queue("gpu_hosts", [make_machine()], by=SYSTEM)
    with Watch(tmp_path) as watch:
        hung = start(lock_s=SHORT_LOCK_S)
        held = hold_up(hung, watch)
        start()
        until(lambda: Run.get().attempt == held.attempt + 1, "another worker to take it up", timeout_s=90)
        hung.send_signal(signal.SIGCONT)
        ended = until(lambda: _ended(run), "the run to end", timeout_s=90, also=lambda: Run.get().__data__)
    assert (ended.state, ended.attempt) == ("succeeded", held.attempt + 1)
    assert len(watch.most) == 1
    _assert_output_is_whole(ended)


def hold_up(worker: subprocess.Popen[bytes], watch: Watch) -> Run:
    """Let the worker hang while it holds the run, until the executor has ended that; returns the run as it was held."""
    until(lambda: (Run.get().child or {}).get("pid"), "the run to have an executor", timeout_s=90)
    until(lambda: watch.seen, "its playbook to begin", timeout_s=90)
    worker.send_signal(signal.SIGSTOP)
    until(lambda: is_stopped(worker), "the worker to hang")
    held: Run = Run.get()
    until(lambda: not marked(held.child["mark"]), "the executor to end by itself", timeout_s=SHORT_LOCK_S + 90)
    return held


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_worker_that_was_held_up_gives_its_run_up_and_says_why(start: StartWorker, tmp_path: Path) -> None:
    run = runs.queue("gpu_hosts", [make_machine()], by=SYSTEM)
    with Watch(tmp_path) as watch:
        worker = start(lock_s=SHORT_LOCK_S)
        held = hold_up(worker, watch)
        worker.send_signal(signal.SIGCONT)
        until(lambda: Run.get().attempt > held.attempt or _ended(run), "the run to begin anew", timeout_s=90)
    said = [event.stdout for event in RunEvent.select().where(RunEvent.kind == "run.lost")]
    assert said[-1].startswith("The worker was held up for longer than the run may go on unwatched, so it was ended.")
    assert len(watch.most) == 1
