"""Signing in and out, refreshing, changing the password: `auth/*`.

Tokens go into the body, for programs, or into HttpOnly cookies (`cookies: true`), for pages; never into both, and never
are they read from an address.
"""

from __future__ import annotations

from typing import Any

import marshmallow as ma
from flask import Response, current_app, jsonify, request
from flask_jwt_extended import (
    JWTManager,
    create_access_token,
    create_refresh_token,
    get_jwt,
    set_access_cookies,
    set_refresh_cookies,
    unset_jwt_cookies,
    verify_jwt_in_request,
)

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, current_user, family_id, public, requires
from portal.api.people import ProfileIn, UserOut
from portal.models import User
from portal.models.states import USER_ROLES
from portal.services import sessions, users
from portal.services.sessions import Caller, Session

bp = Blueprint("auth", __name__, url_prefix="/api/v1/auth", description="Signing in and out")
jwt = JWTManager()


@jwt.user_lookup_loader
def _user_of(_header: dict[str, Any], claims: dict[str, Any]) -> User | None:
    return sessions.find_user(claims)


class LoginIn(Schema):
    username = ma.fields.String(required=True, validate=ma.validate.Length(1, 64))
    password = ma.fields.String(required=True, validate=ma.validate.Length(1, 200), load_only=True)
    cookies = ma.fields.Boolean(load_default=False)


class TokensOut(Schema):
    access_token = ma.fields.String(metadata={"description": "Absent where the tokens went into cookies"})
    refresh_token = ma.fields.String()
    expires_in = ma.fields.Integer(required=True, metadata={"description": "Seconds that the access token lives"})
    must_change_password = ma.fields.Boolean(required=True)
    user = ma.fields.Nested(UserOut, required=True)


@bp.post("/login")
@public("it is where one signs in")
@bp.arguments(LoginIn)
@bp.response(200, TokensOut)
def login(body: dict[str, Any]) -> Response:
    """Sign in with user name and password"""
    session = sessions.sign_in(body["username"], body["password"], caller=caller(), life_s=refresh_token_s())
    return tokens_response(session, cookies=body["cookies"])


@bp.post("/refresh")
@public("the refresh token itself is the proof")
@bp.response(200, TokensOut)
def refresh() -> Response:
    """Exchange the refresh token (bearer, or cookie with its CSRF token) for new tokens; each can be used once"""
    verify_jwt_in_request(refresh=True)
    session = sessions.refresh(get_jwt(), caller=caller(), life_s=refresh_token_s())
    return tokens_response(session, cookies="Authorization" not in request.headers)


class LogoutIn(Schema):
    everywhere = ma.fields.Boolean(load_default=False)


@bp.post("/logout")
@requires(*USER_ROLES, before_password_change=True)
@bp.arguments(LogoutIn, required=False)
@bp.response(204)
def logout(body: dict[str, Any]) -> Response:
    """Sign out on this device, or everywhere"""
    if body["everywhere"]:
        sessions.sign_out_everywhere(current_user(), by=actor())
    else:
        sessions.sign_out(family_id() or 0, by=actor())
    answer = Response(status=204)
    unset_jwt_cookies(answer)
    return answer


class PasswordIn(Schema):
    old_password = ma.fields.String(required=True, validate=ma.validate.Length(1, 200), load_only=True)
    new_password = ma.fields.String(required=True, validate=ma.validate.Length(1, 200), load_only=True)


@bp.post("/password")
@requires(*USER_ROLES, before_password_change=True)
@bp.arguments(PasswordIn)
@bp.response(200, TokensOut)
def change_password(body: dict[str, Any]) -> Response:
    """Change the password; every other sign-in ends, and this one goes on with the new tokens"""
    user = users.change_password(current_user(), old=body["old_password"], new=body["new_password"], by=actor())
    session = sessions.start(user, caller=caller(), life_s=refresh_token_s())
    return tokens_response(session, cookies="Authorization" not in request.headers)


@bp.get("/me")
@requires(*USER_ROLES)
@bp.response(200, UserOut)
def me() -> User:
    """Who I am"""
    return current_user()


@bp.patch("/me")
@requires(*USER_ROLES)
@bp.arguments(ProfileIn)
@bp.response(200, UserOut)
def edit_me(body: dict[str, Any]) -> User:
    """Change my profile; what is absent stays, null clears"""
    return users.edit(current_user(), by=actor(), **body)


def caller() -> Caller:
    """Where this request comes from."""
    return Caller(
        request.remote_addr or "unknown", request.headers.get("User-Agent"), f"{request.method} {request.path}"
    )


def refresh_token_s() -> int:
    return int(current_app.config["SETTINGS"].refresh_token_s)


def tokens_response(session: Session, *, cookies: bool) -> Response:
    """The answer that hands out the tokens of `session`; the pages' sign-in uses it too."""
    access, following = tokens_of(session)
    body = {
        "expires_in": current_app.config["SETTINGS"].access_token_s,
        "must_change_password": session.user.must_change_password,
        "user": UserOut().dump(session.user),
    }
    if not cookies:
        return jsonify({"access_token": access, "refresh_token": following, **body})
    answer = jsonify(body)
    set_access_cookies(answer, access)
    set_refresh_cookies(answer, following)
    return answer


def tokens_of(session: Session) -> tuple[str, str]:
    """The signed access and refresh token."""
    identity = str(session.user.id)
    claims = {"generation": session.user.generation, "family": session.family.id}
    access = create_access_token(identity, additional_claims=claims)
    following = create_refresh_token(identity, additional_claims={**claims, "jti": session.jti})
    return access, following
