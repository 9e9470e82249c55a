"""Forms of the network, for staff: zones, security groups, records, where a machine stands, what customers may open."""

from __future__ import annotations

from typing import Any

from flask import flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.errors import Error
from portal.models import DnsRecord, DnsZone, Machine, SecurityGroup
from portal.models.states import DNS_CLOUDS, GROUP_CLOUDS, RECORD_PURPOSES, RECORD_TYPES
from portal.services import (
    machines,
    network_machines,
    network_names,
    network_openings,
    network_requests,
    network_views,
    network_zones,
)
from portal.services.actors import STAFF
from portal.web import network_forms
from portal.web.acting import acting
from portal.web.blueprint import bp
from portal.web.forms import Form
from portal.web.network_forms import optional_number
from portal.web.network_shapes import CLOUD_WORDS, DNS_WORDS, PURPOSE_WORDS

ZONE_FIELDS = ("name", "cloud", "external_id", "ttl_s", "serves_machines", "serves_leases")
GROUP_FIELDS = ("name", "cloud", "region", "vpc", "external_id")
RECORD_FIELDS = ("zone_id", "type", "name", "values", "ttl_s", "purpose", "proxied", "machine", "lease")
PLACE_FIELDS = ("gateway_id", "security_group_id", "forward_ports")
LIMIT_FIELDS = (
    "openings_a_lease", "ports_an_opening", "first_port", "last_port", "may_open_to_world",
    *network_openings.QUOTAS.values(),
)  # fmt: skip


# Zones


@bp.get("/network/zones/new")
@requires(*STAFF)
def new_zone() -> ResponseReturnValue:
    return _zone_page(None, None)


@bp.post("/network/zones/new")
@requires(*STAFF)
def create_zone() -> ResponseReturnValue:
    form = Form.of_request(keep=ZONE_FIELDS)
    try:
        zone = network_zones.create_zone(
            name=form.needed("name"), cloud=form.needed("cloud"), by=actor(), **_zone_typed(form)
        )
    except Error as error:
        return _zone_page(None, form.refused(error)), error.status
    flash(gettext("The zone %(name)s is written down.", name=zone.name), "success")
    return redirect(url_for("web.network"), 303)


@bp.get("/network/zones/<int:zone_id>")
@requires(*STAFF)
def zone(zone_id: int) -> ResponseReturnValue:
    return _zone_page(network_zones.get_zone(zone_id), None)


@bp.post("/network/zones/<int:zone_id>")
@requires(*STAFF)
def edit_zone(zone_id: int) -> ResponseReturnValue:
    found, form = network_zones.get_zone(zone_id), Form.of_request(keep=ZONE_FIELDS)
    try:
        network_zones.edit_zone(found, by=actor(), **_zone_typed(form))
    except Error as error:
        return _zone_page(found, form.refused(error)), error.status
    flash(gettext("The zone %(name)s is saved.", name=found.name), "success")
    return redirect(url_for("web.network"), 303)


@bp.post("/network/zones/<int:zone_id>/delete")
@requires(*STAFF)
def delete_zone(zone_id: int) -> ResponseReturnValue:
    found = network_zones.get_zone(zone_id)
    with acting(gettext("The zone %(name)s is forgotten; in the cloud it stays.", name=found.name)) as went_well:
        network_zones.delete_zone(found, by=actor())
    return redirect(url_for("web.network") if went_well else url_for("web.zone", zone_id=zone_id), 303)


def _zone_typed(form: Form) -> dict[str, Any]:
    return {
        "external_id": form.optional("external_id"),
        "ttl_s": optional_number(form, "ttl_s"),
        "serves_machines": form.is_checked("serves_machines"),
        "serves_leases": form.is_checked("serves_leases"),
    }


def _zone_page(found: DnsZone | None, form: Form | None) -> str:
    clouds = [(cloud, DNS_WORDS[cloud]) for cloud in DNS_CLOUDS]
    return render_template(
        "network/zone.html", zone=found, form=form, clouds=clouds, dns_words=DNS_WORDS, readable=network_views.readable
    )


# Security groups


@bp.get("/network/groups/new")
@requires(*STAFF)
def new_group() -> ResponseReturnValue:
    return _group_page(None, None)


@bp.post("/network/groups/new")
@requires(*STAFF)
def create_group() -> ResponseReturnValue:
    form = Form.of_request(keep=GROUP_FIELDS)
    place = {"cloud": form.text("cloud"), "region": form.text("region")}
    try:
        group = network_zones.create_group(by=actor(), **place, **_group_typed(form))
    except Error as error:
        return _group_page(None, form.refused(error)), error.status
    flash(gettext("The security group %(name)s is written down.", name=group.name), "success")
    return redirect(url_for("web.network"), 303)


@bp.get("/network/groups/<int:group_id>")
@requires(*STAFF)
def group(group_id: int) -> ResponseReturnValue:
    return _group_page(network_zones.get_group(group_id), None)


@bp.post("/network/groups/<int:group_id>")
@requires(*STAFF)
def edit_group(group_id: int) -> ResponseReturnValue:
    found, form = network_zones.get_group(group_id), Form.of_request(keep=GROUP_FIELDS)
    try:
        network_zones.edit_group(found, by=actor(), **_group_typed(form))
    except Error as error:
        return _group_page(found, form.refused(error)), error.status
    flash(gettext("The security group %(name)s is saved.", name=form.text("name")), "success")
    return redirect(url_for("web.network"), 303)


@bp.post("/network/groups/<int:group_id>/delete")
@requires(*STAFF)
def delete_group(group_id: int) -> ResponseReturnValue:
    found = network_zones.get_group(group_id)
    with acting(gettext("The security group %(name)s is forgotten.", name=found.name)) as went_well:
        network_zones.delete_group(found, by=actor())
    return redirect(url_for("web.network") if went_well else url_for("web.group", group_id=group_id), 303)


def _group_typed(form: Form) -> dict[str, Any]:
    return {"name": form.text("name"), "vpc": form.optional("vpc"), "external_id": form.optional("external_id")}


def _group_page(found: SecurityGroup | None, form: Form | None) -> str:
    clouds = [(cloud, CLOUD_WORDS[cloud]) for cloud in GROUP_CLOUDS]
    return render_template("network/group.html", group=found, form=form, clouds=clouds, cloud_words=CLOUD_WORDS)


# Records


@bp.get("/network/records/new")
@requires(*STAFF)
def new_record() -> ResponseReturnValue:
    return _record_page(None, None)


@bp.post("/network/records/new")
@requires(*STAFF)
def create_record() -> ResponseReturnValue:
    form = Form.of_request(keep=RECORD_FIELDS)
    try:
        machine, lease = network_forms.whose(form)
        network_requests.want_record(
            network_zones.get_zone(form.number("zone_id")),
            machine=machine,
            lease=lease,
            type=form.text("type"),
            by=actor(),
            **_record_typed(form, form.text("type")),
        )
    except Error as error:
        return _record_page(None, network_forms.refused(form, error)), error.status
    flash(gettext("The record is wanted: the stacks make it with their next apply."), "success")
    return redirect(url_for("web.network_names"), 303)


@bp.get("/network/records/<int:record_id>")
@requires(*STAFF)
def record(record_id: int) -> ResponseReturnValue:
    return _record_page(network_names.get(record_id), None)


@bp.post("/network/records/<int:record_id>")
@requires(*STAFF)
def edit_record(record_id: int) -> ResponseReturnValue:
    found, form = network_names.get(record_id), Form.of_request(keep=RECORD_FIELDS)
    try:
        network_requests.edit_record(found, by=actor(), **_record_typed(form, found.type))
    except Error as error:
        return _record_page(found, network_forms.refused(form, error)), error.status
    flash(gettext("The record is saved: the stacks change it with their next apply."), "success")
    return redirect(url_for("web.network_names"), 303)


@bp.post("/network/records/<int:record_id>/remove")
@requires(*STAFF)
def remove_record(record_id: int) -> ResponseReturnValue:
    with acting(gettext("The record is wanted no longer: the stacks remove it with their next apply.")):
        network_requests.remove_record(network_names.get(record_id), by=actor())
    return redirect(url_for("web.network_names"), 303)


def _record_typed(form: Form, kind: str) -> dict[str, Any]:
    return {
        "name": form.needed("name"),
        "values": network_forms.values(form, kind),
        "ttl_s": optional_number(form, "ttl_s"),
        "purpose": form.text("purpose"),
        "proxied": form.is_checked("proxied"),
    }


def _record_page(found: DnsRecord | None, form: Form | None) -> str:
    machine_id = request.args.get("machine", type=int)
    return render_template(
        "network/record.html",
        record=found,
        form=form,
        typed_values="\n".join(network_views.value_lines(found)) if found else None,
        name=network_views.readable(found.name) if found else None,
        readable=network_views.readable,
        zones=[
            (each.id, f"{network_views.readable(each.name)} · {DNS_WORDS[each.cloud]}")
            for each in network_zones.list_zones()
        ],
        types=[(kind, kind) for kind in RECORD_TYPES],
        purposes=[(word, PURPOSE_WORDS[word]) for word in RECORD_PURPOSES],
        machine=None if machine_id is None else machines.get(machine_id),
    )


# Where a machine stands


@bp.get("/machines/<int:machine_id>/place")
@requires(*STAFF)
def place(machine_id: int) -> ResponseReturnValue:
    return _place_page(machines.get(machine_id), None)


@bp.post("/machines/<int:machine_id>/place")
@requires(*STAFF)
def place_machine(machine_id: int) -> ResponseReturnValue:
    found, form = machines.get(machine_id), Form.of_request(keep=PLACE_FIELDS)
    try:
        network_machines.place(
            found,
            gateway_id=optional_number(form, "gateway_id"),
            security_group_id=optional_number(form, "security_group_id"),
            forward_ports=form.optional("forward_ports"),
            by=actor(),
        )
    except Error as error:
        return _place_page(found, form.refused(error)), error.status
    flash(gettext("It is saved where the machine stands."), "success")
    return redirect(url_for("web.machine", machine_id=machine_id), 303)


def _place_page(machine: Machine, form: Form | None) -> str:
    gateways = [(each.id, f"{each.name} · {each.public_address}") for each in network_machines.gateways()]
    groups = [
        (each.id, f"{each.name} · {CLOUD_WORDS[each.cloud]} {each.region}") for each in network_zones.list_groups()
    ]
    return render_template("machines/place.html", machine=machine, form=form, gateways=gateways, groups=groups)


# What customers may open


@bp.get("/network/limits")
@requires(*STAFF)
def network_limits() -> ResponseReturnValue:
    return _limits_page(None)


@bp.post("/network/limits")
@requires(*STAFF)
def set_network_limits() -> ResponseReturnValue:
    form = Form.of_request(keep=LIMIT_FIELDS)
    try:
        numbers = {name: form.number(name) for name in LIMIT_FIELDS if name != "may_open_to_world"}
        network_openings.set_limits(by=actor(), may_open_to_world=form.is_checked("may_open_to_world"), **numbers)
    except Error as error:
        return _limits_page(form.refused(error)), error.status
    flash(gettext("The limits are saved; what is open already stays."), "success")
    return redirect(url_for("web.network_openings"), 303)


def _limits_page(form: Form | None) -> str:
    return render_template("network/limits.html", form=form, limits=network_openings.limits())
