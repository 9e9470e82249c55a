"""Machines, for staff: the list, adding one, and one machine's page with everything that can be done to it now."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from flask import Response, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.db import utcnow
from portal.errors import Error, Invalid
from portal.integrations import host_keys
from portal.models import Machine
from portal.services import (
    availability,
    config,
    drift,
    frozen,
    leases,
    network_views,
    overviews,
    provisioning,
    reclaims,
    retirement,
    runs,
    tenants,
)
from portal.services import machines as fleet
from portal.services.actors import STAFF
from portal.web import monitoring, network_shapes, operations, shapes
from portal.web.acting import acting, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form
from portal.web.frame import is_fragment

DESCRIPTIVE = ("public_address", "region", "rack", "remark")
FIELDS = ("name", "address", "ssh_port", "ssh_user", "labels", *DESCRIPTIVE)
ALLOCATE_FIELDS = ("tenant_id", "starts_at", "until", "retain_h", "root", "remark")
FILTERS = ("state", "reachability", "keyword")


@bp.get("/machines")
@requires(*STAFF)
def machines() -> ResponseReturnValue:
    now = utcnow()
    wanted = {name: request.args.get(name) or None for name in FILTERS}
    page = page_asked(overviews.search(now=now, **wanted), *FILTERS)
    views = overviews.of_machines(page.items, now)
    template = "machines/_rows.html" if is_fragment() else "machines/list.html"
    return render_template(template, page=page, views=views)


@bp.get("/machines/add")
@requires(*STAFF)
def add_machine() -> ResponseReturnValue:
    return render_template("machines/add.html", form=None)


@bp.post("/machines/add")
@requires(*STAFF)
def add_machine_with() -> ResponseReturnValue:
    form = Form.of_request(keep=FIELDS)
    try:
        machine = fleet.register(**_typed(form), credential=_credential(form), by=actor())
    except Error as error:
        return render_template("machines/add.html", form=form.refused(error)), error.status
    _scan(machine)
    return redirect(url_for("web.machine", machine_id=machine.id), 303)


def _typed(form: Form) -> dict[str, Any]:
    """The fields of a machine that one sees again; the credential is not among them."""
    texts = {name: form.text(name) for name in ("name", "address", "ssh_user")}
    return {
        **texts,
        "ssh_port": form.number("ssh_port", default=22),
        "labels": form.pairs("labels"),
        **{name: form.optional(name) for name in DESCRIPTIVE},
    }


def _credential(form: Form) -> dict[str, str] | None:
    """The first contact's password or key; sudo asks for the same password unless another one is given."""
    given = {name: form.raw(name) for name in ("password", "private_key", "become_password") if form.raw(name).strip()}
    if "password" in given:
        given.setdefault("become_password", given["password"])
    return given or None


@bp.get("/machines/<int:machine_id>")
@requires(*STAFF)
def machine(machine_id: int) -> ResponseReturnValue:
    return _page(fleet.get(machine_id))


def _page(machine: Machine, *, opened: str = "", form: Form | None = None) -> str:
    """The page; with the dialog `opened` whose form came back."""
    if is_fragment():
        return render_template("machines/_live.html", **_live(machine))
    charts = monitoring.charts(url_for("web.machine_chart", machine_id=machine.id))
    facts = {**_live(machine), **_history(machine), **charts}
    return render_template("machines/detail.html", opened=opened, form=form, **facts)


def _live(machine: Machine) -> dict[str, Any]:
    """What the page asks for again every few seconds."""
    now = utcnow()
    view = overviews.of_machine(machine, now)
    held = None if view.lease is None else overviews.of_lease(view.lease, now)
    newest = next(iter(runs.list_runs(machine_id=machine.id).limit(1)), None)
    return {
        "view": view,
        "machine": machine,
        "address": shapes.with_port(machine.address, machine.ssh_port),
        "gpus": shapes.gpu_rows(view),
        "usage": shapes.usage(view),
        "system": shapes.system(machine),
        "held": held,
        "left": held and shapes.time_left(held, now),
        "still_open": shapes.still_open(held) if held else [],
        "run": newest,
        "shows_run": newest is not None and newest.state in ("queued", "running"),
        "version": f"{machine.state} {newest and (newest.id, newest.state)} {view.lease and view.lease.id}",
    }


def _history(machine: Machine) -> dict[str, Any]:
    """What changes only when the page is opened again."""
    return {
        "runs": list(runs.list_runs(machine_id=machine.id).limit(10)),
        "past": list(overviews.search_leases(machine_id=machine.id).limit(10)),
        "reclaims": list(reclaims.search(machine_id=machine.id).limit(10)),
        "baseline": fleet.find_baseline(machine),
        "drift": drift.find(machine),
        "operations": operations.WORDS,
        "meanings": operations.MEANINGS,
        "not_shown": operations.NOT_SHOWN,
        "keys_in_question": shapes.keys_in_question(machine),
        **_network(machine),
    }


@bp.get("/machines/<int:machine_id>/network")
@requires(*STAFF)
def machine_network(machine_id: int) -> ResponseReturnValue:
    """The part of the machine's page that asks for itself again."""
    found = fleet.get(machine_id)
    return render_template("machines/_network.html", machine=found, **_network(found))


def _network(machine: Machine) -> dict[str, Any]:
    now = utcnow()
    there = network_views.of_machine(machine, leases.find_open(machine))
    return {
        "there": there,
        "names": [network_shapes.name_row(row) for row in there.names],
        "openings": network_shapes.opening_rows(there.openings, now, there.forwards),
        "forwards": network_shapes.forward_rows(there.forwards, now),
    }


@bp.post("/machines/<int:machine_id>/scan")
@requires(*STAFF)
def scan_host_keys(machine_id: int) -> ResponseReturnValue:
    found = fleet.get(machine_id)
    _scan(found)
    return _back(found)


def _scan(machine: Machine) -> None:
    """Ask the host for its keys; they are shown to be compared, nothing is trusted by it."""
    with acting(gettext("The host answered. Compare its fingerprint before you confirm it.")):
        fleet.offer_host_keys(machine, host_keys.scan(machine.address, machine.ssh_port), by=actor())


@bp.post("/machines/<int:machine_id>/confirm")
@requires(*STAFF)
def confirm_host_key(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=("reason",))
    return _done_or_shown_again(
        "confirm",
        found,
        form,
        gettext("The host key is pinned."),
        lambda: fleet.confirm_host_key(found, form.text("fingerprint"), by=actor(), reason=form.optional("reason")),
    )


def _done_or_shown_again(
    dialog: str, machine: Machine, form: Form, done: str, act: Callable[[], object]
) -> ResponseReturnValue:
    """Act, say `done` and go back to the machine; or show it with the dialog that was refused, as it was typed."""
    try:
        act()
    except Error as error:
        return _page(fleet.get(machine.id), opened=dialog, form=form.refused(error)), error.status
    flash(done, "success")
    return _back(machine)


@bp.post("/machines/<int:machine_id>/provision")
@requires(*STAFF)
def provision(machine_id: int) -> ResponseReturnValue:
    found = fleet.get(machine_id)
    with acting(gettext("Provisioning is queued; its output follows here.")):
        provisioning.provision(found, by=actor())
    return _back(found)


@bp.get("/machines/<int:machine_id>/edit")
@requires(*STAFF)
def edit_machine(machine_id: int) -> ResponseReturnValue:
    return render_template("machines/edit.html", machine=fleet.get(machine_id), form=None)


@bp.post("/machines/<int:machine_id>/edit")
@requires(*STAFF)
def edit_machine_with(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=FIELDS)
    given = {"credential": credential} if (credential := _credential(form)) else {}
    try:
        fleet.edit(found, **_typed(form), **given, by=actor())
    except Error as error:
        return render_template("machines/edit.html", machine=found, form=form.refused(error)), error.status
    return _back(found)


@bp.get("/machines/<int:machine_id>/allocate")
@requires(*STAFF)
def allocate(machine_id: int) -> ResponseReturnValue:
    return _allocate_page(fleet.get(machine_id), None)


@bp.post("/machines/<int:machine_id>/allocate")
@requires(*STAFF)
def allocate_with(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=ALLOCATE_FIELDS)
    try:
        leases.allocate(
            found,
            to=tenants.get(form.number("tenant_id")),
            starts_at=form.moment("starts_at") if form.text("starts_at") else None,
            until=form.moment("until"),
            retain_s=form.number("retain_h") * 3600,
            root=form.is_checked("root"),
            remark=form.optional("remark"),
            by=actor(),
        )
    except Error as error:
        return _allocate_page(found, form.refused(error)), error.status
    return _back(found)


def _allocate_page(machine: Machine, form: Form | None) -> str:
    now = utcnow()
    return render_template(
        "machines/allocate.html",
        machine=machine,
        form=form,
        tenants=[(tenant.id, tenant.name) for tenant in tenants.search()],
        refusals=availability.start_refusals(machine, now),
        until=(now + timedelta(days=30)).strftime("%Y-%m-%dT%H:00"),
        retain_h=config.current().default_retain_s // 3600,
    )


@bp.post("/machines/<int:machine_id>/reclaim")
@requires(*STAFF)
def reclaim(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=("reason", "force", "confirm"))
    wanted: dict[str, Any] = {
        "reason": form.text("reason"),
        "force": form.is_checked("force"),
        "confirm": form.optional("confirm"),
    }
    done = gettext("The machine is being taken back.")
    return _done_or_shown_again("reclaim", found, form, done, lambda: leases.reclaim(found, by=actor(), **wanted))


@bp.post("/machines/<int:machine_id>/maintenance")
@requires(*STAFF)
def maintenance(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=("reason", "until"))
    if form.text("switch") == "off":
        with acting(gettext("Maintenance has ended.")):
            fleet.end_maintenance(found, by=actor())
        return _back(found)
    done = gettext("The machine is in maintenance; leases and tasks go on.")
    return _done_or_shown_again("maintenance", found, form, done, lambda: _start_maintenance(found, form))


def _start_maintenance(machine: Machine, form: Form) -> None:
    until = form.moment("until") if form.text("until") else None
    fleet.start_maintenance(machine, reason=form.text("reason"), until=until, by=actor())


@bp.post("/machines/<int:machine_id>/baseline")
@requires(*STAFF)
def take_baseline(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=("reason",))
    done = gettext("A new baseline is being taken; the machine is ready again when it is there.")
    return _done_or_shown_again(
        "baseline",
        found,
        form,
        done,
        lambda: provisioning.take_baseline(found, by=actor(), reason=form.needed("reason")),
    )


@bp.post("/machines/<int:machine_id>/thaw")
@requires(*STAFF)
def thaw(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=("reason",))
    done = gettext("The host follows the portal again.")
    return _done_or_shown_again(
        "thaw", found, form, done, lambda: frozen.thaw(found, by=actor(), reason=form.text("reason"))
    )


@bp.post("/machines/<int:machine_id>/reimaged")
@requires(*STAFF)
def reimaged(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=("reason",))
    wanted: dict[str, Any] = {"reason": form.text("reason"), "credential": _credential(form)}
    done = gettext("Scan and confirm its new host key, then provision it.")
    return _done_or_shown_again("reimaged", found, form, done, lambda: retirement.reimaged(found, by=actor(), **wanted))


@bp.post("/machines/<int:machine_id>/retire")
@requires(*STAFF)
def retire(machine_id: int) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=("reason", "confirm"))
    done = gettext("The machine is retired; its history stays.")
    return _done_or_shown_again("retire", found, form, done, lambda: _retire(found, form))


def _retire(machine: Machine, form: Form) -> None:
    if form.text("confirm") != machine.name:
        raise Invalid({"confirm": [gettext("Type the machine's name to retire it.")]})
    retirement.retire(machine, by=actor(), reason=form.text("reason"))


@bp.post("/machines/<int:machine_id>/delete")
@requires(*STAFF)
def delete_machine(machine_id: int) -> ResponseReturnValue:
    found = fleet.get(machine_id)
    with acting(gettext("The machine %(name)s is deleted.", name=found.name)) as went_well:
        retirement.delete(found, by=actor())
    return redirect(url_for("web.machines"), 303) if went_well else _back(found)


@bp.get("/machines/<int:machine_id>/gpus/<gpu_uuid>/forget")
@requires(*STAFF)
def gpu_taken_out(machine_id: int, gpu_uuid: str) -> ResponseReturnValue:
    return render_template("machines/forget_gpu.html", machine=fleet.get(machine_id), gpu_uuid=gpu_uuid)


@bp.post("/machines/<int:machine_id>/gpus/<gpu_uuid>/forget")
@requires(*STAFF)
def forget_gpu(machine_id: int, gpu_uuid: str) -> ResponseReturnValue:
    found, form = fleet.get(machine_id), Form.of_request(keep=())
    with acting(gettext("The GPU is not expected any more.")):
        fleet.forget_gpu(found, gpu_uuid, by=actor(), reason=form.text("reason"))
    return _back(found)


def _back(machine: Machine) -> Response:
    return redirect(url_for("web.machine", machine_id=machine.id), 303)  # type: ignore[return-value]  # one class, two names


@bp.get("/reclaims/<int:reclaim_id>/report")
@requires(*STAFF)
def report(reclaim_id: int) -> ResponseReturnValue:
    found = reclaims.get(reclaim_id)
    content = json.loads(reclaims.report_file(found))["report"]
    return render_template("machines/report.html", reclaim=found, report=content, **shapes.report_parts(content))
