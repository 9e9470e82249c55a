"""Customers: `admin/customers*`. Whatever is posted here, what comes out is a customer; staff has a door of its own."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, requires
from portal.api.paging import page_of, page_schema
from portal.api.people import OneTimePasswordOut, ProfileIn, UserCreatedOut, UserFilters, UserOut, split_page
from portal.models import User
from portal.models.states import MEMBER_ROLES
from portal.services import tenants, users
from portal.services.actors import STAFF

bp = Blueprint("customers", __name__, url_prefix="/api/v1/admin/customers", description="The people of the tenants")


class CustomerIn(ProfileIn):
    username = ma.fields.String(required=True, validate=ma.validate.Length(1, 64))
    tenant_id = ma.fields.Integer(load_default=None, allow_none=True)
    member_role = ma.fields.String(load_default="member", validate=ma.validate.OneOf(MEMBER_ROLES))


class CustomerFilters(UserFilters):
    tenant_id = ma.fields.Integer()


class BelongsOut(Schema):
    tenant_id = ma.fields.Integer(required=True)
    tenant = ma.fields.String(required=True, attribute="tenant.name")
    role = ma.fields.String(required=True)


class CustomerOut(UserOut):
    memberships = ma.fields.List(ma.fields.Nested(BelongsOut), required=True)


@bp.get("")
@requires(*STAFF, scope="read")
@bp.arguments(CustomerFilters, location="query")
@bp.response(200, page_schema(UserOut))
def list_customers(args: dict[str, Any]) -> dict[str, Any]:
    """Customers by user name, with filters"""
    page, filters = split_page(args)
    return page_of(users.search(roles=users.CUSTOMERS, **filters), page)


@bp.post("")
@requires(*STAFF)
@bp.arguments(CustomerIn)
@bp.response(201, UserCreatedOut)
def create_customer(body: dict[str, Any]) -> dict[str, Any]:
    """Create a customer; the answer holds the one-time password, once"""
    tenant_id = body.pop("tenant_id")
    tenant = None if tenant_id is None else tenants.get(tenant_id)
    user, password = users.create_customer(body.pop("username"), by=actor(), tenant=tenant, **body)
    return {"user": user, "one_time_password": password}


@bp.get("/<int:user_id>")
@requires(*STAFF, scope="read")
@bp.response(200, CustomerOut)
def get_customer(user_id: int) -> User:
    """One customer, with the tenants"""
    return users.get(user_id, roles=users.CUSTOMERS)


@bp.patch("/<int:user_id>")
@requires(*STAFF)
@bp.arguments(ProfileIn)
@bp.response(200, UserOut)
def edit_customer(body: dict[str, Any], user_id: int) -> User:
    """Change the profile; what is absent stays, null clears"""
    return users.edit(users.get(user_id, roles=users.CUSTOMERS), by=actor(), **body)


@bp.post("/<int:user_id>/disable")
@requires(*STAFF)
@bp.response(200, UserOut)
def disable_customer(user_id: int) -> User:
    """Shut a customer out now: sign-ins, tokens and keys on the hosts"""
    return users.disable(users.get(user_id, roles=users.CUSTOMERS), by=actor())


@bp.post("/<int:user_id>/enable")
@requires(*STAFF)
@bp.response(200, UserOut)
def enable_customer(user_id: int) -> User:
    """Let a customer in again"""
    return users.enable(users.get(user_id, roles=users.CUSTOMERS), by=actor())


@bp.post("/<int:user_id>/reset-password")
@requires(*STAFF)
@bp.response(200, OneTimePasswordOut)
def reset_customer_password(user_id: int) -> dict[str, str]:
    """Give a random one-time password; every sign-in ends"""
    return {"one_time_password": users.reset_password(users.get(user_id, roles=users.CUSTOMERS), by=actor())}
