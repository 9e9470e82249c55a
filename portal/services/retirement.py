"""The end of a machine as we know it: installed anew as another host, retired for good, or deleted as never used.

What it was until then is in machines.py; what had it, in leases.py and reclaims.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from portal.db import atomic, utcnow
from portal.errors import Conflict
from portal.models import Forward, Gpu, Lease, Machine, MachineReport, RunHost
from portal.services import (
    agents,
    audit,
    commands,
    events,
    frozen,
    machines,
    network,
    network_machines,
    network_names,
    network_openings,
)
from portal.services.actors import Actor
from portal.services.machine_fields import checked
from portal.services.transitions import move

NOWHERE = dict.fromkeys(network_machines.FIELDS)  # behind no gateway and no group, and no gateway itself


def reimaged(machine: Machine, *, by: Actor, reason: str, credential: Mapping[str, str] | None = None) -> Machine:
    """The quarantined host was installed anew from outside: nothing of what we knew about it holds any more.

    Scan and confirm its new host key, then provision. Its agent gets a new identity, its desired state a new epoch.
    """
    fields = checked({"credential": credential}) if credential else {}
    with atomic():
        machine = machines.lock(machine)
        if machine.state != "quarantined" and not (machine.state == "failed" and machine.needs_reimage):
            raise Conflict(f"The machine is {machine.state}; only a quarantined one is re-imaged.", code="wrong_state")
        for column, value in fields.items():
            setattr(machine, column, value)
        machine.epoch, machine.reimaged_at, machine.needs_reimage = str(uuid.uuid4()), utcnow(), False
        machine.host_key = machine.host_key_confirmed_at = machine.host_keys_offered = None
        machine.save()
        Machine.update(**frozen.NOT_FROZEN).where(Machine.id == machine.id).execute()
        commands.cancel_all(machine, "thaw", by=by, reason="The host was installed anew.")
        agents.end_credentials(machine, by=by)
        MachineReport.delete().where(MachineReport.machine == machine).execute()
        network_openings.forget_seen(machine)
        Machine.update(hears_openings=False).where(Machine.id == machine.id).execute()  # until its new agent says so
        audit.record("machine.reimaged", machine, by=by, reason=reason)
        events.write("machine.reimaged", machine_id=machine.id)
    return machine


def retire(machine: Machine, *, by: Actor, reason: str) -> Machine:
    """Never again; its history stays, its address may be used by another machine."""
    with atomic():
        machine = machines.lock(machine)
        planned = Lease.select().where(Lease.machine == machine, Lease.state == "scheduled").first()
        if planned is not None:
            raise Conflict(f"Lease {planned.id} is scheduled on this machine; end it first.", code="has_leases")
        network_machines.refuse_gateway_in_use(machine)
        move(machine, leave=["failed", "ready", "quarantined"], enter="retired", state_reason=reason)
        Machine.update(first_contact=None, **NOWHERE).where(Machine.id == machine.id).execute()
        network_openings.close_of_machine(machine, by=by)
        network_names.close_of_machine(machine, by=by)
        network.changed()
        Gpu.delete().where(Gpu.machine == machine).execute()  # the cards may go into another machine
        agents.end_credentials(machine, by=by)
        audit.record("machine.retired", machine, by=by, reason=reason)
        events.write("machine.retired", machine_id=machine.id)
    return machines.get(machine.id)


def delete(machine: Machine, *, by: Actor) -> None:
    """Only what was never leased and never touched; the rest is retired and keeps its history."""
    with atomic():
        machine = machines.lock(machine)
        if Lease.select().where(Lease.machine == machine).exists():
            raise Conflict("The machine has been leased; retire it, its history is kept.", code="has_leases")
        if RunHost.select().where(RunHost.machine == machine).exists():
            raise Conflict("The machine has runs in its history; retire it instead.", code="has_runs")
        if Forward.select().where(Forward.gateway == machine).exists():
            raise Conflict("The machine has forwarded ports; retire it, its history is kept.", code="has_forwards")
        network_machines.refuse_gateway_in_use(machine)
        network.changed()
        audit.record("machine.deleted", machine, by=by, name=machine.name, address=machine.address)
        events.write("machine.deleted", machine_id=machine.id)
        Machine.delete().where(Machine.id == machine.id).execute()
