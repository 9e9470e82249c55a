"""Leases: who has which machine, until when.

A lease's life is told here in order: allocate, activate, extend, end, observed closed, ended; and beside it: continue
one whose data is still retained, take the machine back, write a lease or one of its grants off. What stands in the way
of one is in availability.py, what it opens in grants.py and network_switch.py, how the machine gets clean in
reclaims.py. Here is no HTTP and no host: callers pass who, why, and where it matters the time.

Every change takes the machine's row first (`machines.lock`): what was checked stays true until the commit, and no two
transactions wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, id_above, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.models import Attempt, Lease, Machine, Reclaim, Task, Tenant, User
from portal.models.states import LEASE_OPEN, TASK_LIVE
from portal.services import (
    audit,
    availability,
    batch,
    events,
    grants,
    machines,
    network_forwards,
    network_openings,
    network_switch,
    reclaims,
    tasks,
    tenants,
)
from portal.services.actors import SYSTEM, Actor, of_agent
from portal.services.availability import CannotAllocate
from portal.services.health import Problem
from portal.services.network_applied import View
from portal.services.network_openings import Wish
from portal.services.transitions import WrongState, move

LAST_UID = 59999  # beyond it begin those that Debian and systemd give away by themselves
MAX_RETAIN_S = 90 * 24 * 3600
TASKS_WAIT = timedelta(minutes=5)  # how long a closed lease waits for the exit codes of its tasks


# Look


def get(lease_id: int) -> Lease:
    lease: Lease | None = Lease.get_or_none(Lease.id == lease_id)
    if lease is None:
        raise NotFound(f"There is no lease {lease_id}.")
    return lease


def of_user(user: User) -> peewee.ModelSelect[Lease]:
    """The leases of the tenants in which this user may look: the one place where a customer's view is scoped."""
    own = tenants.ids_of(user, "look") or [0]
    with_all = Lease.select(Lease, Machine, Tenant).join(Machine).switch(Lease).join(Tenant)
    return with_all.where(Lease.tenant << own)


def get_of(user: User, lease_id: int) -> Lease:
    """A lease of this user's tenants. Raises NotFound, for a stranger's as well."""
    lease: Lease | None = of_user(user).where(Lease.id == lease_id).first()
    if lease is None:
        raise NotFound("You have no such lease.")
    return lease


def open_of_user(user: User) -> peewee.ModelSelect[Lease]:
    """What they have now, by machine name."""
    return of_user(user).where(Lease.state << LEASE_OPEN).order_by(Machine.name)


def get_open_of_user(user: User, machine_id: int) -> Lease:
    """The lease by which this user's tenant has the machine. Raises NotFound, for a stranger's machine as well."""
    lease: Lease | None = open_of_user(user).where(Lease.machine == machine_id).first()
    if lease is None:
        raise NotFound("You have no such machine.")
    return lease


def find_open(machine: Machine) -> Lease | None:
    """The lease that has this machine now, if any."""
    lease: Lease | None = Lease.get_or_none(Lease.machine == machine, Lease.state << LEASE_OPEN)
    return lease


# Allocate


def allocate(
    machine: Machine,
    *,
    to: Tenant,
    until: datetime,
    starts_at: datetime | None = None,
    retain_s: int,
    root: bool = False,
    remark: str | None = None,
    openings: Sequence[Wish] = (),
    by: Actor,
) -> Lease:
    """Lease the machine to a tenant, from now or from `starts_at` on.

    Its keys, its `openings`, its name and, behind a gateway, its port there open in one transaction. After the end its
    data is kept for `retain_s`, then wiped. Raises Invalid, or CannotAllocate with every reason.
    """
    now = utcnow()
    _check_times(starts_at, until, retain_s, now)
    if openings and starts_at is not None:
        raise Invalid({"openings": ["Open ports once the lease is active; this one begins later."]})
    probe_key = reclaims.new_probe_key()
    try:
        with atomic():
            # The first statement takes the machine's row, so that every check below still holds at the commit.
            uid = _take_uid(machine)
            machine = machines.get(machine.id)
            refusals = [
                *availability.tenant_refusals(to),
                *availability.overlaps(machine, starts_at or now, until, retain_s),
            ]
            refusals += availability.plan_refusals(machine) if starts_at else availability.start_refusals(machine, now)
            if refusals:
                raise CannotAllocate(refusals)
            fields = {"tenant": to, "retain_s": retain_s, "root": root, "remark": remark, "probe_key": probe_key}
            lease = _write(machine, uid=uid, starts_at=starts_at or now, ends_at=until, by=by, **fields)
            if starts_at is None:
                _activate(lease, machine, by=by, openings=openings)
    except peewee.IntegrityError:
        # The partial unique index has the last word, whatever the checks above believed.
        raise CannotAllocate([Problem("leased", f"{machine.name} was leased to somebody at this moment.")]) from None
    return lease


def _write(machine: Machine, *, by: Actor, **fields: Any) -> Lease:
    """The row of a new lease, whose login is its own if it continues none.

    Its id makes that login: one that the host has never seen, also where it remembers leases that the portal has lost.
    """
    lease = Lease.create(
        machine=machine, state="scheduled", created_by=by.user, **id_above(Lease, machine.leases_above), **fields
    )
    if lease.login is None:
        lease.login = f"lease{lease.id}"
        lease.save()
    told = {name: fields[name] for name in ("starts_at", "ends_at", "retain_s", "root")}
    _tell("lease.scheduled", lease, by=by, continues=lease.continues_id, **told)
    return lease


def _check_times(starts_at: datetime | None, until: datetime, retain_s: int, now: datetime) -> None:
    faults: dict[str, list[str]] = {}
    if starts_at is not None and starts_at <= now:
        faults["starts_at"] = ["Lies in the past; leave it out to start now."]
    if until <= (starts_at or now):
        faults["until"] = ["Lies before the start." if starts_at else "Lies in the past."]
    if not 0 <= retain_s <= MAX_RETAIN_S:
        faults["retain_s"] = [f"Use 0 to {MAX_RETAIN_S} seconds."]
    if faults:
        raise Invalid(faults)


def _take_uid(machine: Machine) -> int:
    """A UID is never used twice on a machine."""
    if Machine.update(next_uid=Machine.next_uid + 1).where(Machine.id == machine.id).execute() != 1:
        raise NotFound(f"There is no machine {machine.id} any more.")
    following: int = Machine.select(Machine.next_uid).where(Machine.id == machine.id).scalar()
    if following - 1 > LAST_UID:
        used_up = f"{machine.name} has used up its UIDs; retire it and register the newly installed host."
        raise CannotAllocate([Problem("no_uid_left", used_up)])
    return following - 1


# Activate


def _activate(lease: Lease, machine: Machine, *, by: Actor, openings: Sequence[Wish] = ()) -> None:
    """Inside the transaction that holds the machine's row and has checked it."""
    move(machine, leave="ready", enter="leased")
    _open(lease, machine, by=by, openings=openings)


def _open(lease: Lease, machine: Machine, *, by: Actor, openings: Sequence[Wish] = ()) -> None:
    move(lease, leave="scheduled", enter="active", activated_at=utcnow())
    grants.open_all(lease)
    events.desired_changed(lease.machine_id)
    network_switch.open_all(lease, machine, openings, by=by)
    _tell("lease.active", lease, by=by)


def activate_due(now: datetime | None = None) -> int:
    """Start the scheduled leases whose time has come; returns how many.

    One whose machine is not ready then goes on waiting, and ends when its own end passes.
    """
    now = now or utcnow()
    due = Lease.select().where(Lease.state == "scheduled", Lease.starts_at <= now).order_by(Lease.starts_at)
    return batch.each(due, lambda lease: _start_or_end(lease, now))


def _start_or_end(lease: Lease, now: datetime) -> bool:
    try:
        _start(lease, now)
    except (CannotAllocate, WrongState, peewee.IntegrityError):
        if lease.ends_at <= now:
            end(lease, by=SYSTEM, reason="The machine was not ready before the lease's end.")
        return False
    return True


def _start(lease: Lease, now: datetime) -> None:
    with atomic():
        machine = machines.lock(lease.machine)
        refusals = [*availability.tenant_refusals(lease.tenant), *availability.start_refusals(machine, now)]
        if lease.ends_at <= now:
            refusals.append(Problem("over", f"Lease {lease.id} is over."))
        if refusals:
            raise CannotAllocate(refusals)
        _activate(lease, machine, by=SYSTEM)


def begin_as_seen(machine: Machine, seen: Sequence[Mapping[str, Any]], *, by: Actor) -> None:
    """A lease that the backup has as scheduled is open on its host: it began in the time that the portal has lost.

    Inside the transaction that thaws this machine. It goes on, and nobody asks again what was asked when it began.
    """
    has = {entry["login"] for entry in seen if entry["state"] == "open"}
    now = utcnow()
    is_now = (Lease.state == "scheduled") & (Lease.starts_at <= now) & (Lease.ends_at > now)
    begun = Lease.get_or_none(Lease.machine == machine, is_now, Lease.login << has)
    if begun is not None and machine.state == "ready":
        _activate(begun, machine, by=by)


# Extend


def extend(lease: Lease, *, until: datetime, by: Actor) -> Lease:
    """Give a lease a later end; returns the lease that then holds the machine.

    An active one goes on: it counts once the host has acknowledged it, until then both ends are shown. So does one
    whose end has passed while its machine is frozen. One that has ended, and whose data is still retained, is continued
    by a new lease with the same login and UID.
    """
    with atomic():
        machine = machines.lock(lease.machine)
        lease = get(lease.id)
        now = utcnow()
        if lease.state == "ended":
            return _continue(lease, machine, until=until, by=by, now=now)
        if lease.state == "ending" or (lease.ends_at <= now and not _is_the_host_s_to_end(lease, machine)):
            raise Conflict(
                f"Lease {lease.id} is ending on the host. Extend it when the host has closed it.", code="lease_ending"
            )
        if until <= lease.ends_at:
            later = f"Must be later than {lease.ends_at.isoformat()}; to stop earlier, end the lease."
            raise Invalid({"until": [later]})
        if until <= now:
            raise Invalid({"until": ["Lies in the past."]})
        overlaps = list(availability.overlaps(machine, lease.starts_at, until, lease.retain_s, but=lease))
        if overlaps:
            raise CannotAllocate(overlaps)
        before = lease.ends_at
        # Only while it is what we read: the sweep may be closing it at this moment.
        unchanged = (Lease.id == lease.id) & (Lease.state == lease.state) & (Lease.ends_at == before)
        if Lease.update(ends_at=until).where(unchanged).execute() != 1:
            raise WrongState(f"Lease {lease.id} was changed by somebody at this moment.")
        lease.ends_at = until
        if lease.state == "active":
            events.desired_changed(machine.id)
            network_switch.moved(lease)
        _tell("lease.extended", lease, by=by, before=before, until=until)
    return lease


def _is_the_host_s_to_end(lease: Lease, machine: Machine) -> bool:
    """A frozen host may know a later end than we do, and ends the lease by itself at the one that it knows."""
    return lease.state == "active" and machine.frozen_reason is not None


def _continue(lease: Lease, machine: Machine, *, until: datetime, by: Actor, now: datetime) -> Lease:
    """Open again what was closed, data intact: only while the reclaim still waits, and for the same tenant."""
    if until <= now:
        raise Invalid({"until": ["Lies in the past."]})
    reclaims.cancel_waiting(lease, by=by, reason=f"Lease {lease.id} is extended.")
    refusals = [
        *availability.tenant_refusals(lease.tenant),
        *availability.overlaps(machine, now, until, lease.retain_s, but=lease),
    ]
    refusals += [*availability.run_refusals(machine), *availability.past_refusals(machine)]
    if refusals:
        raise CannotAllocate(refusals)
    following = _write(
        machine,
        tenant=lease.tenant_id,
        login=lease.login,
        uid=lease.uid,
        starts_at=now,
        ends_at=until,
        retain_s=lease.retain_s,
        root=lease.root,
        remark=lease.remark,
        continues=lease,
        probe_key=reclaims.new_probe_key(),
        by=by,
    )
    _open(following, machine, by=by)
    return following


# End


def end(lease: Lease, *, by: Actor, reason: str, force: bool = False) -> Lease:
    """Close the door now; the host follows, then the reclaim. `force` skips the retention of the data."""
    with atomic():
        machines.lock(lease.machine)
        lease = get(lease.id)
        if lease.state == "scheduled":
            move(lease, leave="scheduled", enter="ended", ended_at=utcnow(), end_reason=reason, ended_by=by.user)
            _tell("lease.ended", lease, by=by, reason=reason)
        elif lease.state == "ending" and force and not lease.end_forced:
            Lease.update(end_forced=True).where(Lease.id == lease.id).execute()
            _tell("lease.forced", lease, by=by, reason=reason)
        else:
            _close(lease, by=by, reason=reason, force=force)
    return get(lease.id)


def _close(lease: Lease, *, by: Actor, reason: str, force: bool = False, where: Any = None) -> None:
    changes = {"ending_at": utcnow(), "end_reason": reason, "ended_by": by.user, "end_forced": force}
    move(lease, leave="active", enter="ending", where=where, **changes)
    grants.want_all_closed(lease)
    tasks.end_all_of(lease, reason=reason)
    events.desired_changed(lease.machine_id)
    network_switch.close_all(lease, by=by)
    _tell("lease.ending", lease, by=by, reason=reason, force=force)


def reclaim(
    machine: Machine, *, by: Actor, reason: str, force: bool = False, confirm: str | None = None
) -> Reclaim | None:
    """Take the machine back: end its lease, skip the retention, or clean a quarantined one again.

    `force` wipes at once what would still be retained, and needs the machine's name as `confirm`. Returns the reclaim,
    or None while the lease must end first.
    """
    if not reason.strip():
        raise Invalid({"reason": ["Say why; the customer and the report get to read it."]})
    if force and confirm != machine.name:
        raise Invalid({"confirm": [f"Type the machine's name, {machine.name}: the customer's data is wiped at once."]})
    machine = machines.get(machine.id)
    if machine.state == "quarantined":
        return reclaims.again(machine, by=by, reason=reason)
    lease = find_open(machine)
    if lease is not None:
        end(lease, by=by, reason=reason, force=force)
        return None
    waiting = reclaims.find_waiting(machine)
    if waiting is None:
        raise Conflict(f"{machine.name} is {machine.state}; there is nothing to reclaim.", code="wrong_state")
    if not force:
        until = waiting.due_at.isoformat(timespec="minutes")
        raise Conflict(f"{machine.name} retains its data until {until}; use force to wipe it now.", code="retained")
    return reclaims.skip_retention(waiting, by=by, reason=reason)


def end_due(now: datetime | None = None) -> int:
    """Close the leases whose end has come; returns how many. The host has closed them by itself already.

    One whose machine is frozen stays until the two have been compared: an extension may be what the portal has lost.
    """
    now = now or utcnow()
    return batch.each(
        Lease.select().where(Lease.state == "active", Lease.ends_at <= now), lambda lease: _close_due(lease, now)
    )


def _close_due(lease: Lease, now: datetime) -> bool:
    with atomic():  # an extension that was committed meanwhile wins
        if _is_the_host_s_to_end(lease, machines.lock(lease.machine)):
            return False
        _close(lease, by=SYSTEM, reason="The agreed end has come.", where=Lease.ends_at <= now)
    return True


def finish_silent(now: datetime | None = None) -> int:
    """End the leases that the host has closed and whose tasks' ends it never told; returns how many.

    Their processes are dead, so the lease does not wait for ever.
    """
    now = now or utcnow()
    silent = Lease.select().where(Lease.state == "ending", Lease.ending_at <= now - TASKS_WAIT)
    return batch.each(silent, lambda lease: _finish_without_tasks(lease, now))


def _finish_without_tasks(lease: Lease, now: datetime) -> bool:
    if grants.get(lease, "keys").observed != "closed" or _awaits_tasks(lease, now):
        return False
    with atomic():
        machines.lock(lease.machine)
        grants.observe(lease, "tasks", "closed")
        lease = get(lease.id)
        if lease.state != "ending" or not grants.are_all_closed(lease):
            return False
        _finish(lease, by=SYSTEM)
    return True


# Observed by the host


def observed(machine: Machine, seen: Sequence[Mapping[str, Any]]) -> None:
    """Take in what the agent says about the leases on its host: acknowledged ends, grants, and that one is closed.

    Call it after `machine.applied_generation` is up to date. What a host says about leases that are not its own, or
    long ended, is not heard.
    """
    by_login = {entry["login"]: entry for entry in seen}
    for lease in list(Lease.select().where(Lease.machine == machine, Lease.state << LEASE_OPEN)):
        entry = by_login.get(lease.login)
        if entry is not None:
            _observe(lease, machine, entry)
        elif lease.state == "ending" and _has_applied_everything(machine):
            _never_there(lease, machine)


def _observe(lease: Lease, machine: Machine, entry: Mapping[str, Any]) -> None:
    with atomic():
        machines.lock(machine)
        lease = get(lease.id)
        _acknowledge(lease, machine, entry)
        state = _state_of(entry)
        news = grants.observe(
            lease, "keys", state, fingerprints=sorted(entry["key_fingerprints"]), message=entry["message"]
        )
        news |= grants.observe(
            lease, "tasks", "open" if state == "closed" and _awaits_tasks(lease, utcnow()) else state
        )
        if news:
            _tell_observed(lease)
        if lease.state == "ending" and grants.are_all_closed(lease):
            _finish(lease, by=of_agent(machine))


def _state_of(entry: Mapping[str, Any]) -> str:
    """Closed means nobody in and nothing running; a number of processes that is unknown or above zero is neither."""
    if entry["state"] == "closed":
        return "closed" if entry["processes"] == 0 else "unknown"
    return "open" if entry["state"] == "open" else "unknown"


def _acknowledge(lease: Lease, machine: Machine, entry: Mapping[str, Any]) -> None:
    if not entry["end_armed"] or entry["ends_at"] is None:
        return
    armed = datetime.fromisoformat(entry["ends_at"])
    if lease.acknowledged_ends_at == armed:
        return
    lease.acknowledged_ends_at = armed
    Lease.update(acknowledged_ends_at=armed).where(Lease.id == lease.id).execute()
    _tell("lease.end_acknowledged", lease, by=of_agent(machine), ends_at=armed)


def _tell_observed(lease: Lease) -> None:
    events.write("lease.observed", machine_id=lease.machine_id, tenant_id=lease.tenant_id, resource_id=lease.id)


def _awaits_tasks(lease: Lease, now: datetime) -> bool:
    """The end of its tasks is still to be told. Their processes are dead, so a host that forgot them is not awaited."""
    keys = grants.get(lease, "keys")
    if keys.observed == "closed" and keys.observed_at is not None and keys.observed_at + TASKS_WAIT <= now:
        return False
    attempts = Attempt.select().join(Task).where(Task.lease == lease, Attempt.state << TASK_LIVE)
    return bool(attempts.exists())


def _has_applied_everything(machine: Machine) -> bool:
    now = machines.get(machine.id)
    return now.applied_generation is not None and now.applied_generation >= now.generation


def _never_there(lease: Lease, machine: Machine) -> None:
    """The host does all that we want and does not know this lease: it ended before the host had heard of it."""
    with atomic():
        machines.lock(machine)
        lease = get(lease.id)
        never = "The host never opened it."
        grants.observe(lease, "keys", "closed", message=never)
        grants.observe(lease, "tasks", "open" if _awaits_tasks(lease, utcnow()) else "closed", message=never)
        if lease.state == "ending" and grants.are_all_closed(lease):
            _finish(lease, by=of_agent(machine))


def holes_observed(machine: Machine, told: Mapping[str, Any]) -> None:
    """Take in what the agent says of openings on its host and, of a gateway, of forwards; an older one says nothing.

    Call it after `observed`: what was the last thing to be awaited ends the lease.
    """
    is_current = _has_applied_everything(machine)
    news = network_openings.observe(machine, told.get("openings"), is_current=is_current)
    if machine.is_gateway:
        news |= network_forwards.observe(machine, told.get("forwards"), is_current=is_current)
    for lease in list(Lease.select().where(Lease.id << sorted(news or {0})).order_by(Lease.id)):
        network_seen(lease, by=of_agent(machine))


def network_seen(lease: Lease, *, views: Mapping[str, View] | None = None, by: Actor = SYSTEM) -> bool:
    """An agent or a stack has said something of what this lease opens in the network; True when that is news."""
    with atomic():
        machines.lock(lease.machine)
        lease = get(lease.id)
        news = network_switch.refresh(lease, views)
        if news:
            _tell_observed(lease)
        if lease.state == "ending" and grants.are_all_closed(lease):
            _finish(lease, by=by)
    return news


def names_changed(lease: Lease) -> bool:
    """An active one has a name from now on, or none any more, or it leads elsewhere; True when that is news."""
    with atomic():
        machines.lock(lease.machine)
        lease = get(lease.id)
        before = [(grant.kind, grant.desired_at) for grant in grants.of_lease(lease)]
        if lease.state == "active":
            network_switch.follow(lease, since=0)  # the zone may have been given out for long
        return before != [(grant.kind, grant.desired_at) for grant in grants.of_lease(lease)]


def write_off_grant(lease: Lease, kind: str, *, by: Actor, reason: str) -> Lease:
    """An agent or a stack will not say any more that this is closed: the lease waits for it no longer.

    What was last seen of it stays to be read. The keys and tasks of a host that does not answer go with the whole
    lease. Raises Invalid, NotFound, or Conflict while the grant is wanted open or was seen closed.
    """
    if not reason.strip():
        raise Invalid({"reason": ["Say how you know; the trail keeps it."]})
    with atomic():
        machines.lock(lease.machine)
        lease = get(lease.id)
        grant = grants.find(lease, kind)
        if grant is None or kind not in network_switch.KINDS:
            raise NotFound(f"Lease {lease.id} has no such grant that can be written off.")
        if not grant.is_still_open:
            raise Conflict("Nobody waits for this grant to be closed.", code="wrong_state")
        grants.write_off(grant, by=by, reason=reason)
        network_switch.write_off(lease, kind)
        _tell("grant.written_off", lease, by=by, kind=kind, observed=grant.observed, reason=reason)
        if lease.state == "ending" and grants.are_all_closed(lease):
            _finish(lease, by=by)
    return get(lease.id)


def _finish(lease: Lease, *, by: Actor, **detail: Any) -> None:
    move(lease, leave="ending", enter="ended", ended_at=utcnow())
    reclaims.wait_for(lease)
    events.desired_changed(lease.machine_id)
    _tell("lease.ended", lease, by=by, **detail)


def write_off(lease: Lease, *, by: Actor, reason: str) -> Lease:
    """The host will not answer any more: the lease ends unobserved. Its machine must still be proven clean."""
    with atomic():
        machines.lock(lease.machine)
        lease = get(lease.id)
        if lease.state == "active":
            _close(lease, by=by, reason=reason)
        if lease.state != "ending":
            raise Conflict(f"Lease {lease.id} is {lease.state}; there is nothing to write off.", code="wrong_state")
        tasks.lose_all_of(lease, reason=reason)
        open_still = [grant.kind for grant in grants.of_lease(lease) if grant.observed != "closed"]
        _finish(lease, by=by, reason=reason, written_off=True, not_observed_closed=open_still)
    return lease


def _tell(action: str, lease: Lease, *, by: Actor, **detail: Any) -> None:
    """The audit entry and the event of one change."""
    audit.record(action, lease, by=by, tenant_id=lease.tenant_id, machine_id=lease.machine_id, **detail)
    events.write(action, machine_id=lease.machine_id, tenant_id=lease.tenant_id, resource_id=lease.id)
