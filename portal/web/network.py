"""The network, for staff: where it stands, what differs, and the lists of names, openings and forwards.

The forms are in network_places.py (zones, groups, records, limits) and network_openings.py.
"""

from __future__ import annotations

from typing import Any

from flask import flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.db import utcnow
from portal.errors import Error
from portal.services import machines, network_drift, network_posts, network_views, network_zones
from portal.services import network as ground
from portal.services.actors import STAFF
from portal.services.network_drift import Entry
from portal.web import network_shapes
from portal.web.acting import PAGE_SIZE, Page, number_asked, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form
from portal.web.frame import is_fragment

WORDS = {
    "cloud_words": network_shapes.CLOUD_WORDS,
    "dns_words": network_shapes.DNS_WORDS,
    "change_words": network_shapes.CHANGE_WORDS,
    "kind_words": network_shapes.KIND_WORDS,
    "readable": network_views.readable,
}


@bp.get("/network")
@requires(*STAFF)
def network() -> ResponseReturnValue:
    return _overview(None)


@bp.post("/network/thaw")
@requires(*STAFF)
def thaw_network() -> ResponseReturnValue:
    form = Form.of_request(keep=("reason",))
    try:
        ground.thaw(by=actor(), reason=form.text("reason"))
    except Error as error:
        return _overview(form.refused(error)), error.status
    flash(gettext("The stacks are given exports again."), "success")
    return redirect(url_for("web.network"), 303)


@bp.post("/network/stacks/gone")
@requires(*STAFF)
def forget_stack() -> ResponseReturnValue:
    form = Form.of_request(keep=("stack", "reason", "although_wanted"))
    try:
        network_posts.forget(
            form.text("stack"),
            by=actor(),
            reason=form.text("reason"),
            although_wanted=form.is_checked("although_wanted"),
        )
    except Error as error:
        return _overview(None, gone=form.refused(error)), error.status
    flash(gettext("Nobody waits for this stack any more."), "success")
    return redirect(url_for("web.network"), 303)


def _overview(form: Form | None, gone: Form | None = None) -> str:
    now, standing = utcnow(), network_views.standing()
    facts: dict[str, Any] = {
        "standing": standing,
        "row": standing.state,
        "waits": None if standing.waits_since is None else now - standing.waits_since,
        "version": f"{standing.state.generation} {standing.state.frozen_at} {[each.seen for each in standing.stacks]}",
        **WORDS,
    }
    if is_fragment():
        return render_template("network/_standing.html", **facts)
    compared = network_drift.compare()
    return render_template(
        "network/overview.html",
        form=form,
        gone=gone,
        counts=network_views.counts(),
        names=sum(each.kind == "name" and each.desired is not None for each in compared.entries),
        compared=compared,
        stack_options=[(each.name, each.name) for each in standing.stacks],
        zones=list(network_zones.list_zones()),
        groups=list(network_zones.list_groups()),
        **facts,
    )


@bp.get("/network/changes")
@requires(*STAFF)
def network_changes() -> ResponseReturnValue:
    """What the stacks have still to do; with `state` what is in one state."""
    wanted = request.args.get("state") or None
    compared = network_drift.compare(only=wanted)
    found = [
        each
        for each in network_views.entries(compared, keyword=request.args.get("keyword"))
        if wanted or each.state != "applied"
    ]
    page = _page(found, "state", "keyword")
    return render_template("network/changes.html", page=page, asked=network_drift.who_asked(page.items), **WORDS)


@bp.get("/network/names")
@requires(*STAFF)
def network_names() -> ResponseReturnValue:
    compared = network_drift.compare(only=request.args.get("state") or None)
    found = network_views.entries(compared, kind="name", keyword=request.args.get("keyword"))
    page = _page(found, "state", "keyword")
    return render_template(
        "network/names.html",
        page=page,
        rows=[(each, network_shapes.name_row(each.row)) for each in page.items],
        has_zone=network_zones.list_zones().exists(),
        asked=network_drift.who_asked(page.items),
        **WORDS,
    )


def _page(found: list[Entry], *filters: str) -> Page:
    """The page of what was compared that the address asks for."""
    number = number_asked()
    kept = {name: request.args[name] for name in filters if request.args.get(name)}
    start = (number - 1) * PAGE_SIZE
    return Page(found[start : start + PAGE_SIZE], number, PAGE_SIZE, len(found), kept)


@bp.get("/network/openings")
@requires(*STAFF)
def network_openings() -> ResponseReturnValue:
    machine_id = request.args.get("machine", type=int)
    rows = network_views.openings(
        show=request.args.get("show"), machine_id=machine_id, keyword=request.args.get("keyword") or None
    )
    page = page_asked(rows, "show", "machine", "keyword")
    return render_template(
        "network/_opening_rows.html" if is_fragment() else "network/openings.html",
        page=page,
        rows=network_shapes.opening_rows(page.items, utcnow()),
        only=None if machine_id is None else machines.get(machine_id),
    )


@bp.get("/network/forwards")
@requires(*STAFF)
def network_forwards() -> ResponseReturnValue:
    gateway_id, keyword = request.args.get("gateway", type=int), request.args.get("keyword") or None
    page = page_asked(network_views.forwards(gateway_id=gateway_id, keyword=keyword), "gateway", "keyword")
    rows = network_shapes.forward_rows(page.items, utcnow())
    if is_fragment():
        return render_template("network/_forward_rows.html", page=page, rows=rows)
    return render_template("network/forwards.html", page=page, rows=rows, gateways=network_views.gateways())
