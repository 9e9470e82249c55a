"""An agent without a host: what it says at the door of the portal, checked against the protocol in both directions."""

from __future__ import annotations

import base64
import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from portal.db import utcnow
from portal.integrations import protocol
from portal.models import Attempt, Lease, Machine, Task, Tenant, User
from portal.services import agents, tasks
from portal.services.actors import SYSTEM
from tests.factories import actor_of, make_lease, make_machine

_seq = itertools.count(1)
FACTS = {
    "hostname": "gpu-host",
    "machine_id": "0123456789abcdef0123456789abcdef",
    "product_uuid": None,
    "os": "Debian GNU/Linux 12 (bookworm)",
    "kernel": "6.1.0",
    "architecture": "x86_64",
    "cpu_model": None,
    "cpu_cores": 8,
    "memory_total_bytes": 64 << 30,
    "python": "3.11.2",
    "openssh": "OpenSSH_9.2p1",
}
NO_GPUS = {
    "state": "no_library", "message": None, "sampled_at": None,
    "driver_version": None, "nvml_version": None, "gpus": [],
}  # fmt: skip


def gpu(uid: str, index: int = 0) -> dict[str, Any]:
    unknown = (
        "memory_used_bytes", "memory_reserved_bytes", "utilization_percent", "memory_bandwidth_percent",
        "temperature_c", "power_w", "power_limit_w", "ecc_uncorrected", "mig", "processes", "serial", "pci_bus_id",
    )  # fmt: skip
    known = {"index": index, "uuid": uid, "name": "NVIDIA H100", "memory_total_bytes": 80 << 30}
    return {**dict.fromkeys(unknown), **known, "errors": [], "state": "ok"}


def time_of(moment: Any = None) -> str:
    return protocol.format_time(moment or utcnow())


def observed(lease: Lease, state: str = "open", **fields: Any) -> dict[str, Any]:
    given = {
        "lease_id": lease.host_id,
        "login": lease.login,
        "state": state,
        "ends_at": time_of(lease.ends_at),
        "key_fingerprints": [],
        "end_armed": True,
        "processes": 0,
        "closed_at": None if state == "open" else time_of(),
        "message": None,
    }
    return given | fields


def attempt_report(attempt_id: int, state: str, **fields: Any) -> dict[str, Any]:
    given = {
        "attempt_id": attempt_id,
        "state": state,
        "exit_code": None,
        "signal": None,
        "started_at": None if state == "starting" else time_of(),
        "ended_at": None if state in ("starting", "running") else time_of(),
        "boot_id": "boot-1",
        "log_bytes": 0,
        "log_truncated": False,
        "reason": None,
    }
    return given | fields


def log_range(attempt_id: int, offset: int, data: bytes, *, end: bool = False) -> dict[str, Any]:
    return {"attempt_id": attempt_id, "offset": offset, "data": base64.b64encode(data).decode(), "end": end}


def journal_record(event: str = "lease.closed", **fields: Any) -> dict[str, Any]:
    given = {
        "id": str(uuid.uuid4()),
        "at": time_of(),
        "event": event,
        "lease_id": None,
        "attempt_id": None,
        "detail": {},
    }
    return given | fields


def command_result(command_id: int, *, ok: bool = True, **fields: Any) -> dict[str, Any]:
    return {"command_id": command_id, "ok": ok, "message": None, "result": None} | fields


@dataclass
class FakeAgent:
    """The agent of one machine. Its tests say what it observed; it fills in the rest."""

    client: FlaskClient
    credential: str
    epoch: str | None = None
    generation: int = 0
    boot_id: str = "boot-1"
    said: list[Mapping[str, Any]] = field(default_factory=list)

    def report(self, **parts: Any) -> dict[str, Any]:
        response = self.say(self.message(**parts))
        assert response.status_code == 200, response.get_data(as_text=True)
        answer: dict[str, Any] = protocol.check(response.get_json(), "sync_response")
        return answer

    def hold(self, wait_s: float = 0, **fields: Any) -> dict[str, Any]:
        """The held call; takes over what it is told, as an agent does."""
        response = self.say(self.message(report=None, wait_s=wait_s, **fields))
        assert response.status_code == 200, response.get_data(as_text=True)
        answer: dict[str, Any] = protocol.check(response.get_json(), "sync_response")
        if answer["desired"] is not None:
            self.epoch, self.generation = answer["epoch"], answer["generation"]
        return answer

    def await_order(self) -> dict[str, Any]:
        """The desired state that follows a change, which the process hears of within a moment."""
        answer = self.hold(wait_s=10)
        assert answer["desired"] is not None, "nothing new was wanted within 10 s"
        desired: dict[str, Any] = answer["desired"]
        return desired

    def message(
        self, *, wait_s: float = 0, epoch: Any = ..., generation: int | None = None, **parts: Any
    ) -> dict[str, Any]:
        told = None if parts.get("report", ...) is None else self._report(parts)
        return {
            "protocol": 1,
            "epoch": self.epoch if epoch is ... else epoch,
            "generation": self.generation if generation is None else generation,
            "wait_s": wait_s,
            "report": told,
        }

    def _report(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "seq": next(_seq),
            "boot_id": self.boot_id,
            "agent_version": "0.1.0",
            "sent_at": time_of(),
            "frozen": False,
            "facts": None,
            "metrics": None,
            "gpu": None,
            "leases": [],
            "applied_generation": self.generation,
            "attempts": [],
            "logs": [],
            "command_results": [],
            "journal": [],
            **parts,
        }

    def say(self, message: Mapping[str, Any], credential: str | None = None) -> TestResponse:
        self.said.append(message)
        headers = {"Authorization": f"Bearer {credential or self.credential}"}
        return self.client.post("/api/v1/agent/sync", json=message, headers=headers)


def enroll(client: FlaskClient, token: str, **fields: Any) -> TestResponse:
    body = {"protocol": 1, "agent_version": "0.1.0", "boot_id": "boot-1", "facts": FACTS, "gpu": NO_GPUS, **fields}
    return client.post("/api/v1/agent/enroll", json=body, headers={"Authorization": f"Bearer {token}"})


def agent_of(app: Flask, machine: Machine) -> FakeAgent:
    """An agent that was let in as agents are, and has called once."""
    token = agents.new_enroll_token(machine, by=SYSTEM)
    client = app.test_client()
    response = enroll(client, token)
    assert response.status_code == 200, response.get_data(as_text=True)
    agent = FakeAgent(client, response.get_json()["credential"])
    agent.hold()
    return agent


def leased_machine(tenant: Tenant, **fields: Any) -> tuple[Machine, Lease]:
    """A machine with an active lease of the tenant, with a login as the real way gives it."""
    machine = make_machine(state="leased", **fields)
    lease = make_lease(machine, tenant, uid=20000)
    lease.login = f"lease{lease.id}"
    lease.save()
    return machine, lease


def make_task(lease: Lease, user: User, **fields: Any) -> tuple[Task, Attempt]:
    """A task as its owner would create it, and its first attempt."""
    given = {"name": "train", "command": "python train.py\n", **fields}
    task = tasks.create(lease.machine_id, by=actor_of(user), **given)
    return task, tasks.newest_attempt(task)


LATER = timedelta(hours=1)
