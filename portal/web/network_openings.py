"""Openings, asked for and closed on pages: by staff for any machine or lease, by customers for their own lease."""

from __future__ import annotations

from flask import flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, current_user, requires
from portal.db import utcnow
from portal.errors import Error
from portal.models import Opening
from portal.models.states import HOLE_PROTOCOLS
from portal.services import leases, machines, network_openings, network_requests, network_views, tenants
from portal.services.actors import STAFF
from portal.web import network_forms, network_shapes
from portal.web.acting import acting
from portal.web.blueprint import bp
from portal.web.forms import Form
from portal.web.frame import is_fragment

FIELDS = ("machine", "lease", *network_forms.WISH_FIELDS)


# Staff


@bp.get("/network/openings/new")
@requires(*STAFF)
def new_opening() -> ResponseReturnValue:
    return _page(None)


@bp.post("/network/openings/new")
@requires(*STAFF)
def open_port() -> ResponseReturnValue:
    form = Form.of_request(keep=FIELDS)
    try:
        machine, lease = network_forms.whose(form)
        wished = network_forms.wish(form)
        opening = network_requests.open_for(machine=machine, lease=lease, wished=wished, by=actor())
    except Error as error:
        return _page(network_forms.refused(form, error)), error.status
    flash(gettext("The opening is wanted: the host is told now."), "success")
    return redirect(_home_of(opening), 303)


def _page(form: Form | None) -> str:
    machine_id, lease_id = request.args.get("machine", type=int), request.args.get("lease", type=int)
    return render_template(
        "network/opening.html",
        form=form,
        machine=None if machine_id is None else machines.get(machine_id),
        lease=None if lease_id is None else leases.get(lease_id),
        **_choices(),
    )


def _choices() -> dict[str, object]:
    return {
        "protocols": [(word, word.upper()) for word in HOLE_PROTOCOLS],
        "my_source": network_shapes.my_source(request.remote_addr),
    }


@bp.post("/network/openings/<int:opening_id>/close")
@requires(*STAFF)
def close_opening(opening_id: int) -> ResponseReturnValue:
    opening = network_openings.get(opening_id)
    with acting(gettext("The opening is wanted no longer: the host is told now.")):
        network_requests.close_port(opening, by=actor())
    back = Form.of_request(keep=()).text("back")
    return redirect(_home_of(opening) if back == "home" else url_for("web.network_openings"), 303)


def _home_of(opening: Opening) -> str:
    """The page of what it was opened for."""
    if opening.lease_id is not None:
        return url_for("web.lease", lease_id=opening.lease_id)
    return url_for("web.machine", machine_id=opening.machine_id)


# Customers


@bp.get("/my/machines/<int:machine_id>/openings")
@requires("customer")
def my_openings(machine_id: int) -> ResponseReturnValue:
    return _my_page(machine_id, None)


@bp.post("/my/machines/<int:machine_id>/openings")
@requires("customer")
def open_my_port(machine_id: int) -> ResponseReturnValue:
    lease = leases.get_open_of_user(current_user(), machine_id)
    form = Form.of_request(keep=network_forms.WISH_FIELDS)
    try:
        wished = network_forms.wish(form)
        network_requests.open_port_as_customer(current_user(), lease, wished, by=actor())
    except Error as error:
        return _my_page(machine_id, network_forms.refused(form, error)), error.status
    flash(gettext("The port is being opened: the host is told now."), "success")
    return redirect(url_for("web.my_openings", machine_id=machine_id), 303)


@bp.post("/my/machines/<int:machine_id>/openings/<int:opening_id>/close")
@requires("customer")
def close_my_port(machine_id: int, opening_id: int) -> ResponseReturnValue:
    lease = leases.get_open_of_user(current_user(), machine_id)
    with acting(gettext("The port is being closed, and connections through it end.")):
        network_requests.close_port_as_customer(current_user(), lease, opening_id, by=actor())
    return redirect(url_for("web.my_openings", machine_id=machine_id), 303)


def _my_page(machine_id: int, form: Form | None) -> str:
    me = current_user()
    lease = leases.get_open_of_user(me, machine_id)
    forwards = network_views.forwards_of([lease])
    rows = network_shapes.opening_rows(network_views.openings_of(lease), utcnow(), forwards)
    facts = {"lease": lease, "machine": lease.machine, "rows": rows, "may_use": _may_use(lease.tenant_id, lease.state)}
    if is_fragment():
        return render_template("my/_openings.html", **facts)
    return render_template("my/openings.html", form=form, limits=network_openings.limits(), **facts, **_choices())


def _may_use(tenant_id: int, state: str) -> bool:
    return state == "active" and tenants.may(current_user(), tenant_id, "use")
