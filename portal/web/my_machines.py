"""A customer's machines: what is leased until when, what the GPUs do, and how to connect."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from flask import render_template
from flask.typing import ResponseReturnValue
from flask_babel import lazy_gettext

from portal.api.guard import current_user, requires
from portal.db import utcnow
from portal.services import connections, keys, leases, network_forwards, network_views, overviews
from portal.services.overviews import HeldView
from portal.web import network_shapes, shapes
from portal.web.blueprint import bp
from portal.web.frame import is_fragment

# In words of our own: what a rule says is for staff.
ALERT_WORDS = {
    "MachineOffline": lazy_gettext("The machine does not answer."),
    "AgentSilent": lazy_gettext("The machine does not report."),
    "GpuLost": lazy_gettext("A GPU is lost: fewer answer than you have leased."),
    "GpuFailing": lazy_gettext("A GPU answers with errors."),
    "GpuDriverFailing": lazy_gettext("The GPU driver does not answer, or not rightly."),
    "GpuHot": lazy_gettext("A GPU is hot."),
    "GpuTooHot": lazy_gettext("A GPU is too hot, and may slow down."),
    "GpuEccErrors": lazy_gettext("The memory of a GPU has errors that cannot be corrected."),
    "GpuRowRemapPending": lazy_gettext("The memory of a GPU wants a reset of the GPU."),
    "GpuRowRemapFailed": lazy_gettext("The memory of a GPU is worn out."),
    "GpuXidRestart": lazy_gettext("A GPU wants a restart of the machine."),
    "GpuXidReset": lazy_gettext("A GPU wants a reset."),
    "GpuXidHardware": lazy_gettext("A GPU may have a fault."),
    "DiskNearlyFull": lazy_gettext("A disk is nearly full."),
    "DiskFull": lazy_gettext("A disk is full."),
    "DiskLow": lazy_gettext("The disk for your data has little room left."),
}


@bp.get("/my/machines")
@requires("customer")
def my_machines() -> ResponseReturnValue:
    me, now = current_user(), utcnow()
    held = list(leases.open_of_user(me))
    openings, forwards = network_views.openings_by_lease(held), network_views.forwards_of(held)
    items = [
        {
            **_facts(each, now),
            "openings": network_shapes.opening_rows(openings[each.lease.lease.id], now, forwards),
        }
        for each in overviews.held(held, me, now)
    ]
    return render_template("my/_machines.html" if is_fragment() else "my/machines.html", items=items)


@bp.get("/my/machines/<int:machine_id>/connection")
@requires("customer")
def my_connection(machine_id: int) -> ResponseReturnValue:
    me = current_user()
    lease = leases.get_open_of_user(me, machine_id)
    way = connections.of(lease, user=me)
    has_key = keys.list_of(me).exists()
    forward = network_forwards.find_ssh(lease)
    opened = network_shapes.opening_rows(network_views.openings_of(lease), utcnow(), network_views.forwards_of([lease]))
    return render_template(
        "my/_connection.html",
        machine=lease.machine,
        way=way,
        has_key=has_key,
        forward=forward,
        opened=[row for row in opened if row.ways],
        names=network_views.names_seen(lease),
    )


def _facts(held: HeldView, now: datetime) -> dict[str, Any]:
    return {
        "view": held.machine,
        "held": held.lease,
        "may_connect": held.may_connect,
        "left": shapes.time_left(held.lease, now),
        "still_open": shapes.still_open(held.lease),
        "gpus": shapes.gpu_rows(held.machine),
        "alerts": [(told, ALERT_WORDS[told.name]) for told in held.alerts],
    }
