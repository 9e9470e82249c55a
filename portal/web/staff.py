"""Admins and operators, for admins alone: made with a one-time password, shut out, and let in again."""

from __future__ import annotations

from flask import redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.errors import Error
from portal.services import users
from portal.services.actors import STAFF
from portal.web.acting import acting, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form

FIELDS = ("username", "role", "display_name", "email")


@bp.get("/staff")
@requires("admin")
def staff() -> ResponseReturnValue:
    return _page(None)


@bp.post("/staff")
@requires("admin")
def create_staff() -> ResponseReturnValue:
    form = Form.of_request(keep=FIELDS)
    profile = {name: form.optional(name) for name in ("display_name", "email")}
    try:
        user, password = users.create_staff(form.text("username"), form.text("role"), by=actor(), **profile)
    except Error as error:
        return _page(form.refused(error)), error.status
    return render_template("people/password.html", user=user, password=password, back=url_for("web.staff"))


@bp.post("/staff/<int:user_id>/<any(disable, enable):act>")
@requires("admin")
def switch_staff(user_id: int, act: str) -> ResponseReturnValue:
    user = users.get(user_id, roles=STAFF)
    if act == "disable":
        with acting(gettext("%(name)s is disabled: sign-ins and tokens.", name=user.username)):
            users.disable(user, by=actor())
    else:
        with acting(gettext("%(name)s may sign in again.", name=user.username)):
            users.enable(user, by=actor())
    return redirect(url_for("web.staff"), 303)


@bp.post("/staff/<int:user_id>/reset-password")
@requires("admin")
def reset_staff_password(user_id: int) -> ResponseReturnValue:
    user = users.get(user_id, roles=STAFF)
    password = users.reset_password(user, by=actor())
    return render_template("people/password.html", user=user, password=password, back=url_for("web.staff"))


def _page(form: Form | None) -> str:
    keyword = request.args.get("keyword") or None
    page = page_asked(users.search(roles=STAFF, keyword=keyword), "keyword")
    return render_template("staff/list.html", page=page, roles=STAFF, form=form)
