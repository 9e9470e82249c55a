"""Monitoring: what the fleet does now and did, and the charts on the pages of machines.

A chart is drawn in the browser (static/monitoring.js) from what `…/chart` answers. That is always an answer: where
there is no chart it says why, in the reader's language.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from flask import Response, current_app, jsonify, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import lazy_gettext

from portal.api.guard import current_user, requires
from portal.db import utcnow
from portal.errors import Error, NotFound
from portal.services import leases, monitoring_charts, monitoring_live
from portal.services import machines as fleet
from portal.services.actors import STAFF
from portal.services.monitoring_charts import SPANS
from portal.services.monitoring_measures import MEASURES
from portal.web.acting import PAGE_SIZE, Page, number_asked
from portal.web.blueprint import bp
from portal.web.frame import is_fragment, told

MEASURE_WORDS = {
    "utilization": lazy_gettext("GPU utilisation"),
    "memory": lazy_gettext("GPU memory"),
    "temperature": lazy_gettext("GPU temperature"),
    "power": lazy_gettext("GPU power"),
    "clock": lazy_gettext("GPU clock"),
    "slowdown": lazy_gettext("GPU slowed down"),
    "ecc": lazy_gettext("Uncorrected ECC errors"),
    "cpu": lazy_gettext("Processors"),
    "host_memory": lazy_gettext("Memory of the host"),
    "network": lazy_gettext("Network"),
    "disk": lazy_gettext("Disks in use"),
}
SPAN_WORDS = {
    "1h": lazy_gettext("1 hour"),
    "6h": lazy_gettext("6 hours"),
    "1d": lazy_gettext("1 day"),
    "7d": lazy_gettext("7 days"),
    "30d": lazy_gettext("30 days"),
}
CAUSE_WORDS = {
    "host_down": lazy_gettext("host down"),
    "exporter_failing": lazy_gettext("exporter failing"),
    "gpu_gone": lazy_gettext("GPU gone"),
    "mig": lazy_gettext("n/a (MIG)"),
    "not_reported": lazy_gettext("not reported"),
    "no_data": lazy_gettext("nothing recorded"),
}
LINE_WORDS = {
    "fleet": lazy_gettext("fleet"),
    "received": lazy_gettext("received"),
    "sent": lazy_gettext("sent"),
    "cpu": lazy_gettext("Processors"),
    "host_memory": lazy_gettext("Memory of the host"),
    "more": lazy_gettext("and more"),
    "all": lazy_gettext("all"),
}
ORDER_WORDS = {
    "host": lazy_gettext("by machine"),
    "utilization": lazy_gettext("highest utilisation first"),
    "memory": lazy_gettext("fullest memory first"),
    "temperature": lazy_gettext("hottest first"),
    "power": lazy_gettext("highest power first"),
}
DEVICE_STATE_WORDS = {
    "ok": lazy_gettext("answers"),
    "lost": lazy_gettext("lost"),
    "error": lazy_gettext("in error"),
    "missing": lazy_gettext("not there"),
    "unknown": lazy_gettext("unknown"),
}


def charts(address: str) -> dict[str, Any]:
    """What `monitoring/_charts.html` is given: where the charts come from, and the words that are drawn."""
    return {
        "charts_address": address,
        "has_history": current_app.config["SETTINGS"].prometheus_url is not None,
        "measures": {name: (str(MEASURE_WORDS[name]), MEASURES[name].is_of_gpus) for name in MEASURES},
        "spans": SPAN_WORDS,
        "words": {name: str(word) for name, word in (CAUSE_WORDS | LINE_WORDS).items()},
    }


# Staff


@bp.get("/monitoring")
@requires(*STAFF)
def monitoring() -> ResponseReturnValue:
    template = "monitoring/_overview.html" if is_fragment() else "monitoring/overview.html"
    return render_template(template, **_overview(), **charts(url_for("web.fleet_chart")))


def _overview() -> dict[str, Any]:
    now = utcnow()
    order = request.args.get("order", "")
    order = order if order in monitoring_live.ORDERS else "host"
    found = monitoring_live.devices(now, order=order, page=number_asked(), page_size=PAGE_SIZE)
    return {
        **_live(monitoring_live.overview(now)),
        "devices": Page(**found, filters={"order": order}),
        "orders": ORDER_WORDS,
        "device_word": lambda word: DEVICE_STATE_WORDS.get(word, word),
    }


def _live(overview: dict[str, Any]) -> dict[str, Any]:
    """The overview, its time as a time, and the bars of its distribution: how high, in percent of the highest."""
    tenths = overview["gpus"]["distribution"]["tenths"]
    highest = max(*tenths, 1)
    bars = [
        {"label": f"{10 * index} – {10 * (index + 1)} %", "count": count, "percent": round(100 * count / highest)}
        for index, count in enumerate(tenths)
    ]
    return {"live": overview, "computed_at": datetime.fromisoformat(overview["computed_at"]), "bars": bars}


@bp.get("/monitoring/chart")
@requires(*STAFF)
def fleet_chart() -> ResponseReturnValue:
    return _drawn(lambda measure, span: monitoring_charts.of_fleet(measure, span, utcnow()))


@bp.get("/machines/<int:machine_id>/chart")
@requires(*STAFF)
def machine_chart(machine_id: int) -> ResponseReturnValue:
    found, gpu = fleet.get(machine_id), request.args.get("gpu") or None
    return _drawn(lambda measure, span: monitoring_charts.of_machine(found, measure, span, utcnow(), gpu_uuid=gpu))


# A customer


@bp.get("/my/machines/<int:machine_id>/monitoring")
@requires("customer")
def my_monitoring(machine_id: int) -> ResponseReturnValue:
    lease = leases.get_open_of_user(current_user(), machine_id)
    address = url_for("web.my_chart", machine_id=machine_id)
    return render_template("monitoring/mine.html", machine=lease.machine, lease=lease, **charts(address))


@bp.get("/my/machines/<int:machine_id>/chart")
@requires("customer")
def my_chart(machine_id: int) -> ResponseReturnValue:
    lease = leases.get_open_of_user(current_user(), machine_id)
    return _drawn(lambda measure, span: monitoring_charts.of_lease(lease, measure, span, utcnow()))


def _drawn(draw: Callable[[str, str], dict[str, Any]]) -> Response:
    """The chart that the address asks for, or why there is none."""
    measure, span = request.args.get("measure", "utilization"), request.args.get("range", next(iter(SPANS)))
    try:
        return jsonify(draw(measure, span))
    except NotFound:
        raise
    except Error as error:
        return jsonify(trouble=told(error.message))
