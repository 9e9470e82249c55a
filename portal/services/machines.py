"""Machines: what is written down about one, its pinned host key, and the row that everybody holds who changes it.

Told in order: look and hold, register, confirm the host key, in service. How it becomes ready is in provisioning.py,
who has it until when in leases.py, how it gets clean in reclaims.py, how it is now in health.py, its end in
retirement.py. Nothing here dials a host.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.integrations import host_keys
from portal.models import AgentCredential, Baseline, Gpu, Lease, Machine, MachineReport, Reclaim
from portal.models.states import LEASE_OPEN
from portal.services import audit, config, events, health, network, network_places, vault
from portal.services.actors import Actor
from portal.services.machine_fields import Credential, checked

ALIVE = ("pending", "current")  # the states of a credential that is accepted


# Look, and hold


def get(machine_id: int) -> Machine:
    machine: Machine | None = Machine.get_or_none(Machine.id == machine_id)
    if machine is None:
        raise NotFound(f"There is no machine {machine_id}.")
    return machine


def named(name: str) -> Machine:
    """By the name that somebody typed. Raises Invalid."""
    machine: Machine | None = Machine.get_or_none(Machine.name == name)
    if machine is None:
        raise Invalid({"machine": [f"There is no machine called {name}."]})
    return machine


def lock(machine: Machine) -> Machine:
    """The machine's row as it is now, held until the transaction ends: checks made after this line stay true.

    Whoever changes a machine, or its leases, reclaims, commands or tasks, takes it first: then no two transactions wait
    for each other.
    """
    if Machine.update(name=Machine.name).where(Machine.id == machine.id).execute() != 1:
        raise NotFound(f"There is no machine {machine.id} any more.")
    return get(machine.id)


def expected_gpus(machine: Machine) -> list[Gpu]:
    return list(Gpu.select().where(Gpu.machine == machine).order_by(Gpu.slot, Gpu.id))


def gpus_by_machine(ids: Sequence[int] | None = None) -> dict[int, list[Gpu]]:
    """The same of many machines, or of all, by the machine's id; one without any is not in it."""
    query = Gpu.select().order_by(Gpu.slot, Gpu.id)
    found: dict[int, list[Gpu]] = {}
    for gpu in query if ids is None else query.where(Gpu.machine << ids):
        found.setdefault(gpu.machine_id, []).append(gpu)
    return found


def find_report(machine: Machine) -> MachineReport | None:
    report: MachineReport | None = MachineReport.get_or_none(MachineReport.machine == machine)
    return report


def is_enrolled(machine: Machine) -> bool:
    """Whether its agent has a credential that would be accepted."""
    alive = AgentCredential.select().where(AgentCredential.machine == machine, AgentCredential.state << ALIVE)
    return bool(alive.exists())


def health_of(machine: Machine, now: datetime) -> health.Health:
    """Reachability and health, by the limits of this portal."""
    return health.of(machine, expected_gpus(machine), find_report(machine), now, limits())


def limits() -> health.Limits:
    settings = config.current()
    return health.Limits(report_interval_s=settings.report_interval_s, offline_after_s=settings.offline_after_s)


def first_contact(machine: Machine) -> Credential | None:
    """The credential in the clear, for the inventory of a run alone. None: the portal's own key works."""
    return None if machine.first_contact is None else json.loads(vault.decrypt(machine.first_contact))


def find_baseline(machine: Machine) -> Baseline | None:
    """The newest one: what a reclaim compares with."""
    baseline: Baseline | None = (
        Baseline.select().where(Baseline.machine == machine).order_by(Baseline.id.desc()).first()
    )
    return baseline


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
            network.changed()
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
    if named is not None and named.state == "retired":
        way_out = f"A retired machine has the name {named.name!r}. Give that one another name first."
        return Conflict(way_out, code="name_in_use", machine_id=named.id)
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
    return host_keys.fingerprint(blob)


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
            network_places.edited(get(machine.id), changed, before=machine)
    except peewee.IntegrityError:
        raise _taken(fields, machine) from None
    return get(machine.id)


def forget_gpu(machine: Machine, gpu_uuid: str, *, by: Actor, reason: str) -> None:
    """An operator says that this GPU was taken out: it is expected no longer."""
    with atomic():
        if Gpu.delete().where(Gpu.machine == machine, Gpu.uuid == gpu_uuid).execute() != 1:
            raise NotFound(f"{machine.name} is not expected to have a GPU {gpu_uuid}.")
        audit.record("machine.gpu_forgotten", machine, by=by, uuid=gpu_uuid, reason=reason)


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
