"""The worker process: claims queued runs, one thread each, takes over those of dead workers, and sweeps.

Any number of workers may run, on any number of machines: the rows decide who has what. A worker that is told to stop
ends its runs and gives them back.
"""

from __future__ import annotations

import logging
import signal
import threading
import uuid
from pathlib import Path

from portal import start
from portal.db import AWAY, connection
from portal.integrations import queue
from portal.integrations.faults import point
from portal.integrations.runner import end_leftovers
from portal.models import Run
from portal.services import drift, runs
from portal.services.transitions import WrongState
from portal.settings import Settings
from portal.worker import directory
from portal.worker.execution import Execution
from portal.worker.sweeper import sweep_until

LOG = logging.getLogger(__name__)

HEARERS = (drift,)  # told of the end of a run, and needed by nobody else here
LOOK_S = 1.0  # how long a run whose bell was not heard waits
SWEEP_DIRECTORIES_S = 60


class Worker:
    """`project` is where playbooks/ and ansible.cfg lie; only a test names another place than the product's own."""

    def __init__(self, settings: Settings, *, project: Path = directory.PROJECT) -> None:
        self._settings, self._project = settings, project
        self._stopping, self._heard = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._rounds = 0

    def stop(self) -> None:
        """Claim nothing more, give back what runs, and return from `work`."""
        self._stopping.set()
        self._heard.set()

    def work(self) -> None:
        """Until `stop`. The process must be bound, and the database migrated."""
        helpers = [
            threading.Thread(target=queue.bell().listen, args=(self._heard, self._stopping), name="bell"),
            threading.Thread(
                target=sweep_until, args=(self._stopping, self._settings.sweep_interval_s), name="sweeper"
            ),
        ]
        for thread in helpers:
            thread.start()
        while not self._stopping.is_set():
            self._heard.clear()
            try:
                with connection():
                    self._look()
            except AWAY:
                LOG.warning("the database does not answer; runs go on when it does", exc_info=True)
            except Exception:  # of one run or directory: the worker is there for all of them
                LOG.exception("looking for runs failed; the worker looks again")
            self._heard.wait(LOOK_S)
        for thread in (*self._threads, *helpers):
            thread.join()

    def _look(self) -> None:
        if self._rounds % SWEEP_DIRECTORIES_S == 0:
            directory.sweep(self._settings)
        self._rounds += 1
        self._take_over()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while len(self._threads) < self._settings.runs_at_once and not self._stopping.is_set():
            token = str(uuid.uuid4())
            run = runs.claim(token, lock_s=self._settings.run_lock_s)
            if run is None:
                return
            self._start(run, token)

    def _start(self, run: Run, token: str) -> None:
        LOG.info("run %s: %s, attempt %s", run.id, run.playbook, run.attempt)
        execution = Execution(run, token, self._settings, project=self._project, worker_stops=self._stopping)
        thread = threading.Thread(target=self._execute, args=(execution,), name=f"run {run.id}")
        self._threads.append(thread)
        thread.start()

    def _execute(self, execution: Execution) -> None:
        execution.execute()
        self._heard.set()  # its place is free

    def _take_over(self) -> None:
        """End what a dead worker's runs left here, then let the rules decide what becomes of them."""
        while run := runs.take_over(token := str(uuid.uuid4()), lock_s=self._settings.run_lock_s):
            mark = run.child["mark"]
            path = directory.path_of(self._settings, mark)
            LOG.warning("run %s: its worker is gone", run.id)
            unkillable = end_leftovers(mark, run.child, path)
            point("take_over.killed")
            directory.remove(path)
            reason = "The worker that held it is gone."
            if unkillable:
                reason += f" The processes {unkillable} could not be ended."
            try:
                runs.lose(run, token, reason=reason, remains=runs.open_work(run))
            except WrongState:
                LOG.warning("run %s was taken over by somebody else meanwhile", run.id)


def main(settings: Settings, *, project: Path = directory.PROJECT) -> None:
    """Bind this process to the database and work until SIGTERM or SIGINT."""
    start.bind(settings)
    worker = Worker(settings, project=project)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.work()
