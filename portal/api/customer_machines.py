"""A customer's machines: what their tenants have leased now, and how to get in. `customer/machines*`."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import current_user, requires
from portal.api.leases import GrantOut, ReasonPart
from portal.api.machines import GpuOut
from portal.api.paging import PageArgs, page_of, page_schema
from portal.db import utcnow
from portal.models.states import ALERT_SEVERITIES
from portal.services import connections, leases, overviews
from portal.services.connections import Connection
from portal.services.overviews import HeldView

bp = Blueprint("customer_machines", __name__, url_prefix="/api/v1/customer/machines", description="My machines")


class ToldOut(Schema):
    """Something that was wrong with the machine during the lease."""

    name = ma.fields.String(required=True, metadata={"example": "GpuLost"})
    severity = ma.fields.String(required=True, validate=ma.validate.OneOf(ALERT_SEVERITIES))
    since = ma.fields.AwareDateTime(required=True, metadata={"description": "Not before the lease began"})
    until = ma.fields.AwareDateTime(required=True, allow_none=True, metadata={"description": "null: it still is"})


class HeldOut(Schema):
    """A leased machine, without anything that is not its tenant's: no address of ours, no other lease, no remark."""

    id = ma.fields.Integer(attribute="machine.machine.id", required=True)
    name = ma.fields.String(attribute="machine.machine.name", required=True)
    lease_id = ma.fields.Integer(attribute="lease.lease.id", required=True)
    lease_state = ma.fields.String(attribute="lease.lease.state", required=True)
    tenant_id = ma.fields.Integer(attribute="lease.lease.tenant_id", required=True)
    tenant_name = ma.fields.String(attribute="lease.lease.tenant.name", required=True)
    login = ma.fields.String(attribute="lease.lease.login", required=True)
    root = ma.fields.Boolean(attribute="lease.lease.root", required=True)
    starts_at = ma.fields.AwareDateTime(attribute="lease.lease.starts_at", required=True)
    ends_at = ma.fields.AwareDateTime(attribute="lease.lease.ends_at", required=True)
    acknowledged_ends_at = ma.fields.AwareDateTime(attribute="lease.lease.acknowledged_ends_at", allow_none=True)
    is_end_acknowledged = ma.fields.Boolean(attribute="lease.is_end_acknowledged", required=True)
    retain_s = ma.fields.Integer(attribute="lease.lease.retain_s", required=True)
    grants = ma.fields.List(
        ma.fields.Nested(GrantOut(exclude=("detail", "written_off_reason"))), attribute="lease.grants", required=True
    )
    reachability = ma.fields.String(attribute="machine.health.reachability", required=True)
    last_seen_at = ma.fields.AwareDateTime(attribute="machine.health.last_seen_at", allow_none=True)
    problems = ma.fields.List(ma.fields.Nested(ReasonPart), attribute="machine.health.problems", required=True)
    maintenance_since = ma.fields.AwareDateTime(attribute="machine.machine.maintenance_since", allow_none=True)
    maintenance_until = ma.fields.AwareDateTime(attribute="machine.machine.maintenance_until", allow_none=True)
    maintenance_reason = ma.fields.String(attribute="machine.machine.maintenance_reason", allow_none=True)
    gpus = ma.fields.List(ma.fields.Nested(GpuOut), attribute="machine.gpus", required=True)
    metrics = ma.fields.Raw(
        attribute="machine.metrics", allow_none=True, metadata={"description": "Of the host, now; null: it is silent"}
    )
    may_connect = ma.fields.Boolean(required=True)
    alerts = ma.fields.List(ma.fields.Nested(ToldOut), required=True)


class ConnectionOut(Schema):
    login = ma.fields.String(required=True)
    host = ma.fields.String(required=True)
    port = ma.fields.Integer(required=True)
    command = ma.fields.String(required=True)
    ssh_config = ma.fields.String(required=True)
    host_key_type = ma.fields.String(required=True)
    host_key_fingerprint = ma.fields.String(required=True)
    known_hosts_line = ma.fields.String(required=True)


@bp.get("")
@requires("customer")
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(HeldOut))
def list_mine(args: dict[str, Any]) -> dict[str, Any]:
    """The machines that my tenants have leased now"""
    page = page_of(leases.open_of_user(current_user()), args)
    return {**page, "items": overviews.held(page["items"], current_user(), utcnow())}


@bp.get("/<int:machine_id>")
@requires("customer")
@bp.response(200, HeldOut)
def show(machine_id: int) -> HeldView:
    lease = leases.get_open_of_user(current_user(), machine_id)
    return overviews.held([lease], current_user(), utcnow())[0]


@bp.get("/<int:machine_id>/connection")
@requires("customer")
@bp.response(200, ConnectionOut)
def connection(machine_id: int) -> Connection:
    """How to get in with one's own key; for those who may use the tenant's machines"""
    return connections.of(leases.get_open_of_user(current_user(), machine_id), user=current_user())
