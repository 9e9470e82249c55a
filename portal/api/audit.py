"""The audit trail: `admin/audit/logs`. Entries are only read here; nothing can change or remove one."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.api.people import split_page
from portal.services import audit
from portal.services.actors import STAFF

bp = Blueprint("audit", __name__, url_prefix="/api/v1/admin/audit", description="Who did what, and when")


class AuditFilters(PageArgs):
    action = ma.fields.String(
        validate=ma.validate.Length(1, 64), metadata={"description": "`key.added`, or `key.` for all of a noun"}
    )
    resource_type = ma.fields.String(validate=ma.validate.Length(1, 32))
    resource_id = ma.fields.Integer()
    tenant_id = ma.fields.Integer()
    actor = ma.fields.String(validate=ma.validate.Length(1, 64), metadata={"description": "A user name, exactly"})
    outcome = ma.fields.String(validate=ma.validate.OneOf(audit.OUTCOMES))
    since = ma.fields.AwareDateTime()
    until = ma.fields.AwareDateTime()


class AuditOut(Schema):
    id = ma.fields.Integer(required=True)
    at = ma.fields.AwareDateTime(required=True)
    actor_kind = ma.fields.String(required=True)
    actor_id = ma.fields.Integer(allow_none=True)
    actor_name = ma.fields.String(required=True)
    actor_role = ma.fields.String(allow_none=True)
    address = ma.fields.String(allow_none=True)
    request = ma.fields.String(allow_none=True)
    action = ma.fields.String(required=True)
    resource_type = ma.fields.String(allow_none=True)
    resource_id = ma.fields.Integer(allow_none=True)
    tenant_id = ma.fields.Integer(allow_none=True)
    detail = ma.fields.Dict(keys=ma.fields.String(), required=True)
    outcome = ma.fields.String(required=True)
    sealed = ma.fields.Function(lambda entry: entry.seal is not None, metadata={"type": "boolean"})


@bp.get("/logs")
@requires(*STAFF, scope="read")
@bp.arguments(AuditFilters, location="query")
@bp.response(200, page_schema(AuditOut))
def list_logs(args: dict[str, Any]) -> dict[str, Any]:
    """The trail, newest first, with filters"""
    page, filters = split_page(args)
    return page_of(audit.search(**filters), page)
