"""`admin/inventory`: the machines as inventory/plugins/portal.py reads them. No secret is in it."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import requires
from portal.services import inventory
from portal.services.actors import STAFF

bp = Blueprint("inventory", __name__, url_prefix="/api/v1/admin/inventory", description="The machines, for Ansible")


class InventoryHostOut(Schema):
    name = ma.fields.String(required=True)
    address = ma.fields.String(required=True)
    port = ma.fields.Integer(required=True)
    user = ma.fields.String(required=True)
    host_keys = ma.fields.List(ma.fields.String(), required=True, metadata={"description": "The pinned ones"})
    groups = ma.fields.List(ma.fields.String(), required=True)
    vars = ma.fields.Dict(keys=ma.fields.String(), required=True)


class LeftOutOut(Schema):
    name = ma.fields.String(required=True)
    reason = ma.fields.String(required=True)


class InventoryOut(Schema):
    schema = ma.fields.Integer(required=True)
    generated_at = ma.fields.String(required=True)
    hosts = ma.fields.List(ma.fields.Nested(InventoryHostOut), required=True)
    left_out = ma.fields.List(ma.fields.Nested(LeftOutOut), required=True)


@bp.get("")
@requires(*STAFF, scope="inventory")
@bp.response(200, InventoryOut)
def get_inventory() -> dict[str, Any]:
    """All machines that are not retired; those without a confirmed host key are left out, and named"""
    return inventory.of_all()
