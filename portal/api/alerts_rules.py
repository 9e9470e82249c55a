"""Alert rules that staff wrote: `admin/alerts/rules*`, and the file that Prometheus takes (`prometheus/rules`)."""

from __future__ import annotations

from typing import Any

import marshmallow as ma
from flask import Response

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.models import AlertRule
from portal.models.states import ALERT_SEVERITIES
from portal.services import alerts_rules
from portal.services.actors import STAFF
from portal.services.alerts_rules import CONDITIONS, LONGEST_S, LONGEST_TEXT, METRICS, MOST_HOURS, Trial

bp = Blueprint("alert_rules", __name__, url_prefix="/api/v1/admin/alerts/rules", description="Rules of one's own")
file_bp = Blueprint("alert_rules_file", __name__, url_prefix="/api/v1/prometheus", description="For Prometheus")


class ScopeIn(Schema):
    """Neither: every machine."""

    region = ma.fields.String(validate=ma.validate.Length(1, 64))
    machines = ma.fields.List(
        ma.fields.String(validate=ma.validate.Length(1, 63)), validate=ma.validate.Length(1, 1000)
    )


class RuleEdit(Schema):
    name = ma.fields.String(validate=ma.validate.Length(1, 64), metadata={"example": "GpuIdle"})
    metric = ma.fields.String(validate=ma.validate.OneOf(list(METRICS)))
    condition = ma.fields.String(validate=ma.validate.OneOf(CONDITIONS))
    threshold = ma.fields.Float(allow_nan=False)
    duration_s = ma.fields.Integer(strict=True, validate=ma.validate.Range(0, LONGEST_S))
    severity = ma.fields.String(validate=ma.validate.OneOf(ALERT_SEVERITIES))
    scope = ma.fields.Nested(ScopeIn)
    summary = ma.fields.String(validate=ma.validate.Length(1, LONGEST_TEXT))
    way_out = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=LONGEST_TEXT))
    is_on = ma.fields.Boolean()


class RuleIn(RuleEdit):
    @ma.pre_load
    def everything_is_there(self, data: Any, **_: Any) -> Any:
        """A new rule has no field to keep."""
        needed = ("name", "metric", "condition", "threshold", "duration_s", "severity", "summary")
        missing = [name for name in needed if isinstance(data, dict) and name not in data]
        if missing:
            raise ma.ValidationError({name: ["Missing data for required field."] for name in missing})
        return data


class TrialIn(RuleIn):
    hours = ma.fields.Integer(load_default=24, strict=True, validate=ma.validate.Range(1, MOST_HOURS))


class RuleOut(Schema):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)
    metric = ma.fields.String(required=True)
    condition = ma.fields.String(required=True)
    threshold = ma.fields.Float(required=True)
    duration_s = ma.fields.Integer(required=True)
    severity = ma.fields.String(required=True)
    scope = ma.fields.Dict(keys=ma.fields.String(), required=True)
    summary = ma.fields.String(required=True)
    way_out = ma.fields.String(allow_none=True)
    is_on = ma.fields.Boolean(required=True)
    expression = ma.fields.Function(alerts_rules.expression, metadata={"type": "string", "description": "In PromQL"})
    changed_at = ma.fields.AwareDateTime(required=True)


class TimeOut(Schema):
    labels = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.String(), required=True)
    starts_at = ma.fields.AwareDateTime(required=True)
    ends_at = ma.fields.AwareDateTime(required=True)
    worst = ma.fields.Float(required=True)


class TrialOut(Schema):
    hours = ma.fields.Integer(required=True)
    step_s = ma.fields.Integer(required=True, metadata={"description": "What is shorter was not seen"})
    count = ma.fields.Integer(required=True)
    times = ma.fields.List(ma.fields.Nested(TimeOut), required=True, metadata={"description": "The newest 200"})


@bp.get("")
@requires(*STAFF, scope="read")
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(RuleOut))
def list_rules(args: dict[str, Any]) -> dict[str, Any]:
    """Rules by name"""
    return page_of(alerts_rules.search(), args)


@bp.post("")
@requires(*STAFF)
@bp.arguments(RuleIn)
@bp.response(201, RuleOut)
def create_rule(body: dict[str, Any]) -> AlertRule:
    """Write a rule; it is off unless the body says otherwise"""
    return alerts_rules.create(by=actor(), **body)


@bp.get("/<int:rule_id>")
@requires(*STAFF, scope="read")
@bp.response(200, RuleOut)
def get_rule(rule_id: int) -> AlertRule:
    """One rule"""
    return alerts_rules.get(rule_id)


@bp.patch("/<int:rule_id>")
@requires(*STAFF)
@bp.arguments(RuleEdit)
@bp.response(200, RuleOut)
def edit_rule(body: dict[str, Any], rule_id: int) -> AlertRule:
    """Change a rule, or switch it on or off"""
    return alerts_rules.edit(alerts_rules.get(rule_id), by=actor(), **body)


@bp.delete("/<int:rule_id>")
@requires(*STAFF)
@bp.response(204)
def remove_rule(rule_id: int) -> None:
    """Remove a rule; what it has raised ends when Prometheus has read the rules again"""
    alerts_rules.remove(alerts_rules.get(rule_id), by=actor())


@bp.post("/try")
@requires(*STAFF)
@bp.arguments(TrialIn)
@bp.response(200, TrialOut)
def try_rule(body: dict[str, Any]) -> Trial:
    """When a rule would have fired in the last hours; nothing is saved"""
    return alerts_rules.try_out(**body)


@file_bp.get("/rules")
@requires(*STAFF, scope="prometheus")
@file_bp.response(200, content_type="application/yaml")
def show_rules_file() -> Response:
    """The rules that are switched on, as a file for Prometheus"""
    return Response(alerts_rules.file_for_prometheus(), content_type="application/yaml; charset=utf-8")
