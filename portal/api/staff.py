"""Admins and operators: `admin/staff*`, for admins alone."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint
from portal.api.guard import actor, requires
from portal.api.paging import page_of, page_schema
from portal.api.people import OneTimePasswordOut, ProfileIn, UserCreatedOut, UserFilters, UserOut, split_page
from portal.models import User
from portal.services import users
from portal.services.actors import STAFF

bp = Blueprint("staff", __name__, url_prefix="/api/v1/admin/staff", description="Admins and operators")


class StaffIn(ProfileIn):
    username = ma.fields.String(required=True, validate=ma.validate.Length(1, 64))
    role = ma.fields.String(required=True, validate=ma.validate.OneOf(STAFF))


@bp.get("")
@requires("admin")
@bp.arguments(UserFilters, location="query")
@bp.response(200, page_schema(UserOut))
def list_staff(args: dict[str, Any]) -> dict[str, Any]:
    """Admins and operators by user name"""
    page, filters = split_page(args)
    return page_of(users.search(roles=STAFF, **filters), page)


@bp.post("")
@requires("admin")
@bp.arguments(StaffIn)
@bp.response(201, UserCreatedOut)
def create_staff(body: dict[str, Any]) -> dict[str, Any]:
    """Create an admin or operator; the answer holds the one-time password, once"""
    user, password = users.create_staff(body.pop("username"), body.pop("role"), by=actor(), **body)
    return {"user": user, "one_time_password": password}


@bp.post("/<int:user_id>/disable")
@requires("admin")
@bp.response(200, UserOut)
def disable_staff(user_id: int) -> User:
    """Shut somebody of the staff out now; nobody can do it to themselves"""
    return users.disable(users.get(user_id, roles=STAFF), by=actor())


@bp.post("/<int:user_id>/enable")
@requires("admin")
@bp.response(200, UserOut)
def enable_staff(user_id: int) -> User:
    """Let somebody in again"""
    return users.enable(users.get(user_id, roles=STAFF), by=actor())


@bp.post("/<int:user_id>/reset-password")
@requires("admin")
@bp.response(200, OneTimePasswordOut)
def reset_staff_password(user_id: int) -> dict[str, str]:
    """Give a random one-time password; every sign-in ends"""
    return {"one_time_password": users.reset_password(users.get(user_id, roles=STAFF), by=actor())}
