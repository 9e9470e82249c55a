"""Customers, for staff: the people of the tenants, their first passwords, and who is shut out."""

from __future__ import annotations

from flask import flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.errors import Error
from portal.models.states import MEMBER_ROLES
from portal.services import keys, tenants, users
from portal.services.actors import STAFF
from portal.web.acting import acting, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form

PROFILE = ("display_name", "full_name", "email", "phone")
FIELDS = ("username", "tenant_id", "member_role", "display_name", "email")


@bp.get("/customers")
@requires(*STAFF)
def customers() -> ResponseReturnValue:
    return _list_page(None)


@bp.post("/customers")
@requires(*STAFF)
def create_customer() -> ResponseReturnValue:
    form = Form.of_request(keep=FIELDS)
    profile = {name: form.optional(name) for name in ("display_name", "email")}
    try:
        tenant = tenants.get(form.number("tenant_id"))
        user, password = users.create_customer(
            form.text("username"), by=actor(), tenant=tenant, member_role=form.text("member_role"), **profile
        )
    except Error as error:
        return _list_page(form.refused(error)), error.status
    return render_template("people/password.html", user=user, password=password, back=_address_of(user.id))


def _list_page(form: Form | None) -> str:
    page = page_asked(users.search(roles=users.CUSTOMERS, keyword=request.args.get("keyword") or None), "keyword")
    return render_template(
        "customers/list.html",
        page=page,
        belongs=tenants.memberships_by_user(page.items),
        tenants=[(tenant.id, tenant.name) for tenant in tenants.search()],
        chosen=request.args.get("tenant", type=int),
        roles=MEMBER_ROLES,
        form=form,
    )


@bp.get("/customers/<int:user_id>")
@requires(*STAFF)
def customer(user_id: int) -> ResponseReturnValue:
    return _page(user_id, None)


@bp.post("/customers/<int:user_id>")
@requires(*STAFF)
def edit_customer(user_id: int) -> ResponseReturnValue:
    user, form = users.get(user_id, roles=users.CUSTOMERS), Form.of_request(keep=PROFILE)
    try:
        users.edit(user, by=actor(), **{name: form.optional(name) for name in PROFILE})
    except Error as error:
        return _page(user_id, form.refused(error)), error.status
    flash(gettext("The profile is saved."), "success")
    return redirect(_address_of(user_id), 303)


@bp.post("/customers/<int:user_id>/<any(disable, enable):act>")
@requires(*STAFF)
def switch_customer(user_id: int, act: str) -> ResponseReturnValue:
    user = users.get(user_id, roles=users.CUSTOMERS)
    if act == "disable":
        with acting(gettext("%(name)s is disabled: sign-ins, tokens and keys on the machines.", name=user.username)):
            users.disable(user, by=actor())
    else:
        with acting(gettext("%(name)s may sign in again.", name=user.username)):
            users.enable(user, by=actor())
    return redirect(_address_of(user_id), 303)


@bp.post("/customers/<int:user_id>/reset-password")
@requires(*STAFF)
def reset_customer_password(user_id: int) -> ResponseReturnValue:
    user = users.get(user_id, roles=users.CUSTOMERS)
    password = users.reset_password(user, by=actor())
    return render_template("people/password.html", user=user, password=password, back=_address_of(user_id))


def _page(user_id: int, form: Form | None) -> str:
    user = users.get(user_id, roles=users.CUSTOMERS)
    return render_template(
        "customers/detail.html",
        user=user,
        memberships=list(tenants.memberships_of(user)),
        keys=list(keys.list_of(user)),
        presence=keys.presence_of(user),
        form=form,
    )


def _address_of(user_id: int) -> str:
    return url_for("web.customer", user_id=user_id)
