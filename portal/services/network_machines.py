"""Where a machine stands in the network: behind which gateway and security group, or a gateway itself.

A gateway is a machine with a pool of ports and a public address; customers of those behind it come in there, and it is
leased to nobody. Which port leads where is in network_forwards.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import peewee

from portal.db import atomic
from portal.errors import Conflict, Invalid
from portal.models import Forward, Lease, Machine, SecurityGroup
from portal.models.states import LEASE_OPEN
from portal.services import audit, events, machines, network, network_places, network_quota
from portal.services.actors import Actor

POOL = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
LOWEST = 1024  # below it stand the services of the gateway itself
MOST_PORTS = 5000  # what an agent is told of at once
FIELDS = ("gateway_id", "security_group_id", "forward_ports")


def gateways() -> peewee.ModelSelect[Machine]:
    return (
        Machine.select().where(Machine.forward_ports.is_null(False), Machine.state != "retired").order_by(Machine.name)
    )


def behind(gateway: Machine) -> peewee.ModelSelect[Machine]:
    """The machines whose customers come in by this gateway."""
    return Machine.select().where(Machine.gateway == gateway, Machine.state != "retired").order_by(Machine.name)


def pool(gateway: Machine) -> range:
    """The ports that it may give away; empty for a machine that is no gateway."""
    found = POOL.fullmatch(gateway.forward_ports or "")
    return range(0) if found is None else range(int(found[1]), int(found[2]) + 1)


def place(machine: Machine, *, by: Actor, **given: Any) -> Machine:
    """Set any of FIELDS; None takes it away. Not while a lease is open: what it opened would stand somewhere else.

    Raises Invalid that names the field, and Conflict.
    """
    with atomic():
        machine = machines.lock(machine)
        network.hold()  # nobody changes the gateway meanwhile
        changes = {field: value for field, value in given.items() if getattr(machine, field) != value}
        if not changes:
            return machine
        if machine.state == "retired":
            raise Conflict("The machine is retired.", code="wrong_state")
        if (faults := _faults(machine, {**_now(machine), **changes}, changes)) != {}:
            raise Invalid(faults)
        _refuse_in_use(machine, changes)
        Machine.update(**changes).where(Machine.id == machine.id).execute()
        if changes.get("security_group_id") is not None:
            network_quota.refuse_unfit(machines.get(machine.id))
        audit.record("machine.placed", machine, by=by, fields=changes)
        events.write("machine.edited", machine_id=machine.id)
        events.desired_changed(machine.id)
        network.changed()
    return machines.get(machine.id)


def _now(machine: Machine) -> dict[str, Any]:
    return {field: getattr(machine, field) for field in FIELDS}


def _faults(machine: Machine, wanted: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, list[str]]:
    faults: dict[str, list[str]] = {}
    if changes.get("forward_ports") is not None and (found := _pool_faults(machine, changes["forward_ports"])):
        faults["forward_ports"] = found
    if wanted["gateway_id"] is not None and wanted["forward_ports"] is not None:
        faults["gateway_id"] = ["A gateway stands behind no other gateway."]
    elif changes.get("gateway_id") is not None and (found := _gateway_faults(machine, changes["gateway_id"])):
        faults["gateway_id"] = found
    if changes.get("security_group_id") is not None:
        known = SecurityGroup.select().where(SecurityGroup.id == changes["security_group_id"])
        if not known.exists():
            faults["security_group_id"] = ["There is no such security group."]
    return faults


def _pool_faults(machine: Machine, text: str) -> list[str]:
    found = POOL.fullmatch(text)
    if found is None or not LOWEST <= int(found[1]) <= int(found[2]) <= 65535:
        return [f"Write the first and the last port, such as 20000-20999, from {LOWEST} to 65535."]
    if int(found[2]) - int(found[1]) >= MOST_PORTS:
        return [f"A gateway forwards at most {MOST_PORTS} ports."]
    if machine.public_address is None:
        return ["Enter the machine's public address first: it is where customers of the machines behind it come in."]
    return []


def _gateway_faults(machine: Machine, gateway_id: int) -> list[str]:
    gateway: Machine | None = Machine.get_or_none(Machine.id == gateway_id)
    if gateway is None or not gateway.is_gateway or gateway.state == "retired":
        return ["Choose a gateway: a machine with a pool of ports and a public address."]
    address = network_places.find_address(machine)
    if address is None:
        return ["Behind a gateway a machine is known by its IP address. Enter that instead of a host name."]
    return network_places.faults_of_family(gateway, address)


def _refuse_in_use(machine: Machine, changes: Mapping[str, Any]) -> None:
    in_the_way = (*LEASE_OPEN, "scheduled") if changes.get("forward_ports") else LEASE_OPEN  # no gateway is leased
    held = Lease.select().where(Lease.machine == machine, Lease.state << in_the_way).order_by(Lease.starts_at).first()
    if held is not None:
        raise Conflict(
            f"Lease {held.id} has {machine.name} or is to have it. Change where it stands when that has ended.",
            code="has_leases",
        )
    if "forward_ports" in changes and changes["forward_ports"] is None:
        refuse_gateway_in_use(machine)


def refuse_gateway_in_use(machine: Machine) -> None:
    """Raises Conflict while machines stand behind it or one of its ports is taken."""
    count = behind(machine).count()
    taken = Forward.select().where(Forward.gateway == machine, Forward.released_at.is_null()).count()
    if count or taken:
        raise Conflict(
            f"{machine.name} is the gateway of {count} machines and forwards {taken} ports. Free them first.",
            code="gateway_in_use",
        )
