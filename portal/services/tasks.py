"""Tasks: a customer's work on a leased machine. Told in order: create, send, hear from the host, retry, stop, lose.

A task is tried in attempts; each has an id of its own, is sent to one host and never moves backwards, whatever the host
says later. `Task.state` is a copy of its newest attempt's and has no transitions of its own. The output is in
logs.py; how the host runs it is the agent's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import peewee

from portal import db
from portal.db import utcnow
from portal.errors import Conflict, Forbidden, Invalid, NotFound
from portal.integrations import protocol
from portal.integrations.protocol import parse_time_or_none
from portal.models import Attempt, Gpu, Lease, Machine, MachineReport, Task, Tenant, User
from portal.models.states import ATTEMPT, LEASE_OPEN, TASK_ENDED, TASK_LIVE
from portal.services import audit, batch, events, machines, tenants
from portal.services.actors import SYSTEM, Actor, of_agent
from portal.services.transitions import move

MOST_COMMAND_BYTES = 64 * 1024
MOST_ENV = 200
MOST_ENV_BYTES = 64 * 1024
MOST_LIVE_A_LEASE = 100  # the desired state carries 500 attempts at most
MOST_LIVE_BYTES = 8 * 1024 * 1024  # of a lease's live tasks, written as JSON: an agent reads no answer above 32 MiB
LONGEST_S = 30 * 24 * 3600
MOST_GRACE_S = 300  # a host that reboots waits that long for it
MOST_RETRIES = 10
RETRIED = ("failed", "lost")  # a task that ran out of its time would do so again
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
STOP_REPEATED = timedelta(hours=1)  # how long a stop is repeated to a host that has not confirmed it
ALREADY_BEGUN = "echo 'RemoteGPU: this attempt had begun, and its host has lost it. It is not run twice.' >&2\nexit 1\n"
AWAY = timedelta(minutes=5)
SILENT = timedelta(minutes=10)

Found = Any  # a query of tasks; peewee's own type names a column's model differently in each of its methods


# Look


def of(user: User) -> Found:
    """The tasks of all tenants this person belongs to, newest first: the one place that says so."""
    return every().where(Lease.tenant << tenants.ids_of(user))


def every() -> Found:
    """All tasks with their lease, machine, tenant and creator, newest first."""
    return (
        Task.select(Task, Lease, Machine, Tenant, User)
        .join(Lease)
        .join(Machine)
        .switch(Lease)
        .join(Tenant)
        .switch(Task)
        .join(User)
        .order_by(Task.id.desc())
    )


def matching(
    tasks: Found,
    *,
    state: str | None = None,
    machine_id: int | None = None,
    tenant_id: int | None = None,
    lease_id: int | None = None,
    keyword: str | None = None,
) -> Found:
    """Those of `tasks` that match every filter given. The keyword is looked for in name and command."""
    if state is not None:
        tasks = tasks.where(Task.state == state)
    if machine_id is not None:
        tasks = tasks.where(Lease.machine == machine_id)
    if tenant_id is not None:
        tasks = tasks.where(Lease.tenant == tenant_id)
    if lease_id is not None:
        tasks = tasks.where(Task.lease == lease_id)
    if keyword:
        tasks = tasks.where(Task.name.contains(keyword) | Task.command.contains(keyword))
    return tasks


def figures(tasks: Found) -> dict[str, int]:
    """How many of `tasks` are in each state: over all of them, not over a page."""
    counted: Any = tasks.select(Task.state, peewee.fn.COUNT(Task.id)).order_by().group_by(Task.state).tuples()
    return dict.fromkeys(ATTEMPT, 0) | dict(counted)


def get(tasks: Found, task_id: int) -> Task:
    """The task with this id among `tasks`. Raises NotFound: it does not exist, or it is somebody else's."""
    task: Task | None = tasks.where(Task.id == task_id).first()
    if task is None:
        raise NotFound(f"There is no task {task_id}.")
    return task


def attempts_of(task: Task) -> list[Attempt]:
    """Oldest first."""
    return list(Attempt.select().where(Attempt.task == task).order_by(Attempt.number))


def newest_attempt(task: Task) -> Attempt:
    attempt: Attempt = Attempt.select().where(Attempt.task == task).order_by(Attempt.number.desc()).get()
    return attempt


def with_newest_attempts(page: list[Task]) -> list[Task]:
    """The same tasks, each with its newest attempt as `newest`: one query for a whole page."""
    last = Attempt.select(peewee.fn.MAX(Attempt.id)).where(Attempt.task << page).group_by(Attempt.task)
    newest = {attempt.task_id: attempt for attempt in Attempt.select().where(Attempt.id << last)} if page else {}
    for task in page:
        task.newest = newest[task.id]
    return page


def get_attempt(task: Task, number: int | None) -> Attempt:
    """One attempt of this task, the newest without a number. Raises NotFound."""
    if number is None:
        return newest_attempt(task)
    attempt: Attempt | None = Attempt.get_or_none(Attempt.task == task, Attempt.number == number)
    if attempt is None:
        raise NotFound(f"Task {task.id} has no attempt {number}.")
    return attempt


# Create


def create(
    machine_id: int,
    *,
    name: str,
    command: str,
    env: Mapping[str, str] | None = None,
    workdir: str | None = None,
    gpu_uuids: list[str] | None = None,
    time_limit_s: int | None = 3600,
    stop_grace_s: int = 30,
    retries: int = 0,
    by: Actor,
) -> Task:
    """Run `command`, a script for bash, on a machine that the caller's tenant has leased now.

    `gpu_uuids` None means all of the machine's GPUs. Raises NotFound when none of the caller's tenants has an active
    lease there, Forbidden for somebody who only looks, Invalid with every faulty field.
    """
    lease = _lease_to_run_on(machine_id, by)
    given = {
        "name": name.strip(),
        "command": command,
        "env": dict(env or {}),
        "workdir": workdir or None,
        "gpu_uuids": gpu_uuids,
        "time_limit_s": time_limit_s,
        "stop_grace_s": stop_grace_s,
        "retries": retries,
    }
    _check(given, machine_id)
    with db.atomic():
        _hold(lease)
        task = Task(lease=lease, created_by=by.user, **given)
        _check_room(task)
        task.save()
        _try(task, number=1)
        audit.record("task.created", task, by=by, tenant_id=lease.tenant_id, name=task.name, lease_id=lease.id)
    return task


def _lease_to_run_on(machine_id: int, by: Actor) -> Lease:
    if by.user is None:
        raise Forbidden("A task is created by a person.")
    active = (Lease.machine == machine_id) & (Lease.state == "active") & (Lease.ends_at > utcnow())
    lease: Lease | None = Lease.select().where(active & (Lease.tenant << tenants.ids_of(by.user))).first()
    if lease is None:
        raise NotFound(f"You have no active lease on machine {machine_id}.", code="no_lease")
    tenants.require(by.user, lease.tenant_id, "use")
    return lease


def _check(given: Mapping[str, Any], machine_id: int) -> None:
    faults: dict[str, list[str]] = {}
    for field, fault in (*_text_faults(given), *_env_faults(given["env"]), *_number_faults(given)):
        faults.setdefault(field, []).append(fault)
    faults.update(_gpu_faults(given["gpu_uuids"], machine_id))
    if faults:
        raise Invalid(faults)


def _text_faults(given: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if not given["name"] or len(given["name"]) > 100 or not given["name"].isprintable():
        yield "name", "Use one line of 1 to 100 characters."
    command = given["command"]
    if not command.strip():
        yield "command", "Write what is to be run."
    # The protocol counts characters, the host bytes: the smaller one holds.
    if len(command.encode("utf-8", "surrogatepass")) > MOST_COMMAND_BYTES:
        yield "command", f"Longer than {MOST_COMMAND_BYTES} bytes; put the script into a file and run that."
    if not _is_clean(command):
        yield "command", "Contains a NUL or half a character."
    workdir = given["workdir"]
    if workdir is not None and (len(workdir) > 1000 or not workdir.isprintable()):
        yield "workdir", "Use a path of at most 1000 characters."


def _is_clean(text: str) -> bool:
    return "\0" not in text and not any(0xD800 <= ord(char) < 0xE000 for char in text)


def _env_faults(env: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    if (
        len(env) > MOST_ENV
        or sum(len(name) + len(value.encode("utf-8", "surrogatepass")) for name, value in env.items()) > MOST_ENV_BYTES
    ):
        yield "env", f"More than {MOST_ENV} variables or {MOST_ENV_BYTES} bytes."
    for name, value in env.items():
        if not ENV_NAME.fullmatch(name):
            yield "env", f"{name[:60]!r} is no name for a variable: letters, digits and '_', no digit first."
        if not _is_clean(value):
            yield "env", f"{name[:60]}: contains a NUL or half a character."


def _number_faults(given: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    limit = given["time_limit_s"]
    if limit is not None and not 1 <= limit <= LONGEST_S:
        yield "time_limit_s", f"Use 1 to {LONGEST_S} seconds."
    if not 0 <= given["stop_grace_s"] <= MOST_GRACE_S:
        yield "stop_grace_s", f"Use 0 to {MOST_GRACE_S} seconds."
    if not 0 <= given["retries"] <= MOST_RETRIES:
        yield "retries", f"Use 0 to {MOST_RETRIES}."


def _gpu_faults(uuids: list[str] | None, machine_id: int) -> dict[str, list[str]]:
    if uuids is None:
        return {}
    there = {gpu.uuid for gpu in Gpu.select(Gpu.uuid).where(Gpu.machine == machine_id)}
    unknown = sorted(set(uuids) - there)
    if unknown or len(set(uuids)) != len(uuids):
        return {"gpu_uuids": [f"The machine has {', '.join(sorted(there)) or 'no GPU'}; name each at most once."]}
    return {}


def _hold(lease: Lease) -> None:
    """Hold the machine's row, then the lease's, until the transaction ends: whoever ends it waits, or has done so.

    Always the machine first, here and wherever an attempt moves: two transactions must not wait for each other.
    """
    machines.lock(lease.machine)
    held = Lease.update(remark=Lease.remark).where(
        Lease.id == lease.id, Lease.state == "active", Lease.ends_at > utcnow()
    )
    if held.execute() != 1:
        raise Conflict("The lease has ended.", code="lease_ended")


def _check_room(task: Task) -> None:
    """Whether the lease may have this one beside those that are live: its host is told of all of them at once."""
    columns = (Task.command, Task.env, Task.workdir)
    others = list(Task.select(*columns).where(Task.lease == task.lease, Task.state << TASK_LIVE))
    live = len(others)
    if live >= MOST_LIVE_A_LEASE:
        raise Conflict(f"{live} tasks wait or run on this machine; stop one first.", code="too_many_tasks")
    if sum(map(_bytes_to_send, [*others, task])) > MOST_LIVE_BYTES:
        raise Conflict(
            "The scripts and variables of the tasks that wait or run on this machine would be more than "
            f"{MOST_LIVE_BYTES} bytes. Stop one first, or put long scripts into files and run those.",
            code="too_many_tasks",
        )


def _bytes_to_send(task: Task) -> int:
    """As they are sent: a control character takes six bytes."""
    return protocol.size([task.command, task.env, task.workdir])


def _try(task: Task, *, number: int) -> Attempt:
    """The next attempt, with an id that no host has ever seen."""
    try:
        with db.atomic():
            above: int = Machine.select(Machine.attempts_above).where(Machine.id == task.lease.machine_id).scalar()
            attempt = Attempt.create(task=task, number=number, **db.id_above(Attempt, above))
    except peewee.IntegrityError:
        raise Conflict("Somebody has just started the next attempt.", code="already_retried") from None
    _mirror(task, attempt)
    return attempt


def _mirror(task: Task, attempt: Attempt) -> bool:
    """Bring the task up to its newest attempt, and tell the host and those who watch. False: there is a newer one.

    No transition: a retry begins at `queued` again, while no attempt ever goes back.
    """
    lease = task.lease
    newest = Attempt.select(peewee.fn.MAX(Attempt.number)).where(Attempt.task == task)
    copied = Task.update(state=attempt.state, ended_at=attempt.ended_at).where(
        Task.id == task.id, newest == attempt.number
    )
    if copied.execute() != 1:
        return False
    task.state, task.ended_at = attempt.state, attempt.ended_at
    events.write(f"task.{attempt.state}", machine_id=lease.machine_id, tenant_id=lease.tenant_id, resource_id=task.id)
    events.desired_changed(lease.machine_id)
    return True


# Send


def to_send(machine: Machine) -> list[dict[str, Any]]:
    """What the host shall run and stop, as the protocol writes it, oldest first.

    A stop of an attempt that has ended here is repeated until the host confirms it: it may have begun to run meanwhile.
    """
    unconfirmed = (
        (Attempt.desired == "stop") & Attempt.boot_id.is_null() & (Attempt.stop_requested_at > utcnow() - STOP_REPEATED)
    )
    wanted = (
        Attempt.select(Attempt, Task, Lease)
        .join(Task)
        .join(Lease)
        .where(Lease.machine == machine, Lease.state << LEASE_OPEN)
        .where((Attempt.state << TASK_LIVE) | unconfirmed)
        .order_by((Attempt.state << TASK_LIVE).desc(), Attempt.id)
        .limit(500)
    )
    all_gpus = [gpu.uuid for gpu in Gpu.select(Gpu.uuid).where(Gpu.machine == machine).order_by(Gpu.slot, Gpu.id)]
    return [_order(attempt, all_gpus) for attempt in wanted]


def _order(attempt: Attempt, all_gpus: list[str]) -> dict[str, Any]:
    """The GPUs are named one by one, since a task that asks for all of them means those that were leased.

    What shall not begin goes by its id: there can be hundreds, each as large as a task may be. Should the host not know
    one that ran there, it runs what we send, and says so.
    """
    task = attempt.task
    begins = attempt.desired == "run" and attempt.state != "running"
    return {
        "attempt_id": attempt.id,
        "task_id": task.id,
        "lease_id": task.lease.host_id,
        "state": attempt.desired,
        "command": task.command if begins else ALREADY_BEGUN,
        "env": task.env if begins else {},
        "workdir": task.workdir if begins else None,
        "time_limit_s": task.time_limit_s,
        "stop_grace_s": task.stop_grace_s,
        "gpu_uuids": (all_gpus or None) if task.gpu_uuids is None else task.gpu_uuids,  # no GPU known: null
    }


# Hear from the host


def attempt_reported(machine: Machine, reported: Mapping[str, Any]) -> None:
    """Take the host's word on one of its attempts. States only move on; what comes late, or twice, changes nothing.

    The caller has checked that the attempt is this machine's.
    """
    attempt_id = int(reported["attempt_id"])
    if _is_no_news(get_any_attempt(attempt_id), reported):
        return
    with db.atomic():
        machines.lock(machine)
        attempt = get_any_attempt(attempt_id)
        if reported["log_truncated"] and not attempt.log_truncated:
            Attempt.update(log_truncated=True).where(Attempt.id == attempt.id).execute()
        steps = way(attempt.state, reported["state"])
        if attempt.state in TASK_ENDED:
            _answer_late(attempt, reported)
        elif steps:
            _follow(attempt, steps, reported, by=of_agent(machine))


def _is_no_news(attempt: Attempt, reported: Mapping[str, Any]) -> bool:
    """The same again, as with every heartbeat while a task runs: not worth a lock."""
    same_log = attempt.log_truncated or not reported["log_truncated"]
    return bool(attempt.state == reported["state"] and attempt.boot_id is not None and same_log)


def get_any_attempt(attempt_id: int) -> Attempt:
    """With its task and lease. Nobody is asked here whether they may see it."""
    attempt: Attempt = Attempt.select(Attempt, Task, Lease).join(Task).join(Lease).where(Attempt.id == attempt_id).get()
    return attempt


@cache
def way(state: str, to: str) -> tuple[str, ...]:
    """The states to pass through from `state` to `to`, the shortest way; none if it is the same or there is no way."""
    ways: list[tuple[str, ...]] = [(state,)]
    for path in ways:
        if path[-1] == to:
            return path[1:]
        ways += [(*path, after) for after in ATTEMPT[path[-1]]]
    return ()


def _follow(attempt: Attempt, steps: tuple[str, ...], reported: Mapping[str, Any], *, by: Actor) -> None:
    has_ended = steps[-1] in TASK_ENDED
    known = {
        "started_at": parse_time_or_none(reported["started_at"]) or attempt.started_at,
        "boot_id": reported["boot_id"] or attempt.boot_id,
        "reason": reported["reason"],
    }
    if has_ended:
        known |= {
            "ended_at": parse_time_or_none(reported["ended_at"]) or utcnow(),
            "exit_code": reported["exit_code"],
            "signal": reported["signal"],
        }
    for step in steps:
        _move(attempt, step, by=by, **(known if step == steps[-1] else {}))
    _settle(attempt)


def _move(attempt: Attempt, step: str, *, by: Actor, **changes: Any) -> None:
    move(attempt, leave=attempt.state, enter=step, **changes)
    detail = {"attempt_id": attempt.id, "exit_code": attempt.exit_code, "reason": attempt.reason}
    audit.record(f"task.{step}", attempt.task, by=by, tenant_id=attempt.task.lease.tenant_id, **detail)


def _settle(attempt: Attempt) -> None:
    """An attempt has moved: the task follows, and a failed one is tried again while retries are left."""
    task = attempt.task
    is_wanted = attempt.desired == "run" and attempt.number <= task.retries
    if _mirror(task, attempt) and attempt.state in RETRIED and is_wanted and _is_running(task.lease):
        _try(task, number=attempt.number + 1)


def _is_running(lease: Lease) -> bool:
    return bool(lease.state == "active" and lease.ends_at > utcnow())


def _answer_late(attempt: Attempt, reported: Mapping[str, Any]) -> None:
    """It has ended here. A host that runs it all the same is told to stop it, until it has confirmed (`boot_id`)."""
    if reported["state"] in TASK_ENDED:
        if attempt.boot_id is None:
            Attempt.update(boot_id=reported["boot_id"]).where(Attempt.id == attempt.id).execute()
        return
    told = attempt.desired == "stop" and attempt.boot_id is None and attempt.stop_requested_at is not None
    if not told or attempt.stop_requested_at < utcnow() - STOP_REPEATED / 2:
        again = {"desired": "stop", "boot_id": None, "stop_requested_at": utcnow()}
        Attempt.update(**again).where(Attempt.id == attempt.id).execute()
        events.desired_changed(attempt.task.lease.machine_id)


# Stop and retry


def stop(task: Task, *, by: Actor) -> Task:
    """End it now, with every process of it. Asking again, or after its end, changes nothing."""
    _require_hand(task, by)
    with db.atomic():
        machines.lock(task.lease.machine)
        attempt = get_any_attempt(newest_attempt(task).id)
        if _stop_attempt(attempt, reason="stopped by request", by=by):
            audit.record("task.stop_requested", task, by=by, tenant_id=task.lease.tenant_id, attempt_id=attempt.id)
    return get(every(), task.id)


def is_in_hand_of(task: Task, user: User) -> bool:
    """Whether this person may stop it and try it again."""
    own = task.created_by_id == user.id
    return user.role != "customer" or tenants.may(user, task.lease.tenant_id, "use" if own else "manage")


def _require_hand(task: Task, by: Actor) -> None:
    """Staff may; of the tenant, whoever created it and still has `use`, and whoever has `manage`."""
    if by.is_staff:
        return
    if by.user is None:
        raise Forbidden("A task is stopped or tried again by a person.")
    own = task.created_by_id == by.user.id
    tenants.require(by.user, task.lease.tenant_id, "use" if own else "manage")


def _stop_attempt(attempt: Attempt, *, reason: str, by: Actor) -> bool:
    """Whether that was news. What has not begun ends here and now; the rest when the host says so."""
    if attempt.state in TASK_ENDED or attempt.desired == "stop":
        return False
    now = utcnow()
    Attempt.update(desired="stop", stop_requested_at=now).where(Attempt.id == attempt.id).execute()
    attempt.desired, attempt.stop_requested_at = "stop", now
    if attempt.state == "queued":
        _move(attempt, "stopped", by=by, ended_at=now, reason=reason)
        _settle(attempt)
    else:
        events.desired_changed(attempt.task.lease.machine_id)
        lease = attempt.task.lease
        events.write(
            "task.stopping", machine_id=lease.machine_id, tenant_id=lease.tenant_id, resource_id=attempt.task_id
        )
    return True


def retry(task: Task, *, by: Actor) -> Task:
    """A new attempt of a task that has ended, while its lease is active. Raises Conflict."""
    _require_hand(task, by)
    with db.atomic():
        _hold(task.lease)
        last = newest_attempt(task)
        if last.state not in TASK_ENDED:
            raise Conflict(f"The task is {last.state}; only one that has ended can be tried again.", code="wrong_state")
        _check_room(task)
        attempt = _try(task, number=last.number + 1)
        audit.record("task.retried", task, by=by, tenant_id=task.lease.tenant_id, attempt_id=attempt.id)
    return get(every(), task.id)


def end_all_of(lease: Lease, *, reason: str, by: Actor = SYSTEM) -> int:
    """The lease ends, and with it all that runs under it; returns how many were told to stop."""
    with db.atomic():
        return sum(_stop_attempt(attempt, reason=reason, by=by) for attempt in _live_of(lease))


def _live_of(lease: Lease) -> list[Attempt]:
    machines.lock(lease.machine)
    # Before its attempts, as where their output is counted: two transactions must not wait for each other.
    Lease.update(remark=Lease.remark).where(Lease.id == lease.host_id).execute()
    live = Attempt.select(Attempt, Task, Lease).join(Task).join(Lease)
    return list(live.where(Task.lease == lease, Attempt.state << TASK_LIVE).order_by(Attempt.id))


# Lose


def lose_all_of(lease: Lease, *, reason: str) -> int:
    """Nobody will hear of them any more, by an operator's word; returns how many."""
    with db.atomic():
        return sum(_lose(attempt, reason) for attempt in _live_of(lease))


def lose_gone(now: datetime | None = None) -> int:
    """End what cannot come back; returns how many. Idempotent, for the sweep.

    An attempt is lost when its host has booted since it began, or when its lease has ended and the host is away or
    silent. While its machine is frozen none is. That the boot ids differ means a boot since: the agent's first report
    after one brings what it still knows, which is taken before its boot id is written, and that is written before
    anything is taken that began later (sync.py).
    """
    now = now or utcnow()
    return batch.each(_live_with_report(), lambda attempt: _lose_if_gone(attempt, now))


def _lose_if_gone(attempt: Attempt, now: datetime) -> bool:
    reason = _loss(attempt, now)
    return reason is not None and _lose(attempt, reason)


def _live_with_report() -> list[Attempt]:
    return list(
        Attempt.select(Attempt, Task, Lease, Machine, MachineReport)
        .join(Task)
        .join(Lease)
        .join(Machine)
        .join(MachineReport, peewee.JOIN.LEFT_OUTER, on=(MachineReport.machine == Machine.id), attr="last_report")
        .where(Attempt.state << TASK_LIVE)
    )


def _loss(attempt: Attempt, now: datetime) -> str | None:
    lease = attempt.task.lease
    if lease.machine.frozen_reason is not None:
        return None  # nothing that the host said of its tasks was taken: it may have finished this one
    report = getattr(lease.machine, "last_report", None)
    boot_id = getattr(report, "boot_id", None)
    if attempt.boot_id and boot_id and boot_id != attempt.boot_id:
        return "The host was restarted while the task ran."
    if lease.state != "ended":
        return None
    heard_at = getattr(report, "received_at", None)
    if heard_at is None or heard_at < now - AWAY:
        return "Its lease has ended, and the host has not been heard of since."
    if lease.ended_at is not None and lease.ended_at < now - SILENT:
        return "Its lease has ended, and the host says nothing about it."
    return None


def _lose(attempt: Attempt, reason: str) -> bool:
    with db.atomic():
        machines.lock(attempt.task.lease.machine)
        attempt = get_any_attempt(attempt.id)
        steps = way(attempt.state, "lost")
        if not steps:
            return False
        for step in steps:
            changes = {"ended_at": utcnow(), "reason": reason} if step == "lost" else {}
            _move(attempt, step, by=SYSTEM, **changes)
        _settle(attempt)
    return True
