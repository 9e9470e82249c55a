"""Leases, for staff: who has which machine until when, and how each goes on or ends."""

from __future__ import annotations

from flask import flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.db import utcnow
from portal.errors import Error
from portal.services import leases as lettings
from portal.services import network_views, overviews
from portal.services.actors import STAFF
from portal.web import network_shapes, shapes
from portal.web.acting import page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form
from portal.web.frame import is_fragment


@bp.get("/leases")
@requires(*STAFF)
def leases() -> ResponseReturnValue:
    page = page_asked(overviews.search_leases(state=request.args.get("state") or None), "state")
    return render_template("leases/list.html", page=page, views=overviews.of_leases(page.items, utcnow()))


@bp.get("/leases/<int:lease_id>")
@requires(*STAFF)
def lease(lease_id: int) -> ResponseReturnValue:
    return _page(lease_id)


@bp.post("/leases/<int:lease_id>/extend")
@requires(*STAFF)
def extend_lease(lease_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=("until",))
    try:
        held = lettings.extend(lettings.get(lease_id), until=form.moment("until"), by=actor())
    except Error as error:
        return _page(lease_id, extending=form.refused(error)), error.status
    flash(gettext("The new end is saved: the host is told now."), "success")
    return redirect(url_for("web.lease", lease_id=held.id), 303)


@bp.post("/leases/<int:lease_id>/end")
@requires(*STAFF)
def end_lease(lease_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=("reason",))
    try:
        ended = lettings.end(lettings.get(lease_id), by=actor(), reason=form.needed("reason"))
    except Error as error:
        return _page(lease_id, ending=form.refused(error)), error.status
    is_over = ended.state == "ended"
    flash(gettext("The lease is called off.") if is_over else gettext("The lease is ending: the host closes it now."))
    return redirect(url_for("web.lease", lease_id=lease_id), 303)


@bp.post("/leases/<int:lease_id>/write-off")
@requires(*STAFF)
def write_off_lease(lease_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=("reason",))
    try:
        lettings.write_off(lettings.get(lease_id), by=actor(), reason=form.needed("reason"))
    except Error as error:
        return _page(lease_id, ending=form.refused(error)), error.status
    flash(gettext("The lease has ended unobserved; the machine must still be proven clean."), "warning")
    return redirect(url_for("web.lease", lease_id=lease_id), 303)


@bp.post("/leases/<int:lease_id>/grants/write-off")
@requires(*STAFF)
def write_off_grant(lease_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=("kind", "reason"))
    try:
        lettings.write_off_grant(lettings.get(lease_id), form.text("kind"), by=actor(), reason=form.needed("reason"))
    except Error as error:
        return _page(lease_id, writing_off=form.refused(error)), error.status
    flash(gettext("Nobody waits for it any more; what was last seen of it stays here."), "warning")
    return redirect(url_for("web.lease", lease_id=lease_id), 303)


def _page(
    lease_id: int, *, extending: Form | None = None, ending: Form | None = None, writing_off: Form | None = None
) -> str:
    now = utcnow()
    held = overviews.of_lease(lettings.get(lease_id), now)
    grants, forwards = network_shapes.grant_rows(held, now), network_views.forwards_of([held.lease])
    facts = {
        "held": held,
        "lease": held.lease,
        "left": shapes.time_left(held, now),
        "still_open": shapes.still_open(held),
        "grants": grants,
        "writable": [each.grant.kind for each in grants if each.may_be_written_off],
        "openings": network_shapes.opening_rows(network_views.openings_of(held.lease), now, forwards),
        "forwards": network_shapes.forward_rows(forwards, now),
        "names": [network_shapes.name_row(row) for row in network_views.names_of(held.lease)],
    }
    if is_fragment():
        return render_template("leases/_state.html", **facts)
    return render_template("leases/detail.html", extending=extending, ending=ending, writing_off=writing_off, **facts)
