"""My API tokens, for CI and the inventory plugin: `auth/tokens`. A token cannot make tokens."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, current_user, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.api.people import one_line
from portal.models.states import USER_ROLES
from portal.services import tokens

bp = Blueprint("api_tokens", __name__, url_prefix="/api/v1/auth/tokens", description="API tokens for programs")


class TokenIn(Schema):
    name = ma.fields.String(required=True, validate=one_line(64))
    scopes = ma.fields.List(
        ma.fields.String(validate=ma.validate.OneOf(list(tokens.SCOPES))),
        required=True,
        validate=ma.validate.Length(1, len(tokens.SCOPES)),
    )
    expires_at = ma.fields.AwareDateTime(required=True)


class TokenOut(Schema):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)
    scopes = ma.fields.List(ma.fields.String(), required=True)
    created_at = ma.fields.AwareDateTime(required=True)
    expires_at = ma.fields.AwareDateTime(required=True)
    last_used_at = ma.fields.AwareDateTime(allow_none=True)


class TokenCreatedOut(TokenOut):
    token = ma.fields.String(required=True, metadata={"description": "Shown once; send it as Authorization: Bearer"})


@bp.get("")
@requires(*USER_ROLES)
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(TokenOut))
def list_tokens(args: dict[str, Any]) -> dict[str, Any]:
    """My tokens, newest first"""
    return page_of(tokens.list_of(current_user()), args)


@bp.post("")
@requires(*USER_ROLES)
@bp.arguments(TokenIn)
@bp.response(201, TokenCreatedOut)
def create_token(body: dict[str, Any]) -> dict[str, Any]:
    """Make a token; the answer holds it, once"""
    token, secret = tokens.create(current_user(), by=actor(), **body)
    return {**TokenOut().dump(token), "expires_at": token.expires_at, "created_at": token.created_at, "token": secret}


@bp.delete("/<int:token_id>")
@requires(*USER_ROLES)
@bp.response(204)
def revoke_token(token_id: int) -> None:
    """Revoke a token: its next use is refused"""
    tokens.revoke(tokens.get_of(current_user(), token_id), by=actor())
