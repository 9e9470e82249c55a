"""Drift: `admin/drift*`, what a provisioning run would change. To look is to run the playbook `drift`."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.models import Drift, Machine
from portal.models.states import DRIFT
from portal.services import drift, machines
from portal.services.actors import STAFF

bp = Blueprint("drift", __name__, url_prefix="/api/v1/admin/drift", description="What differs on the hosts")


class DriftFilters(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(DRIFT))


class DriftOut(Schema):
    machine_id = ma.fields.Integer(required=True)
    machine = ma.fields.String(required=True)
    state = ma.fields.String(
        required=True, metadata={"description": "none, drifted, or unknown: not looked at, or not wholly"}
    )
    looked_at = ma.fields.AwareDateTime(allow_none=True, metadata={"description": "null: nobody has looked yet"})
    reason = ma.fields.String(allow_none=True, metadata={"description": "Why it is unknown, or known in part only"})
    change_count = ma.fields.Integer(allow_none=True)
    run_id = ma.fields.Integer(allow_none=True)


class ChangeOut(Schema):
    role = ma.fields.String(allow_none=True)
    task = ma.fields.String(required=True)
    item = ma.fields.String(allow_none=True)
    path = ma.fields.String(allow_none=True)
    diff = ma.fields.String(
        allow_none=True, metadata={"description": "- is what the host has, + what it should have; never a secret"}
    )


class DriftDetailOut(DriftOut):
    changes = ma.fields.List(ma.fields.Nested(ChangeOut), required=True)


@bp.get("")
@requires(*STAFF, scope="read")
@bp.arguments(DriftFilters, location="query")
@bp.response(200, page_schema(DriftOut))
def list_drift(args: dict[str, Any]) -> dict[str, Any]:
    """Every machine with what the last look found, by name"""
    page = page_of(drift.search(state=args.get("state")), args)
    return {**page, "items": [_shown(machine, machine.drift) for machine in page["items"]]}


@bp.get("/<int:machine_id>")
@requires(*STAFF, scope="read")
@bp.response(200, DriftDetailOut)
def get_drift(machine_id: int) -> dict[str, Any]:
    """What differs on this machine, and when that was seen"""
    machine = machines.get(machine_id)
    return _shown(machine, drift.find(machine))


def _shown(machine: Machine, found: Drift | None) -> dict[str, Any]:
    if found is None or found.looked_at is None:  # an outer join makes a row of nothing
        nothing = dict.fromkeys(("looked_at", "reason", "change_count", "run_id"))
        told: dict[str, Any] = {"state": "unknown", "changes": [], **nothing}
    else:
        told = {**found.__data__, "run_id": found.run_id, "change_count": len(found.changes)}
    return {**told, "machine_id": machine.id, "machine": machine.name}
