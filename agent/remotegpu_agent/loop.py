"""The agent at work: one thread hears what is wanted, one makes it so, one tells what is.

`Agent` only wires: what to believe is state.py's, what to do is plan.py's, how is leases.py's and tasks.py's. The
threads share nothing but events and those objects; each keeps going whatever the others meet. The held call brings
the desired state down; the report brings everything up; neither waits for the other, and the host is kept in order
without either.
"""

import contextlib
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from remotegpu_agent import __version__, facts, metrics
from remotegpu_agent.clock import Clock
from remotegpu_agent.commands import Commands, Operations
from remotegpu_agent.config import Config
from remotegpu_agent.credential import Credential, enroll
from remotegpu_agent.files import find_json, write_json
from remotegpu_agent.forwards import Forwards, is_gateway
from remotegpu_agent.gpu import GpuProbe
from remotegpu_agent.journal import Journal
from remotegpu_agent.leases import CannotOpen, Entry, Leases, end_survives_reboot
from remotegpu_agent.observe.docker import DockerFailed
from remotegpu_agent.observe.tools import ToolFailed
from remotegpu_agent.openings import Openings
from remotegpu_agent.plan import (
    ArmEnd,
    CloseLease,
    EndUnstarted,
    Host,
    HostLease,
    MakeLogin,
    SetExpiry,
    StartAttempt,
    Step,
    StopAttempt,
    WriteKeys,
    plan,
)
from remotegpu_agent.portal import Endpoint, NotYours, Portal, PortalError, Refused, TooLarge
from remotegpu_agent.protocol import ProtocolError, format_time, now, parse_time, read_desired
from remotegpu_agent.state import Answer, Held, State, find_thaw
from remotegpu_agent.tasks import CannotStart, Tasks

log = logging.getLogger(__name__)

SYNC_PATH = "/api/v1/agent/sync"
HELD_WAIT_S = 20.0
LOOK_AGAIN_S = 10.0  # how often the host is compared with the plan when nothing calls for it
RETRY_S = 2.0  # ... after a step failed
FIRST_LOOK_S = 10.0  # how long the first report waits for the first look at the host
TASK_POLL_S = 0.2  # how often the logs of running tasks are looked at: ten times a second took 0.5 % of a core
QUIET_POLL_S = 5.0
QUOTA_POLL_S = 1.0  # how often it is looked whether they are over their quota
FROZEN_POLL_S = 3.0
DEFAULT_INTERVAL_S = 15.0
DEFAULT_QUOTA_BYTES = 64 * 1024 * 1024
GPU_WAIT_S = 1.0  # how long a report waits for a fresh sample before it sends the last one
FACTS_EVERY_S = 3600.0
STATUS_FILE = "status.json"


class Backoff:
    """How long to wait after the next failure: doubling, with jitter, lest a thousand agents return as one."""

    def __init__(self, *, first_s: float = 1.0, most_s: float = 30.0) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._failures = 0

    def succeeded(self) -> None:
        self._failures = 0

    def next_s(self) -> float:
        wait_s: float = min(self._most_s, self._first_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, 10)
        return wait_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, hides nothing


class Agent:
    def __init__(self, config: Config) -> None:
        self.config = config
        for directory in (config.state_dir, config.run_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.journal = Journal(config.state_dir / "journal.jsonl")
        self.state = State(config.state_dir / "desired.json")
        self.credential = Credential(config.credential_file)
        self.tasks = Tasks(config, self.journal)
        self.clock = Clock(config.state_dir)
        self.openings = Openings(lambda: self.state.held, self.clock)
        self.leases = Leases(config, self.journal, self.tasks.stop_lease, self.openings)
        operations = Operations(self.credential, self.state, self.leases, self.tasks, self.journal)
        self.commands = Commands(config.state_dir / "commands", operations, on_result=self._tell)
        self.forwards = Forwards(config.state_dir, self.journal)
        self.gpu = GpuProbe(
            [] if is_gateway() else [config.program, "nvml-child"], xids_file=config.run_dir / "xids.json"
        )
        self._stopping = threading.Event()
        self._wanted = threading.Event()  # the reconciler has something to do
        self._has_looked = threading.Event()  # before the first look "nothing is open" would be a guess
        self._telling = threading.Event()  # the reporter has something to say
        self._observed: list[dict[str, Any]] = []
        self._applied_generation = 0
        self._troubles: dict[int, str] = {}  # lease id → what went wrong at the last try
        self._said: frozenset[object] = frozenset()
        self._looked_for_lost_at = 0.0
        self._dropped_at = 0.0
        self._seq = int(time.time() * 1000)
        self._facts_sent_at: float | None = None
        self._contact_written_at = -1.0
        self._last_contact_at: str | None = (find_json(config.run_dir / STATUS_FILE) or {}).get("last_contact_at")
        self._reported_at: str | None = None  # by this very process: an upgrade waits for it

    # Life

    def run(self) -> None:
        """Work until TERM."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())
        prune_unpacked()
        self.leases.reserve.keep()
        self.gpu.start()
        self.gpu.ask()
        reconciler = self._thread("reconcile", self._reconcile_forever)
        self._write_status()
        self._enroll_forever()
        if not self._stopping.is_set():
            self._thread("held", self._hold_forever)
            self._thread("report", self._report_forever)
            self._notify("READY=1")
        self._stopping.wait()
        self._wanted.set()
        reconciler.join(10)
        self.gpu.stop()

    @staticmethod
    def _notify(text: str) -> None:
        """Tell systemd, where it listens."""
        address = os.environ.get("NOTIFY_SOCKET")
        if address:
            import socket

            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
                sock.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
        thread.start()
        return thread

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that dies would leave half an agent: better none, which systemd starts again."""
        try:
            work()
        except BaseException:
            log.exception("the agent cannot go on")
            os._exit(70)

    def _tell(self) -> None:
        self._telling.set()

    # Enrolment

    def _enroll_forever(self) -> None:
        """Until there is a credential. A token that lies there is used even if there is one: the portal wants a new
        enrolment.
        """
        backoff = Backoff()
        while not self._stopping.is_set():
            token = self._find_token()
            try:
                if token is None and self.credential.is_enrolled:
                    return
                if token is not None:
                    self._enroll(token)
                    return
            except Refused as error:
                if self.credential.is_enrolled:
                    log.warning("the enrolment token is void, going on with the credential there is: %s", error)
                    return
                log.warning("the enrolment token is not accepted; issue a new one in the portal: %s", error)
            except (PortalError, KeyError) as error:
                log.warning("enrolment: %s", error)
            self._stopping.wait(backoff.next_s() if token else QUIET_POLL_S)

    def _find_token(self) -> str | None:
        try:
            return self.config.enroll_token_file.read_text().strip() or None
        except FileNotFoundError:
            return None

    def _enroll(self, token: str) -> None:
        portal = Portal(Endpoint.of(self.config))
        try:
            self.gpu.ask(wait_s=GPU_WAIT_S)
            answer = enroll(portal, token, boot_id=facts.boot_id(), facts=facts.collect(), gpu=self.gpu.report())
        finally:
            portal.close()
        self.credential.keep(answer)
        self.state.begin(answer["epoch"])
        self.config.enroll_token_file.unlink(missing_ok=True)
        self.journal.record("agent.enrolled", detail={"machine_id": answer["machine_id"]})
        self._write_status()
        log.info("enrolled as machine %d", answer["machine_id"])

    # Hear what is wanted

    def _hold_forever(self) -> None:
        portal, backoff = Portal(Endpoint.of(self.config)), Backoff()
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                is_new = self._sync(portal, report=None, wait_s=HELD_WAIT_S)
                backoff.succeeded()
            except (PortalError, ProtocolError, OSError) as error:
                log.warning("held call: %s", error)
                self._stopping.wait(backoff.next_s())
                continue
            if self.state.held.frozen:
                self._stopping.wait(FROZEN_POLL_S)
            elif not is_new and time.monotonic() - started < 1:
                self._stopping.wait(1)  # answered at once and for nothing: do not make a storm of it

    def _sync(self, portal: Portal, *, report: dict[str, Any] | None, wait_s: float) -> bool:
        """One call and what follows from its answer; True when something new is wanted. Raises PortalError,
        ProtocolError.
        """
        held = self.state.held
        message = {
            "protocol": 1,
            "epoch": held.epoch,
            "generation": held.generation,
            "wait_s": wait_s,
            "report": report,
        }
        answer = self.credential.call(lambda secret: portal.call(SYNC_PATH, message, credential=secret, wait_s=wait_s))
        self.clock.heard(parse_time(answer.get("now"), "now"))
        self._acknowledge(held, answer)
        is_new = self._adopt(held, answer)
        self._write_status(contact=True)
        return is_new

    def _adopt(self, asked: Held, answer: dict[str, Any]) -> bool:
        raw = answer["desired"]
        desired = read_desired(raw) if raw is not None else None
        word = Answer(answer["epoch"], answer["generation"], desired, asked.epoch, asked.generation)
        done = self.commands.thaws_done(answer["epoch"])
        before, after = self.state.adopt(word, raw, machine_id=self.credential.machine_id, thaws_done=done)
        if after.frozen and not before.frozen:
            log.error("frozen: %s", after.frozen)
            self.journal.record("agent.frozen", detail={"reason": after.frozen})
        thaw = find_thaw(after.desired, done=done) if after.desired and after != before and not after.frozen else None
        if thaw is not None:
            if before.frozen or before.epoch != after.epoch:
                self._forget_what_the_portal_lost(after, retained=thaw.args["retained"])
            self.commands.note_thaw(word.epoch, thaw)  # last: once it is told, the portal judges again what is lost
        if after != before:
            self._wanted.set()
        return after != before

    def _forget_what_the_portal_lost(self, held: Held, *, retained: Iterable[int]) -> None:
        """After a thaw an id may come a second time for something else: what is not named now never counts again.

        What is named and has ended is told again: the portal may have forgotten that, and would have it run twice.
        """
        named = {lease.lease_id for lease in held.desired.leases} if held.desired else set()
        named |= set(retained)  # ended, and its tenant may still come back to the data
        for entry in self.leases.entries():
            if entry.lease_id not in named and not entry.disowned:
                why = "the portal lost it when it was restored: clean the machine before this id is used again"
                self.leases.disown(entry.lease_id, why)
        orders = held.desired.attempts if held.desired else ()
        wanted = {order.attempt_id for order in orders if not self.tasks.is_anothers(order)}
        self.tasks.disown(set(self.tasks.observe()) - wanted)
        self.tasks.tell_again(wanted)
        self.journal.record("agent.thawed", detail={"epoch": held.epoch, "generation": held.generation})

    def _acknowledge(self, asked: Held, answer: dict[str, Any]) -> None:
        acks = answer["acks"]
        self.tasks.acknowledge(acks["attempts"])
        self.commands.acknowledge(asked.epoch, acks["command_results"])
        self.journal.acknowledge(acks["journal"])

    # Make it so

    def _reconcile_forever(self) -> None:
        while not self._stopping.is_set():
            try:
                is_at_rest = self.reconcile()
            except OSError as error:  # a full disk must not stop what comes after
                log.error("reconcile: %s", error)
                is_at_rest = False
            self._has_looked.set()
            self._wanted.wait(self._pause_s() if is_at_rest else RETRY_S)
            self._wanted.clear()

    def _pause_s(self) -> float:
        """Until the next look; a lease's end is not slept over."""
        ends = [entry.ends_at for entry in self.leases.entries() if not entry.is_closed]
        soonest_s = min(((end - now()).total_seconds() for end in [*ends, *self.forwards.ends()]), default=LOOK_AGAIN_S)
        return min(LOOK_AGAIN_S, max(0.02, soonest_s))

    def reconcile(self) -> bool:
        """Compare, act, look again; False when a step failed and is to be tried again."""
        held = self.state.held
        host = self._look(held)
        steps = plan(held.desired, host, at=now(), frozen=held.frozen is not None, render_keys=self.leases.render_keys)
        failed = self._apply(steps)
        failed = not self._settle_openings(held) or failed
        failed = not self._settle_forwards(held) or failed
        if held.desired is not None and not held.frozen:
            self.commands.consider(held.desired)
        self._describe(held, self._look(held) if steps else host)
        if not failed:
            self._applied_generation = held.generation
        self._tell()
        return not failed and not self._look_for_lost()

    def _settle_openings(self, held: Held) -> bool:
        """After the leases, whose ends they never outlive. False: something resisted."""
        try:
            if held.desired is None or held.frozen:
                self.openings.look(self.leases.open_ends())
            else:
                self.openings.settle(self.leases.open_ends())
        except ToolFailed as error:
            log.warning("openings: %s", error)
            return False
        return True

    def _settle_forwards(self, held: Held) -> bool:
        """On a gateway. Where nothing is ordered now, what was lasts until its end. False: something resisted."""
        wanted = held.desired.forwards if held.desired is not None and not held.frozen else None
        return self.forwards.settle(wanted, doubt=self.clock.doubt())

    def _look_for_lost(self) -> bool:
        """After the steps and not every time: a Stop must not wait for systemd to tell of every other task."""
        if time.monotonic() - self._looked_for_lost_at < LOOK_AGAIN_S / 2:
            return False
        self._looked_for_lost_at = time.monotonic()
        try:
            return self.tasks.look_for_lost()
        except ToolFailed as error:
            log.warning("tasks: %s", error)
            return False

    def _look(self, held: Held) -> Host:
        obstacles = {}
        for lease in held.desired.leases if held.desired else ():
            obstacle = self.leases.obstacle(lease) if lease.is_open else None
            if obstacle:
                obstacles[lease.lease_id] = obstacle
        return Host(leases=self.leases.observe(), attempts=self.tasks.observe(), obstacles=obstacles)

    def _apply(self, steps: list[Step]) -> bool:
        """Every step in order; after a failure the rest of that lease's steps wait: no key without an armed end."""
        self._troubles = {}
        for step in steps:
            lease_id = _lease_of(step)
            if lease_id is not None and lease_id in self._troubles:
                continue
            try:
                log.info("%s", _describe_step(step))
                self._do(step)
            except CannotStart as error:
                log.warning(
                    "%s: %s", _describe_step(step), error
                )  # the attempt has its end, and the portal hears of it
            except (ToolFailed, DockerFailed, CannotOpen, OSError) as error:
                log.error("%s: %s", _describe_step(step), error)
                self._troubles[lease_id or 0] = f"{_describe_step(step)}: {error}"
        return bool(self._troubles)

    def _do(self, step: Step) -> None:
        match step:
            case StopAttempt(attempt_id, reason):
                self.tasks.stop(attempt_id, reason)
            case CloseLease(lease_id, reason):
                self.leases.close(lease_id, reason)
            case MakeLogin(lease):
                self.leases.make_login(lease)
            case ArmEnd(lease):
                self.leases.arm_end(lease)
            case SetExpiry(lease):
                self.leases.set_expiry(lease)
            case WriteKeys(lease):
                self.leases.write_keys(lease)
            case StartAttempt(order):
                entry = self.leases.find(order.lease_id)
                if entry is None or entry.is_closed:
                    raise CannotOpen(f"lease {order.lease_id} is not open")
                self.tasks.start(order, entry.login, self.config.home_dir / entry.login)
            case EndUnstarted(order, state, reason):
                self.tasks.end_unstarted(order, state, reason)

    def _describe(self, held: Held, host: Host) -> None:
        """What the next report says of the leases."""
        named = {lease.lease_id: lease for lease in held.desired.leases} if held.desired else {}
        entries = {entry.lease_id: entry for entry in self.leases.entries()}
        strangers = {entry.lease_id for entry in entries.values() if entry.disowned}
        # Frozen, it tells of all that is not cleaned: an operator compares that with what a restored portal remembers.
        alive = {lease_id for lease_id, lease in host.leases.items() if held.frozen or not lease.is_shut()}
        ids = sorted(set(named) | (alive - strangers))
        guarded = end_survives_reboot()
        observed = []
        for lease_id in ids[:64]:
            login = named[lease_id].login if lease_id in named else host.leases[lease_id].login
            trouble = host.obstacles.get(lease_id) or self._troubles.get(lease_id)
            observed.append(
                _observed(lease_id, login, entries.get(lease_id), host.leases.get(lease_id), trouble, guarded)
            )
        self._observed = observed

    # Tell what is

    def _report_forever(self) -> None:
        portal, backoff = Portal(Endpoint.of(self.config)), Backoff()
        next_full_at = 0.0
        self._has_looked.wait(FIRST_LOOK_S)
        while not self._stopping.is_set():
            is_full = time.monotonic() >= next_full_at
            of_tasks = self.tasks.news()
            news = self._news(of_tasks)
            if not is_full and news <= self._said:
                self._wait_for_news(of_tasks, until=min(next_full_at, time.monotonic() + QUIET_POLL_S))
                continue
            try:
                self._sync(portal, report=self._report(is_full=is_full), wait_s=0)
                self._note_reported()
                backoff.succeeded()
                self._said = news
                if is_full:
                    next_full_at = time.monotonic() + self._interval_s()
            except NotYours as error:
                log.error("report: %s: dropped %s", error, error.items)
                self._drop_strangers(error.items)
                self._wait_and_drop(backoff.next_s())
            except (PortalError, ProtocolError, OSError) as error:
                log.warning("report: %s", error)
                self._facts_sent_at = None
                if isinstance(error, TooLarge) and self.commands.shorten(self.state.held.epoch):
                    continue
                self._wait_and_drop(backoff.next_s())

    def _wait_for_news(self, known: tuple[object, ...], *, until: float) -> None:
        """Until somebody tells, the tasks have other news than these, or this moment. All else that is reported is not
        looked at: whoever changes it tells.
        """
        while not self._stopping.is_set() and (left_s := until - time.monotonic()) > 0:
            self._drop_excess_if_due()
            pause_s = TASK_POLL_S if self.tasks.unfinished() else QUIET_POLL_S  # first: an end after this is news
            if self.tasks.news() != known or self._telling.wait(min(left_s, pause_s)):
                break
        self._telling.clear()

    def _note_reported(self) -> None:
        """The portal has taken a report of this version; who upgrades the agent looks for that."""
        is_first, self._reported_at = self._reported_at is None, format_time(now())
        if is_first:
            self._write_status()

    def _drop_strangers(self, items: dict[str, list[Any]]) -> None:
        """The portal does not know these: say no more of them, so that the rest is heard. Nothing on the host is
        touched.
        """
        for lease_id in items.get("leases", ()):
            self.leases.disown(lease_id, f"the portal does not know lease {lease_id} on this machine")
        self.tasks.disown(items.get("attempts", ()))
        self.commands.acknowledge(self.state.held.epoch, items.get("command_results", ()))
        self.journal.acknowledge(items.get("journal", ()))

    def _news(self, of_tasks: tuple[object, ...]) -> frozenset[object]:
        """What the portal should know; what of it is new since the last report does not wait for the next heartbeat."""
        results = (("result", result["command_id"]) for result in self.commands.results(self.state.held.epoch))
        records = (record["id"] for record in self.journal.pending())
        leases = (repr(lease | {"processes": None}) for lease in self._observed)
        openings = (repr(opening) for opening in self.openings.report())
        applied = ("applied", self._applied_generation)
        forwards = (repr(forward) for forward in self.forwards.report())
        return frozenset((*of_tasks, *results, *records, *leases, *openings, *forwards, applied))

    def _report(self, *, is_full: bool) -> dict[str, Any]:
        if is_full:
            self.gpu.ask(wait_s=GPU_WAIT_S)
        self._seq += 1
        held = self.state.held
        quota = held.desired.log_quota_bytes if held.desired else DEFAULT_QUOTA_BYTES
        ranges = self.tasks.log_ranges(quota_bytes=quota)
        return {
            "seq": self._seq,
            "boot_id": facts.boot_id(),
            "agent_version": __version__,
            "sent_at": format_time(now()),
            "frozen": held.frozen is not None,
            "facts": self._facts_if_due() if is_full else None,
            "metrics": metrics.sample() if is_full else None,
            "gpu": self.gpu.report() if is_full else None,
            "leases": self._observed,
            "applied_generation": self._applied_generation,
            "attempts": self.tasks.reports(),
            "logs": ranges,
            **({"forwards": forwards} if (forwards := self.forwards.report()) or is_gateway() else {}),
            "openings": self.openings.report(),
            "command_results": self.commands.results(held.epoch),
            # Only where there is something to say: a portal that was rolled back does not know it.
            **({"command_at_work": at_work} if is_full and (at_work := self.commands.at_work(held.epoch)) else {}),
            "journal": self.journal.pending(),
        }

    def _facts_if_due(self) -> dict[str, Any] | None:
        if self._facts_sent_at is not None and time.monotonic() - self._facts_sent_at < FACTS_EVERY_S:
            return None
        self._facts_sent_at = time.monotonic()
        return facts.collect()

    def _interval_s(self) -> float:
        desired = self.state.held.desired
        return desired.report_interval_s if desired else DEFAULT_INTERVAL_S

    def _wait_and_drop(self, wait_s: float) -> None:
        """A portal that is away must not let a talkative task fill the disk."""
        until = time.monotonic() + wait_s
        while not self._stopping.is_set() and (left_s := until - time.monotonic()) > 0:
            self._drop_excess()
            self._stopping.wait(min(QUOTA_POLL_S, left_s))

    def _drop_excess_if_due(self) -> None:
        if time.monotonic() - self._dropped_at >= QUOTA_POLL_S:
            self._drop_excess()

    def _drop_excess(self) -> None:
        self._dropped_at = time.monotonic()
        desired = self.state.held.desired
        try:
            self.tasks.drop_excess(quota_bytes=desired.log_quota_bytes if desired else DEFAULT_QUOTA_BYTES)
        except OSError as error:
            log.warning("logs: %s", error)

    def _write_status(self, *, contact: bool = False) -> None:
        """For `remotegpu-agent status`: what only this process knows. Once a second at most."""
        if contact:
            if time.monotonic() - self._contact_written_at < 1:
                return
            self._contact_written_at, self._last_contact_at = time.monotonic(), format_time(now())
        status = {
            "pid": os.getpid(),
            "version": __version__,
            "reported_at": self._reported_at,
            "last_contact_at": self._last_contact_at,
            "clock_offset_s": self.clock.offset_s,
            "gpu": self.gpu.report(),
        }
        write_json(self.config.run_dir / STATUS_FILE, status)


def _lease_of(step: Step) -> int | None:
    match step:
        case CloseLease(lease_id, _):
            return lease_id
        case MakeLogin(lease) | ArmEnd(lease) | SetExpiry(lease) | WriteKeys(lease):
            return lease.lease_id
        case StartAttempt(order):
            return order.lease_id
    return None


def _describe_step(step: Step) -> str:
    """For the log: never a key, a command or an environment."""
    match step:
        case StopAttempt(attempt_id, reason):
            return f"stop attempt {attempt_id} ({reason})"
        case CloseLease(lease_id, reason):
            return f"close lease {lease_id} ({reason})"
        case MakeLogin(lease):
            return f"make login {lease.login}"
        case ArmEnd(lease):
            return f"arm the end of lease {lease.lease_id} at {format_time(lease.ends_at)}"
        case SetExpiry(lease):
            return f"set the last day of {lease.login}"
        case WriteKeys(lease):
            return f"write {len(lease.keys)} keys of {lease.login}"
        case StartAttempt(order):
            return f"start attempt {order.attempt_id}"
        case EndUnstarted(order, state, reason):
            return f"attempt {order.attempt_id} is {state} ({reason})"


def _observed(
    lease_id: int, login: str, entry: Entry | None, there: HostLease | None, trouble: str | None, guarded: bool
) -> dict[str, Any]:
    is_open = entry is not None and not entry.is_closed
    armed_at: datetime | None = there.armed_at if there else None
    return {
        "lease_id": lease_id,
        "login": login,
        "state": "error" if trouble else "open" if is_open else "closed",
        "ends_at": format_time(entry.ends_at) if entry else None,
        "key_fingerprints": list(entry.key_fingerprints) if entry and there and there.keys else [],
        "end_armed": bool(is_open and guarded and entry and armed_at == entry.ends_at),
        "processes": there.processes if there else 0,
        "closed_at": format_time(entry.closed_at) if entry and entry.closed_at else None,
        "message": trouble[:400] if trouble else None,
    }


def prune_unpacked() -> None:
    """Remove what older versions of this program unpacked (SHIV_ROOT); ours stays."""
    root = os.environ.get("SHIV_ROOT")
    ours = next((parent for parent in Path(__file__).parents if root and parent.parent == Path(root)), None)
    if ours is None:
        return
    for other in ours.parent.iterdir():
        if other.is_dir() and other != ours:
            shutil.rmtree(other, ignore_errors=True)
