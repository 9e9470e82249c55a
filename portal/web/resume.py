"""A request whose sign-in has run out: what was asked for, or typed, goes on after it was renewed.

The refresh token travels to `/api/v1/auth` alone, so a page cannot renew anything by itself: it answers with one whose
script does (static/portal.js), and which then opens the address again or posts the form again. A form is taken up only
if it carries the CSRF token of the very sign-in that ran out: else any other site could have it posted for the person.
"""

from __future__ import annotations

from collections.abc import Iterator

import jwt
from flask import current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_jwt_extended import decode_token
from flask_jwt_extended.exceptions import JWTExtendedException


def after_sign_in() -> ResponseReturnValue:
    """Renew the sign-in and go on, if it can be renewed; else sign in first."""
    is_page = request.method in ("GET", "HEAD")
    back = request.full_path.rstrip("?") if is_page else url_for("web.home")
    if "csrf_refresh_token" in request.cookies:
        if is_page:
            return render_template("auth/resume.html", next=back), 401
        if request.method == "POST" and _is_own_form():
            return render_template("auth/resume.html", again=request.full_path.rstrip("?"), fields=_typed()), 401
    return redirect(url_for("web.sign_in", next=back))


def _is_own_form() -> bool:
    """Whether it was sent from a page of ours, in the sign-in whose access token it came with; its age is no matter."""
    config, sent = current_app.config, request.form.get("csrf_token")
    token = request.cookies.get(config["JWT_ACCESS_COOKIE_NAME"])
    if not sent or not token:
        return False
    try:
        claims = decode_token(token, csrf_value=sent, allow_expired=True)
    except (jwt.PyJWTError, JWTExtendedException):
        return False
    return bool(claims["type"] == "access")


def _typed() -> Iterator[tuple[str, str]]:
    """What comes back to whoever sent it a moment ago, secrets too: the answer is kept nowhere (`no-store`)."""
    return ((name, text) for name, text in request.form.items(multi=True) if name != "csrf_token")
