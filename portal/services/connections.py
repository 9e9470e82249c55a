"""How a customer reaches a leased machine: the command, the lines for ~/.ssh, and the key that the host must show.

There is no password and no machine-wide key to tell: a lease opens to its people's own keys. Behind a gateway the way
in is the port there that was forwarded to this machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from portal.errors import Conflict
from portal.models import Lease, User
from portal.services import machines, network_forwards, tenants


@dataclass(frozen=True)
class Connection:
    login: str
    host: str
    port: int
    command: str
    ssh_config: str
    host_key_type: str
    host_key_fingerprint: str
    known_hosts_line: str


def of(lease: Lease, *, user: User) -> Connection:
    """For somebody who may use the tenant's machines (else Forbidden). Raises Conflict unless the lease is active."""
    tenants.require(user, lease.tenant_id, "use")
    machine = lease.machine
    if lease.state != "active" or lease.login is None or machine.host_key is None:
        raise Conflict(f"The lease is {lease.state}; one can connect while it is active.", code="lease_not_active")
    host, port = _way_in(lease)
    key_type = machine.host_key.split()[0]
    return Connection(
        login=lease.login,
        host=host,
        port=port,
        command=_command(host, port, lease.login, key_type),
        ssh_config=_config(machine.name, host, port, lease.login),
        host_key_type=key_type,
        host_key_fingerprint=machines.fingerprint(machine.host_key),
        known_hosts_line=f"{_known_name(host, port)} {machine.host_key}",
    )


def _way_in(lease: Lease) -> tuple[str, int]:
    """The public address and port, of the gateway where there is one."""
    machine = lease.machine
    forward = network_forwards.find_ssh(lease)
    if forward is not None:
        return forward.gateway.public_address or forward.gateway.address, forward.public_port
    return machine.public_address or machine.address, machine.ssh_port


def _command(host: str, port: int, login: str, key_type: str) -> str:
    """A host has keys of several types, and ssh asks for an Ed25519 one first: it must show the one that was pinned."""
    types = "rsa-sha2-512,rsa-sha2-256" if key_type == "ssh-rsa" else key_type
    chosen = [] if key_type == "ssh-ed25519" else ["-o", f"HostKeyAlgorithms={types}"]
    return " ".join(["ssh", *chosen, *([] if port == 22 else ["-p", str(port)]), f"{login}@{host}"])


def _config(name: str, host: str, port: int, login: str) -> str:
    lines = [f"Host {name}", f"    HostName {host}", f"    Port {port}", f"    User {login}"]
    return "\n".join([*lines, "    StrictHostKeyChecking yes", ""])


def _known_name(host: str, port: int) -> str:
    """As known_hosts wants it: a port other than 22 in brackets."""
    return host if port == 22 else f"[{host}]:{port}"
