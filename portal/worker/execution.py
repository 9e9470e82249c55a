"""One attempt at one run, from the claim to its end, in a thread of its own.

The thread writes the private directory, starts the executor, and then only listens: output goes into the database in
batches, the lock is renewed at a third of its time, a wish to cancel and the time limit are obeyed. Every write counts
only while the token is ours; once it is not, the executor is ended and nothing more is said.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from portal.db import AWAY, connection, utcnow
from portal.errors import Error, incident
from portal.integrations.faults import point
from portal.integrations.processes import Process
from portal.integrations.runner import Runner
from portal.models import Run
from portal.services import runs
from portal.services.audit import MASK
from portal.services.runs import Line, Outcome
from portal.services.transitions import WrongState
from portal.settings import Settings
from portal.worker import directory

LOG = logging.getLogger(__name__)

BATCH_S = 0.2  # how old output may get before it is kept and shown
BATCH_LINES = 200
LISTEN_S = 0.1
LOOK_S = 0.5  # how often a wish to cancel is looked for

FAILURES = ("runner_on_failed", "runner_on_unreachable")
T = TypeVar("T")


@dataclass
class Heard:
    """What the executor has said so far."""

    waiting: list[Line] = field(default_factory=list)
    waiting_since: float = 0.0
    stats: dict[str, Any] | None = None
    failure: Line | None = None
    ended: bool = False
    exit_code: int | None = None


class Execution:
    """`worker_stops` is set when this worker is to end: the run is then given back."""

    def __init__(
        self, run: Run, token: str, settings: Settings, *, project: Path, worker_stops: threading.Event
    ) -> None:
        self._run, self._token, self._settings, self._project = run, token, settings, project
        self._worker_stops, self._limit_s = worker_stops, settings.run_timeout_s
        self._mark = run.child["mark"]
        self._path = directory.path_of(settings, self._mark)
        self._heard = Heard()
        self._secrets: tuple[str, ...] = ()
        self._hosts: tuple[str, ...] = ()
        self._lock_ends_at = time.monotonic() + settings.run_lock_s
        self._next_renewal = time.monotonic() + settings.run_lock_s / 3
        self._next_look = 0.0

    def execute(self) -> None:
        """Run it. Never raises: what goes wrong becomes the run's end, or is left to whoever takes it over."""
        try:
            self._execute()
        except WrongState:
            LOG.warning("run %s is held by somebody else by now; what was done here is void", self._run.id)
        except AWAY:
            LOG.exception("run %s: the database is away; the run is taken up when its lock has expired", self._run.id)
        except Exception:
            number = incident()
            LOG.exception("incident %s: run %s could not be executed", number, self._run.id)
            reason = (
                f"The worker could not execute it: the log has why, as incident {number}. Mend that and run it again."
            )
            with contextlib.suppress(WrongState, *AWAY):
                self._finish(Outcome("failed", reason=reason))
        finally:
            directory.remove(self._path)
            point("directory.removed")

    def _execute(self) -> None:
        try:
            self._prepare()
        except Error as refusal:  # no host left, no key to reach it: nothing was started
            self._finish(Outcome("failed", reason=refusal.message))
            return
        runner = Runner(self._path, self._mark)
        try:
            point("child.started")
            why = self._listen(runner)
            self._conclude(runner, why)
        finally:
            runner.close()

    def _prepare(self) -> None:
        directory.make(self._settings, self._mark)
        point("directory.made")
        with connection():
            prepared = directory.fill(self._path, self._run, self._settings, self._project)
        self._secrets, self._hosts = prepared.secrets, prepared.hosts
        point("directory.written")

    # ── listen ──

    def _listen(self, runner: Runner) -> str | None:
        """Follow the run until it ends by itself (None) or must be ended: `cancel`, `timeout` or `stop`."""
        limit_at = time.monotonic() + self._limit_s
        named = False
        while (said := runner.messages(LISTEN_S)) is not None:
            for message in said:
                self._hear(message)
            if runner.child and not named:
                named = True
                self._name_child(runner.child)
            self._keep_output()
            self._hold_on(runner)
            if self._run.cancel_requested_at is not None:
                return "cancel"
            if time.monotonic() > limit_at:
                return "timeout"
            if self._worker_stops.is_set():
                return "stop"
        return None

    def _name_child(self, child: Process) -> None:
        self._write(lambda: runs.record_child(self._run, self._token, child.as_dict(), lock_s=self._lock_s))

    @property
    def _lock_s(self) -> float:
        return self._settings.run_lock_s

    def _write(self, write: Callable[[], T]) -> T:
        """Write something that also holds the lock. A database that is away for a moment ends no run; one that is away
        for longer than our lock does, and what `write` raises for it is passed on."""
        while True:
            began = time.monotonic()
            try:
                with connection():
                    written = write()
            except AWAY:
                if began > self._lock_ends_at:
                    raise
                time.sleep(LISTEN_S)
            else:
                self._lock_ends_at = began + self._lock_s
                return written

    def _keep_output(self) -> None:
        heard = self._heard
        is_old = heard.waiting and time.monotonic() - heard.waiting_since > BATCH_S
        if is_old or len(heard.waiting) >= BATCH_LINES:
            self._write(lambda: runs.record(self._run, self._token, heard.waiting, lock_s=self._lock_s))
            heard.waiting = []

    def _hold_on(self, runner: Runner) -> None:
        """Renew the lock when that is due, and say so to the executor; now and then see what the row says."""
        now = time.monotonic()
        if now >= self._next_renewal:
            self._run = self._write(lambda: runs.keep(self._run, self._token, lock_s=self._lock_s))
            self._next_renewal = now + self._lock_s / 3
            runner.keep_alive()
        elif now >= self._next_look:
            self._next_look = now + LOOK_S
            with contextlib.suppress(*AWAY), connection():
                self._run = runs.get_run(self._run.id)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["type"] == "end":
            point("end.seen")
            self._heard.ended, self._heard.exit_code = True, message["rc"]
        elif message["type"] == "event":
            self._heard.stats = message.get("stats") or self._heard.stats
            if not self._heard.waiting:
                self._heard.waiting_since = time.monotonic()
            line = self._line(message)
            self._heard.waiting.append(line)
            if line.kind in FAILURES and not (line.data or {}).get("ignored"):
                self._heard.failure = line

    def _line(self, message: dict[str, Any]) -> Line:
        data = message["data"] or {}
        return Line(
            kind=message["kind"][:40],
            stdout=self._plain(message["stdout"]),
            host=message["host"],
            task=self._plain(message["task"]) if message["task"] else None,
            data={name: self._plain(value) if isinstance(value, str) else value for name, value in data.items()}
            or None,
            at=_moment(message["at"]),
        )

    def _plain(self, text: str) -> str:
        """Text that any database takes, without the secrets of this run: a password that is printed is not kept."""
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return text.replace("\0", "�").encode("utf-8", "replace").decode()

    # ── conclude ──

    def _conclude(self, runner: Runner, why: str | None) -> None:
        """Write the end. Before that nothing of the run is left: the next one on its hosts must be alone."""
        if why is not None:
            runner.end()
            self._drain(runner)
        verdicts = directory.verdicts(self._path)
        if unkillable := runner.close():
            LOG.error("run %s: the processes %s could not be ended", self._run.id, unkillable)
        heard = self._heard
        if why == "cancel":
            self._finish_ended_by_us("cancelled", "Cancelled while it ran.")
        elif why == "timeout":
            self._finish_ended_by_us("failed", f"It took longer than the limit of {self._limit_s} s and was ended.")
        elif why == "stop":
            self._lose("The worker was stopped.")
        elif runner.was_let_down:
            self._lose("The worker was held up for longer than the run may go on unwatched, so it was ended.")
        elif not heard.ended or heard.exit_code is None:
            self._lose("The process of the run was gone without a result.")
        else:
            reason = self._why_failed()
            state = "succeeded" if reason is None else "failed"
            self._finish(Outcome(state, heard.exit_code, reason, stats=heard.stats, verdicts=verdicts))

    def _drain(self, runner: Runner) -> None:
        """What was printed before the end belongs to the run; wait for it a moment, not longer."""
        give_up_at = time.monotonic() + 3
        while time.monotonic() < give_up_at and (said := runner.messages(LISTEN_S)) is not None:
            for message in said:
                self._hear(message)

    def _finish_ended_by_us(self, state: str, reason: str) -> None:
        self._finish(Outcome(state, None, reason, self._open_work(), self._heard.stats))

    def _lose(self, reason: str) -> None:
        remains = self._open_work()
        self._write(lambda: runs.lose(self._run, self._token, reason=reason, remains=remains))

    def _open_work(self) -> str | None:
        """What may still go on at the hosts; all that was heard is kept first, since it is read from there."""
        lines, self._heard.waiting = self._heard.waiting, []
        self._write(lambda: runs.record(self._run, self._token, lines, lock_s=self._lock_s))
        return self._write(lambda: runs.open_work(self._run))

    def _finish(self, outcome: Outcome) -> None:
        self._write(lambda: runs.finish(self._run, self._token, outcome, self._heard.waiting))

    def _why_failed(self) -> str | None:
        """The playbook's own words, for somebody who reads one line; None if it did not fail."""
        heard = self._heard
        if heard.exit_code == 0:
            # Ansible calls it success when no host matched: to us a host that was not reached is a failure.
            missed = [name for name in self._hosts if name not in (heard.stats or {})]
            return f"Nothing was done on {', '.join(missed)}; see the start of the output." if missed else None
        if heard.failure is None:
            return f"ansible-playbook ended with code {heard.exit_code}; see the output."
        message = (heard.failure.data or {}).get("message") or "failed"
        return f"{heard.failure.host}: {heard.failure.task}: {message}"[:2000]


def _moment(text: str | None) -> datetime:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return utcnow()
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
