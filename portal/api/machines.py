"""Machines for those who run the house: `admin/machines*`."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, requires
from portal.api.leases import LeaseOut, ReasonPart, ReclaimOut
from portal.api.openings import WishIn
from portal.api.paging import PageArgs, page_of, page_schema
from portal.db import utcnow
from portal.integrations import host_keys
from portal.models import Run
from portal.models.states import MACHINE
from portal.services import (
    agents,
    config,
    frozen,
    leases,
    machines,
    network_openings,
    overviews,
    provisioning,
    retirement,
    tenants,
)
from portal.services.actors import STAFF
from portal.services.overviews import LeaseView, MachineView

bp = Blueprint("machines", __name__, url_prefix="/api/v1/admin/machines", description="Machines")


class MachineArgs(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(list(MACHINE)))
    reachability = ma.fields.String(validate=ma.validate.OneOf(["online", "offline", "never"]))
    keyword = ma.fields.String(validate=ma.validate.Length(max=100))


class CredentialIn(Schema):
    """For the first contact alone; forgotten once the portal's own key works, and never told."""

    password = ma.fields.String(load_only=True, validate=ma.validate.Length(1, 1024))
    private_key = ma.fields.String(load_only=True, validate=ma.validate.Length(1, 16384))
    become_password = ma.fields.String(load_only=True, validate=ma.validate.Length(1, 1024))


class DescriptiveIn(Schema):
    """The rest of the rules for each field is in services/machine_fields.py; the answer names every faulty one."""

    region = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=64))
    rack = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=64))
    public_address = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=253))
    labels = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.String())
    remark = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=4000))
    credential = ma.fields.Nested(CredentialIn, load_only=True)


class MachineIn(DescriptiveIn):
    name = ma.fields.String(required=True, validate=ma.validate.Length(1, 63), metadata={"example": "gpu-17"})
    address = ma.fields.String(required=True, validate=ma.validate.Length(1, 253))
    ssh_port = ma.fields.Integer(load_default=22, strict=True)
    ssh_user = ma.fields.String(required=True, validate=ma.validate.Length(1, 32))


class MachineEdit(DescriptiveIn):
    name = ma.fields.String(validate=ma.validate.Length(1, 63))
    address = ma.fields.String(validate=ma.validate.Length(1, 253))
    ssh_port = ma.fields.Integer(strict=True)
    ssh_user = ma.fields.String(validate=ma.validate.Length(1, 32))


class GpuOut(Schema):
    uuid = ma.fields.String(attribute="gpu.uuid")
    slot = ma.fields.Integer(attribute="gpu.slot", allow_none=True)
    name = ma.fields.String(attribute="gpu.name", allow_none=True)
    serial = ma.fields.String(attribute="gpu.serial", allow_none=True)
    memory_bytes = ma.fields.Integer(attribute="gpu.memory_bytes", allow_none=True)
    live = ma.fields.Raw(
        allow_none=True, metadata={"description": "As the host says now; null: it says nothing of it, or is silent"}
    )


class OfferedKey(Schema):
    type = ma.fields.String(required=True)
    fingerprint = ma.fields.String(required=True)


class HolderOut(Schema):
    """The lease that has the machine now."""

    id = ma.fields.Integer(required=True)
    state = ma.fields.String(required=True)
    tenant_id = ma.fields.Integer(required=True)
    tenant_name = ma.fields.String(attribute="tenant.name", required=True)
    ends_at = ma.fields.AwareDateTime(required=True)
    acknowledged_ends_at = ma.fields.AwareDateTime(allow_none=True)


class MachineOut(Schema):
    id = ma.fields.Integer(attribute="machine.id", required=True)
    name = ma.fields.String(attribute="machine.name", required=True)
    address = ma.fields.String(attribute="machine.address", required=True)
    ssh_port = ma.fields.Integer(attribute="machine.ssh_port", required=True)
    ssh_user = ma.fields.String(attribute="machine.ssh_user", required=True)
    state = ma.fields.String(attribute="machine.state", required=True)
    state_reason = ma.fields.String(attribute="machine.state_reason", allow_none=True)
    state_changed_at = ma.fields.AwareDateTime(attribute="machine.state_changed_at")
    region = ma.fields.String(attribute="machine.region", allow_none=True)
    rack = ma.fields.String(attribute="machine.rack", allow_none=True)
    public_address = ma.fields.String(attribute="machine.public_address", allow_none=True)
    labels = ma.fields.Dict(attribute="machine.labels")
    remark = ma.fields.String(attribute="machine.remark", allow_none=True)
    has_first_contact = ma.fields.Boolean(required=True)
    host_key_fingerprint = ma.fields.String(allow_none=True)
    host_keys_offered = ma.fields.List(
        ma.fields.Nested(OfferedKey), attribute="machine.host_keys_offered", allow_none=True
    )
    maintenance_since = ma.fields.AwareDateTime(attribute="machine.maintenance_since", allow_none=True)
    maintenance_until = ma.fields.AwareDateTime(attribute="machine.maintenance_until", allow_none=True)
    maintenance_reason = ma.fields.String(attribute="machine.maintenance_reason", allow_none=True)
    frozen_reason = ma.fields.String(attribute="machine.frozen_reason", allow_none=True)
    frozen_at = ma.fields.AwareDateTime(attribute="machine.frozen_at", allow_none=True)
    needs_reimage = ma.fields.Boolean(attribute="machine.needs_reimage")
    reimaged_at = ma.fields.AwareDateTime(attribute="machine.reimaged_at", allow_none=True)
    created_at = ma.fields.AwareDateTime(attribute="machine.created_at")
    reachability = ma.fields.String(attribute="health.reachability", required=True)
    last_seen_at = ma.fields.AwareDateTime(attribute="health.last_seen_at", allow_none=True)
    is_healthy = ma.fields.Boolean(attribute="health.is_healthy", required=True)
    problems = ma.fields.List(ma.fields.Nested(ReasonPart), attribute="health.problems", required=True)
    agent_version = ma.fields.String(attribute="report.agent_version", allow_none=True)
    facts = ma.fields.Raw(attribute="machine.facts", allow_none=True)
    metrics = ma.fields.Raw(allow_none=True, metadata={"description": "Of the host, now; null: it is silent"})
    gpus = ma.fields.List(ma.fields.Nested(GpuOut), required=True)
    lease = ma.fields.Nested(HolderOut, allow_none=True)
    reclaim = ma.fields.Nested(ReclaimOut, allow_none=True)


@bp.get("")
@requires(*STAFF)
@bp.arguments(MachineArgs, location="query")
@bp.response(200, page_schema(MachineOut))
def list_machines(args: dict[str, Any]) -> dict[str, Any]:
    """All machines, by name"""
    now = utcnow()
    filters = {name: args.get(name) for name in ("state", "reachability", "keyword")}
    page = page_of(overviews.search(now=now, **filters), args)
    return {**page, "items": overviews.of_machines(page["items"], now)}


@bp.post("")
@requires(*STAFF)
@bp.arguments(MachineIn)
@bp.response(201, MachineOut)
def register(body: dict[str, Any]) -> MachineView:
    """Write down a machine; nothing is dialled yet"""
    return _shown(machines.register(by=actor(), **body))


@bp.get("/<int:machine_id>")
@requires(*STAFF)
@bp.response(200, MachineOut)
def show(machine_id: int) -> MachineView:
    return _shown(machines.get(machine_id))


@bp.patch("/<int:machine_id>")
@requires(*STAFF)
@bp.arguments(MachineEdit)
@bp.response(200, MachineOut)
def edit(body: dict[str, Any], machine_id: int) -> MachineView:
    """Change what is written down, or the credential of a first contact that failed"""
    return _shown(machines.edit(machines.get(machine_id), by=actor(), **body))


@bp.delete("/<int:machine_id>")
@requires(*STAFF)
@bp.response(204)
def delete(machine_id: int) -> None:
    """Delete a machine that was never leased and never touched; others are retired"""
    retirement.delete(machines.get(machine_id), by=actor())


class ConfirmIn(Schema):
    fingerprint = ma.fields.String(required=True, validate=ma.validate.Length(1, 80))
    reason = ma.fields.String(validate=ma.validate.Length(max=1000))


@bp.post("/<int:machine_id>/host-key")
@requires(*STAFF)
@bp.response(200, MachineOut)
def scan_host_key(machine_id: int) -> MachineView:
    """Ask the host for its keys, to compare; nothing is trusted yet"""
    machine = machines.get(machine_id)
    seen = host_keys.scan(machine.address, machine.ssh_port)
    return _shown(machines.offer_host_keys(machine, seen, by=actor()))


@bp.post("/<int:machine_id>/host-key/confirm")
@requires(*STAFF)
@bp.arguments(ConfirmIn)
@bp.response(200, MachineOut)
def confirm_host_key(body: dict[str, Any], machine_id: int) -> MachineView:
    """Pin one of the offered keys; replacing a pinned one needs a reason"""
    machine = machines.get(machine_id)
    return _shown(machines.confirm_host_key(machine, body["fingerprint"], by=actor(), reason=body.get("reason")))


class RunRef(Schema):
    id = ma.fields.Integer(required=True)
    state = ma.fields.String(required=True)


@bp.post("/<int:machine_id>/provision")
@requires(*STAFF)
@bp.response(202, RunRef)
def provision(machine_id: int) -> Run:
    """Queue the run that makes it a GPU host; watch it at admin/runs/{id}"""
    return provisioning.provision(machines.get(machine_id), by=actor())


class CredentialSent(Schema):
    credential_id = ma.fields.Integer(
        required=True, metadata={"description": "What `remotegpu-agent heard --credential` on the host waits for"}
    )


@bp.post("/<int:machine_id>/agent-credential")
@requires(*STAFF, scope="admin")
@bp.response(202, CredentialSent)
def rotate_agent_credential(machine_id: int) -> dict[str, int]:
    """Send the agent a new credential; the one that it has ends with the first use of the new one"""
    command = agents.rotate(machines.get(machine_id), by=actor())
    return {"credential_id": command.args["credential_id"]}


class AllocateIn(Schema):
    tenant_id = ma.fields.Integer(required=True, strict=True)
    until = ma.fields.AwareDateTime(required=True)
    starts_at = ma.fields.AwareDateTime(allow_none=True)
    retain_s = ma.fields.Integer(strict=True, metadata={"description": "How long data is kept after the end"})
    root = ma.fields.Boolean(load_default=False)
    remark = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=4000))
    openings = ma.fields.List(ma.fields.Nested(WishIn), load_default=list, validate=ma.validate.Length(max=100))


@bp.post("/<int:machine_id>/allocate")
@requires(*STAFF)
@bp.arguments(AllocateIn)
@bp.response(201, LeaseOut)
def allocate(body: dict[str, Any], machine_id: int) -> LeaseView:
    """Lease the machine to a tenant; 409 lists everything that stands in the way"""
    machine, tenant = machines.get(machine_id), tenants.get(body.pop("tenant_id"))
    body.setdefault("retain_s", config.current().default_retain_s)
    body["openings"] = network_openings.checked(body["openings"])
    lease = leases.allocate(machine, to=tenant, by=actor(), **body)
    return overviews.of_lease(lease, utcnow())


class ReclaimIn(Schema):
    reason = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))
    force = ma.fields.Boolean(load_default=False, metadata={"description": "Wipe at once what would be retained"})
    confirm = ma.fields.String(metadata={"description": "The machine's name; needed with force"})


@bp.post("/<int:machine_id>/reclaim")
@requires(*STAFF)
@bp.arguments(ReclaimIn)
@bp.response(202, MachineOut)
def reclaim(body: dict[str, Any], machine_id: int) -> MachineView:
    """End the lease, skip the retention of one that has ended, or clean a quarantined machine again"""
    machine = machines.get(machine_id)
    leases.reclaim(machine, by=actor(), **body)
    return _shown(machines.get(machine.id))


class MaintenanceIn(Schema):
    reason = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))
    until = ma.fields.AwareDateTime(allow_none=True)


@bp.post("/<int:machine_id>/maintenance")
@requires(*STAFF)
@bp.arguments(MaintenanceIn)
@bp.response(200, MachineOut)
def start_maintenance(body: dict[str, Any], machine_id: int) -> MachineView:
    """A flag, also on a leased machine; its state and its lease stay as they are"""
    return _shown(machines.start_maintenance(machines.get(machine_id), by=actor(), **body))


@bp.delete("/<int:machine_id>/maintenance")
@requires(*STAFF)
@bp.response(200, MachineOut)
def end_maintenance(machine_id: int) -> MachineView:
    return _shown(machines.end_maintenance(machines.get(machine_id), by=actor()))


class ReasonIn(Schema):
    reason = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))


@bp.post("/<int:machine_id>/baseline")
@requires(*STAFF)
@bp.arguments(ReasonIn)
@bp.response(202, MachineOut)
def take_baseline(body: dict[str, Any], machine_id: int) -> MachineView:
    """What the free host is now is its measure from now on: somebody has changed it without the portal"""
    return _shown(provisioning.take_baseline(machines.get(machine_id), by=actor(), **body))


@bp.post("/<int:machine_id>/thaw")
@requires(*STAFF)
@bp.arguments(ReasonIn)
@bp.response(200, MachineOut)
def thaw(body: dict[str, Any], machine_id: int) -> MachineView:
    """The portal's word counts again for a host that froze"""
    return _shown(frozen.thaw(machines.get(machine_id), by=actor(), **body))


class ReimagedIn(ReasonIn):
    credential = ma.fields.Nested(CredentialIn, load_only=True)


@bp.post("/<int:machine_id>/reimaged")
@requires(*STAFF)
@bp.arguments(ReimagedIn)
@bp.response(200, MachineOut)
def reimaged(body: dict[str, Any], machine_id: int) -> MachineView:
    """The quarantined host was installed anew: scan and confirm its new key, then provision it"""
    return _shown(retirement.reimaged(machines.get(machine_id), by=actor(), **body))


@bp.post("/<int:machine_id>/retire")
@requires(*STAFF)
@bp.arguments(ReasonIn)
@bp.response(200, MachineOut)
def retire(body: dict[str, Any], machine_id: int) -> MachineView:
    """Never again; the history stays"""
    return _shown(retirement.retire(machines.get(machine_id), by=actor(), **body))


@bp.delete("/<int:machine_id>/gpus/<string:gpu_uuid>")
@requires(*STAFF)
@bp.arguments(ReasonIn, location="query")
@bp.response(204)
def forget_gpu(args: dict[str, Any], machine_id: int, gpu_uuid: str) -> None:
    """A GPU was taken out and is expected no longer"""
    machines.forget_gpu(machines.get(machine_id), gpu_uuid, by=actor(), reason=args["reason"])


def _shown(machine: Any) -> MachineView:
    return overviews.of_machine(machine, utcnow())
