"""Machines: from a bare host that somebody typed in to one that can be leased, and to its retirement.

A machine's life is told here in order: register, confirm the host key, provision, enrolled, baseline taken, ready;
maintenance, edit, thaw, re-imaged, retire, delete. Who has it until when is in leases.py, how it gets clean in
reclaims.py, how it is now in health.py. Nothing here dials a host.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.models import Baseline, Command, Gpu, Lease, Machine, MachineReport, Reclaim, Run, RunHost
from portal.models.states import LEASE_OPEN
from portal.services import agents, audit, commands, config, events, health, reclaims, reports, runs, sync, vault
from portal.services.actors import SYSTEM, Actor, of_agent
from portal.services.machine_fields import Credential, checked
from portal.services.transitions import move

UNHEARD_WAIT = timedelta(minutes=10)  # how long a frozen host has to say what it knows before it is thawed unheard
UIDS_SET_ASIDE = 500  # more than the leases that one machine has had between a backup and its restoration
LEASES_SET_ASIDE = 1000  # the same for all machines together
READY_DEADLINE = timedelta(minutes=15)  # from a successful run to the baseline; an agent that works needs seconds


# Look


def get(machine_id: int) -> Machine:
    machine: Machine | None = Machine.get_or_none(Machine.id == machine_id)
    if machine is None:
        raise NotFound(f"There is no machine {machine_id}.")
    return machine


def expected_gpus(machine: Machine) -> list[Gpu]:
    return list(Gpu.select().where(Gpu.machine == machine).order_by(Gpu.slot, Gpu.id))


def find_report(machine: Machine) -> MachineReport | None:
    report: MachineReport | None = MachineReport.get_or_none(MachineReport.machine == machine)
    return report


def health_of(machine: Machine, now: datetime) -> health.Health:
    """Reachability and health, by the limits of this portal."""
    return health.of(machine, expected_gpus(machine), find_report(machine), now, limits())


def limits() -> health.Limits:
    settings = config.current()
    return health.Limits(report_interval_s=settings.report_interval_s, offline_after_s=settings.offline_after_s)


def first_contact(machine: Machine) -> Credential | None:
    """The credential in the clear, for the inventory of a run alone. None: the portal's own key works."""
    return None if machine.first_contact is None else json.loads(vault.decrypt(machine.first_contact))


# Register


def register(
    *,
    name: str,
    address: str,
    ssh_user: str,
    ssh_port: int = 22,
    credential: Mapping[str, str] | None = None,
    by: Actor,
    **descriptive: Any,
) -> Machine:
    """Write down a machine. Raises Invalid, or Conflict that names the machine which has the name or the address."""
    given = {"name": name, "address": address, "ssh_user": ssh_user, "ssh_port": ssh_port, **descriptive}
    fields = checked({**given, "credential": credential})
    try:
        with atomic():
            machine = Machine.create(epoch=str(uuid.uuid4()), **fields)
            audit.record("machine.registered", machine, by=by, **_told(fields))
            events.write("machine.registered", machine_id=machine.id)
    except peewee.IntegrityError:
        raise _taken(fields) from None
    return machine


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the audit trail may hold of these columns: `resource` and `by` are its own words."""
    return {"fields": dict(fields)}


def _taken(fields: Mapping[str, Any], machine: Machine | None = None) -> Conflict:
    """Name the machine that has this name or this address."""
    own = None if machine is None else machine.id
    others = Machine.select().where(Machine.id != own) if own else Machine.select()
    named = others.where(Machine.name == fields.get("name", machine and machine.name)).first()
    if named is not None:
        return Conflict(f"There is a machine named {named.name!r} already.", code="name_in_use", machine_id=named.id)
    address = fields.get("address", machine and machine.address)
    port = fields.get("ssh_port", machine and machine.ssh_port)
    at = others.where(Machine.address == address, Machine.ssh_port == port, Machine.state != "retired").first()
    if at is None:
        return Conflict("Somebody registered the same machine at this moment. Try again.", code="address_in_use")
    return Conflict(
        f"The machine {at.name!r} has the address {address} port {port} already.",
        code="address_in_use",
        machine_id=at.id,
        machine_name=at.name,
    )


# Confirm the host key


def offer_host_keys(machine: Machine, keys: Sequence[Mapping[str, str]], *, by: Actor) -> Machine:
    """Keep what the last scan saw, for an operator to compare. Nothing is trusted yet."""
    offered = [{"type": key["type"], "line": key["line"], "fingerprint": fingerprint(key["line"])} for key in keys]
    with atomic():
        Machine.update(host_keys_offered=offered).where(Machine.id == machine.id).execute()
        audit.record("machine.host_keys_offered", machine, by=by, fingerprints=[key["fingerprint"] for key in offered])
    machine.host_keys_offered = offered
    return machine


def fingerprint(line: str) -> str:
    """`SHA256:…` of a public key line, as `ssh-keygen -l` prints it. Raises ValueError if it is none."""
    try:
        blob = base64.b64decode(line.split()[1], validate=True)
    except (IndexError, binascii.Error):
        raise ValueError(f"{line[:40]!r} is not a public key") from None
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def confirm_host_key(machine: Machine, wanted: str, *, by: Actor, reason: str | None = None) -> Machine:
    """Pin the offered key with this fingerprint; every connection is checked against it from now on.

    A machine that has a key already takes another one only with a reason, and the trail says so.
    """
    with atomic():
        machine = lock(machine)
        offered = {key["fingerprint"]: key["line"] for key in machine.host_keys_offered or []}
        line = offered.get(wanted.strip())
        if line is None:
            raise Invalid({"fingerprint": ["The host has not offered this key. Scan again and compare all of it."]})
        if machine.host_key == line:
            return machine
        if machine.host_key is not None and not (reason or "").strip():
            raise Invalid({"reason": ["The machine has another key pinned. Say why the new one is to be trusted."]})
        action = "machine.host_key_confirmed" if machine.host_key is None else "machine.host_key_replaced"
        before = machine.host_key and fingerprint(machine.host_key)
        machine.host_key, machine.host_key_confirmed_at = line, utcnow()
        machine.save()
        audit.record(action, machine, by=by, fingerprint=wanted, before=before, reason=reason)
        events.write(action, machine_id=machine.id)
    return machine


def lock(machine: Machine) -> Machine:
    """The machine's row as it is now, held until the transaction ends: checks made after this line stay true.

    Whoever changes a machine, or its leases, reclaims, commands or tasks, takes it first: then no two transactions wait
    for each other.
    """
    if Machine.update(name=Machine.name).where(Machine.id == machine.id).execute() != 1:
        raise NotFound(f"There is no machine {machine.id} any more.")
    return get(machine.id)


# Provision


def provision(machine: Machine, *, by: Actor) -> Run:
    """Queue the run that makes it a GPU host. From quarantined only after a re-image, from leased never."""
    with atomic():
        machine = lock(machine)
        if machine.host_key is None:
            raise Conflict("Confirm the machine's host key first.", code="host_key_not_confirmed")
        if machine.needs_reimage and machine.state == "failed":
            raise Conflict(f"{machine.name} must be installed anew: {machine.state_reason}", code="not_reimaged")
        if machine.state == "quarantined" and not _is_reimaged_since_quarantine(machine):
            raise Conflict(
                "The machine is quarantined. Reclaim it again, or install it anew and say so.", code="not_reimaged"
            )
        move(machine, leave=["registered", "failed", "ready", "quarantined"], enter="provisioning")
        run = runs.queue("gpu_hosts", [machine], purpose="provision", by=by)
        audit.record("machine.provisioning", machine, by=by, run_id=run.id)
        events.write("machine.provisioning", machine_id=machine.id, run_id=run.id)
    return run


def _is_reimaged_since_quarantine(machine: Machine) -> bool:
    return machine.reimaged_at is not None and machine.reimaged_at >= machine.state_changed_at


def run_finished(run: Run) -> None:
    """A provisioning run is over: forget the password and ask for the baseline, or say why it failed."""
    of_run = Machine.select().join(RunHost).where(RunHost.run == run, Machine.state == "provisioning")
    for machine in list(of_run.order_by(Machine.id)):
        if newest_provision_run(machine) != run:
            continue
        if run.state == "succeeded":
            with atomic():
                machine = lock(machine)
                _forget_first_contact(machine)
                _ask_for_baseline(machine)
        else:
            _fail(machine, f"The provisioning run {run.id} is {run.state}: {run.reason or 'see its output'}")


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
    if _is_provisioned(machine) and agents.is_enrolled(machine) and not asked.exists():
        commands.queue(machine, "baseline", by=SYSTEM)


def _is_provisioned(machine: Machine) -> bool:
    """The run has made it what it shall be; only the baseline is missing."""
    run = newest_provision_run(machine)
    return machine.state == "provisioning" and run is not None and run.state == "succeeded"


def _fail(machine: Machine, reason: str) -> None:
    with atomic():
        machine = lock(machine)
        move(machine, leave="provisioning", enter="failed", state_reason=reason)
        audit.record("machine.failed", machine, by=SYSTEM, outcome="failed", reason=reason)
        events.write("machine.failed", machine_id=machine.id)


def fail_overdue(now: datetime) -> int:
    """Machines whose run went well and whose agent then kept silent are failed; returns how many."""
    overdue = 0
    for machine in list(Machine.select().where(Machine.state == "provisioning")):
        run = newest_provision_run(machine)
        if run and run.state == "succeeded" and run.ended_at and run.ended_at + READY_DEADLINE <= now:
            waited = f"within {READY_DEADLINE.total_seconds() / 60:.0f} min of run {run.id}"
            missing = "no baseline" if agents.is_enrolled(machine) else "no agent enrolled"
            _fail(
                machine,
                f"There came {missing} {waited}. Look at the agent's journal on the host, then provision again.",
            )
            overdue += 1
    return overdue


# The agent is there


def enrolled(machine: Machine, facts: Mapping[str, Any]) -> None:
    """The agent has its credential. Called inside the enrolment's transaction."""
    with atomic():
        machine = lock(machine)
        Machine.update(facts=dict(facts)).where(Machine.id == machine.id).execute()
        _ask_for_baseline(machine)


def seen_gpus(machine: Machine, gpus: Iterable[Mapping[str, Any]]) -> None:
    """Take the reported GPUs for the expected ones: while provisioning, and as long as none is known.

    GPUs that are expected already stay expected when they are missing; `forget_gpu` is the way out. A UUID that is
    another machine's fails the provisioning, with both names.
    """
    known = {gpu.uuid: gpu for gpu in expected_gpus(machine)}
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


def forget_gpu(machine: Machine, gpu_uuid: str, *, by: Actor, reason: str) -> None:
    """An operator says that this GPU was taken out: it is expected no longer."""
    with atomic():
        if Gpu.delete().where(Gpu.machine == machine, Gpu.uuid == gpu_uuid).execute() != 1:
            raise NotFound(f"{machine.name} is not expected to have a GPU {gpu_uuid}.")
        audit.record("machine.gpu_forgotten", machine, by=by, uuid=gpu_uuid, reason=reason)


def baseline_taken(machine: Machine, content: Mapping[str, Any]) -> None:
    """What the host looks like before anybody leases it is kept, and the machine is ready.

    Only a machine that is being provisioned takes one: a host that somebody has leased must not become its own measure.
    """
    with atomic():
        machine = lock(machine)
        if not _is_provisioned(machine):
            audit.record("baseline.refused", machine, by=of_agent(machine), outcome="refused", state=machine.state)
            return
        digest = reports.digest(content)
        taken_at = datetime.fromisoformat(content["taken_at"])
        Baseline.create(machine=machine, digest=digest, content=dict(content), taken_at=taken_at)
        move(machine, leave="provisioning", enter="ready", needs_reimage=False)
        audit.record("machine.ready", machine, by=of_agent(machine), baseline=digest)
        events.write("machine.ready", machine_id=machine.id)


def baseline_failed(machine: Machine, reason: str) -> None:
    """The agent could not take it; without one the machine could never be proven clean."""
    if get(machine.id).state == "provisioning":
        _fail(machine, f"The baseline could not be taken: {reason}")


def find_baseline(machine: Machine) -> Baseline | None:
    """The newest one: what a reclaim compares with."""
    baseline: Baseline | None = (
        Baseline.select().where(Baseline.machine == machine).order_by(Baseline.id.desc()).first()
    )
    return baseline


# In service


def edit(machine: Machine, *, by: Actor, **changes: Any) -> Machine:
    """Change descriptive fields, the way to the host, or the credential for a first contact that failed."""
    fields = checked(changes)
    try:
        with atomic():
            machine = lock(machine)
            changed = {key: value for key, value in fields.items() if getattr(machine, key) != value}
            if not changed:
                return machine
            Machine.update(**changed).where(Machine.id == machine.id).execute()
            audit.record("machine.edited", machine, by=by, **_told(changed))
            events.write("machine.edited", machine_id=machine.id)
    except peewee.IntegrityError:
        raise _taken(fields, machine) from None
    return get(machine.id)


def start_maintenance(machine: Machine, *, reason: str, until: datetime | None = None, by: Actor) -> Machine:
    """A flag, on a leased machine too: nothing about its state or lease changes, only nobody new gets it."""
    if not reason.strip():
        raise Invalid({"reason": ["Say what is being done; the customer reads it."]})
    with atomic():
        machine = lock(machine)
        if machine.state == "retired":
            raise Conflict("The machine is retired.", code="wrong_state")
        machine.maintenance_since = machine.maintenance_since or utcnow()
        machine.maintenance_reason, machine.maintenance_until = reason.strip(), until
        machine.save()
        audit.record("machine.maintenance_started", machine, by=by, reason=reason, until=until)
        events.write("machine.maintenance", machine_id=machine.id)
    return machine


def end_maintenance(machine: Machine, *, by: Actor) -> Machine:
    with atomic():
        machine = lock(machine)
        if machine.maintenance_since is None:
            return machine
        machine.maintenance_since = machine.maintenance_until = machine.maintenance_reason = None
        machine.save()
        audit.record("machine.maintenance_ended", machine, by=by)
        events.write("machine.maintenance", machine_id=machine.id)
    return machine


def thaw(machine: Machine, *, by: Actor, reason: str) -> Machine:
    """An operator has compared the portal with the host and says that the portal's word counts again.

    The host closes what the portal does not name, and cleans nothing. If it has leases that the portal has lost, or was
    not heard at all, somebody's data may be on it: it is leased to nobody any more before it is installed anew. Raises
    Conflict if it is not frozen, or while it is still to say what it knows.
    """
    with atomic():
        machine = lock(machine)
        report = find_report(machine)
        is_heard = report is not None and report.frozen
        if not machine.frozen_reason and not is_heard:
            raise Conflict("The host is not frozen.", code="not_frozen")
        if not is_heard:
            _check_waited(machine)
        seen = report.leases if report is not None and is_heard else []
        lost = _lost_leases(machine, seen)
        _begin_anew(machine, seen)
        if lost or not is_heard:
            _distrust(get(machine.id), lost, by=by)
        commands.cancel_all(machine, "thaw", by=by, reason="The machine is thawed again.")
        commands.queue(machine, "thaw", by=by, epoch=machine.epoch, generation=machine.generation)
        audit.record("machine.thawed", machine, by=by, reason=reason, lost_leases=lost, is_heard=is_heard)
    return get(machine.id)


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
    state = get(machine.id).state
    audit.record("machine.needs_reimage", machine, by=by, outcome="failed", reason=why, state=state)
    events.write(f"machine.{state}", machine_id=machine.id)


def is_proven_clean(machine: Machine) -> bool:
    """Its last lease is followed by a reclaim that passed or by a new installation; or it was never leased."""
    used = Lease.select().where(Lease.machine == machine, Lease.activated_at.is_null(False))
    last: Lease | None = used.order_by(Lease.activated_at.desc(), Lease.id.desc()).first()
    if last is None:
        return True
    if last.state in LEASE_OPEN or last.ended_at is None:
        return False
    if machine.reimaged_at is not None and machine.reimaged_at >= last.ended_at:
        return True
    return bool(Reclaim.select().where(Reclaim.lease == last, Reclaim.state == "passed").exists())


# The end


def reimaged(machine: Machine, *, by: Actor, reason: str, credential: Mapping[str, str] | None = None) -> Machine:
    """The quarantined host was installed anew from outside: nothing of what we knew about it holds any more.

    Scan and confirm its new host key, then provision. Its agent gets a new identity, its desired state a new epoch.
    """
    fields = checked({"credential": credential}) if credential else {}
    with atomic():
        machine = lock(machine)
        if machine.state != "quarantined" and not (machine.state == "failed" and machine.needs_reimage):
            raise Conflict(f"The machine is {machine.state}; only a quarantined one is re-imaged.", code="wrong_state")
        for column, value in fields.items():
            setattr(machine, column, value)
        machine.epoch, machine.reimaged_at, machine.needs_reimage = str(uuid.uuid4()), utcnow(), False
        machine.host_key = machine.host_key_confirmed_at = machine.host_keys_offered = None
        machine.save()
        Machine.update(**sync.NOT_FROZEN).where(Machine.id == machine.id).execute()
        commands.cancel_all(machine, "thaw", by=by, reason="The host was installed anew.")
        agents.end_credentials(machine, by=by)
        MachineReport.delete().where(MachineReport.machine == machine).execute()
        audit.record("machine.reimaged", machine, by=by, reason=reason)
        events.write("machine.reimaged", machine_id=machine.id)
    return machine


def retire(machine: Machine, *, by: Actor, reason: str) -> Machine:
    """Never again; its history stays, its address may be used by another machine."""
    with atomic():
        machine = lock(machine)
        planned = Lease.select().where(Lease.machine == machine, Lease.state == "scheduled").first()
        if planned is not None:
            raise Conflict(f"Lease {planned.id} is scheduled on this machine; end it first.", code="has_leases")
        move(machine, leave=["failed", "ready", "quarantined"], enter="retired", state_reason=reason)
        Machine.update(first_contact=None).where(Machine.id == machine.id).execute()
        Gpu.delete().where(Gpu.machine == machine).execute()  # the cards may go into another machine
        agents.end_credentials(machine, by=by)
        audit.record("machine.retired", machine, by=by, reason=reason)
        events.write("machine.retired", machine_id=machine.id)
    return get(machine.id)


def delete(machine: Machine, *, by: Actor) -> None:
    """Only what was never leased and never touched; the rest is retired and keeps its history."""
    with atomic():
        machine = lock(machine)
        if Lease.select().where(Lease.machine == machine).exists():
            raise Conflict("The machine has been leased; retire it, its history is kept.", code="has_leases")
        if RunHost.select().where(RunHost.machine == machine).exists():
            raise Conflict("The machine has runs in its history; retire it instead.", code="has_runs")
        audit.record("machine.deleted", machine, by=by, name=machine.name, address=machine.address)
        events.write("machine.deleted", machine_id=machine.id)
        Machine.delete().where(Machine.id == machine.id).execute()
