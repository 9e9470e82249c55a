"""What a machine's own fields mean for the network: its name and address stand in names and forwards.

Below machines.py, which says here what was edited. Behind which gateway and group it stands is in network_machines.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from portal.errors import Conflict, Invalid
from portal.models import Forward, Machine
from portal.services import events, network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def find_address(machine: Machine) -> Address | None:
    """None where it is known by a host name."""
    return find_ip(machine.address)


def find_ip(text: str | None) -> Address | None:
    try:
        return ipaddress.ip_address(text or "")
    except ValueError:
        return None


def faults_of_family(gateway: Machine, address: Address) -> list[str]:
    """What keeps the gateway from leading to this address: it forwards within its own family alone."""
    outside = find_ip(gateway.public_address)  # a host name may lead to either family
    if outside is not None and outside.version != address.version:
        return [f"{gateway.name} has an IPv{outside.version} address and cannot forward to IPv{address.version}."]
    return []


def edited(machine: Machine, changed: Collection[str], *, before: Machine) -> None:
    """These fields of the machine, which is as it is now, were changed: carry it to where they stand.

    Called inside the transaction of the edit. Raises Invalid where the network needs what was taken away, Conflict
    where customers are led to what was.
    """
    if machine.is_gateway and machine.public_address is None:
        raise Invalid({"public_address": ["A gateway needs it: customers come in there."]})
    if machine.is_gateway and "public_address" in changed:
        _refuse_other_family(machine)
    led = Forward.select().where(Forward.machine == machine, Forward.closed_at.is_null())
    if "ssh_port" in changed and led.exists():
        raise Conflict(
            "Customers come in by a port that leads to the old one; change it when the lease has ended.",
            code="has_leases",
        )
    if machine.gateway_id is not None and "address" in changed:
        events.desired_changed(machine.gateway_id)  # takes the gateway's row: its own address stays what it is
        _refuse_unreachable(machine, before, is_led=led.exists())
    if not {"name", "address", "public_address"}.isdisjoint(changed):
        network.changed()


def _refuse_unreachable(machine: Machine, before: Machine, *, is_led: bool) -> None:
    """Its gateway must be able to lead to the new address, and its customers come in by the family that they know."""
    address, known = find_address(machine), find_address(before)
    if address is None:
        raise Invalid({"address": ["Behind a gateway a machine is known by its IP address."]})
    if faults := faults_of_family(Machine.get_by_id(machine.gateway_id), address):
        raise Invalid({"address": faults})
    if is_led and known is not None and known.version != address.version:
        raise Conflict(
            f"Customers come in by IPv{known.version}, and the address {address} is IPv{address.version}; "
            "change it when the lease has ended.",
            code="has_leases",
        )


def _refuse_other_family(gateway: Machine) -> None:
    """Whoever stands behind it must be led to from its new address too."""
    network.hold()  # nobody is placed behind it meanwhile
    for each in Machine.select().where(Machine.gateway == gateway, Machine.state != "retired").order_by(Machine.name):
        address = find_address(each)
        if address is not None and faults_of_family(gateway, address):
            raise Invalid(
                {
                    "public_address": [
                        f"{each.name} stands behind it with an IPv{address.version} address, and a gateway forwards "
                        "within one family. Give it such a public address, or place the machines elsewhere first."
                    ]
                }
            )
