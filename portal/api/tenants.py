"""Tenants and their members: `admin/tenants*` for the house, `customer/tenants` for who belongs to them."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, current_user, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.models import Membership, Tenant
from portal.models.states import MEMBER_ROLES
from portal.services import tenants, users
from portal.services.actors import STAFF

bp = Blueprint("tenants", __name__, url_prefix="/api/v1/admin/tenants", description="Companies and who belongs to them")
customer_bp = Blueprint(
    "customer_tenants", __name__, url_prefix="/api/v1/customer/tenants", description="The companies I belong to"
)


class TenantIn(Schema):
    name = ma.fields.String(required=True, validate=ma.validate.Length(1, 100))


class TenantFilters(PageArgs):
    keyword = ma.fields.String(validate=ma.validate.Length(1, 100))


class TenantOut(Schema):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)
    created_at = ma.fields.AwareDateTime(required=True)


class MyTenantOut(Schema):
    id = ma.fields.Integer(required=True, attribute="tenant_id")
    name = ma.fields.String(required=True, attribute="tenant.name")
    role = ma.fields.String(required=True, validate=ma.validate.OneOf(MEMBER_ROLES))


class MemberIn(Schema):
    user_id = ma.fields.Integer(required=True)
    role = ma.fields.String(required=True, validate=ma.validate.OneOf(MEMBER_ROLES))


class MemberRoleIn(Schema):
    role = ma.fields.String(required=True, validate=ma.validate.OneOf(MEMBER_ROLES))


class MemberOut(Schema):
    user_id = ma.fields.Integer(required=True)
    username = ma.fields.String(required=True, attribute="user.username")
    display_name = ma.fields.String(allow_none=True, attribute="user.display_name")
    role = ma.fields.String(required=True)
    disabled_at = ma.fields.AwareDateTime(allow_none=True, attribute="user.disabled_at")


@bp.get("")
@requires(*STAFF, scope="read")
@bp.arguments(TenantFilters, location="query")
@bp.response(200, page_schema(TenantOut))
def list_tenants(args: dict[str, Any]) -> dict[str, Any]:
    """Tenants by name"""
    return page_of(tenants.search(args.get("keyword")), args)


@bp.post("")
@requires(*STAFF)
@bp.arguments(TenantIn)
@bp.response(201, TenantOut)
def create_tenant(body: dict[str, Any]) -> Tenant:
    """Create a tenant"""
    return tenants.create(body["name"], by=actor())


@bp.get("/<int:tenant_id>")
@requires(*STAFF, scope="read")
@bp.response(200, TenantOut)
def get_tenant(tenant_id: int) -> Tenant:
    """One tenant"""
    return tenants.get(tenant_id)


@bp.patch("/<int:tenant_id>")
@requires(*STAFF)
@bp.arguments(TenantIn)
@bp.response(200, TenantOut)
def rename_tenant(body: dict[str, Any], tenant_id: int) -> Tenant:
    """Rename a tenant"""
    return tenants.rename(tenants.get(tenant_id), body["name"], by=actor())


@bp.get("/<int:tenant_id>/members")
@requires(*STAFF, scope="read")
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(MemberOut))
def list_members(args: dict[str, Any], tenant_id: int) -> dict[str, Any]:
    """Who belongs to the tenant, by user name"""
    return page_of(tenants.members_of(tenants.get(tenant_id)), args)


@bp.post("/<int:tenant_id>/members")
@requires(*STAFF)
@bp.arguments(MemberIn)
@bp.response(201, MemberOut)
def add_member(body: dict[str, Any], tenant_id: int) -> Membership:
    """Make a customer a member; the keys reach the tenant's machines at once"""
    user = users.get(body["user_id"], roles=users.CUSTOMERS)
    return tenants.add_member(tenants.get(tenant_id), user, body["role"], by=actor())


@bp.patch("/<int:tenant_id>/members/<int:user_id>")
@requires(*STAFF)
@bp.arguments(MemberRoleIn)
@bp.response(200, MemberOut)
def set_member_role(body: dict[str, Any], tenant_id: int, user_id: int) -> Membership:
    """Change what a member may do"""
    return tenants.set_member_role(tenants.get(tenant_id), user_id, body["role"], by=actor())


@bp.delete("/<int:tenant_id>/members/<int:user_id>")
@requires(*STAFF)
@bp.response(204)
def remove_member(tenant_id: int, user_id: int) -> None:
    """Take somebody out; the keys leave the tenant's machines at once"""
    tenants.remove_member(tenants.get(tenant_id), user_id, by=actor())


@customer_bp.get("")
@requires("customer", scope="read")
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(MyTenantOut))
def list_my_tenants(args: dict[str, Any]) -> dict[str, Any]:
    """The tenants I belong to, and as what"""
    return page_of(tenants.memberships_of(current_user()), args)
