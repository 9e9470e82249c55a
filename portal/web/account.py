"""One's own account: profile and language, where one is signed in, and API tokens. The password is in auth.py."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from flask import flash, redirect, render_template, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext, lazy_gettext
from flask_jwt_extended import unset_jwt_cookies

from portal.api.guard import actor, current_user, family_id, requires
from portal.db import utcnow
from portal.errors import Error
from portal.models import User
from portal.models.states import USER_ROLES
from portal.services import sessions, users
from portal.services import tokens as api_tokens
from portal.web.acting import acting
from portal.web.blueprint import bp
from portal.web.forms import Form

PROFILE = ("display_name", "full_name", "email", "phone")
SCOPE_WORDS = {
    "inventory": lazy_gettext("read the machines as the inventory plugin does"),
    "alerts": lazy_gettext("deliver alerts as Alertmanager does"),
    "network": lazy_gettext("read the network's export and tell what was applied, as a pipeline does"),
    "prometheus": lazy_gettext("read targets, rules and metrics as Prometheus does"),
    "read": lazy_gettext("read lists and details"),
    "admin": lazy_gettext("change machines, leases and runs"),
}


@bp.get("/account")
@requires(*USER_ROLES)
def account() -> ResponseReturnValue:
    return _account_page(None)


@bp.post("/account")
@requires(*USER_ROLES)
def edit_account() -> ResponseReturnValue:
    form = Form.of_request(keep=(*PROFILE, "locale"))
    try:
        users.edit(current_user(), by=actor(), **{name: form.optional(name) for name in (*PROFILE, "locale")})
    except Error as error:
        return _account_page(form.refused(error)), error.status
    flash(gettext("Your profile is saved."), "success")
    return redirect(url_for("web.account"), 303)


def _account_page(form: Form | None) -> str:
    me: User = current_user()
    return render_template(
        "account/profile.html",
        form=form,
        user=me,
        sign_ins=list(sessions.open_of(me)),
        this=family_id(),
        lives=api_tokens.list_of(me).count(),
    )


@bp.post("/account/sign-ins/<int:sign_in_id>/end")
@requires(*USER_ROLES)
def end_sign_in(sign_in_id: int) -> ResponseReturnValue:
    with acting(gettext("That sign-in has ended.")):
        sessions.sign_out(sessions.get_open_of(current_user(), sign_in_id).id, by=actor())
    return redirect(url_for("web.account"), 303)


@bp.post("/account/sign-out-everywhere")
@requires(*USER_ROLES)
def sign_out_everywhere() -> ResponseReturnValue:
    sessions.sign_out_everywhere(current_user(), by=actor())
    flash(gettext("You are signed out everywhere, here too."), "success")
    answer: Any = redirect(url_for("web.sign_in"), 303)
    unset_jwt_cookies(answer)
    return answer  # type: ignore[no-any-return]  # werkzeug's and Flask's Response are one


@bp.get("/account/tokens")
@requires(*USER_ROLES)
def tokens() -> ResponseReturnValue:
    return _tokens_page(None)


@bp.post("/account/tokens")
@requires(*USER_ROLES)
def create_token() -> ResponseReturnValue:
    form = Form.of_request(keep=("name", "days", *_scopes()))
    try:
        token, secret = api_tokens.create(
            current_user(),
            name=form.text("name"),
            scopes=[scope for scope in _scopes() if form.is_checked(scope)],
            expires_at=utcnow() + timedelta(days=form.number("days", least=1, most=api_tokens.MAX_LIFE.days)),
            by=actor(),
        )
    except Error as error:
        return _tokens_page(form.refused(error)), error.status
    return render_template("account/token.html", token=token, secret=secret)


@bp.post("/account/tokens/<int:token_id>/revoke")
@requires(*USER_ROLES)
def revoke_token(token_id: int) -> ResponseReturnValue:
    token = api_tokens.get_of(current_user(), token_id)
    with acting(gettext("The token %(name)s is revoked: its next use is refused.", name=token.name)):
        api_tokens.revoke(token, by=actor())
    return redirect(url_for("web.tokens"), 303)


def _tokens_page(form: Form | None) -> str:
    words = {scope: SCOPE_WORDS.get(scope, api_tokens.SCOPES[scope]) for scope in _scopes()}
    return render_template(
        "account/tokens.html", tokens=list(api_tokens.list_of(current_user())), scopes=words, form=form, now=utcnow()
    )


def _scopes() -> tuple[str, ...]:
    """What this person's tokens may be made for."""
    return ("read",) if current_user().role == "customer" else tuple(api_tokens.SCOPES)
