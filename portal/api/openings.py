"""Openings: holes in a machine's firewall and the group before it: `admin/openings*`, `customer/machines/*/openings`.

A customer asks for those of the own lease, within `admin/network/limits`.
"""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, current_user, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.models import Opening
from portal.models.states import HOLE_PROTOCOLS
from portal.services import leases, machines, network_forwards, network_openings, network_requests
from portal.services.actors import STAFF
from portal.services.network_openings import Limits

bp = Blueprint("openings", __name__, url_prefix="/api/v1/admin/openings", description="Openings of machines and leases")
limits_bp = Blueprint("network_limits", __name__, url_prefix="/api/v1/admin/network/limits", description="Limits")
customer_bp = Blueprint(
    "customer_openings", __name__, url_prefix="/api/v1/customer/machines/<int:machine_id>/openings",
    description="Openings of my lease",
)  # fmt: skip

forwards_bp = Blueprint(
    "customer_forwards", __name__, url_prefix="/api/v1/customer/machines/<int:machine_id>/forwards",
    description="Ports that lead to my machine",
)  # fmt: skip


class WishIn(Schema):
    """What shall be let in. The rules are in services/network_openings.py; the answer names every faulty field."""

    protocol = ma.fields.String(required=True, validate=ma.validate.OneOf(HOLE_PROTOCOLS))
    first_port = ma.fields.Integer(required=True, strict=True, metadata={"example": 8888})
    last_port = ma.fields.Integer(strict=True, allow_none=True, load_default=None)
    source = ma.fields.String(
        required=True,
        validate=ma.validate.Length(1, 64),
        metadata={"example": "203.0.113.0/24", "description": "A network without host bits"},
    )
    reason = ma.fields.String(
        allow_none=True,
        load_default=None,
        validate=ma.validate.Length(max=500),
        metadata={"description": "Needed where it opens to the world"},
    )
    ends_at = ma.fields.AwareDateTime(allow_none=True, load_default=None)


class OpenIn(WishIn):
    machine_id = ma.fields.Integer(strict=True, allow_none=True, load_default=None)
    lease_id = ma.fields.Integer(strict=True, allow_none=True, load_default=None)


class OpeningOut(Schema):
    id = ma.fields.Integer(required=True)
    key = ma.fields.String(required=True)
    machine_id = ma.fields.Integer(required=True)
    lease_id = ma.fields.Integer(allow_none=True)
    protocol = ma.fields.String(required=True)
    first_port = ma.fields.Integer(required=True)
    last_port = ma.fields.Integer(required=True)
    source = ma.fields.String(required=True)
    reason = ma.fields.String(allow_none=True)
    ends_at = ma.fields.AwareDateTime(allow_none=True, metadata={"description": "null: with its lease, or by hand"})
    created_at = ma.fields.AwareDateTime(required=True)
    closed_at = ma.fields.AwareDateTime(allow_none=True, metadata={"description": "Wanted no longer since then"})
    observed = ma.fields.String(required=True, metadata={"description": "As last seen on the host"})
    observed_at = ma.fields.AwareDateTime(allow_none=True)
    error = ma.fields.String(allow_none=True)


class AskedOpeningOut(OpeningOut):
    requested_by = ma.fields.Pluck(
        Schema.from_dict({"username": ma.fields.String()}, name="AskerOut"), "username", allow_none=True
    )


class OpeningArgs(PageArgs):
    machine_id = ma.fields.Integer()
    lease_id = ma.fields.Integer()
    is_open = ma.fields.Boolean(metadata={"description": "Wanted now, or not any more"})


@bp.get("")
@requires(*STAFF)
@bp.arguments(OpeningArgs, location="query")
@bp.response(200, page_schema(AskedOpeningOut))
def list_openings(args: dict[str, Any]) -> dict[str, Any]:
    """Openings, newest first"""
    filters = {name: args.get(name) for name in ("machine_id", "lease_id", "is_open")}
    return page_of(network_openings.search(**filters), args)


@bp.post("")
@requires(*STAFF)
@bp.arguments(OpenIn)
@bp.response(201, OpeningOut)
def open_port(body: dict[str, Any]) -> Opening:
    """Open it for a lease, or for a machine whoever has leased it; what is open already is answered"""
    machine_id, lease_id = body.pop("machine_id"), body.pop("lease_id")
    return network_requests.open_for(
        machine=None if machine_id is None else machines.get(machine_id),
        lease=None if lease_id is None else leases.get(lease_id),
        wished=network_openings.wish(**body),
        by=actor(),
    )


@bp.get("/<int:opening_id>")
@requires(*STAFF)
@bp.response(200, OpeningOut)
def get_opening(opening_id: int) -> Opening:
    return network_openings.get(opening_id)


@bp.delete("/<int:opening_id>")
@requires(*STAFF)
@bp.response(200, OpeningOut)
def close_port(opening_id: int) -> Opening:
    """Close it; the answer shows what the host was last seen to do"""
    return network_requests.close_port(network_openings.get(opening_id), by=actor())


class LimitsIn(Schema):
    openings_a_lease = ma.fields.Integer(strict=True)
    ports_an_opening = ma.fields.Integer(strict=True)
    first_port = ma.fields.Integer(strict=True)
    last_port = ma.fields.Integer(strict=True)
    may_open_to_world = ma.fields.Boolean()
    rules_a_group = ma.fields.Integer(strict=True, metadata={"description": "AWS's quota for a security group"})
    alicloud_rules_a_group = ma.fields.Integer(strict=True, metadata={"description": "The same of Alibaba Cloud"})
    tencent_rules_a_group = ma.fields.Integer(strict=True, metadata={"description": "The same of Tencent Cloud"})


@limits_bp.get("")
@requires(*STAFF)
@limits_bp.response(200, LimitsIn)
def get_limits() -> Limits:
    """What customers may open without asking anybody"""
    return network_openings.limits()


@limits_bp.patch("")
@requires(*STAFF)
@limits_bp.arguments(LimitsIn)
@limits_bp.response(200, LimitsIn)
def set_limits(body: dict[str, Any]) -> Limits:
    return network_openings.set_limits(by=actor(), **body)


@customer_bp.get("")
@requires("customer")
@customer_bp.arguments(PageArgs, location="query")
@customer_bp.response(200, page_schema(OpeningOut))
def list_mine(args: dict[str, Any], machine_id: int) -> dict[str, Any]:
    """The openings of my lease, newest first"""
    lease = leases.get_open_of_user(current_user(), machine_id)
    return page_of(network_openings.search(lease_id=lease.id), args)


@customer_bp.post("")
@requires("customer")
@customer_bp.arguments(WishIn)
@customer_bp.response(201, OpeningOut)
def open_mine(body: dict[str, Any], machine_id: int) -> Opening:
    """Open a port of my machine until the lease's end, or earlier; within what the operator lets customers open"""
    lease = leases.get_open_of_user(current_user(), machine_id)
    wished = network_openings.wish(**body)
    return network_requests.open_port_as_customer(current_user(), lease, wished, by=actor())


class WayInOut(Schema):
    """A port of the gateway that leads to my machine. Its address is the gateway's public one."""

    protocol = ma.fields.String(required=True)
    public_address = ma.fields.String(attribute="gateway.public_address", required=True)
    public_port = ma.fields.Integer(required=True)
    port = ma.fields.Integer(attribute="target_port", required=True, metadata={"description": "On my machine"})
    source = ma.fields.String(required=True)
    closed_at = ma.fields.AwareDateTime(allow_none=True, metadata={"description": "Wanted no longer since then"})
    observed = ma.fields.String(required=True, metadata={"description": "As last seen on the gateway"})
    observed_at = ma.fields.AwareDateTime(allow_none=True)


@forwards_bp.get("")
@requires("customer")
@forwards_bp.arguments(PageArgs, location="query")
@forwards_bp.response(200, page_schema(WayInOut))
def list_ways_in(args: dict[str, Any], machine_id: int) -> dict[str, Any]:
    """How my machine and what I opened on it are reached from outside, where it stands behind a gateway"""
    return page_of(network_forwards.search_of(leases.get_open_of_user(current_user(), machine_id)), args)


@customer_bp.delete("/<int:opening_id>")
@requires("customer")
@customer_bp.response(200, OpeningOut)
def close_mine(machine_id: int, opening_id: int) -> Opening:
    lease = leases.get_open_of_user(current_user(), machine_id)
    return network_requests.close_port_as_customer(current_user(), lease, opening_id, by=actor())
