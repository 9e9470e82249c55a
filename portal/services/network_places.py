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


def edited(machine: Machine, changed: Collection[str]) -> None:
    """These fields of the machine, which is as it is now, were changed: carry it to where they stand.

    Called inside the transaction of the edit. Raises Invalid where the network needs what was taken away, Conflict
    where customers are led to what was.
    """
    if machine.is_gateway and machine.public_address is None:
        raise Invalid({"public_address": ["A gateway needs it: customers come in there."]})
    if machine.gateway_id is not None and find_address(machine) is None:
        raise Invalid({"address": ["Behind a gateway a machine is known by its IP address."]})
    led = Forward.select().where(Forward.machine == machine, Forward.closed_at.is_null())
    if "ssh_port" in changed and led.exists():
        raise Conflict(
            "Customers come in by a port that leads to the old one; change it when the lease has ended.",
            code="has_leases",
        )
    if machine.gateway_id is not None and "address" in changed:
        events.desired_changed(machine.gateway_id)
    if not {"name", "address", "public_address"}.isdisjoint(changed):
        network.changed()
