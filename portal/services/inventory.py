"""The inventory: what Ansible may know of machines, as one document that inventory/plugins/portal.py reads.

A shell that asks with an API token gets names, addresses and pinned keys. Passwords and one-time tokens are in the
document of a run only, which lies in that run's private directory. A machine without a pinned host key is never in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portal.db import utcnow
from portal.errors import Invalid
from portal.models import Lease, Machine, Opening, Run
from portal.models.states import LEASE_OPEN
from portal.services import agents, config, login_keys, machines, reclaims
from portal.services.actors import SYSTEM

SCHEMA = 1
GPU_HOSTS, GATEWAYS = "gpu_hosts", "gateways"
SECRET_FIELDS = ("password", "become_password")
SECRET_VARS = ("remotegpu_enroll_token",)


@dataclass(frozen=True)
class RunFiles:
    """The run that a document is for, and its private directory, where private keys may be put."""

    run: Run
    directory: Path


def of_all() -> dict[str, Any]:
    """The document of every machine that is not retired, for whoever may read the inventory."""
    return document(Machine.select().where(Machine.state != "retired"))


def document(chosen: Iterable[Machine], *, for_run: RunFiles | None = None) -> dict[str, Any]:
    """The document for these machines. `left_out` names those that cannot be in it, and why.

    With `for_run` it holds what first contact and enrolment need; it must then be kept 0600 and deleted with the run.
    """
    hosts, left_out = [], []
    purpose = "shell" if for_run is None else for_run.run.purpose
    if for_run is not None and for_run.run.playbook == login_keys.PLAYBOOK:
        login_keys.begin(for_run.run)
    ways = login_keys.ways()
    open_ports = _ports_of_machines()
    leased = {row.machine_id for row in Lease.select(Lease.machine).where(Lease.state << LEASE_OPEN)}
    for machine in sorted(chosen, key=lambda each: each.name):
        if machine.host_key is None:
            left_out.append({"name": machine.name, "reason": "its host key is not confirmed"})
            continue
        operator_keys = ways.wanted_lines(machine, purpose=purpose)
        entry = _host(machine, is_leased=machine.id in leased, operator_keys=operator_keys)
        entry["vars"]["remotegpu_open_ports"] = sorted(open_ports[machine.id])
        try:
            if for_run is not None:
                _add_secrets(entry, machine, for_run, fallback=ways.fallback_file(machine))
        except login_keys.CannotRotate as refusal:
            left_out.append({"name": machine.name, "reason": refusal.message})
            continue
        hosts.append(entry)
    return {"schema": SCHEMA, "generated_at": utcnow().isoformat(), "hosts": hosts, "left_out": left_out}


def _ports_of_machines() -> dict[int, set[int]]:
    """The TCP ports that stay open while nobody has leased a machine: whoever scans it will find them."""
    ports: dict[int, set[int]] = defaultdict(set)
    now = utcnow()
    of_machine = (Opening.lease.is_null()) & Opening.closed_at.is_null() & (Opening.protocol == "tcp")
    for each in Opening.select().where(of_machine & (Opening.ends_at.is_null() | (Opening.ends_at > now))):
        ports[each.machine_id] |= set(range(each.first_port, each.last_port + 1))
    return ports


def _host(machine: Machine, *, is_leased: bool, operator_keys: list[str]) -> dict[str, Any]:
    settings = config.current()
    ca = settings.ca_for_hosts
    values: dict[str, Any] = {
        "remotegpu_machine_id": machine.id,
        "remotegpu_portal_url": settings.public_url,
        "remotegpu_lease_active": is_leased,
        "remotegpu_maintenance": machine.maintenance_since is not None,
        "remotegpu_login_user": machine.ssh_user,
        "remotegpu_operator_keys": operator_keys,
    }
    if settings.is_secure and ca is not None and ca.exists():
        values["remotegpu_ca_pem"] = ca.read_text()
    return {
        "name": machine.name,
        "address": machine.address,
        "port": machine.ssh_port,
        "user": machine.ssh_user,
        "host_keys": [machine.host_key],
        "groups": [GATEWAYS if machine.is_gateway else GPU_HOSTS],
        "vars": values,
        "password": None,
        "become_password": None,
        "private_key_file": None,
        "fallback_key_file": None,
    }


def _add_secrets(entry: dict[str, Any], machine: Machine, files: RunFiles, *, fallback: Path | None) -> None:
    """What only a run may know. The portal's own key is named by its file; it is never copied."""
    entry["private_key_file"] = str(login_keys.file())
    entry["fallback_key_file"] = None if fallback is None else str(fallback)
    contact = machines.first_contact(machine) or {}
    entry["password"], entry["become_password"] = contact.get("password"), contact.get("become_password")
    if key := contact.get("private_key"):
        entry["private_key_file"] = _key_file(files.directory / "keys" / f"contact-{machine.id}", key)
    if files.run.purpose == "provision":
        entry["vars"]["remotegpu_enroll_token"] = agents.new_enroll_token(machine, by=SYSTEM)
    if files.run.playbook == "verify":
        entry["vars"] |= _question(machine, files)
    if files.run.playbook == login_keys.PLAYBOOK:
        entry["vars"] |= _rotation(machine, files, fallback)


def _rotation(machine: Machine, files: RunFiles, fallback: Path | None) -> dict[str, Any]:
    """What rotate_credentials proves: the key that opens, the one that must not, and the agent's new credential.

    Raises CannotRotate if it cannot be done now.
    """
    login_keys.prepare(machine)
    values: dict[str, Any] = {
        "remotegpu_rotate_key_file": str(login_keys.file()),
        "remotegpu_rotate_old_key_file": "" if fallback is None else str(fallback),
        "remotegpu_rotate_fingerprint": login_keys.fingerprint(),
        "remotegpu_rotate_comment": login_keys.COMMENT,
        "remotegpu_rotate_output": str(files.directory / "verdicts"),
    }
    if machines.is_enrolled(machine):
        command = agents.rotate(machine, by=SYSTEM)
        values["remotegpu_rotate_credential_id"] = command.args["credential_id"]
    return values


def _question(machine: Machine, files: RunFiles) -> dict[str, Any]:
    """What verify.yml compares the host with. After a lease the reclaim asks, with the login that must be refused."""
    values: dict[str, Any] = {"remotegpu_verify_output": str(files.directory / "verdicts")}
    if files.run.purpose == "verify":
        asked = reclaims.verify_request(files.run, machine)
        values["remotegpu_verify_request"] = asked.request
        values["remotegpu_verify_probe_login"] = asked.login
        key_file = files.directory / "keys" / f"probe-{machine.id}"
        values["remotegpu_verify_probe_key_file"] = _key_file(key_file, asked.probe_key)
    elif baseline := machines.find_baseline(machine):
        nobody = {"lease_id": None, "login": None, "uid": None}
        request = {"schema": SCHEMA, "machine_id": machine.id, **nobody, "baseline": baseline.content}
        values["remotegpu_verify_request"] = request
    return values


def _key_file(file: Path, key: str) -> str:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.touch(mode=0o600, exist_ok=False)
    file.write_text(key if key.endswith("\n") else f"{key}\n")
    return str(file)


def limit_to(document: dict[str, Any], run: Run) -> str:
    """The explicit host list of a run. Raises Invalid if it is empty: to Ansible an empty one means every host."""
    names = [host["name"] for host in document["hosts"]]
    if not names or not all(names):
        why = " ".join(each["reason"] for each in document["left_out"]) or "its list is empty"
        raise Invalid({"machines": [f"Run {run.id} has no host left that can be reached: {why}"]})
    return ",".join(names)


def secrets_in(document: dict[str, Any]) -> tuple[str, ...]:
    """The values of a run's document that must appear in no output."""
    found = {host[name] for host in document["hosts"] for name in SECRET_FIELDS}
    found |= {host["vars"].get(name) for host in document["hosts"] for name in SECRET_VARS}
    return tuple(sorted((value for value in found if value), key=len, reverse=True))
