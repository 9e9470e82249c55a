"""A rental without hosts: the portal's own services, and doubles at its border for the host's agent and the worker.

`Host` says what an agent would say, `finish_run` what a worker would. Everything else happens as it does in production,
so that no test starts from a world that the portal would not let happen.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from portal.db import atomic, utcnow
from portal.integrations import protocol
from portal.models import Command, Lease, Machine, MachineReport, Reclaim, Run, Tenant
from portal.services import agents, commands, config, leases, machines, provisioning, reclaims, runs
from portal.services.actors import SYSTEM, Actor
from portal.services.runs import Outcome

GIB = 1024**3
BOOT = "9d2f7f3c-5b0e-4f8e-9a43-0c8f5d1f2a11"
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
OTHER_HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP8BAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
_numbers = itertools.count(1)


def tomorrow() -> datetime:
    return utcnow() + timedelta(days=1)


def told(moment: datetime) -> str:
    """A time as the protocol writes it."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


# What a host says


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "hostname": "host",
        "machine_id": uuid.uuid4().hex,
        "product_uuid": None,
        "os": "Debian GNU/Linux 12",
        "kernel": "6.1.0",
        "architecture": "x86_64",
        "cpu_model": "Test CPU",
        "cpu_cores": 64,
        "memory_total_bytes": 512 * GIB,
        "python": "3.11.2",
        "openssh": "9.2",
        **changes,
    }


def gpu(gpu_uuid: str, index: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "uuid": gpu_uuid,
        "name": "NVIDIA H100",
        "serial": f"S{index}",
        "pci_bus_id": f"0000:0{index}:00.0",
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": 0,
        "memory_reserved_bytes": 0,
        "utilization_percent": 0,
        "memory_bandwidth_percent": 0,
        "temperature_c": 30,
        "power_w": 70,
        "power_limit_w": 700,
        "ecc_uncorrected": 0,
        "mig": False,
        "processes": [],
        "errors": [],
        "state": "ok",
        **changes,
    }


def gpu_report(gpus: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "state": "ok",
        "message": None,
        "sampled_at": told(utcnow()),
        "driver_version": "570.1",
        "nvml_version": "12.570.1",
        "gpus": list(gpus),
        **changes,
    }


def metrics(*, free_bytes: int | None = 500 * GIB) -> dict[str, Any]:
    disk = {
        "mount": "/",
        "device": "/dev/vda1",
        "total_bytes": 1000 * GIB,
        "used_bytes": None,
        "free_bytes": free_bytes,
    }
    return {
        "sampled_at": told(utcnow()),
        "cpu_percent": 1.0,
        "load1": 0.1,
        "memory_total_bytes": 512 * GIB,
        "memory_used_bytes": GIB,
        "uptime_s": 1000.0,
        "disks": [disk],
        "network": [],
    }


def baseline() -> dict[str, Any]:
    return {
        "schema": 1,
        "taken_at": told(utcnow()),
        "boot_id": BOOT,
        "agent_version": "0.1.0",
        "sections": {"accounts": {"/etc/passwd": "root:x:0:0::/root:/bin/bash\n"}},
    }


def steps(**results: str) -> list[dict[str, Any]]:
    """The cleaning steps of an agent that passed them all, but for these results."""
    return [
        {
            "id": name,
            "result": result,
            "reason": None if result == "passed" else f"{name} is still there",
            "before": ["something"],
            "acted": ["removed it"],
            "after": [],
            "duration_s": 0.25,
        }
        for name, result in (dict.fromkeys(protocol.words("cleaning_step"), "passed") | results).items()
    ]


def clean_result(**results: str) -> dict[str, Any]:
    all_steps = steps(**results)
    now = told(utcnow())
    return {
        "schema": 1,
        "passed": all(step["result"] in ("passed", "not_applicable") for step in all_steps),
        "steps": all_steps,
        "boot_id": BOOT,
        "agent_version": "0.1.0",
        "started_at": now,
        "ended_at": now,
    }


def verdict(**results: str) -> dict[str, Any]:
    """What verify.yml says of a host: that all of it passed, but for these results."""
    wanted = dict.fromkeys((*reclaims.FROM_OUTSIDE, *protocol.words("host_check")), "passed") | results
    checks: list[dict[str, Any]] = [
        {"id": name, "result": result, "reason": None if result == "passed" else f"{name} was seen", "evidence": {}}
        for name, result in wanted.items()
    ]
    return {"schema": 1, "passed": all(check["result"] == "passed" for check in checks), "checks": checks}


class Host:
    """The agent of one machine, as the portal hears it."""

    def __init__(self, machine: Machine, *, gpus: int = 2) -> None:
        self.id = machine.id
        self.gpu_uuids = [f"GPU-{machine.id:04d}-{index}" for index in range(gpus)]

    @property
    def machine(self) -> Machine:
        """The row as it is now."""
        return machines.get(self.id)

    @property
    def state(self) -> str:
        return str(self.machine.state)

    def enrol(self) -> None:
        token = agents.new_enroll_token(self.machine, by=SYSTEM)
        seen = gpu_report([gpu(each, index) for index, each in enumerate(self.gpu_uuids)])
        request = {"protocol": 1, "agent_version": "0.1.0", "boot_id": BOOT, "facts": facts(), "gpu": seen}
        agents.enroll(agents.invitation_of(token), request)

    def report(self, **changes: Any) -> None:
        """The last report is this one, just now."""
        values = {
            "received_at": utcnow(),
            "clock_offset_s": 0.1,
            "agent_version": "0.1.0",
            "boot_id": BOOT,
            "seq": next(_numbers),
            "metrics": metrics(),
            "gpu": gpu_report([gpu(each, index) for index, each in enumerate(self.gpu_uuids)]),
            **changes,
        }
        with atomic():
            MachineReport.delete().where(MachineReport.machine == self.id).execute()
            MachineReport.create(machine=self.id, **values)

    def queued(self, kind: str) -> Command:
        """The command of this kind that it was given and has not answered."""
        return Command.get(Command.machine == self.id, Command.kind == kind, Command.state == "queued")

    def answers(
        self, kind: str, result: Mapping[str, Any] | None, *, ok: bool = True, message: str | None = None
    ) -> Command:
        """It has carried out a command that it was given."""
        command = self.queued(kind)
        said = {"command_id": command.id, "ok": ok, "message": message, "result": result}
        commands.finished(self.machine, said)
        return Command.get_by_id(command.id)

    def sees(self, lease: Lease, state: str = "open", **changes: Any) -> None:
        """It reports how it has this lease."""
        leases.observed(self.machine, [observed(lease, state, **changes)])

    def applies_everything(self) -> None:
        """It has carried out all that is wanted now."""
        with atomic():
            Machine.update(applied_generation=Machine.generation).where(Machine.id == self.id).execute()


def observed(lease: Lease, state: str = "open", **changes: Any) -> dict[str, Any]:
    """A lease as the protocol reports it."""
    lease = leases.get(lease.id)
    return {
        "lease_id": lease.host_id,
        "login": lease.login,
        "state": state,
        "ends_at": told(lease.ends_at),
        "key_fingerprints": [],
        "end_armed": state == "open",
        "processes": 0,
        "closed_at": told(utcnow()) if state == "closed" else None,
        "message": None,
        **changes,
    }


# What a worker says


def finish_run(
    run: Run | int,
    state: str = "succeeded",
    verdicts: Mapping[str, Any] | None = None,
    stats: Mapping[str, Any] | None = None,
) -> Run:
    """A worker takes the run and ends it."""
    wanted = run if isinstance(run, int) else run.id
    token = str(uuid.uuid4())
    taken = runs.claim(token, lock_s=60)
    assert taken is not None, "no run is waiting"
    assert taken.id == wanted, f"run {taken.id} is first"
    reason = None if state == "succeeded" else "it went wrong"
    outcome = Outcome(
        state, exit_code=0, reason=reason, verdicts=dict(verdicts or {}) or None, stats=dict(stats or {}) or None
    )
    runs.finish(taken, token, outcome)
    return runs.get_run(wanted)


# The way


def ensure_signing_key() -> None:
    """The key that `init` makes, for the reports."""
    file = config.current().signing_key_file
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    form, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file.write_bytes(Ed25519PrivateKey.generate().private_bytes(serialization.Encoding.PEM, form, no_password))


def register(name: str | None = None, **fields: Any) -> Machine:
    """A machine that was just typed in."""
    number = next(_numbers)
    given = {"name": name or f"host-{number}", "address": f"192.0.2.{number % 250}", "ssh_port": 10000 + number}
    return machines.register(**{**given, "ssh_user": "root", "credential": {"password": "pw"}, "by": SYSTEM, **fields})


def confirm(machine: Machine, line: str = HOST_KEY) -> Machine:
    """Its host key is offered, compared and pinned."""
    machines.offer_host_keys(machine, [{"type": "ssh-ed25519", "line": line, "fingerprint": ""}], by=SYSTEM)
    return machines.confirm_host_key(machine, machines.fingerprint(line), by=SYSTEM, reason="compared")


def ready_host(name: str | None = None, *, by: Actor = SYSTEM, gpus: int = 2, **fields: Any) -> Host:
    """From a bare machine to one that can be leased: every step of the way."""
    ensure_signing_key()
    host = Host(confirm(register(name, **fields)), gpus=gpus)
    run = provisioning.provision(host.machine, by=by)
    host.enrol()
    finish_run(run)
    host.answers("baseline", baseline())
    host.report()
    assert host.state == "ready", host.machine.state_reason
    return host


def allocate(host: Host, tenant: Tenant, *, by: Actor = SYSTEM, **given: Any) -> Lease:
    """Lease it until tomorrow, without retention, if the test does not say otherwise."""
    return leases.allocate(host.machine, to=tenant, by=by, **{"until": tomorrow(), "retain_s": 0, **given})


def end(host: Host, lease: Lease, *, by: Actor = SYSTEM) -> Lease:
    """It is ended, and the host has closed it."""
    leases.end(lease, by=by, reason="done")
    host.sees(lease, "closed")
    ended = leases.get(lease.id)
    assert ended.state == "ended"
    return ended


def reclaim_of(lease: Lease) -> Reclaim:
    """The newest one of this lease."""
    return Reclaim.select().where(Reclaim.lease == lease).order_by(Reclaim.id.desc()).get()


def reclaim(host: Host, lease: Lease, *, said: Mapping[str, Any] | None = None) -> Reclaim:
    """Cleaned by the agent and verified by a run that says `said`, by default that all is well."""
    reclaims.advance_due()
    host.answers("clean", clean_result())
    run_id = reclaim_of(lease).run_id
    assert run_id is not None
    finish_run(run_id, verdicts={host.machine.name: verdict() if said is None else said})
    return reclaim_of(lease)
