"""What the fleet does and did: `admin/monitoring/*`, `admin/dashboard/*`, and a customer's own charts.

Answers come ready from the services, some of them thousands of lines long and computed for many: they are written as
they are, without a schema in between. The schemas describe them, and a test holds each answer against its own.
"""

from __future__ import annotations

from typing import Any

import marshmallow as ma
import orjson
from flask import Response

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import current_user, requires
from portal.api.paging import PageArgs, page_schema
from portal.db import utcnow
from portal.models.states import MACHINE
from portal.services import leases, machines, monitoring_charts, monitoring_live
from portal.services.actors import STAFF
from portal.services.monitoring_charts import CAUSES, SPANS
from portal.services.monitoring_measures import MEASURES

bp = Blueprint("monitoring", __name__, url_prefix="/api/v1/admin/monitoring", description="What the fleet does")
dashboard_bp = Blueprint("dashboard", __name__, url_prefix="/api/v1/admin/dashboard", description="The dashboard")
customer_bp = Blueprint("my_charts", __name__, url_prefix="/api/v1/customer/machines", description="My machines")


def _number(about: str | None = None) -> ma.fields.Float:
    """A measured value; null is unknown."""
    return ma.fields.Float(required=True, allow_none=True, metadata={"description": about} if about else {})


class UseOut(Schema):
    """GPUs that are expected, and what is known of them."""

    expected = ma.fields.Integer(required=True)
    answering = ma.fields.Integer(required=True)
    in_trouble = ma.fields.Integer(required=True, metadata={"description": "Lost, in error, or not there"})
    utilization_percent = _number("Mean of those that are known")
    memory_percent = _number("Mean of those that are known")
    temperature_max_c = _number()
    power_w = _number("Sum of those that are known")


class DistributionOut(Schema):
    tenths = ma.fields.List(
        ma.fields.Integer(), required=True, metadata={"description": "GPUs with 0 to 10 % utilisation, 10 to 20 %, …"}
    )
    mig = ma.fields.Integer(required=True, metadata={"description": "Divided: they have no utilisation"})
    not_known = ma.fields.Integer(required=True)


class FleetUseOut(UseOut):
    distribution = ma.fields.Nested(DistributionOut, required=True)


class GroupOut(UseOut):
    name = ma.fields.String(required=True, allow_none=True)
    machines = ma.fields.Integer(required=True)


class MachineCountsOut(Schema):
    """Each machine once: by state and by reachability they add up to the total."""

    total = ma.fields.Integer(required=True)
    by_state = ma.fields.Dict(
        keys=ma.fields.String(validate=ma.validate.OneOf(list(MACHINE))), values=ma.fields.Integer(), required=True
    )
    by_reachability = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.Integer(), required=True)
    in_maintenance = ma.fields.Integer(required=True)
    retired = ma.fields.Integer(required=True, metadata={"description": "Not in the total"})


class CustomerCountsOut(Schema):
    total = ma.fields.Integer(required=True)
    active = ma.fields.Integer(required=True, metadata={"description": "Those that have a machine now"})


class TaskCountsOut(Schema):
    running = ma.fields.Integer(required=True)


class AlertCountsOut(Schema):
    open = ma.fields.Integer(required=True)


class HistoryOut(Schema):
    state = ma.fields.String(required=True, validate=ma.validate.OneOf(("ok", "none", "down")))
    message = ma.fields.String(required=True, allow_none=True)


class StatsOut(Schema):
    computed_at = ma.fields.AwareDateTime(required=True, metadata={"description": "When this was true"})
    keep_s = ma.fields.Float(required=True, metadata={"description": "How old it may become"})
    machines = ma.fields.Nested(MachineCountsOut, required=True)
    customers = ma.fields.Nested(CustomerCountsOut, required=True)
    tasks = ma.fields.Nested(TaskCountsOut, required=True)
    alerts = ma.fields.Nested(AlertCountsOut, required=True)
    gpus = ma.fields.Nested(FleetUseOut, required=True)


class RealtimeOut(StatsOut):
    prometheus = ma.fields.Nested(HistoryOut, required=True)
    by_region = ma.fields.List(ma.fields.Nested(GroupOut), required=True)
    by_model = ma.fields.List(ma.fields.Nested(GroupOut), required=True)


class DeviceOut(Schema):
    machine_id = ma.fields.Integer(required=True)
    host = ma.fields.String(required=True)
    slot = ma.fields.Integer(required=True, allow_none=True)
    uuid = ma.fields.String(required=True)
    name = ma.fields.String(required=True, allow_none=True)
    state = ma.fields.String(required=True, validate=ma.validate.OneOf(("ok", "lost", "error", "missing", "unknown")))
    mig = ma.fields.Boolean(required=True, allow_none=True)
    memory_total_bytes = ma.fields.Integer(required=True, allow_none=True)
    utilization_percent = _number()
    memory_percent = _number()
    temperature_c = _number()
    power_w = _number()
    source = ma.fields.String(required=True, allow_none=True, validate=ma.validate.OneOf(("prometheus", "agent")))


class DeviceArgs(PageArgs):
    order = ma.fields.String(load_default="host", validate=ma.validate.OneOf(monitoring_live.ORDERS))


class ChartArgs(Schema):
    measure = ma.fields.String(required=True, validate=ma.validate.OneOf(list(MEASURES)))
    range = ma.fields.String(load_default="1h", validate=ma.validate.OneOf(list(SPANS)))


class MachineChartArgs(ChartArgs):
    gpu = ma.fields.String(
        validate=ma.validate.Length(1, 96), metadata={"description": "The UUID of one of its GPUs; all if left out"}
    )


class TrendArgs(Schema):
    range = ma.fields.String(load_default="1d", validate=ma.validate.OneOf(list(SPANS)))


class GapOut(Schema):
    """No value from the first moment to the last one, both included."""

    from_ = ma.fields.Integer(required=True, data_key="from")
    to = ma.fields.Integer(required=True)
    cause = ma.fields.String(required=True, validate=ma.validate.OneOf(CAUSES))


class LineOut(Schema):
    name = ma.fields.String(required=True)
    uuid = ma.fields.String(required=True, allow_none=True)
    values = ma.fields.List(
        ma.fields.Float(allow_none=True), required=True, metadata={"description": "One for each time; null is a gap"}
    )
    gaps = ma.fields.List(ma.fields.Nested(GapOut), required=True)


class ChartOut(Schema):
    measure = ma.fields.String(required=True)
    unit = ma.fields.String(required=True)
    range = ma.fields.String(required=True)
    step_s = ma.fields.Integer(required=True)
    source = ma.fields.String(required=True, validate=ma.validate.OneOf(("recorded", "samples")))
    times = ma.fields.List(ma.fields.Integer(), required=True, metadata={"description": "Seconds since 1970, UTC"})
    lines = ma.fields.List(ma.fields.Nested(LineOut), required=True)


def _written(answer: dict[str, Any]) -> Response:
    return Response(orjson.dumps(answer), mimetype="application/json")


# The fleet


@bp.get("/realtime")
@requires(*STAFF, scope="read")
@bp.response(200, RealtimeOut)
def realtime() -> Response:
    """The fleet now: machines, use by region and model; at most 30 s old, and it says how old"""
    return _written(monitoring_live.overview(utcnow()))


@bp.get("/devices")
@requires(*STAFF, scope="read")
@bp.arguments(DeviceArgs, location="query")
@bp.response(200, page_schema(DeviceOut))
def list_devices(args: dict[str, Any]) -> Response:
    """Every GPU with its values, by host or the highest value first"""
    return _written(monitoring_live.devices(utcnow(), **args))


@bp.get("/charts")
@requires(*STAFF, scope="read")
@bp.arguments(ChartArgs, location="query")
@bp.response(200, ChartOut)
def fleet_chart(args: dict[str, Any]) -> Response:
    """How a measure of the fleet went; 503 without Prometheus"""
    return _written(monitoring_charts.of_fleet(args["measure"], args["range"], utcnow()))


@bp.get("/machines/<int:machine_id>/charts")
@requires(*STAFF, scope="read")
@bp.arguments(MachineChartArgs, location="query")
@bp.response(200, ChartOut)
def machine_chart(args: dict[str, Any], machine_id: int) -> Response:
    """How a measure of a machine or of one GPU went, gaps with their causes; 503 without Prometheus"""
    found = machines.get(machine_id)
    chart = monitoring_charts.of_machine(found, args["measure"], args["range"], utcnow(), gpu_uuid=args.get("gpu"))
    return _written(chart)


@dashboard_bp.get("/stats")
@requires(*STAFF, scope="read")
@dashboard_bp.response(200, StatsOut)
def stats() -> Response:
    """The dashboard's cards; at most 30 s old, and they say how old"""
    return _written(monitoring_live.stats(utcnow()))


@dashboard_bp.get("/gpu-trend")
@requires(*STAFF, scope="read")
@dashboard_bp.arguments(TrendArgs, location="query")
@dashboard_bp.response(200, ChartOut)
def gpu_trend(args: dict[str, Any]) -> Response:
    """How the fleet's GPU utilisation went; 503 without Prometheus"""
    return _written(monitoring_charts.of_fleet("utilization", args["range"], utcnow()))


# A customer


@customer_bp.get("/<int:machine_id>/charts")
@requires("customer")
@customer_bp.arguments(ChartArgs, location="query")
@customer_bp.response(200, ChartOut)
def my_chart(args: dict[str, Any], machine_id: int) -> Response:
    """How a measure of a machine that my tenant has went, from the beginning of the lease"""
    lease = leases.get_open_of_user(current_user(), machine_id)
    return _written(monitoring_charts.of_lease(lease, args["measure"], args["range"], utcnow()))
