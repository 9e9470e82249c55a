"""Who may. Every route carries exactly one of these, and a test walks them all:

    @requires(*STAFF)                         people with one of the roles (read from the database, not from the token)
    @requires("admin", scope="inventory")     and API tokens of such people that carry the scope
    @public("why")                            anybody
    @says_who("agent")                        a decorator that checks by itself marks its routes with this

A guard stands right below the route, above `@bp.arguments`: a stranger is turned away before the body is read.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, TypeVar

from flask import g, request
from flask_jwt_extended import current_user as jwt_user
from flask_jwt_extended import get_jwt, verify_jwt_in_request
from flask_jwt_extended.exceptions import JWTExtendedException
from jwt import PyJWTError

from portal.errors import Forbidden
from portal.models import User
from portal.models.states import USER_ROLES
from portal.services import actors, tokens
from portal.services.actors import Actor

View = TypeVar("View", bound=Callable[..., Any])


def requires(*roles: str, scope: str | None = None, before_password_change: bool = False) -> Callable[[View], View]:
    """Let in who is signed in with one of `roles`, by cookie (with CSRF token) or bearer token.

    With `scope`, an API token that carries it is let in too, as its owner. `before_password_change` opens the route to
    somebody who must change the password first: the change itself, and signing out.
    """
    unknown = set(roles) - set(USER_ROLES)
    if unknown or not roles:
        raise ValueError(f"requires: name roles out of {USER_ROLES}, not {sorted(unknown) or 'none'}")
    if scope is not None and scope not in tokens.SCOPES:
        raise ValueError(f"requires: no such scope: {scope}")

    def guard(view: View) -> View:
        @wraps(view)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            user = _identify(scope)
            if user.must_change_password and not before_password_change:
                raise Forbidden(
                    "Change your password first: POST /api/v1/auth/password.", code="password_change_required"
                )
            if user.role not in roles:
                raise Forbidden(f"This is for {' and '.join(roles)}; you are {user.role}.")
            return view(*args, **kwargs)

        return _document(says_who(*roles)(guarded), scope)  # type: ignore[return-value]  # wraps keeps the view's shape

    return guard


def public(why: str) -> Callable[[View], View]:
    """Open to everybody; `why` says why that is right."""

    def guard(view: View) -> View:
        view.open_because = why  # type: ignore[attr-defined]  # read by the test that walks the routes
        return says_who("anyone")(view)

    return guard


def says_who(*who: str) -> Callable[[View], View]:
    """Note on a view who may call it."""

    def note(view: View) -> View:
        view.who_may = who  # type: ignore[attr-defined]  # read by the test that walks the routes
        return view

    return note


def current_user() -> User:
    """Who is signed in. Only below `requires`."""
    user: User = g.user
    return user


def actor() -> Actor:
    """Who does this, for the audit trail. Only below `requires`."""
    return actors.of_user(
        current_user(), address=request.remote_addr, request=f"{request.method} {request.path}", kind=g.user_kind
    )


def signed_in() -> User | None:
    """Who is signed in, if anybody is, where anybody may come: nobody by a form without its CSRF token."""
    try:
        if verify_jwt_in_request(optional=True) is None:
            return None
    except (JWTExtendedException, PyJWTError):
        return None
    g.user, g.user_kind, g.family_id = jwt_user._get_current_object(), "user", get_jwt()["family"]
    return current_user()


def family_id() -> int | None:
    """The sign-in that this request came with; None for an API token."""
    found: int | None = g.get("family_id")
    return found


def _identify(scope: str | None) -> User:
    if secret := _api_token():
        user = tokens.user_of(secret, scope=scope)
        g.user, g.user_kind = user, "token"
        return user
    verify_jwt_in_request()
    g.user, g.user_kind, g.family_id = jwt_user._get_current_object(), "user", get_jwt()["family"]
    return current_user()


def _api_token() -> str | None:
    """The API token that came along: as bearer, or as the password of basic, which some programs know alone.

    Basic only reads: a browser that was given one sends it by itself, with a form of somebody else's page as well.
    """
    given = request.authorization
    if given is None:
        return None
    is_basic = given.type == "basic" and request.method == "GET"
    secret = given.token if given.type == "bearer" else given.password if is_basic else None
    return secret if secret and secret.startswith(tokens.PREFIX) else None


def _document(view: Callable[..., Any], scope: str | None) -> Callable[..., Any]:
    """Say in OpenAPI how to sign in for it."""
    doc = deepcopy(getattr(view, "_apidoc", {}))
    security: list[dict[str, list[str]]] = [{"bearer": []}, {"cookie": []}]
    if scope is not None:
        security.append({"api_token": [scope]})
    doc.setdefault("manual_doc", {})["security"] = security
    view._apidoc = doc  # type: ignore[attr-defined]  # where flask-smorest looks
    return view
