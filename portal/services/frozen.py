"""Frozen: the portal and a host disagree about the past, so nothing is ordered before somebody has compared.

Told in order: a restored portal freezes every host and waits for its word; a host that knows more freezes; one that
does not goes on by itself; an operator thaws, and the host goes on in a new epoch. Absence is not an order: whatever is
decided here, no data is wiped by it. How a call is answered meanwhile is in sync.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict
from portal.models import AgentCredential, Attempt, Command, Lease, Machine, MachineReport, Reclaim
from portal.models.states import LEASE_OPEN
from portal.services import audit, commands, events, leases, login_keys, machines, reclaims
from portal.services.actors import SYSTEM, Actor, of_agent
from portal.services.transitions import move

NOT_FROZEN = dict.fromkeys(("frozen_reason", "frozen_at", "frozen_generation", "host_generation"))
MOST_GENERATIONS = 1_000_000_000  # a host may say anything: a column, and what follows, must have room for it
UNHEARD_WAIT = timedelta(minutes=10)  # how long a frozen host has to say what it knows before it is thawed unheard
UIDS_SET_ASIDE = 500  # more than the leases that one machine has had between a backup and its restoration
LEASES_SET_ASIDE = 1000  # the same for all machines together
ATTEMPTS_SET_ASIDE = 1_000_000  # and of attempts at tasks


# Freeze


def freeze_all(reason: str) -> int:
    """The portal comes from a backup: nothing is sent to any host until it has said that it knows no more than we do.

    Called inside the transaction that restored; returns how many. A host that was never enrolled has nothing to say.
    """
    enrolled = AgentCredential.select(AgentCredential.machine).where(AgentCredential.state << machines.ALIVE)
    hosts = list(Machine.select().where(Machine.id << enrolled, Machine.state != "retired").order_by(Machine.id))
    for machine in hosts:
        given: dict[str, Any] = {"frozen_reason": reason, "frozen_at": utcnow(), "host_generation": None}
        given["attempts_above"] = _attempts_above(machine)
        Machine.update(frozen_generation=Machine.generation, **given).where(Machine.id == machine.id).execute()
        MachineReport.update(frozen=False).where(MachineReport.machine == machine).execute()
        commands.cancel_all(machine, "thaw", by=SYSTEM, reason=reason)  # the word of the past that ends here
        login_keys.mend(machine)  # or the next cleaning puts back a key that was replaced since
        audit.record("machine.frozen", machine, by=SYSTEM, reason=reason, generation=machine.generation)
        events.write("machine.frozen", machine_id=machine.id)
    return len(hosts)


def freeze(machine: Machine, generation: int, *, reason: str | None = None) -> None:
    """The host has said that it holds `generation`, which the portal cannot have given it, or froze by itself."""
    with atomic():
        machine = machines.lock(machine)
        if machine.frozen_reason is not None and machine.host_generation is not None:
            return  # another connection was first
        ours = machine.frozen_generation or machine.generation
        machine.frozen_reason = reason or (
            f"The host holds generation {generation}, the portal only {ours}: was an older backup restored?"
        )
        machine.frozen_at, machine.frozen_generation = machine.frozen_at or utcnow(), ours
        machine.host_generation = min(generation, MOST_GENERATIONS)
        machine.attempts_above = _attempts_above(machine)
        machine.save()
        told: dict[str, Any] = {"generation": ours, "host_generation": machine.host_generation}
        by, why = of_agent(machine), machine.frozen_reason
        audit.record("machine.frozen", machine, by=by, outcome="failed", reason=why, **told)
        events.write("machine.frozen", machine_id=machine.id)


def _attempts_above(machine: Machine) -> int:
    """Customers go on making tasks while their host is frozen, and it may know those of the lost past by their ids."""
    newest: int = Attempt.select(peewee.fn.MAX(Attempt.id)).scalar() or 0
    return max(newest, machine.attempts_above) + ATTEMPTS_SET_ASIDE


def note_generation(machine_id: int, generation: int) -> None:
    """A host that is frozen has seen a later generation than it said before: a thaw must go beyond it."""
    seen = min(generation, MOST_GENERATIONS)
    later = Machine.frozen_reason.is_null(False) & (peewee.fn.COALESCE(Machine.host_generation, 0) < seen)
    with atomic():
        Machine.update(host_generation=seen).where(Machine.id == machine_id, later).execute()


# Go on by itself


def believe(machine: Machine) -> None:
    """The host knows no more than the portal did when it was restored: nothing was lost between the two."""
    with atomic():
        machine = machines.lock(machine)
        if machine.frozen_generation is None or machine.host_generation is not None:
            return
        _go_on(machine, by=of_agent(machine), reason="The host holds no later state than the backup.")
        events.write("machine.generation", machine_id=machine.id)  # not a new one, but now it may be told


def _go_on(machine: Machine, *, by: Actor, reason: str) -> None:
    Machine.update(**NOT_FROZEN).where(Machine.id == machine.id).execute()
    audit.record("machine.frozen_ended", machine, by=by, reason=reason)
    events.write("machine.thawed", machine_id=machine.id)


# Thaw


def thaw(machine: Machine, *, by: Actor, reason: str) -> Machine:
    """An operator has compared the portal with the host and says that the portal's word counts again.

    The host closes what the portal does not name, and cleans nothing. A lease that the portal only had planned goes on,
    if it is due and open there. If the host has leases that the portal has lost, or was not heard at all, somebody's
    data may be on it: it is leased to nobody any more before it is installed anew. Raises Conflict if it is not frozen,
    or while it is still to say what it knows.
    """
    with atomic():
        machine = machines.lock(machine)
        report = machines.find_report(machine)
        is_heard = report is not None and report.frozen
        if not machine.frozen_reason and not is_heard:
            raise Conflict("The host is not frozen.", code="not_frozen")
        if not is_heard:
            _check_waited(machine)
        seen = report.leases if report is not None and is_heard else []
        _begin_anew(machine, seen)
        leases.begin_as_seen(machines.get(machine.id), seen, by=by)
        lost = _lost_leases(machine, seen)
        if lost or not is_heard:
            _distrust(machines.get(machine.id), lost, by=by)
        commands.cancel_all(machine, "thaw", by=by, reason="The machine is thawed again.")
        commands.queue(machine, "thaw", by=by, epoch=machine.epoch, generation=machine.generation)
        audit.record("machine.thawed", machine, by=by, reason=reason, lost_leases=lost, is_heard=is_heard)
    return machines.get(machine.id)


def _check_waited(machine: Machine) -> None:
    until = (machine.frozen_at or utcnow()) + UNHEARD_WAIT
    if utcnow() < until:
        raise Conflict(
            f"{machine.name} has not yet said what it knows, so nobody can compare. Wait for its report. "
            f"If none has come by {until:%H:%M} UTC, it can be thawed unheard, and must then be installed anew.",
            code="unheard",
        )


def _lost_leases(machine: Machine, seen: Sequence[Mapping[str, Any]]) -> list[str]:
    """The logins that the host has and the portal does not: of a lease that is not its own, or that is over here.

    One that has ended here may lie closed there for as long as its data is neither wiped nor found to be there.
    """
    here = Lease.select().where(Lease.machine == machine)
    opened = {lease.login for lease in here.where(Lease.state << LEASE_OPEN)}
    unclean = here.join(Reclaim).where(Reclaim.state << ("waiting", "cleaning", "verifying", "failed"))
    closed = {lease.login for lease in unclean}
    return sorted(
        lease["login"]
        for lease in seen
        if lease["login"] not in opened and not (lease["state"] == "closed" and lease["login"] in closed)
    )


def _begin_anew(machine: Machine, seen: Sequence[Mapping[str, Any]]) -> None:
    """A new epoch that goes on beyond everything the host has seen: generations, UIDs, and the ids that make logins."""
    newest: int = Lease.select(peewee.fn.MAX(Lease.id)).scalar() or 0
    told = max((lease["lease_id"] for lease in seen), default=0)
    machine.epoch, machine.applied_generation = str(uuid.uuid4()), None
    machine.generation = max(machine.generation, machine.host_generation or 0)
    machine.host_generation = machine.host_generation or machine.frozen_generation
    machine.next_uid += UIDS_SET_ASIDE
    # A host may say anything: no single word of it uses up the ids of all the others.
    machine.leases_above = max(newest, min(told, newest + 100 * LEASES_SET_ASIDE)) + LEASES_SET_ASIDE
    machine.save()


def _distrust(machine: Machine, lost: Sequence[str], *, by: Actor) -> None:
    """From now on only a new installation makes it clean. A lease that has it now goes on until its end."""
    why = (
        f"The host holds leases that the portal has lost: {', '.join(lost)}."
        if lost
        else "The host was thawed unheard."
    )
    why += " Their data may be on it: install it anew."
    Machine.update(needs_reimage=True).where(Machine.id == machine.id).execute()
    match machine.state:
        case "ready":
            move(machine, leave="ready", enter="quarantined", state_reason=why)
        case "provisioning":
            move(machine, leave="provisioning", enter="failed", state_reason=why)
        case "reclaiming":
            reclaims.give_up(machine, why, by=by)
        case _:
            Machine.update(state_reason=why).where(Machine.id == machine.id).execute()
    state = machines.get(machine.id).state
    audit.record("machine.needs_reimage", machine, by=by, outcome="failed", reason=why, state=state)
    events.write(f"machine.{state}", machine_id=machine.id)


@commands.when_ended("thaw")
def thawed(command: Command) -> None:
    """The host has taken the operator's word: it goes on from the portal's state."""
    if command.state == "done":
        with atomic():
            machine = machines.lock(command.machine)
            _go_on(machine, by=of_agent(machine), reason="The host has taken the operator's word.")
