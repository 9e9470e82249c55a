"""Reclaims: a machine is cleaned after a lease, and proven clean, or it is not offered again.

A reclaim's life is told here in order: wait while the data is retained, clean, verify, the verdict. Cleaning is a
command for the agent, verifying a run from outside; what either of them does not say counts as failed. The end of the
lease itself is in leases.py, how a report is signed in reports.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import peewee
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from portal.db import atomic, utcnow
from portal.errors import Conflict, NotFound, Unavailable
from portal.integrations import protocol
from portal.models import Command, Lease, Machine, Reclaim, Run
from portal.models.states import LEASE_OPEN, RUN_ENDED
from portal.services import agents, audit, batch, commands, events, evidence, machines, reports, runs, vault
from portal.services.actors import SYSTEM, Actor
from portal.services.transitions import WrongState, move

CLEAN_DEADLINE = timedelta(minutes=20)  # a cleaning that has not moved for longer hangs; one that moves may take hours
VERIFY_DEADLINE = timedelta(hours=2)  # from when verifying was ordered: waiting for a worker, and the run itself
GOOD = ("passed", "not_applicable")
FROM_OUTSIDE = ("ports_from_outside", "login_from_outside", "agent_settings")  # roles/verify sees these itself
OLDER_AGENT = "An older agent does not know them: upgrade it, then reclaim again."
ROOT_TENANT = "The tenant had root and could deceive every check on the host: install it anew, then say so."


@dataclass(frozen=True)
class VerifyRequest:
    """What the verifying run needs: the question for the host, and the login that must be refused."""

    request: dict[str, Any]
    login: str
    probe_key: str


# Look


def get(reclaim_id: int) -> Reclaim:
    reclaim: Reclaim | None = Reclaim.get_or_none(Reclaim.id == reclaim_id)
    if reclaim is None:
        raise NotFound(f"There is no reclaim {reclaim_id}.")
    return reclaim


def search(*, state: str | None = None, machine_id: int | None = None) -> peewee.ModelSelect[Reclaim]:
    """Reclaims, newest first."""
    query = Reclaim.select().order_by(Reclaim.id.desc())
    if state is not None:
        query = query.where(Reclaim.state == state)
    return query if machine_id is None else query.where(Reclaim.machine == machine_id)


def find_waiting(machine: Machine) -> Reclaim | None:
    """The one that still retains its lease's data."""
    reclaim: Reclaim | None = Reclaim.get_or_none(Reclaim.machine == machine, Reclaim.state == "waiting")
    return reclaim


def newest_of(machine: Machine) -> Reclaim | None:
    reclaim: Reclaim | None = Reclaim.select().where(Reclaim.machine == machine).order_by(Reclaim.id.desc()).first()
    return reclaim


def report_file(reclaim: Reclaim) -> str:
    """The signed report as a file. Raises NotFound while there is none."""
    if reclaim.report is None or reclaim.signature is None:
        raise NotFound(f"Reclaim {reclaim.id} is {reclaim.state}; its report is written at its end.")
    return reports.file_of(reports.Signed(reclaim.report, reclaim.signature))


# The probe key


def new_probe_key() -> str:
    """A private key, encrypted. Its public half is among the lease's keys: only so does a refusal prove something."""
    return vault.encrypt(_openssh(Ed25519PrivateKey.generate()))


def _openssh(key: Ed25519PrivateKey) -> str:
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    return key.private_bytes(encoding, serialization.PrivateFormat.OpenSSH, no_password).decode()


def probe_line(lease: Lease) -> str | None:
    """The public line of the probe key, for the lease's keys on the host."""
    if lease.probe_key is None:
        return None
    key = serialization.load_ssh_private_key(_probe_key(lease).encode(), password=None)
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(encoding, form).decode()


def _probe_key(lease: Lease) -> str:
    if lease.probe_key is None:
        raise Unavailable(f"Lease {lease.id} has no probe key.", code="no_probe_key")
    return vault.decrypt(lease.probe_key)


# Wait


def wait_for(lease: Lease) -> Reclaim:
    """The lease has ended: its data is retained, then wiped. Called inside the transaction that ends it."""
    now = utcnow()
    due_at = now if lease.end_forced else now + timedelta(seconds=lease.retain_s)
    reclaim: Reclaim = Reclaim.create(
        machine=lease.machine_id,
        lease=lease,
        due_at=due_at,
        force=lease.end_forced,
        reason=lease.end_reason,
        requested_by=lease.ended_by_id,
    )
    _tell("reclaim.waiting", reclaim, by=SYSTEM, due_at=due_at, force=reclaim.force)
    return reclaim


def cancel_waiting(lease: Lease, *, by: Actor, reason: str) -> None:
    """The lease goes on. Raises Conflict when its data is being wiped already, or is gone."""
    reclaim = Reclaim.get_or_none(Reclaim.lease == lease, Reclaim.state == "waiting")
    if reclaim is None:
        following = Lease.get_or_none(Lease.continues == lease)
        why = f"it goes on as lease {following.id}" if following else "its data is not there any more"
        raise Conflict(f"Lease {lease.id} cannot be continued: {why}.", code="lease_over")
    move(reclaim, leave="waiting", enter="cancelled", ended_at=utcnow(), failure=reason)
    _tell("reclaim.cancelled", reclaim, by=by, reason=reason)


def skip_retention(reclaim: Reclaim, *, by: Actor, reason: str) -> Reclaim:
    """Wipe at once what would still be retained. Raises WrongState when it is not waiting any more."""
    with atomic():
        machines.lock(reclaim.machine)
        due = {"due_at": utcnow(), "force": True, "reason": reason, "requested_by": by.user}
        if Reclaim.update(**due).where(Reclaim.id == reclaim.id, Reclaim.state == "waiting").execute() != 1:
            raise WrongState("The reclaim is not waiting any more.")
        reclaim = get(reclaim.id)
        _tell("reclaim.forced", reclaim, by=by, reason=reason)
    return reclaim


def again(machine: Machine, *, by: Actor, reason: str) -> Reclaim:
    """A new reclaim of the same lease: the failed one keeps its report. It cleans at once."""
    with atomic():
        machine = machines.lock(machine)
        if machine.state != "quarantined":
            raise WrongState(f"{machine.name} is {machine.state} by now; somebody was first.", state=machine.state)
        last = newest_of(machine)
        if machine.needs_reimage or last is None:
            raise Conflict(f"{machine.name} cannot be cleaned: {machine.state_reason}", code="needs_reimage")
        if machine.reimaged_at is not None and machine.reimaged_at >= machine.state_changed_at:
            raise Conflict(f"{machine.name} was installed anew; provision it.", code="reimaged")
        reclaim: Reclaim = Reclaim.create(
            machine=machine,
            lease=last.lease_id,
            number=last.number + 1,
            due_at=utcnow(),
            force=True,
            reason=reason,
            requested_by=by.user,
        )
        _tell("reclaim.waiting", reclaim, by=by, reason=reason, number=reclaim.number)
        _clean(reclaim, machine, by=by)
    return reclaim


# Clean


def advance_due(now: datetime | None = None) -> int:
    """Move every reclaim on whose time has come; returns how many. For the sweep."""
    now = now or utcnow()
    going_on = Reclaim.select().where(Reclaim.state << ("waiting", "cleaning", "verifying")).order_by(Reclaim.id)
    return batch.each(going_on, lambda reclaim: _advance(reclaim, now))


def _advance(reclaim: Reclaim, now: datetime) -> bool:
    if reclaim.state == "waiting":
        return reclaim.due_at <= now and _start(reclaim)
    if reclaim.state == "cleaning":
        return _moved_at(reclaim) + CLEAN_DEADLINE <= now and _clean_overdue(reclaim)
    run = Run.get_or_none(Run.id == reclaim.run_id)
    if run is None or run.state in (*RUN_ENDED, "lost"):
        _decide(reclaim, run)  # its end was not heard
        return True
    return run.created_at + VERIFY_DEADLINE <= now and _verify_overdue(reclaim, run)


def _start(reclaim: Reclaim) -> bool:
    with atomic():
        machine = machines.lock(reclaim.machine)
        _clean(reclaim, machine, by=SYSTEM)
    return True


def _clean(reclaim: Reclaim, machine: Machine, *, by: Actor) -> None:
    """Order the agent to clean. The machine leaves `leased` only here: until now the lease could have gone on."""
    _refuse_other_lease(reclaim)
    if machine.frozen_reason is not None:
        raise Conflict(f"{machine.name} is frozen: {machine.frozen_reason} Thaw it first.", code="machine_frozen")
    distrust = machine.state_reason if machine.needs_reimage else None
    move(reclaim, leave="waiting", enter="cleaning", started_at=utcnow())
    move(machine, leave=["leased", "quarantined"], enter="reclaiming")
    if distrust is not None:  # what else is on it was never ours to wipe
        _fail(reclaim, [distrust])
        return
    try:
        command = commands.queue(machine, "clean", lease=reclaim.lease, by=by)
    except commands.NoBaseline as refusal:
        _fail(reclaim, [refusal.message])
        return
    Reclaim.update(command_id=command.id).where(Reclaim.id == reclaim.id).execute()
    reclaim.command_id = command.id
    _tell("reclaim.cleaning", reclaim, by=by, command_id=command.id)


def _refuse_other_lease(reclaim: Reclaim) -> None:
    """Whatever led here, nothing is cleaned under somebody else's feet."""
    other = Lease.get_or_none(Lease.machine == reclaim.machine_id, Lease.state << LEASE_OPEN)
    if other is not None:
        raise Conflict(f"Lease {other.id} has the machine; lease {reclaim.lease_id} cannot be cleaned.", code="leased")


def _moved_at(reclaim: Reclaim) -> datetime:
    """When the cleaning was ordered, or was last seen to move."""
    command = Command.get_or_none(Command.id == reclaim.command_id)
    moved = None if command is None else commands.moved_at(command)
    started: datetime = reclaim.started_at
    return started if moved is None else max(started, moved)


def _clean_overdue(reclaim: Reclaim) -> bool:
    minutes = CLEAN_DEADLINE.total_seconds() / 60
    with atomic():
        machines.lock(reclaim.machine)
        command = Command.get_by_id(reclaim.command_id)
        if command.state == "queued":
            commands.cancel(command, by=SYSTEM, reason="It took too long.")
        _fail(reclaim, [f"The agent has reported neither the cleaning nor that it moves for {minutes:.0f} minutes."])
    return True


@commands.when_ended("clean")
def cleaned(command: Command) -> None:
    """The agent's result of a cleaning. One that comes late or names another lease is refused and changes nothing."""
    with atomic():
        machines.lock(command.machine)
        reclaim = Reclaim.get_or_none(Reclaim.command_id == command.id)
        if reclaim is None or reclaim.lease_id != command.lease_id:
            raise Conflict(
                f"Command {command.id} belongs to no reclaim of lease {command.lease_id}.", code="stray_result"
            )
        _refuse_other_lease(reclaim)
        if reclaim.state != "cleaning":
            raise WrongState(f"Reclaim {reclaim.id} is {reclaim.state}, it awaits no cleaning.", state=reclaim.state)
        reasons = _faults(command.result, "steps", protocol.words("cleaning_step"))
        if command.state != "done":
            reasons.insert(0, f"The agent could not clean: {command.message or 'it does not say why'}")
        if reasons:
            _fail(reclaim, reasons)
        else:
            _verify(reclaim)


def _faults(verdict: Any, part: str, required: Sequence[str]) -> list[str]:
    """Why this result proves nothing; empty if it does. Nothing said is failed, as is everything but a plain pass."""
    if not isinstance(verdict, Mapping):
        return [f"There is no result: {part} are missing."]
    steps = verdict.get(part)
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        return [f"The result holds no {part}."]
    faults = [_fault(step) for step in steps if not isinstance(step, Mapping) or step.get("result") not in GOOD]
    said = {step.get("id") for step in steps if isinstance(step, Mapping)}
    if missing := [name for name in required if name not in said]:
        faults.append(f"Nothing is said of the {part} {', '.join(missing)}. {OLDER_AGENT}")
    if not faults and verdict.get("passed") is not True:
        faults.append("The result does not say that all of it passed.")
    return faults


def _fault(step: Any) -> str:
    if not isinstance(step, Mapping):
        return "A step is not described."
    return f"{step.get('id', 'a step')} {step.get('result', 'unknown')}: {step.get('reason') or 'no reason given'}"


# Verify


def _verify(reclaim: Reclaim) -> None:
    """From outside, and on the host by other means than the cleaning."""
    try:
        run = runs.queue("verify", [reclaim.machine], purpose="verify", by=SYSTEM, reclaim_id=reclaim.id)
    except Conflict as refusal:
        _fail(reclaim, [f"It cannot be verified: {refusal.message}"])
        return
    move(reclaim, leave="cleaning", enter="verifying", run_id=run.id)
    _tell("reclaim.verifying", reclaim, by=SYSTEM, run_id=run.id)


def verify_request(run: Run, machine: Machine) -> VerifyRequest:
    """What the run asks this machine. Holds a private key: for the run's private directory alone."""
    reclaim = Reclaim.get_or_none(Reclaim.run_id == run.id, Reclaim.machine == machine)
    baseline = machines.find_baseline(machine)
    if reclaim is None or baseline is None:
        raise Conflict(f"Run {run.id} verifies no reclaim of {machine.name}.", code="no_reclaim")
    lease = reclaim.lease
    question = {
        "schema": 1,
        "machine_id": machine.id,
        "lease_id": lease.host_id,
        "login": lease.login,
        "uid": lease.uid,
        "baseline": baseline.content,
    }
    return VerifyRequest(question, str(lease.login), _probe_key(lease))


@runs.when_ended("verify")
def run_finished(run: Run) -> None:
    """A verifying run is over: this decides whether the machine may be leased again."""
    reclaim = Reclaim.get_or_none(Reclaim.run_id == run.id)
    if reclaim is None or reclaim.state != "verifying":
        return
    _decide(reclaim, run)


def _verify_overdue(reclaim: Reclaim, run: Run) -> bool:
    runs.cancel(run, by=SYSTEM)
    with atomic():
        machines.lock(reclaim.machine)
        hours = VERIFY_DEADLINE.total_seconds() / 3600
        _fail(reclaim, [f"The verifying run {run.id} did not end within {hours:.0f} hours."])
    return True


# The verdict


def _decide(reclaim: Reclaim, run: Run | None) -> None:
    with atomic():
        machine = machines.lock(reclaim.machine)
        reasons = _verdict_faults(run, machine)
        if reclaim.lease.root:
            reasons.append(ROOT_TENANT)
        if reasons:
            _fail(reclaim, reasons)
        else:
            _pass(reclaim, machine)


def _verdict_faults(run: Run | None, machine: Machine) -> list[str]:
    if run is None:
        return ["The verifying run is gone."]
    verdict = (run.verdicts or {}).get(machine.name)
    reasons = _faults(verdict, "checks", (*FROM_OUTSIDE, *protocol.words("host_check")))
    if run.state != "succeeded":
        reasons.append(f"The verifying run {run.id} is {run.state}: {run.reason or 'see its output'}")
    return reasons


def _pass(reclaim: Reclaim, machine: Machine) -> None:
    """Proven clean: a new credential for the agent, a signed report, and the machine may be leased again."""
    agents.rotate(machine, by=SYSTEM)
    move(reclaim, leave="verifying", enter="passed", **_signed(reclaim, "passed", []))
    move(machine, leave="reclaiming", enter="ready")
    _tell("reclaim.passed", reclaim, by=SYSTEM)


def _fail(reclaim: Reclaim, reasons: Sequence[str]) -> None:
    """Not proven clean: the machine is offered to nobody. The report says why and is signed as well."""
    failure = " ".join(reasons)
    move(
        reclaim, leave=["cleaning", "verifying"], enter="failed", failure=failure, **_signed(reclaim, "failed", reasons)
    )
    machine = machines.get(reclaim.machine_id)
    needs_reimage = reclaim.lease.root or machine.needs_reimage
    move(machine, leave="reclaiming", enter="quarantined", state_reason=failure, needs_reimage=needs_reimage)
    _tell("reclaim.failed", reclaim, by=SYSTEM, outcome="failed", reasons=list(reasons))


def give_up(machine: Machine, reason: str, *, by: Actor) -> None:
    """Its reclaim can prove nothing any more. Called inside the transaction that holds the machine."""
    reclaim = Reclaim.get(Reclaim.machine == machine, Reclaim.state << ("cleaning", "verifying"))
    command = Command.get_or_none(Command.id == reclaim.command_id, Command.state == "queued")
    if command is not None:
        commands.cancel(command, by=by, reason=reason)
    _fail(reclaim, [reason])


def _signed(reclaim: Reclaim, result: str, reasons: Sequence[str]) -> dict[str, Any]:
    """The columns of an ended reclaim: the report, byte for byte as it was signed."""
    ended_at = utcnow()
    content = evidence.of_reclaim(reclaim, result=result, reasons=reasons, ended_at=ended_at)
    signed = reports.sign(content)
    return {"ended_at": ended_at, "report": signed.text, "signature": signed.signature}


def _tell(action: str, reclaim: Reclaim, *, by: Actor, outcome: str = "done", **detail: Any) -> None:
    """The audit entry and the event of one change."""
    machine_id, tenant_id = reclaim.machine_id, reclaim.lease.tenant_id
    detail |= {"machine_id": machine_id, "lease_id": reclaim.lease_id}
    audit.record(action, reclaim, by=by, tenant_id=tenant_id, outcome=outcome, **detail)
    events.write(action, machine_id=machine_id, tenant_id=tenant_id, resource_id=reclaim.id)
