"""Signing in and out, the first change of a given password, and the language."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from flask import Response, g, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_jwt_extended import set_access_cookies, set_refresh_cookies, unset_jwt_cookies

from portal.api.auth import caller, refresh_token_s, tokens_of
from portal.api.guard import actor, current_user, family_id, public, requires, signed_in
from portal.errors import Error, Invalid
from portal.models.states import USER_ROLES
from portal.services import sessions, users
from portal.services.sessions import Session
from portal.web.blueprint import bp
from portal.web.forms import Form
from portal.web.frame import home_of

LOCALE_COOKIE_S = 365 * 24 * 3600


@bp.get("/")
@requires(*USER_ROLES)
def home() -> ResponseReturnValue:
    return redirect(home_of(current_user()))


@bp.get("/sign-in")
@public("it is where one signs in")
def sign_in() -> ResponseReturnValue:
    return render_template("auth/sign_in.html", next=_inside(request.args.get("next")), form=None)


@bp.post("/sign-in")
@public("it is where one signs in")
def sign_in_with() -> ResponseReturnValue:
    form = Form.of_request(keep=("username", "next"))
    back = _inside(form.text("next"))
    try:
        session = sessions.sign_in(
            form.text("username"), form.raw("password"), caller=caller(), life_s=refresh_token_s()
        )
    except Error as error:
        page = render_template("auth/sign_in.html", next=back, form=form.refused(error))
        return page, error.status
    g.user = session.user
    return _signed_in(session, back or home_of(session.user))


@bp.post("/sign-out")
@requires(*USER_ROLES, before_password_change=True)
def sign_out() -> ResponseReturnValue:
    sessions.sign_out(family_id() or 0, by=actor())
    answer: Any = redirect(url_for("web.sign_in"))
    unset_jwt_cookies(answer)
    return answer  # type: ignore[no-any-return]  # werkzeug's and Flask's Response are one


@bp.get("/password")
@requires(*USER_ROLES, before_password_change=True)
def password() -> ResponseReturnValue:
    return render_template("auth/password.html", form=None)


@bp.post("/password")
@requires(*USER_ROLES, before_password_change=True)
def change_password() -> ResponseReturnValue:
    form = Form.of_request(keep=())
    try:
        user = users.change_password(
            current_user(), old=form.raw("old_password"), new=form.raw("new_password"), by=actor()
        )
    except Invalid as error:
        return render_template("auth/password.html", form=form.refused(error)), error.status
    session = sessions.start(user, caller=caller(), life_s=refresh_token_s())
    return _signed_in(session, home_of(user))


@bp.post("/locale")
@public("a language is no secret")
def set_locale() -> ResponseReturnValue:
    answer = redirect(_inside(request.form.get("next")) or url_for("web.home"))
    wanted = "zh_CN" if request.form.get("locale") == "zh_CN" else "en"
    if (user := signed_in()) is not None:  # what is written in the profile would win over the cookie
        users.edit(user, locale=wanted, by=actor())
    answer.set_cookie(
        "locale", wanted, max_age=LOCALE_COOKIE_S, samesite="Lax", secure=request.is_secure, httponly=True
    )
    return answer


def _signed_in(session: Session, where: str) -> Response:
    access, following = tokens_of(session)
    answer: Any = redirect(where, 303)
    set_access_cookies(answer, access)
    set_refresh_cookies(answer, following)
    return answer  # type: ignore[no-any-return]  # werkzeug's and Flask's Response are one


def _inside(address: str | None) -> str:
    """Where to go on, if it is a page of ours; an address that leads elsewhere is dropped."""
    parts = urlsplit(address or "")
    is_ours = not parts.scheme and not parts.netloc and parts.path.startswith("/") and "\\" not in parts.path
    return address if address and is_ours and not address.startswith("//") else ""
