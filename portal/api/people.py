"""What the routes about people share: the shape of a user, of a profile, and of a one-time password."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Schema
from portal.api.paging import PageArgs
from portal.services import users


def one_line(longest: int) -> list[Any]:
    """Validators for a text of a person: one line of printable characters, not empty (null clears a field)."""
    return [ma.validate.Length(1, longest), _printable]


def _printable(text: str) -> None:
    if not text.isprintable() or not text.strip():
        raise ma.ValidationError("Use one line of printable characters.")


class ProfileIn(Schema):
    """Fields that are absent stay as they are; null clears one."""

    email = ma.fields.Email(allow_none=True, validate=ma.validate.Length(max=254))
    display_name = ma.fields.String(allow_none=True, validate=one_line(100))
    full_name = ma.fields.String(allow_none=True, validate=one_line(100))
    phone = ma.fields.String(allow_none=True, validate=one_line(40))
    locale = ma.fields.String(allow_none=True, validate=ma.validate.OneOf(users.LOCALES))


class UserFilters(PageArgs):
    keyword = ma.fields.String(validate=ma.validate.Length(1, 100))
    disabled = ma.fields.Boolean()


class UserOut(Schema):
    id = ma.fields.Integer(required=True)
    username = ma.fields.String(required=True)
    role = ma.fields.String(required=True)
    email = ma.fields.String(allow_none=True)
    display_name = ma.fields.String(allow_none=True)
    full_name = ma.fields.String(allow_none=True)
    phone = ma.fields.String(allow_none=True)
    locale = ma.fields.String(allow_none=True)
    must_change_password = ma.fields.Boolean(required=True)
    disabled_at = ma.fields.AwareDateTime(allow_none=True)
    created_at = ma.fields.AwareDateTime(required=True)
    last_sign_in_at = ma.fields.AwareDateTime(allow_none=True)


class UserCreatedOut(Schema):
    user = ma.fields.Nested(UserOut, required=True)
    one_time_password = ma.fields.String(required=True, metadata={"description": "Shown once"})


class OneTimePasswordOut(Schema):
    one_time_password = ma.fields.String(required=True)


def split_page(args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a list as (page, filters)."""
    page = {name: args[name] for name in ("page", "page_size")}
    return page, {name: value for name, value in args.items() if name not in page}
