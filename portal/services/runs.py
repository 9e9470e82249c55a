"""Runs: one playbook run each, from the wish to its end.

A run's life is told here in order: queue, claim, keep, record, finish; and beside it: cancel, take over, lose. The row
is the truth. A worker holds a run by `lock_token` until `lock_expires_at`, and whatever it says counts only while the
token is its own. Here is no process and no host: starting and killing are in worker/. What its end means is told where
the wish came from: that module has its function called with `@runs.when_ended(purpose)`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

import peewee

from portal.db import AWAY, atomic, db, shared_now, utcnow
from portal.errors import Conflict, Error, Invalid, NotFound, incident
from portal.integrations import queue as bell
from portal.integrations.faults import point
from portal.models import Baseline, Lease, Machine, Run, RunEvent, RunHost, Task, User
from portal.models.states import LEASE_OPEN, RUN_ENDED, TASK_LIVE
from portal.services import audit, events
from portal.services.actors import SYSTEM, Actor
from portal.services.hearers import Hearers
from portal.services.machines import lock
from portal.services.transitions import WrongState, move

LOG = logging.getLogger(__name__)

OPTIONS = MappingProxyType({"check": bool, "reclaim_id": int})
MAX_ATTEMPTS = 3
REPORTED_BACK = ("runner_on_ok", "runner_on_failed", "runner_on_skipped", "runner_on_unreachable")
KEEP_OUTPUT_OF = 1000  # ended runs; older ones keep their row and lose their output
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")  # nothing that Ansible reads as a pattern
RESERVED = ("all", "ungrouped", "localhost")  # nor as another host than the one we mean


@dataclass(frozen=True)
class Playbook:
    """A file in playbooks/. `disrupts`: it may restart what a tenant uses. `repeatable`: a lost run starts again.

    `check`: whether it may only look (True), may not do that (False), or as whoever wants it says (None).
    """

    name: str
    disrupts: bool
    repeatable: bool
    tags: frozenset[str] = frozenset()
    check: bool | None = None


ROLES = frozenset(
    (
        *("base", "ssh_hardening", "unattended_upgrades", "firewall", "docker", "node_exporter", "gpu_agent"),
        *("nvidia_driver", "nvidia_container_toolkit", "nvidia_gpu_exporter", "desktop_vnc", "desktop_xrdp"),
    )
)
ROLES_OF_GATEWAYS = frozenset(
    ("base", "ssh_hardening", "unattended_upgrades", "firewall", "gateway", "node_exporter", "gpu_agent")
)
PLAYBOOKS = MappingProxyType(
    {
        "gpu_hosts": Playbook("gpu_hosts", disrupts=True, repeatable=True, tags=ROLES),
        "gateways": Playbook("gateways", disrupts=False, repeatable=True, tags=ROLES_OF_GATEWAYS),
        "verify": Playbook("verify", disrupts=False, repeatable=True),
        "site": Playbook("site", disrupts=True, repeatable=False, tags=ROLES),
        "upgrade_agent": Playbook("upgrade_agent", disrupts=False, repeatable=True),
        "drift": Playbook("drift", disrupts=False, repeatable=True, check=True),
        "rotate_credentials": Playbook("rotate_credentials", disrupts=False, repeatable=True, check=False),
    }
)


@dataclass(frozen=True)
class Impact:
    """What a run on some machines would meet: open leases and the tasks that live on them."""

    leases: list[Lease]
    tasks: list[Task]

    def as_dict(self) -> dict[str, Any]:
        return {
            "leases": [
                {
                    "id": lease.id,
                    "machine": lease.machine.name,
                    "tenant": lease.tenant.name,
                    "ends_at": lease.ends_at.isoformat(),
                }
                for lease in self.leases
            ],
            "tasks": [{"id": task.id, "name": task.name, "state": task.state} for task in self.tasks],
        }


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `state` is one of succeeded, failed, cancelled."""

    state: str
    exit_code: int | None = None
    reason: str | None = None
    remains: str | None = None
    stats: dict[str, Any] | None = None
    verdicts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Line:
    """One event of a run, as it is kept."""

    kind: str
    stdout: str = ""
    host: str | None = None
    task: str | None = None
    data: dict[str, Any] | None = None
    at: datetime = field(default_factory=utcnow)


when_ended: Hearers[Run] = Hearers()
"""By purpose; `lost` is an end too, unless the run is queued again."""

when_played: Hearers[Run] = Hearers()
"""By playbook, for those whose result is of interest whoever wanted it."""


# ── queue ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def queue(playbook: str, machines: Sequence[Machine], *, purpose: str = "operator", by: Actor, **options: Any) -> Run:
    """Wish for a run of `playbook` on exactly these machines.

    Options: `tags` (some of the playbook's roles), `check` (change nothing, show what would change), `reclaim_id` (the
    reclaim that waits for the verdict). Raises Invalid if a name, an option or the list is wrong, Conflict if a machine
    has no confirmed host key, is retired, or is leased or frozen and the playbook would disturb its tenant.
    """
    chosen = _playbook(playbook)
    tags, kept = _options(chosen, options)
    with atomic():
        hosts = _hosts(machines)
        _refuse_disruption(chosen, hosts)
        run = Run.create(playbook=chosen.name, purpose=purpose, tags=tags, options=kept, requested_by=by.user)
        for machine in hosts:
            RunHost.create(run=run, machine=machine)
        names = [machine.name for machine in hosts]
        audit.record("run.queued", run, by=by, playbook=chosen.name, purpose=purpose, machines=names, tags=tags, **kept)
        events.write("run.queued", resource_id=run.id)
        db.after_commit(bell.ring)
    return run


def machines_named(names: Iterable[str]) -> list[Machine]:
    """The machines with exactly these names. Raises Invalid that lists each name which is blank or unknown."""
    wanted = list(names)
    found = {machine.name: machine for machine in Machine.select().where(Machine.name << (wanted or [""]))}
    wrong = [f"{name!r} is the name of no machine." for name in wanted if name not in found]
    if wrong or not wanted:
        raise Invalid({"machines": wrong or ["Name at least one machine; a run never means all of them."]})
    return [found[name] for name in dict.fromkeys(wanted)]


def fleet() -> list[Machine]:
    """Every machine that was made a GPU host and is not retired: each of them by name, as for any other run."""
    made = Baseline.select(Baseline.machine)
    wanted = (Machine.state != "retired") & Machine.host_key.is_null(False) & (Machine.id << made)
    return list(Machine.select().where(wanted).order_by(Machine.name))


def impact(machines: Iterable[Machine]) -> Impact:
    """The open leases on these machines and the tasks that live on them."""
    ids = [machine.id for machine in machines]
    leases = list(Lease.select().where((Lease.machine << ids) & (Lease.state << LEASE_OPEN)).order_by(Lease.id))
    tasks = Task.select().where((Task.lease << leases) & (Task.state << TASK_LIVE)).order_by(Task.id)
    return Impact(leases, list(tasks) if leases else [])


def _playbook(name: str) -> Playbook:
    chosen = PLAYBOOKS.get(name)
    if chosen is None:
        raise Invalid({"playbook": [f"{name!r} is none of {', '.join(PLAYBOOKS)}."]})
    return chosen


def _options(playbook: Playbook, given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Tags and the other options, each of its type; an option that nothing reads is refused."""
    wrong: dict[str, list[str]] = {}
    tags = given.pop("tags", None) or []
    if unknown := [tag for tag in tags if tag not in playbook.tags]:
        wrong["tags"] = [f"{playbook.name} has no {', '.join(map(repr, unknown))}; it has {sorted(playbook.tags)}."]
    for name, value in given.items():
        if name not in OPTIONS:
            wrong[name] = [f"There is no such option; there are tags, {', '.join(OPTIONS)}."]
        elif type(value) is not OPTIONS[name]:
            wrong[name] = [f"{value!r} is not of the type {OPTIONS[name].__name__}."]
    if playbook.check is False and given.get("check"):
        wrong["check"] = [f"{playbook.name} cannot only look."]
    if wrong:
        raise Invalid(wrong)
    return sorted(tags), {**given, "check": True} if playbook.check else given


def _hosts(machines: Sequence[Machine]) -> list[Machine]:
    """The machines as the database has them now; a list that is empty or holds a stranger is refused."""
    ids = [machine.id for machine in machines]
    hosts = list(Machine.select().where(Machine.id << (ids or [0])).order_by(Machine.name))
    if not hosts or len(hosts) != len(set(ids)):
        raise Invalid({"machines": ["Name at least one machine, each of them known; a run never means all of them."]})
    for machine in hosts:
        if not HOST_NAME.fullmatch(machine.name) or machine.name in RESERVED:
            raise Invalid({"machines": [f"{machine.name!r} cannot be the name of a host."]})
        if machine.state == "retired":
            raise Conflict(f"{machine.name} is retired.", code="machine_retired")
        if machine.host_key is None:
            raise Conflict(
                f"The host key of {machine.name} is not confirmed; confirm its fingerprint first.",
                code="host_key_not_confirmed",
            )
    return hosts


def _refuse_disruption(playbook: Playbook, hosts: list[Machine]) -> None:
    """Nothing that may disturb a tenant where one is, or may be by a host's word that we have not heard.

    Holds the machines until the transaction ends: a lease that begins at this moment sees the run, or the run sees it.
    """
    if not playbook.disrupts:
        return
    hosts = [lock(machine) for machine in sorted(hosts, key=lambda each: each.id)]
    for machine in hosts:
        if machine.frozen_reason is not None:
            raise Conflict(f"{machine.name} is frozen: {machine.frozen_reason} Thaw it first.", code="machine_frozen")
    met = impact([machine for machine in hosts if machine.maintenance_since is None])
    if met.leases:
        names = ", ".join(sorted({lease.machine.name for lease in met.leases}))
        raise Conflict(
            f"{names}: leased, and {playbook.name} may disturb the tenant. Start a maintenance first, or leave it out.",
            code="machine_leased",
            impact=met.as_dict(),
        )


# ── read ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def get_run(run_id: int) -> Run:
    run: Run | None = Run.get_or_none(Run.id == run_id)
    if run is None:
        raise NotFound("There is no such run.")
    return run


def list_runs(*, state: str | None = None, machine_id: int | None = None) -> peewee.ModelSelect[Run]:
    """Runs, newest first."""
    query = Run.select(Run, User).join(User, peewee.JOIN.LEFT_OUTER).order_by(Run.id.desc())
    if state:
        query = query.where(Run.state == state)
    if machine_id is not None:
        query = query.where(Run.id << RunHost.select(RunHost.run).where(RunHost.machine == machine_id))
    return query


def machines_of(run: Run) -> list[Machine]:
    return list(Machine.select().join(RunHost).where(RunHost.run == run).order_by(Machine.name))


def machines_by_run(found: Sequence[Run]) -> dict[int, list[Machine]]:
    """Run id → its machines, for a page of runs."""
    machines: dict[int, list[Machine]] = {run.id: [] for run in found}
    rows = RunHost.select(RunHost, Machine).join(Machine).where(RunHost.run << list(machines)).order_by(Machine.name)
    for row in rows:
        machines[row.run_id].append(row.machine)
    return machines


def went_well_on(machine: Machine, run: Run) -> bool:
    """Whether all of the ended run was done on this machine, whatever became of its others."""
    told = (run.stats or {}).get(machine.name)
    if run.state != "failed" or told is None:
        return run.state == "succeeded"
    return not told["failed"] and not told["unreachable"]


def find_disrupting(machine: Machine) -> Run | None:
    """The run that works on this machine, or waits to, and may disturb whoever leases it; the oldest if there are many.

    Asked while the machine is held, the answer stays true until the transaction ends.
    """
    disrupting = [playbook.name for playbook in PLAYBOOKS.values() if playbook.disrupts]
    here = Run.select().join(RunHost).where(RunHost.machine == machine, Run.state << ("queued", "running"))
    run: Run | None = here.where(Run.playbook << disrupting).order_by(Run.id).first()
    return run


def output_after(run_id: int, counter: int, *, limit: int = 500) -> list[RunEvent]:
    """The run's events after `counter`, in order. Counters of a run have no gaps: only its worker writes them."""
    query = RunEvent.select().where((RunEvent.run == run_id) & (RunEvent.counter > counter))
    return list(query.order_by(RunEvent.counter).limit(limit))


def look_after(run_id: int, counter: int, *, limit: int = 500) -> tuple[Run, list[RunEvent]]:
    """The run as it is, and its output after `counter`. If it has ended, no output can be missing."""
    run = get_run(run_id)  # before the output: the last lines and the end are one transaction
    return run, output_after(run_id, counter, limit=limit)


def is_ended(run: Run) -> bool:
    """Whether nothing more will come: `lost` at rest is an end as well."""
    return run.state in (*RUN_ENDED, "lost")


# ── claim, keep, record, finish: what the worker that holds the run says ───────────────────────────────────────────


@contextmanager
def _step(name: str) -> Iterator[None]:
    """A transaction of a worker; a test may end the process just before its commit or just after it."""
    with atomic():
        yield
        point(f"{name}.before_commit")
    point(f"{name}.committed")


def claim(token: str, *, lock_s: float) -> Run | None:
    """Take the oldest queued run whose hosts are all free, or None. It is then `running` and held by `token`."""
    busy = {row.machine_id for row in RunHost.select(RunHost.machine).where(RunHost.active)}
    for run in list(Run.select().where(Run.state == "queued").order_by(Run.id)):
        wanted = {row.machine_id for row in RunHost.select(RunHost.machine).where(RunHost.run == run)}
        if not wanted & busy and _take(run, token, lock_s):
            return run
        busy |= wanted  # a younger run must not overtake an older one on the way to the same host
    return None


def _take(run: Run, token: str, lock_s: float) -> bool:
    try:
        with _step("claim"):
            move(
                run,
                leave="queued",
                enter="running",
                lock_token=token,
                lock_expires_at=shared_now() + timedelta(seconds=lock_s),
                attempt=run.attempt + 1,
                child={"mark": f"{run.id}:{token}"},
                started_at=utcnow(),
                ended_at=None,
                reason=None,
            )
            RunHost.update(active=True).where(RunHost.run == run).execute()
            _refuse_disruption(_playbook(run.playbook), machines_of(run))
            audit.record("run.running", run, by=SYSTEM, attempt=run.attempt)
            events.write("run.running", resource_id=run.id)
    except (WrongState, peewee.IntegrityError):  # somebody was first: to the run, or to one of its hosts
        return False
    except Error as refusal:  # since it was queued: leased, or the playbook is gone with an upgrade
        _give_up(run.id, refusal)
        return False
    return True


def _give_up(run_id: int, refusal: Error) -> None:
    run = get_run(run_id)
    with suppress(WrongState), _step("give_up"):  # somebody has just cancelled it
        move(run, leave="queued", enter="cancelled", ended_at=utcnow(), event_count=0, reason=refusal.message)
        _ended(run, by=SYSTEM)


def keep(run: Run, token: str, *, lock_s: float) -> Run:
    """Hold on for another `lock_s`; returns the row as it is now. Raises WrongState if it is somebody else's."""
    with _step("renew"):
        _hold(run.id, token, lock_s)
        return get_run(run.id)


def _hold(run_id: int, token: str, lock_s: float) -> None:
    until = shared_now() + timedelta(seconds=lock_s)
    ours = (Run.id == run_id) & (Run.lock_token == token) & (Run.state == "running")
    if not Run.update(lock_expires_at=until).where(ours).execute():
        raise WrongState(f"Run {run_id} is not held with this token any more.")


def record_child(run: Run, token: str, child: dict[str, Any], *, lock_s: float) -> None:
    """Keep which process is the run's ansible-playbook, so that whoever takes the run over can end it."""
    with _step("child"):
        _hold(run.id, token, lock_s)
        Run.update(child={"mark": f"{run.id}:{token}", **child}).where(Run.id == run.id).execute()


def record(run: Run, token: str, lines: Sequence[Line], *, lock_s: float) -> None:
    """Keep some output and wake who follows it. Raises WrongState, and keeps nothing, if the token is void."""
    with _step("events"):
        _hold(run.id, token, lock_s)
        _append(run.id, lines)


def _append(run_id: int, lines: Sequence[Line]) -> int:
    """Write `lines` behind what is there; returns the number of events that the run has now."""
    last: int = RunEvent.select(peewee.fn.MAX(RunEvent.counter)).where(RunEvent.run == run_id).scalar() or 0
    rows = [
        {
            "run": run_id,
            "counter": last + number,
            "at": line.at,
            "kind": line.kind,
            "host": line.host,
            "task": line.task,
            "stdout": line.stdout,
            "data": line.data,
        }
        for number, line in enumerate(lines, 1)
    ]
    for start in range(0, len(rows), 100):  # SQLite takes so many variables in one statement
        RunEvent.insert_many(rows[start : start + 100]).execute()
    if rows:
        events.write("run.event", resource_id=run_id, counter=last + len(rows))
    return last + len(rows)


def finish(run: Run, token: str, outcome: Outcome, lines: Sequence[Line] = ()) -> None:
    """End the run with its last output. Raises WrongState, and keeps nothing, if the token is void."""
    with _step("finish"):
        move(
            run,
            leave="running",
            enter=outcome.state,
            where=Run.lock_token == token,
            lock_token=None,
            lock_expires_at=None,
            ended_at=utcnow(),
            exit_code=outcome.exit_code,
            reason=outcome.reason,
            remains=outcome.remains,
            stats=outcome.stats,
            verdicts=outcome.verdicts,
            event_count=_append(run.id, lines),
        )
        _ended(run, by=SYSTEM)


def _ended(run: Run, *, by: Actor) -> None:
    """The run is over: free its hosts, tell who waits for it."""
    RunHost.update(active=False).where(RunHost.run == run).execute()
    audit.record(f"run.{run.state}", run, by=by, reason=run.reason, exit_code=run.exit_code, remains=run.remains)
    events.write(f"run.{run.state}", resource_id=run.id)
    _hand_over(run)
    db.after_commit(bell.ring)  # a run that waited for one of these hosts can start


def _hand_over(run: Run) -> None:
    """Tell who waits for it, in the same transaction. A run ends even if that module objects.

    Raises what a database that cannot answer now raises: the run has not ended then, and its worker says so again.
    """
    for hearer in (when_ended.by_kind.get(run.purpose), when_played.by_kind.get(run.playbook)):
        if hearer is not None:
            _tell(hearer, run)


def _tell(hearer: Callable[[Run], None], run: Run) -> None:
    try:
        with atomic():
            hearer(run)
    except AWAY:
        raise
    except Exception as error:
        # Raising would leave the run `running` for ever, with its hosts: it has ended, and the objection is kept.
        number = incident()
        LOG.exception("incident %s: run %s ended, but what it was for did not take its result", number, run.id)
        objection = error.message if isinstance(error, Error) else f"the log has why, as incident {number}."
        reason = f"{run.reason or ''} Its result was not taken: {objection} Mend that and run it again.".strip()
        Run.update(reason=reason).where(Run.id == run.id).execute()
        audit.record("run.unheard", run, by=SYSTEM, outcome="failed", incident=number)


# ── cancel ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def cancel(run: Run, *, by: Actor) -> Run:
    """Stop the run: at once if it only waits, otherwise its worker ends every process of it. Repeating it is harmless.

    Raises Conflict if it has ended.
    """
    with atomic():
        now = utcnow()
        wish = Run.update(cancel_requested_at=now).where((Run.id == run.id) & Run.cancel_requested_at.is_null())
        wished = wish.where(Run.state << ["queued", "running"]).execute()
        run = get_run(run.id)  # after the update, which holds the row: no worker can move it meanwhile
        if is_ended(run):
            raise Conflict(f"Run {run.id} has ended: it is {run.state}.", code="run_ended", state=run.state)
        if run.state == "queued":
            reason = f"Cancelled by {by.name} before it started."
            move(run, leave="queued", enter="cancelled", ended_at=now, reason=reason, event_count=_append(run.id, []))
            _ended(run, by=by)
        elif wished:
            audit.record("run.cancelling", run, by=by)
            events.write("run.cancelling", resource_id=run.id)
        db.after_commit(bell.ring)
    return run


# ── take over, lose: a worker is gone ──────────────────────────────────────────────────────────────────────────────


def take_over(token: str, *, lock_s: float) -> Run | None:
    """Take a run whose worker let its lock expire, or None.

    The caller must end whatever carries `run.child["mark"]`, which still is the mark of the worker before it, clean up,
    and only then call `lose`.
    """
    now = shared_now()
    expired = (Run.state == "running") & (Run.lock_expires_at < now)
    for run in list(Run.select().where(expired).order_by(Run.id)):
        with _step("take_over"):
            same = expired & (Run.id == run.id) & (Run.lock_token == run.lock_token)
            until = now + timedelta(seconds=lock_s)
            if Run.update(lock_token=token, lock_expires_at=until).where(same).execute():
                audit.record("run.taken_over", run, by=SYSTEM, attempt=run.attempt)
                return get_run(run.id)
    return None


def lose(run: Run, token: str, *, reason: str, remains: str | None = None, lines: Sequence[Line] = ()) -> None:
    """The run's process is gone without a result, and nothing of it is left on this machine.

    It is queued again if its playbook can be repeated and nobody cancelled it; otherwise it stays lost (or cancelled).
    Raises WrongState if the token is void.
    """
    with _step("lose"):
        Run.update(lock_token=token).where(Run.id == run.id, Run.lock_token == token).execute()  # holds the row
        seen = get_run(run.id)
        state = "cancelled" if seen.cancel_requested_at else "lost"
        closing = Line("run.lost", f"{reason}\n" + (f"{remains}\n" if remains else ""))
        move(
            run,
            leave="running",
            enter=state,
            where=Run.lock_token == token,
            lock_token=None,
            lock_expires_at=None,
            ended_at=utcnow(),
            reason=reason,
            remains=remains,
            event_count=_append(run.id, [*lines, closing]),
        )
        if state == "lost" and _is_repeatable(run) and run.attempt < MAX_ATTEMPTS:
            _queue_again(run)
        else:
            _ended(run, by=SYSTEM)


def _is_repeatable(run: Run) -> bool:
    return run.playbook in PLAYBOOKS and PLAYBOOKS[run.playbook].repeatable


def _queue_again(run: Run) -> None:
    RunHost.update(active=False).where(RunHost.run == run).execute()
    audit.record("run.lost", run, by=SYSTEM, reason=run.reason, remains=run.remains)
    move(run, leave="lost", enter="queued", ended_at=None, event_count=None)
    audit.record("run.queued", run, by=SYSTEM, attempt=run.attempt, reason="The playbook can be repeated.")
    events.write("run.queued", resource_id=run.id)
    db.after_commit(bell.ring)


def held_marks() -> set[str]:
    """The marks of all runs that a worker holds, or held when it died."""
    return {run.child["mark"] for run in Run.select().where(Run.state == "running") if run.child}


def open_work(run: Run) -> str | None:
    """Which tasks had begun on a host and were not reported back: what may still go on there, in words."""
    begun: dict[str, str] = {}
    query = RunEvent.select(RunEvent.kind, RunEvent.host, RunEvent.task).where(RunEvent.run == run)
    for event in query.order_by(RunEvent.counter):
        if event.kind == "playbook_on_start":  # an attempt of its own
            begun.clear()
        elif event.kind == "runner_on_start":
            begun[event.host or ""] = event.task or "a task"
        elif event.kind in REPORTED_BACK:
            begun.pop(event.host or "", None)
    if not begun:
        return None
    return "May still run on the host: " + "; ".join(f"{host}: {task}" for host, task in sorted(begun.items()))


def sweep() -> int:
    """Delete the output of old runs, so that a thousand runs take bounded space; returns how many events went."""
    newest = Run.select(Run.id).where(Run.state << [*RUN_ENDED, "lost"]).order_by(Run.id.desc())
    edge = newest.offset(KEEP_OUTPUT_OF).limit(1).scalar()
    if edge is None:
        return 0
    ended = Run.select(Run.id).where((Run.id <= edge) & (Run.state << [*RUN_ENDED, "lost"]))
    with atomic():
        return int(RunEvent.delete().where(RunEvent.run << ended).execute())
