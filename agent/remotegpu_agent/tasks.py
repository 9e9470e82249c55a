"""Tasks on this host: one attempt is one transient unit of the lease's user, with a cgroup of its own, and outlives
the agent.

Told in the order of an attempt's life: look, start, stop, outcome, log, forget. Everything about an attempt lies in
one directory that belongs to root:

    <tasks_dir>/<attempt id>/          root:lease 0750
        launch, script                 root:lease 0640: the environment, and the customer's own text
        root/                          root 0700: the customer can plant nothing here
            attempt.json               what we know: written by the agent
            stop.json                  somebody asked it to stop: why and when
            log                        its output: written by systemd
            exit.json                  how it ended: written by record-exit.sh
        refused/<attempt id>/          an order of the same id, which had to end unstarted; as above

The boot id tells whether a unit that is missing has ended or was lost. When and why is plan.py's; leases.py ends
tasks too.
"""

import base64
import contextlib
import grp
import logging
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from remotegpu_agent import logs, systemd
from remotegpu_agent.config import Config
from remotegpu_agent.facts import boot_id
from remotegpu_agent.files import find_json, sync_directory, write_atomic, write_json
from remotegpu_agent.journal import Journal
from remotegpu_agent.logs import LogMark
from remotegpu_agent.observe.tools import ToolFailed, run
from remotegpu_agent.plan import HostAttempt
from remotegpu_agent.protocol import DesiredAttempt, format_time, now, parse_time

log = logging.getLogger(__name__)

EXIT_CHDIR = 200  # as systemd has it
RECORDER = "record-exit.sh"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOG_BYTES_PER_REPORT = 2 * logs.WINDOW_BYTES
ENDED = ("succeeded", "failed", "stopped", "timed_out", "lost")


class CannotStart(Exception):
    """The attempt cannot be started; says why."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt stands. exit_code and signal are of its main process; None is unknown or not yet."""

    state: str
    exit_code: int | None = None
    signal: int | None = None
    ended_at: str | None = None
    reason: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class Attempt:
    """One attempt's directory, read and written."""

    def __init__(self, directory: Path) -> None:
        self.attempt_id = int(directory.name)
        self.directory = directory
        self.root = directory / "root"
        self.log_file = self.root / "log"
        self.record: dict[str, Any] = find_json(self.root / "attempt.json") or {}
        self.served = 0  # when a window of its log was last taken, counted
        self._outcome: Outcome | None = None

    @property
    def unit(self) -> str:
        return unit_of(self.attempt_id)

    @property
    def lease_id(self) -> int:
        return int(self.record["lease_id"])

    @property
    def mark(self) -> LogMark:
        return LogMark.read(self.record["log"])

    @property
    def acked_state(self) -> str | None:
        return self.record.get("acked_state")

    def stop_order(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = find_json(self.root / "stop.json")
        return found

    def exit_record(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = find_json(self.root / "exit.json")
        return found

    @property
    def is_launched(self) -> bool:
        """systemd makes the log when it begins; on a busy host systemd-run may come back a minute later."""
        return bool(self.record.get("launched")) or self.log_file.exists()

    def outcome(self) -> Outcome:
        """How it stands by what lies on disk; an end, once there, stays as it is."""
        if self._outcome is None or not self._outcome.has_ended:
            ended = None if self._is_winding_up() else self.exit_record()
            self._outcome = read_outcome(self.record | {"launched": self.is_launched}, ended, self.stop_order)
        return self._outcome

    def _is_winding_up(self) -> bool:
        """Its unit is still there. systemd runs the recorder once the main process has ended; what ignores TERM lives
        on until the grace is over, and may go on writing.
        """
        return systemd.is_loaded(self.unit)

    def keep(self, **changes: Any) -> None:
        """Change the record on disk; nothing is written when nothing changes."""
        changed = self.record | changes
        if changed != self.record:
            write_json(self.root / "attempt.json", changed)
            self.record = changed

    def is_settled(self) -> bool:
        """The portal knows its end and holds its whole log."""
        return self.outcome().has_ended and self.acked_state == self.outcome().state and self.mark.is_complete


class Refusal(Attempt):
    """The end of an order whose id another's attempt has here: it was never started. It lies in the other's directory
    and goes with it.
    """

    def __init__(self, other: Attempt) -> None:
        super().__init__(other.directory / "refused" / other.directory.name)

    def _is_winding_up(self) -> bool:
        return False  # the unit of that name is the other's


def unit_of(attempt_id: int) -> str:
    return f"remotegpu-task-{attempt_id}.service"


def read_outcome(
    record: dict[str, Any], ended: dict[str, Any] | None, stop_order: Callable[[], dict[str, Any] | None]
) -> Outcome:
    """What the files say. `stop_order` is asked only once there is an end: an order that came later has no say."""
    if ended is None:
        return Outcome("running" if record.get("launched") else "starting")
    at: str = ended["at"]
    if "state" in ended:  # written by us: it never ran, or nobody saw its end
        return Outcome(ended["state"], ended_at=at, reason=ended.get("reason"))
    exit_code, number = _exit_of(ended)
    order = stop_order()
    if order is not None and parse_time(order["at"]) <= parse_time(at):
        return Outcome("stopped", exit_code, number, at, order["reason"])
    if ended["host_stopping"]:
        return Outcome("lost", exit_code, number, at, "the host was shut down or rebooted while the task ran")
    if ended["service_result"] == "timeout" and _was_over_its_time(record, at):
        return Outcome("timed_out", exit_code, number, at, f"its time limit of {record['time_limit_s']} s was over")
    if exit_code == 0:
        return Outcome("succeeded", 0, None, at)
    return Outcome("failed", exit_code, number, at, _failure(ended["service_result"], exit_code, number, record))


def _was_over_its_time(record: dict[str, Any], ended_at: str) -> bool:
    """systemd says "timeout" as well when children outlive the main process by the grace: that is no time limit."""
    limit = record.get("time_limit_s")
    return limit is not None and (parse_time(ended_at) - parse_time(record["started_at"])).total_seconds() >= limit


def _exit_of(ended: dict[str, Any]) -> tuple[int | None, int | None]:
    """systemd's $EXIT_CODE and $EXIT_STATUS: (exit code, signal), one of them None."""
    status = ended["exit_status"]
    if ended["exit_code"] == "exited" and status.isdigit():
        return int(status), None
    with contextlib.suppress(KeyError):
        return None, int(signal.Signals[f"SIG{status}"])
    return None, int(status) if status.isdigit() else None


def _failure(result: str, exit_code: int | None, number: int | None, record: dict[str, Any]) -> str | None:
    if result == "oom-kill":
        return "the host ran out of memory"
    if number is not None:
        return f"killed by signal {number}"
    if exit_code == EXIT_CHDIR and record.get("workdir"):
        return f"cannot change to the working directory {record['workdir']}"
    return None


class Tasks:
    def __init__(self, config: Config, journal: Journal) -> None:
        self._config = config
        self._journal = journal
        self._lock = threading.RLock()
        self._attempts: dict[int, Attempt] = {}
        self._refusals: dict[int, Refusal] = {}  # of orders whose id one of those has that the portal has lost
        self._talking: dict[int, Attempt] = {}  # those of which the portal does not know everything yet
        self._served = 0
        self._recorder = config.state_dir / RECORDER
        self._config.tasks_dir.mkdir(parents=True, exist_ok=True)
        self._config.tasks_dir.chmod(0o711)
        for directory in self._config.tasks_dir.iterdir():
            if directory.name.isdigit():
                self._admit(Attempt(directory))

    def _admit(self, attempt: Attempt) -> None:
        if not attempt.record:
            return  # made, but nothing was noted in it: it never started, and will be made again
        self._attempts[attempt.attempt_id] = attempt
        if not _is_silent(attempt):
            self._talking[attempt.attempt_id] = attempt
        self._admit_refusal(Refusal(attempt))

    def _admit_refusal(self, refusal: Refusal) -> None:
        if refusal.exit_record() is None:
            return
        self._refusals[refusal.attempt_id] = refusal
        if not _is_silent(refusal):
            self._talking[refusal.attempt_id] = refusal

    # Look

    def observe(self) -> dict[int, HostAttempt]:
        with self._lock:
            for attempt in [attempt for attempt in self._attempts.values() if not attempt.root.exists()]:
                self._drop(attempt)  # cleaned from the command line
            # What was refused stays so, whatever becomes of the attempt that stood in its way.
            return {
                attempt.attempt_id: HostAttempt(
                    attempt_id=attempt.attempt_id,
                    lease_id=attempt.lease_id,
                    has_ended=attempt.outcome().has_ended,
                    is_stopping=(attempt.root / "stop.json").exists(),
                    is_disowned=_is_disowned(attempt),
                )
                for attempt in (self._attempts | self._refusals).values()
                if not (_is_disowned(attempt) and attempt.outcome().has_ended)
            }

    def unfinished(self) -> list[Attempt]:
        with self._lock:
            return [attempt for attempt in self._talking.values() if not attempt.outcome().has_ended]

    def look_for_lost(self) -> bool:
        """A unit that is gone without an exit record is lost; one that never started may start again.

        True when something changed. Raises ToolFailed.
        """
        # What systemd still has loaded is at work, or winding up: nobody is asked of it, which would start a process.
        unloaded = [attempt for attempt in self.unfinished() if not systemd.is_loaded(attempt.unit)]
        alive = systemd.alive([attempt.unit for attempt in unloaded])
        # Only now the records: a unit that ended in between has left one.
        gone = [attempt for attempt in unloaded if attempt.unit not in alive and attempt.exit_record() is None]
        for attempt in gone:
            if attempt.record["boot_id"] != boot_id():
                self._conclude(attempt, "lost", "the host was restarted while the task ran")
            elif attempt.log_file.exists():
                self._conclude(attempt, "lost", "its unit ended without leaving an exit code")
            else:
                self._drop(attempt)
        return bool(gone)

    # Start

    def start(self, order: DesiredAttempt, login: str, home: Path) -> None:
        """Start the attempt's unit as the lease's user. Raises CannotStart; the attempt has then ended as failed."""
        try:
            attempt = self._prepare(order, login, home)
        except CannotStart as error:
            self.end_unstarted(order, "failed", str(error))
            raise
        try:
            run(self._unit_argv(order, attempt, login), timeout_s=60)
        except ToolFailed as error:
            if attempt.exit_record() is None and not attempt.log_file.exists():
                self._conclude(attempt, "failed", f"it could not be started: {error}")
                raise CannotStart(str(error)) from error
        attempt.keep(launched=True)
        self._journal.record("attempt.started", lease_id=order.lease_id, attempt_id=order.attempt_id)

    def end_unstarted(self, order: DesiredAttempt, state: str, reason: str) -> None:
        """Give an end to an attempt that will never run here. Another's of the same id that runs is left alone."""
        with self._lock:
            other = self._attempts.get(order.attempt_id)
            if other is not None and _is_disowned(other) and not other.outcome().has_ended:
                self._refuse(order, other, state, reason)
                return
        self._fresh_directory(order.attempt_id)
        self._conclude(self._note(order), state, reason)

    def _refuse(self, order: DesiredAttempt, other: Attempt, state: str, reason: str) -> None:
        self._forget_refusal(other)
        refusal = Refusal(other)
        refusal.root.mkdir(mode=0o700, parents=True)
        self._note_in(refusal, order)
        self._conclude(refusal, state, reason)
        self._admit_refusal(refusal)

    def _forget_refusal(self, other: Attempt) -> None:
        if self._refusals.pop(other.attempt_id, None) is not None:
            self._talking.pop(other.attempt_id, None)
        shutil.rmtree(other.directory / "refused", ignore_errors=True)

    def _prepare(self, order: DesiredAttempt, login: str, home: Path) -> Attempt:
        gid = grp.getgrnam(login).gr_gid
        directory = self._fresh_directory(order.attempt_id)
        directory.chmod(0o750)
        shutil.chown(directory, 0, gid)
        script, launch = directory / "script", directory / "launch"
        write_atomic(script, order.command.encode(), mode=0o640, gid=gid)
        write_atomic(launch, render_launch(order, script, workdir_of(order, home)).encode(), mode=0o640, gid=gid)
        write_atomic(self._recorder, resources.files(__package__).joinpath(RECORDER).read_bytes(), mode=0o700)
        return self._note(order)

    def _fresh_directory(self, attempt_id: int) -> Path:
        """Nothing of an attempt that had this id before (the portal was restored since) may be seen by the new one."""
        directory = self._config.tasks_dir / str(attempt_id)
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir()
        return directory

    def _note(self, order: DesiredAttempt) -> Attempt:
        directory = self._config.tasks_dir / str(order.attempt_id)
        (directory / "root").mkdir(mode=0o700)
        attempt = Attempt(directory)
        self._note_in(attempt, order)
        sync_directory(self._config.tasks_dir)
        with self._lock:
            self._admit(attempt)
        return attempt

    @staticmethod
    def _note_in(attempt: Attempt, order: DesiredAttempt) -> None:
        attempt.keep(
            attempt_id=order.attempt_id,
            task_id=order.task_id,
            lease_id=order.lease_id,
            boot_id=boot_id(),
            started_at=format_time(now()),
            time_limit_s=order.time_limit_s,
            workdir=order.workdir,
            launched=False,
            acked_state=None,
            log=asdict(LogMark()),
        )

    def _unit_argv(self, order: DesiredAttempt, attempt: Attempt, login: str) -> list[str]:
        properties = [
            "Type=exec",
            f"User={login}",
            f"StandardOutput=append:{attempt.log_file}",
            f"StandardError=append:{attempt.log_file}",
            "KillMode=control-group",
            # 0 means "for ever" to systemd; the recorder needs time of its own as well.
            *(
                ["KillSignal=SIGKILL", "TimeoutStopSec=10"]
                if order.stop_grace_s == 0
                else [f"TimeoutStopSec={order.stop_grace_s}"]
            ),
            *([f"RuntimeMaxSec={order.time_limit_s}"] if order.time_limit_s else []),
            "CollectMode=inactive-or-failed",
            f"ExecStopPost=+/bin/sh {self._recorder} {attempt.root}",
        ]
        arguments = [f"--property={text}" for text in properties]
        return [
            "systemd-run",
            "--quiet",
            f"--unit={attempt.unit}",
            f"--description=RemoteGPU: task {order.task_id}, attempt {order.attempt_id}",
            *arguments,
            "--",
            "/bin/bash",
            str(attempt.directory / "launch"),
        ]

    # Stop

    def stop(self, attempt_id: int, reason: str) -> None:
        """Ask the attempt to end: TERM now, KILL after its grace. Returns at once. Raises ToolFailed."""
        attempt = self._attempts[attempt_id]
        self._mark_stopped(attempt, reason)
        systemd.stop(attempt.unit)

    def stop_lease(self, lease_id: int, reason: str) -> None:
        """Ask every attempt of the lease to end; its processes are killed by the caller. Raises ToolFailed."""
        with self._lock:
            mine = [attempt for attempt in self._attempts.values() if attempt.lease_id == lease_id]
        for attempt in mine:
            if not attempt.outcome().has_ended:
                self._mark_stopped(attempt, f"its lease ended: {reason}")
                systemd.stop(attempt.unit)

    @staticmethod
    def _mark_stopped(attempt: Attempt, reason: str) -> None:
        if attempt.stop_order() is None:
            try:
                write_json(attempt.root / "stop.json", {"reason": reason, "at": format_time(now())})
            except OSError as error:  # a task that has filled the disk is stopped all the same
                log.error("attempt %d: that it was stopped cannot be noted: %s", attempt.attempt_id, error)

    def _conclude(self, attempt: Attempt, state: str, reason: str) -> None:
        write_json(attempt.root / "exit.json", {"state": state, "reason": reason[:400], "at": format_time(now())})
        self._journal.record(
            f"attempt.{state}",
            lease_id=attempt.lease_id,
            attempt_id=attempt.attempt_id,
            detail={"reason": reason[:400]},
        )

    # Report

    def reports(self) -> list[dict[str, Any]]:
        """Every attempt that the portal does not know the end of, as `attempt_report`."""
        with self._lock:
            return [_report(attempt) for attempt in list(self._talking.values())[:500]]

    def log_ranges(self, *, quota_bytes: int) -> list[dict[str, Any]]:
        """The next window of every log, together at most LOG_BYTES_PER_REPORT, as `log_range`."""
        ranges: list[dict[str, Any]] = []
        budget = LOG_BYTES_PER_REPORT
        with self._lock:
            waiting = [attempt for attempt in self._talking.values() if not attempt.mark.is_complete]
        # Who was served longest ago comes first: one task that never stops talking must not silence the rest.
        for attempt in sorted(waiting, key=lambda each: each.served):
            if budget < logs.WINDOW_BYTES or len(ranges) == 100:
                break
            window = self._next_window(attempt, quota_bytes)
            if window is not None:
                self._served += 1
                attempt.served = self._served
                budget -= len(window.data)
                data = base64.b64encode(window.data).decode()
                ranges.append(
                    {"attempt_id": attempt.attempt_id, "offset": window.offset, "data": data, "end": window.is_end}
                )
        return ranges

    def _next_window(self, attempt: Attempt, quota_bytes: int) -> logs.Window | None:
        # The end first: what is read after it is the whole output, since the last writer is gone.
        has_ended = attempt.outcome().has_ended
        with self._lock:
            mark = logs.settle(attempt.log_file, attempt.mark, quota_bytes=quota_bytes)
            attempt.keep(log=asdict(mark))
        return logs.next_window(attempt.log_file, mark, has_ended=has_ended)

    def news(self) -> tuple[object, ...]:
        """What cannot wait for the next heartbeat; empty is nothing, and the same again is no news."""
        with self._lock:
            return tuple(news for news in map(_news, self._talking.values()) if news)

    def drop_excess(self, *, quota_bytes: int) -> None:
        """Punch out what is over the quota, as it is being written."""
        for attempt in self.unfinished():
            with self._lock:
                mark = logs.settle(attempt.log_file, attempt.mark, quota_bytes=quota_bytes)
                attempt.keep(log=asdict(mark))
            if mark.cut_at is not None:
                logs.punch_hole(attempt.log_file, mark.cut_at - mark.base, logs.size_on_disk(attempt.log_file))

    def acknowledge(self, acks: Iterable[dict[str, Any]]) -> None:
        """What the portal holds by now."""
        for ack in acks:
            with self._lock:
                attempt = self._talking.get(ack["attempt_id"])
                if attempt is None:
                    continue
                before = attempt.mark
                after = logs.acknowledge(
                    attempt.log_file, before, offset=ack["log_offset"], is_complete=ack["log_complete"]
                )
                # Beside the mark, not in it: an agent of before, to which an upgrade may go back, reads that strictly.
                lost = attempt.record.get("log_lost", 0) + logs.lost(before, after)
                attempt.keep(log=asdict(after), acked_state=ack["state"], **({"log_lost": lost} if lost else {}))
                if _is_silent(attempt):
                    self._talking.pop(attempt.attempt_id, None)
            if after != before:
                logs.punch(attempt.log_file, before, after)

    # Forget

    def unsent(self, lease_id: int) -> list[int]:
        """Attempts of the lease whose end or log the portal does not have yet."""
        with self._lock:
            return [attempt.attempt_id for attempt in self._talking.values() if attempt.lease_id == lease_id]

    def acknowledged_bytes(self, lease_id: int) -> int:
        """How much of the lease's logs the portal has; it grows while they arrive."""
        with self._lock:
            return sum(attempt.mark.acked for attempt in self._attempts.values() if attempt.lease_id == lease_id)

    def disown(self, attempt_ids: Iterable[int]) -> None:
        """The portal has lost these: report them no more."""
        with self._lock:
            for attempt_id in attempt_ids:
                if attempt_id in self._attempts:
                    self._attempts[attempt_id].keep(disowned=True)
                    self._talking.pop(attempt_id, None)
                    self._forget_refusal(self._attempts[attempt_id])

    def is_anothers(self, order: DesiredAttempt) -> bool:
        """What has this id here is of another task: a portal that was restored gives ids a second time."""
        with self._lock:
            attempt = self._refusals.get(order.attempt_id) or self._attempts.get(order.attempt_id)
            if attempt is None:
                return False
            return bool((attempt.record["task_id"], attempt.lease_id) != (order.task_id, order.lease_id))

    def tell_again(self, attempt_ids: Iterable[int]) -> None:
        """The portal was restored, and has forgotten what it heard of these: what it acknowledged is void.

        How much of the output it still has, its next acknowledgement says. Of a complete one nothing is here any more;
        it shows that some is missing.
        """
        with self._lock:
            for attempt_id in attempt_ids:
                attempt = self._refusals.get(attempt_id) or self._attempts.get(attempt_id)
                if attempt is not None and not _is_disowned(attempt):
                    attempt.keep(acked_state=None)
                    self._talking[attempt_id] = attempt

    def forget_lease(self, lease_id: int) -> list[int]:
        """Remove every attempt of the lease from this host; it must have ended."""
        with self._lock:
            gone = [attempt for attempt in self._attempts.values() if attempt.lease_id == lease_id]
            for attempt in gone:
                self._drop(attempt)
            return [attempt.attempt_id for attempt in gone]

    def _drop(self, attempt: Attempt) -> None:
        with self._lock:
            self._attempts.pop(attempt.attempt_id, None)
            self._refusals.pop(attempt.attempt_id, None)
            self._talking.pop(attempt.attempt_id, None)
            shutil.rmtree(attempt.directory, ignore_errors=True)


def _is_silent(attempt: Attempt) -> bool:
    return attempt.is_settled() or _is_disowned(attempt)


def _is_disowned(attempt: Attempt) -> bool:
    return bool(attempt.record.get("disowned"))


def _news(attempt: Attempt) -> tuple[object, ...] | None:
    outcome, mark = attempt.outcome(), attempt.mark
    size = logs.size(attempt.log_file, mark)
    if outcome.state == attempt.acked_state and size <= mark.acked and (mark.is_complete or not outcome.has_ended):
        return None
    return attempt.attempt_id, outcome.state, attempt.acked_state, size, mark.acked, mark.is_complete


def _report(attempt: Attempt) -> dict[str, Any]:
    outcome = attempt.outcome()
    return {
        "attempt_id": attempt.attempt_id,
        "state": outcome.state,
        "exit_code": outcome.exit_code,
        "signal": outcome.signal,
        "started_at": attempt.record["started_at"] if attempt.is_launched else None,
        "ended_at": outcome.ended_at,
        "boot_id": attempt.record["boot_id"],
        "log_bytes": logs.size(attempt.log_file, attempt.mark),
        "log_truncated": attempt.mark.cut_at is not None or attempt.mark.base > 0 or "log_lost" in attempt.record,
        "reason": outcome.reason,
    }


def workdir_of(order: DesiredAttempt, home: Path) -> str:
    """The directory the task starts in: the home, a path below it, or an absolute one."""
    wanted = (order.workdir or "").removeprefix("~").removeprefix("/" if (order.workdir or "").startswith("~") else "")
    return os.path.normpath(home / wanted)


def render_launch(order: DesiredAttempt, script: Path, workdir: str) -> str:
    """Environment and directory, quoted for bash, then the script in the same process. Raises CannotStart for a NUL
    byte.
    """
    env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PATH": DEFAULT_PATH}
    if order.gpu_uuids is not None:
        visible = ",".join(order.gpu_uuids)
        env |= {"CUDA_VISIBLE_DEVICES": visible, "NVIDIA_VISIBLE_DEVICES": visible or "none"}
    env |= {"REMOTEGPU_TASK_ID": str(order.task_id), "REMOTEGPU_ATTEMPT_ID": str(order.attempt_id)}
    env |= order.env
    if "\0" in order.command or any("\0" in text for text in env.values()):
        raise CannotStart("a command or variable holds a NUL byte, which no process can be given")
    exports = "".join(f"export {name}={shlex.quote(text)}\n" for name, text in env.items())
    # Not systemd's WorkingDirectory=: that holds for the recorder too, and a directory that is gone would cost
    # us the exit code.
    return f"{exports}cd -- {shlex.quote(workdir)} || exit {EXIT_CHDIR}\nexec /bin/bash {shlex.quote(str(script))}\n"
