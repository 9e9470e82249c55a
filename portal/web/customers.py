"""Customers, for staff: tenants, the people in them, and their first passwords."""

from __future__ import annotations

from flask import flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.errors import Error
from portal.models.states import MEMBER_ROLES
from portal.services import tenants, users
from portal.web.acting import acting, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form

STAFF = ("admin", "operator")


@bp.get("/customers")
@requires(*STAFF)
def customers() -> ResponseReturnValue:
    return _page(None, None)


@bp.post("/customers")
@requires(*STAFF)
def create_customer() -> ResponseReturnValue:
    form = Form.of_request(keep=("username", "tenant_id", "member_role", "display_name", "email"))
    try:
        tenant = tenants.get(form.number("tenant_id"))
        profile = {name: form.optional(name) for name in ("display_name", "email")}
        user, password = users.create_customer(
            form.text("username"), by=actor(), tenant=tenant, member_role=form.text("member_role"), **profile
        )
    except Error as error:
        return _page(form.refused(error), None), error.status
    return render_template("customers/password.html", user=user, password=password)


@bp.post("/tenants")
@requires(*STAFF)
def create_tenant() -> ResponseReturnValue:
    form = Form.of_request(keep=("name",))
    try:
        tenants.create(form.text("name"), by=actor())
    except Error as error:
        return _page(None, form.refused(error)), error.status
    return redirect(url_for("web.customers"), 303)


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
    return redirect(url_for("web.customers"), 303)


@bp.post("/customers/<int:user_id>/reset-password")
@requires(*STAFF)
def reset_customer_password(user_id: int) -> ResponseReturnValue:
    user = users.get(user_id, roles=users.CUSTOMERS)
    return render_template("customers/password.html", user=user, password=users.reset_password(user, by=actor()))


@bp.post("/tenants/<int:tenant_id>/members/<int:user_id>/remove")
@requires(*STAFF)
def remove_member(tenant_id: int, user_id: int) -> ResponseReturnValue:
    tenant = tenants.get(tenant_id)
    tenants.remove_member(tenant, user_id, by=actor())
    flash(gettext("The keys leave the machines of %(name)s now.", name=tenant.name), "success")
    return redirect(url_for("web.customers"), 303)


def _page(form: Form | None, tenant_form: Form | None) -> str:
    page = page_asked(users.search(roles=users.CUSTOMERS, keyword=request.args.get("keyword") or None), "keyword")
    belongs = {user.id: list(tenants.memberships_of(user)) for user in page.items}
    return render_template(
        "customers/list.html",
        page=page,
        belongs=belongs,
        tenants=list(tenants.search()),
        roles=MEMBER_ROLES,
        form=form,
        tenant_form=tenant_form,
    )
