"""Leases and reclaims for those who run the house: `admin/leases*`, `admin/reclaims*`."""

from __future__ import annotations

from typing import Any

import marshmallow as ma
from flask import Response

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.db import utcnow
from portal.models import Reclaim
from portal.models.states import LEASE, RECLAIM
from portal.services import leases, overviews, reclaims, reports
from portal.services.actors import STAFF
from portal.services.overviews import LeaseView

bp = Blueprint("leases", __name__, url_prefix="/api/v1/admin/leases", description="Leases")
reclaims_bp = Blueprint("reclaims", __name__, url_prefix="/api/v1/admin/reclaims", description="Reclaims and reports")


class ReclaimOut(Schema):
    id = ma.fields.Integer(required=True)
    machine_id = ma.fields.Integer(required=True)
    lease_id = ma.fields.Integer(required=True)
    number = ma.fields.Integer(required=True)
    state = ma.fields.String(required=True)
    due_at = ma.fields.AwareDateTime(required=True)
    force = ma.fields.Boolean(required=True)
    reason = ma.fields.String(allow_none=True)
    command_id = ma.fields.Integer(allow_none=True)
    run_id = ma.fields.Integer(allow_none=True)
    started_at = ma.fields.AwareDateTime(allow_none=True)
    ended_at = ma.fields.AwareDateTime(allow_none=True)
    failure = ma.fields.String(allow_none=True)
    created_at = ma.fields.AwareDateTime()


class GrantOut(Schema):
    kind = ma.fields.String(required=True)
    desired = ma.fields.String(required=True)
    desired_at = ma.fields.AwareDateTime()
    observed = ma.fields.String(required=True)
    observed_at = ma.fields.AwareDateTime(allow_none=True)
    waits_since = ma.fields.AwareDateTime(
        allow_none=True, metadata={"description": "Waiting since then for the host, or for a stack to be applied"}
    )
    written_off_at = ma.fields.AwareDateTime(allow_none=True)
    written_off_reason = ma.fields.String(allow_none=True)
    detail = ma.fields.Raw()


class ReasonPart(Schema):
    code = ma.fields.String(required=True)
    message = ma.fields.String(required=True)


class LeaseOut(Schema):
    id = ma.fields.Integer(attribute="lease.id", required=True)
    machine_id = ma.fields.Integer(attribute="lease.machine_id", required=True)
    machine_name = ma.fields.String(attribute="lease.machine.name", required=True)
    tenant_id = ma.fields.Integer(attribute="lease.tenant_id", required=True)
    tenant_name = ma.fields.String(attribute="lease.tenant.name", required=True)
    state = ma.fields.String(attribute="lease.state", required=True)
    login = ma.fields.String(attribute="lease.login", required=True)
    uid = ma.fields.Integer(attribute="lease.uid", required=True)
    starts_at = ma.fields.AwareDateTime(attribute="lease.starts_at", required=True)
    ends_at = ma.fields.AwareDateTime(attribute="lease.ends_at", required=True)
    acknowledged_ends_at = ma.fields.AwareDateTime(
        attribute="lease.acknowledged_ends_at",
        allow_none=True,
        metadata={"description": "The end that the host has armed; differs until it acknowledged an extension"},
    )
    is_end_acknowledged = ma.fields.Boolean(required=True)
    retain_s = ma.fields.Integer(attribute="lease.retain_s", required=True)
    root = ma.fields.Boolean(attribute="lease.root", required=True)
    remark = ma.fields.String(attribute="lease.remark", allow_none=True)
    continues_id = ma.fields.Integer(attribute="lease.continues_id", allow_none=True)
    created_at = ma.fields.AwareDateTime(attribute="lease.created_at")
    activated_at = ma.fields.AwareDateTime(attribute="lease.activated_at", allow_none=True)
    ending_at = ma.fields.AwareDateTime(attribute="lease.ending_at", allow_none=True)
    ended_at = ma.fields.AwareDateTime(attribute="lease.ended_at", allow_none=True)
    end_reason = ma.fields.String(attribute="lease.end_reason", allow_none=True)
    end_forced = ma.fields.Boolean(attribute="lease.end_forced")
    grants = ma.fields.List(ma.fields.Nested(GrantOut), required=True)
    reclaim = ma.fields.Nested(ReclaimOut, allow_none=True)
    waits_for = ma.fields.List(ma.fields.Nested(ReasonPart), required=True)


class LeaseArgs(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(list(LEASE)))
    machine_id = ma.fields.Integer()
    tenant_id = ma.fields.Integer()


@bp.get("")
@requires(*STAFF)
@bp.arguments(LeaseArgs, location="query")
@bp.response(200, page_schema(LeaseOut))
def list_leases(args: dict[str, Any]) -> dict[str, Any]:
    """All leases, newest first"""
    filters = {name: args.get(name) for name in ("state", "machine_id", "tenant_id")}
    page = page_of(overviews.search_leases(**filters), args)
    return {**page, "items": overviews.of_leases(page["items"], utcnow())}


@bp.get("/<int:lease_id>")
@requires(*STAFF)
@bp.response(200, LeaseOut)
def show(lease_id: int) -> LeaseView:
    return _shown(leases.get(lease_id))


class ExtendIn(Schema):
    until = ma.fields.AwareDateTime(required=True)


@bp.post("/<int:lease_id>/extend")
@requires(*STAFF)
@bp.arguments(ExtendIn)
@bp.response(200, LeaseOut)
def extend(body: dict[str, Any], lease_id: int) -> LeaseView:
    """A later end; within the retention of an ended lease, a new one that continues it with its data intact"""
    return _shown(leases.extend(leases.get(lease_id), by=actor(), **body))


class EndIn(Schema):
    reason = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))


@bp.post("/<int:lease_id>/end")
@requires(*STAFF)
@bp.arguments(EndIn)
@bp.response(202, LeaseOut)
def end(body: dict[str, Any], lease_id: int) -> LeaseView:
    """Close it now; its data is retained as agreed"""
    return _shown(leases.end(leases.get(lease_id), by=actor(), **body))


@bp.post("/<int:lease_id>/write-off")
@requires(*STAFF)
@bp.arguments(EndIn)
@bp.response(200, LeaseOut)
def write_off(body: dict[str, Any], lease_id: int) -> LeaseView:
    """The host will not answer any more: end the lease unobserved"""
    return _shown(leases.write_off(leases.get(lease_id), by=actor(), **body))


@bp.post("/<int:lease_id>/grants/<string:kind>/write-off")
@requires(*STAFF)
@bp.arguments(EndIn)
@bp.response(200, LeaseOut)
def write_off_grant(body: dict[str, Any], lease_id: int, kind: str) -> LeaseView:
    """An agent or a stack will not say any more that this is closed: the lease waits for it no longer"""
    return _shown(leases.write_off_grant(leases.get(lease_id), kind, by=actor(), **body))


def _shown(lease: Any) -> LeaseView:
    return overviews.of_lease(lease, utcnow())


class ReclaimArgs(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(list(RECLAIM)))
    machine_id = ma.fields.Integer()


@reclaims_bp.get("")
@requires(*STAFF)
@reclaims_bp.arguments(ReclaimArgs, location="query")
@reclaims_bp.response(200, page_schema(ReclaimOut))
def list_reclaims(args: dict[str, Any]) -> dict[str, Any]:
    """All reclaims, newest first"""
    return page_of(reclaims.search(state=args.get("state"), machine_id=args.get("machine_id")), args)


@reclaims_bp.get("/<int:reclaim_id>")
@requires(*STAFF)
@reclaims_bp.response(200, ReclaimOut)
def show_reclaim(reclaim_id: int) -> Reclaim:
    return reclaims.get(reclaim_id)


@reclaims_bp.get("/<int:reclaim_id>/report")
@requires(*STAFF)
@reclaims_bp.response(200, content_type="application/json")
def report(reclaim_id: int) -> Response:
    """The signed report, as a file for `python -m portal verify-report`"""
    reclaim = reclaims.get(reclaim_id)
    file = Response(reclaims.report_file(reclaim), mimetype="application/json")
    file.headers["Content-Disposition"] = f'attachment; filename="reclaim-{reclaim.id}.json"'
    return file


@reclaims_bp.get("/public-key")
@requires(*STAFF)
@reclaims_bp.response(200, content_type="application/x-pem-file")
def public_key() -> Response:
    """The key with which anybody can check a report"""
    return Response(reports.public_key_pem(), mimetype="application/x-pem-file")
