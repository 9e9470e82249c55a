"""Tenants, for staff: the companies that lease, who belongs to each and as what."""

from __future__ import annotations

from flask import flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.errors import Error
from portal.models.states import MEMBER_ROLES
from portal.services import overviews, users
from portal.services import tenants as companies
from portal.services.actors import STAFF
from portal.web.acting import acting, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form

SHOWN_LEASES = 20


@bp.get("/customers/tenants")
@requires(*STAFF)
def tenants() -> ResponseReturnValue:
    return _list_page(None)


@bp.post("/customers/tenants")
@requires(*STAFF)
def create_tenant() -> ResponseReturnValue:
    form = Form.of_request(keep=("name",))
    try:
        made = companies.create(form.text("name"), by=actor())
    except Error as error:
        return _list_page(form.refused(error)), error.status
    flash(gettext("The tenant %(name)s is made. Now the people in it.", name=made.name), "success")
    return redirect(url_for("web.tenant", tenant_id=made.id), 303)


def _list_page(form: Form | None) -> str:
    page = page_asked(companies.search(request.args.get("keyword") or None), "keyword")
    members = companies.members_counted(page.items)
    return render_template("tenants/list.html", page=page, members=members, form=form)


@bp.get("/customers/tenants/<int:tenant_id>")
@requires(*STAFF)
def tenant(tenant_id: int) -> ResponseReturnValue:
    return _page(tenant_id)


@bp.post("/customers/tenants/<int:tenant_id>")
@requires(*STAFF)
def rename_tenant(tenant_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=("name",))
    try:
        companies.rename(companies.get(tenant_id), form.text("name"), by=actor())
    except Error as error:
        return _page(tenant_id, renaming=form.refused(error)), error.status
    flash(gettext("The new name is saved."), "success")
    return redirect(url_for("web.tenant", tenant_id=tenant_id), 303)


@bp.post("/customers/tenants/<int:tenant_id>/members")
@requires(*STAFF)
def add_member(tenant_id: int) -> ResponseReturnValue:
    found, form = companies.get(tenant_id), Form.of_request(keep=("username", "role"))
    try:
        companies.add_member(found, users.get_customer(form.text("username")), form.text("role"), by=actor())
    except Error as error:
        return _page(tenant_id, adding=form.refused(error)), error.status
    flash(gettext("The keys reach the machines of %(name)s now.", name=found.name), "success")
    return redirect(url_for("web.tenant", tenant_id=tenant_id), 303)


@bp.post("/customers/tenants/<int:tenant_id>/members/<int:user_id>")
@requires(*STAFF)
def set_member_role(tenant_id: int, user_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=())
    with acting(gettext("The role is changed; it counts from the next request.")):
        companies.set_member_role(companies.get(tenant_id), user_id, form.text("role"), by=actor())
    return redirect(url_for("web.tenant", tenant_id=tenant_id), 303)


@bp.post("/customers/tenants/<int:tenant_id>/members/<int:user_id>/remove")
@requires(*STAFF)
def remove_member(tenant_id: int, user_id: int) -> ResponseReturnValue:
    found = companies.get(tenant_id)
    with acting(gettext("The keys leave the machines of %(name)s now.", name=found.name)):
        companies.remove_member(found, user_id, by=actor())
    return redirect(url_for("web.tenant", tenant_id=tenant_id), 303)


def _page(tenant_id: int, *, renaming: Form | None = None, adding: Form | None = None) -> str:
    found = companies.get(tenant_id)
    return render_template(
        "tenants/detail.html",
        tenant=found,
        members=list(companies.members_of(found)),
        leases=list(overviews.search_leases(tenant_id=tenant_id).limit(SHOWN_LEASES)),
        roles=MEMBER_ROLES,
        renaming=renaming,
        adding=adding,
    )
