"""Provisioning: from a bare machine to one that is ready, told in order: the run, the agent that enrols, the baseline.

A free machine that an operator has changed later goes the last step again: only so is the change there to stay.

Nothing here dials a host: the run is a worker's, and the agent reports by itself. What is written down about a machine
is in machines.py, how an agent gets its credential in agents.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict
from portal.models import Baseline, Command, Gpu, Machine, Run, RunHost
from portal.services import audit, batch, commands, events, login_keys, machines, reports, runs
from portal.services.actors import SYSTEM, Actor, of_agent
from portal.services.transitions import WrongState, move

READY_DEADLINE = timedelta(minutes=15)  # without a baseline that comes or moves; on a large disk it may take hours


# The run


def provision(machine: Machine, *, by: Actor) -> Run:
    """Queue the run that makes it a GPU host or gateway: from quarantined only after a re-image, from leased never."""
    with atomic():
        machine = machines.lock(machine)
        if machine.host_key is None:
            raise Conflict("Confirm the machine's host key first.", code="host_key_not_confirmed")
        if machine.needs_reimage and machine.state == "failed":
            raise Conflict(f"{machine.name} must be installed anew: {machine.state_reason}", code="not_reimaged")
        if machine.state == "quarantined" and not _is_reimaged_since_quarantine(machine):
            raise Conflict(
                "The machine is quarantined. Reclaim it again, or install it anew and say so.", code="not_reimaged"
            )
        move(machine, leave=["registered", "failed", "ready", "quarantined"], enter="provisioning")
        playbook = "gateways" if machine.is_gateway else "gpu_hosts"
        commands.cancel_all(machine, "baseline", by=by, reason="The machine is provisioned anew.")
        run = runs.queue(playbook, [machine], purpose="provision", by=by)
        audit.record("machine.provisioning", machine, by=by, run_id=run.id)
        events.write("machine.provisioning", machine_id=machine.id, run_id=run.id)
    return run


def _is_reimaged_since_quarantine(machine: Machine) -> bool:
    return machine.reimaged_at is not None and machine.reimaged_at >= machine.state_changed_at


@runs.when_ended("provision")
def run_finished(run: Run) -> None:
    """A provisioning run is over: forget the password and ask for the baseline, or say why it failed."""
    of_run = Machine.select().join(RunHost).where(RunHost.run == run, Machine.state == "provisioning")
    for machine in list(of_run.order_by(Machine.id)):
        if newest_provision_run(machine) != run:
            continue
        if run.state == "succeeded":
            with atomic():
                machine = machines.lock(machine)
                _forget_first_contact(machine)
                _ask_for_baseline(machine)
        else:
            _fail_for(machine, run)


def newest_provision_run(machine: Machine) -> Run | None:
    of_machine = Run.select().join(RunHost).where(RunHost.machine == machine, Run.purpose == "provision")
    run: Run | None = of_machine.order_by(Run.id.desc()).first()
    return run


def _forget_first_contact(machine: Machine) -> None:
    """The run ended over the portal's own key: the credential that let us in first is worth nothing any more."""
    forgotten = Machine.update(first_contact=None).where(Machine.id == machine.id, Machine.first_contact.is_null(False))
    if forgotten.execute():
        audit.record("machine.first_contact_forgotten", machine, by=SYSTEM)


def _ask_for_baseline(machine: Machine) -> None:
    """Both must be there, in whatever order they come: the finished run, and the agent that can take it."""
    asked = Command.select().where(Command.machine == machine, Command.kind == "baseline", Command.state == "queued")
    if _is_provisioned(machine) and machines.is_enrolled(machine) and not asked.exists():
        commands.queue(machine, "baseline", by=SYSTEM)


def _is_provisioned(machine: Machine) -> bool:
    """The run has made it what it shall be; only the baseline is missing."""
    run = newest_provision_run(machine)
    return machine.state == "provisioning" and run is not None and run.state == "succeeded"


def _fail_for(machine: Machine, run: Run) -> None:
    _fail(machine, f"The provisioning run {run.id} is {run.state}: {run.reason or 'see its output'}")


def _fail(machine: Machine, reason: str) -> None:
    with atomic():
        machine = machines.lock(machine)
        move(machine, leave="provisioning", enter="failed", state_reason=reason)
        audit.record("machine.failed", machine, by=SYSTEM, outcome="failed", reason=reason)
        events.write("machine.failed", machine_id=machine.id)


def fail_overdue(now: datetime | None = None) -> int:
    """Machines whose run went well and whose agent then kept silent are failed, and those whose run has ended without
    them hearing of it; returns how many."""
    now = now or utcnow()
    going_on = Machine.select().where(Machine.state == "provisioning")
    return batch.each(going_on, lambda machine: _fail_if_overdue(machine, now))


def _fail_if_overdue(machine: Machine, now: datetime) -> bool:
    with atomic():
        machine = machines.lock(machine)  # so that nobody provisions it anew meanwhile
        run = newest_provision_run(machine)
        if machine.state != "provisioning" or run is None or run.ended_at is None:
            return False
        if run.state == "succeeded":
            return _fail_if_silent(machine, run, now)
        _fail_for(machine, run)
    return True


def _fail_if_silent(machine: Machine, run: Run, now: datetime) -> bool:
    if _moved_at(machine, run) + READY_DEADLINE > now:
        return False
    waited = f"for {READY_DEADLINE.total_seconds() / 60:.0f} min"
    missing = "neither a baseline nor a word that it moves" if machines.is_enrolled(machine) else "no agent that enrols"
    _fail(machine, f"There came {missing} {waited}. Look at the agent's journal on the host, then provision again.")
    return True


def _moved_at(machine: Machine, run: Run) -> datetime:
    """When the run ended, the machine came here, the baseline was ordered, or was last seen to move."""
    moments: list[datetime] = [run.ended_at or machine.state_changed_at, machine.state_changed_at]
    for order in commands.queued(machine, "baseline"):
        moments += [order.created_at, commands.moved_at(order) or order.created_at]
    return max(moments)


# The agent


def enrolled(machine: Machine, facts: Mapping[str, Any]) -> None:
    """The agent has its credential. Called inside the enrolment's transaction."""
    with atomic():
        machine = machines.lock(machine)
        Machine.update(facts=dict(facts)).where(Machine.id == machine.id).execute()
        _ask_for_baseline(machine)


def seen_gpus(machine: Machine, gpus: Iterable[Mapping[str, Any]]) -> None:
    """Take the reported GPUs for the expected ones: while provisioning, and as long as none is known.

    GPUs that are expected already stay expected when they are missing; `forget_gpu` is the way out. A UUID that is
    another machine's fails the provisioning, with both names.
    """
    known = {gpu.uuid: gpu for gpu in machines.expected_gpus(machine)}
    new = [gpu for gpu in gpus if gpu["uuid"] not in known]
    if not new or (known and machine.state != "provisioning"):
        return
    try:
        with atomic():
            for gpu in new:
                _expect(machine, gpu)
            audit.record("machine.gpus_expected", machine, by=of_agent(machine), uuids=[gpu["uuid"] for gpu in new])
    except peewee.IntegrityError:
        _refuse_gpus(machine, [gpu["uuid"] for gpu in new])


def _expect(machine: Machine, gpu: Mapping[str, Any]) -> None:
    Gpu.create(
        machine=machine,
        uuid=gpu["uuid"],
        slot=gpu["index"],
        name=gpu["name"],
        memory_bytes=gpu["memory_total_bytes"],
        serial=gpu["serial"],
        pci_bus_id=gpu["pci_bus_id"],
    )


def _refuse_gpus(machine: Machine, uuids: Sequence[str]) -> None:
    other = Gpu.select(Gpu, Machine).join(Machine).where(Gpu.uuid << uuids, Gpu.machine != machine).first()
    if other is None:
        return  # two reports of the same host at once: the other one has written them
    if machine.state == "provisioning":
        _fail(
            machine, f"GPU {other.uuid} is already the machine {other.machine.name}'s, {machine.name} reports it too."
        )


# The baseline


@runs.when_played("gpu_hosts")
@runs.when_played("site")
def host_changed(run: Run) -> None:
    """An operator's own run has changed hosts: of those that are free a new baseline is taken, as after provisioning.

    Else the next cleaning would undo the run: open a port that it has closed, take away whom it has let in. A host
    that is leased must not become its own measure: there the run has to be repeated once it is free.
    """
    if run.purpose == "provision" or run.options.get("check"):
        return
    for machine in runs.machines_of(run):
        if runs.went_well_on(machine, run):
            with atomic():
                _renew_if_free(machines.lock(machine), run)


def _renew_if_free(machine: Machine, run: Run) -> None:
    """Nobody gets the machine meanwhile; a baseline that is being taken began before the run's end, so it is void."""
    is_free = machine.state == "ready" and machine.frozen_reason is None and machines.is_proven_clean(machine)
    if is_free and machines.find_baseline(machine) is not None and not machine.is_gateway:
        _take_anew(machine, by=SYSTEM, reason=f"Run {run.id} ({run.playbook}) has changed the host.")
    elif _is_provisioned(machine):
        commands.cancel_all(machine, "baseline", by=SYSTEM, reason=f"Run {run.id} has changed the host meanwhile.")
        _ask_for_baseline(machine)


def take_baseline(machine: Machine, *, by: Actor, reason: str) -> Machine:
    """What the free host is now is to be its measure: an operator has changed it without the portal, and says why.

    It is `ready` again once the baseline is there, or `failed`. Raises WrongState unless it is ready, Conflict while
    it is frozen.
    """
    with atomic():
        machine = machines.lock(machine)
        if machine.state != "ready":
            raise WrongState(
                f"{machine.name} is {machine.state}; a baseline is taken of a machine that is ready.",
                state=machine.state,
            )
        if machine.frozen_reason is not None:
            raise Conflict(f"{machine.name} is frozen: {machine.frozen_reason} Thaw it first.", code="machine_frozen")
        _take_anew(machine, by=by, reason=reason)
    return machine


def _take_anew(machine: Machine, *, by: Actor, reason: str) -> None:
    move(machine, leave="ready", enter="provisioning")
    audit.record("baseline.renewing", machine, by=by, reason=reason)
    events.write("machine.provisioning", machine_id=machine.id)
    _ask_for_baseline(machine)


@commands.when_ended("baseline")
def baseline_answered(command: Command) -> None:
    if command.state == "done":
        baseline_taken(command.machine, command.result)
    else:
        baseline_failed(command.machine, command.message or "no reason was given")


def baseline_taken(machine: Machine, content: Mapping[str, Any]) -> None:
    """What the host looks like before anybody leases it is kept, and the machine is ready.

    Only a machine that is being provisioned takes one: a host that somebody has leased must not become its own measure.
    """
    with atomic():
        machine = machines.lock(machine)
        if not _is_provisioned(machine):
            audit.record("baseline.refused", machine, by=of_agent(machine), outcome="refused", state=machine.state)
            return
        digest = reports.digest(content)
        taken_at = datetime.fromisoformat(content["taken_at"])
        Baseline.create(machine=machine, digest=digest, content=dict(content), taken_at=taken_at)
        move(machine, leave="provisioning", enter="ready", needs_reimage=False)
        login_keys.baseline_taken(machine, content)
        audit.record("machine.ready", machine, by=of_agent(machine), baseline=digest)
        events.write("machine.ready", machine_id=machine.id)


def baseline_failed(machine: Machine, reason: str) -> None:
    """The agent could not take it; without one the machine could never be proven clean."""
    if machines.get(machine.id).state == "provisioning":
        _fail(machine, f"The baseline could not be taken: {reason}")
