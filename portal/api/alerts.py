"""Alerts for those who run the house (`admin/alerts*`), and the door for Alertmanager (`alerts/webhook`)."""

from __future__ import annotations

import re
from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.api.people import split_page
from portal.models import AlertSilence
from portal.models.states import ALERT, ALERT_SEVERITIES, ALERT_SILENCE
from portal.services import alerts, alerts_silences
from portal.services.actors import STAFF
from portal.services.alerts import AlertView, Notice

bp = Blueprint("alerts", __name__, url_prefix="/api/v1/admin/alerts", description="What is wrong, and who has it")
webhook_bp = Blueprint("alert_webhook", __name__, url_prefix="/api/v1/alerts", description="For Alertmanager")
MOST_ALERTS = 2000  # of one delivery


# What Alertmanager sends


class Delivered(ma.Schema):
    """What another program sends: fields of its later versions are let through unread, or alerts would be lost."""

    class Meta:
        unknown = ma.EXCLUDE


def _texts(longest: int) -> ma.fields.Dict:
    return ma.fields.Dict(
        keys=ma.fields.String(validate=ma.validate.Length(1, 200)),
        values=ma.fields.String(validate=ma.validate.Length(max=longest)),
        required=True,
        validate=ma.validate.Length(max=100),
    )


class DeliveredAlert(Delivered):
    status = ma.fields.String(required=True, validate=ma.validate.OneOf(("firing", "resolved")))
    labels = _texts(1000)
    annotations = _texts(8000)
    startsAt = ma.fields.AwareDateTime(required=True)
    endsAt = ma.fields.AwareDateTime(load_default=None, metadata={"description": "Read of a resolved one only"})
    fingerprint = ma.fields.String(
        required=True, validate=ma.validate.Regexp(re.compile(r"[0-9a-f]{1,64}\Z"), error="Send hexadecimal digits.")
    )

    @ma.validates_schema
    def resolved_has_an_end(self, data: dict[str, Any], **_: Any) -> None:
        if data["status"] == "resolved" and data["endsAt"] is None:
            raise ma.ValidationError("Say when it ended.", "endsAt")


class DeliveryIn(Delivered):
    """Version 4 of its webhook, as documented by Alertmanager."""

    version = ma.fields.String(required=True, validate=ma.validate.Equal("4", error="Only version 4 is understood."))
    alerts = ma.fields.List(
        ma.fields.Nested(DeliveredAlert), required=True, validate=ma.validate.Length(max=MOST_ALERTS)
    )
    truncatedAlerts = ma.fields.Integer(load_default=0, strict=True, validate=ma.validate.Range(0, 2**31 - 1))


class DeliveryOut(Schema):
    fired = ma.fields.List(ma.fields.Integer(), required=True, metadata={"description": "Alerts that are new"})
    resolved = ma.fields.List(ma.fields.Integer(), required=True)
    unchanged = ma.fields.Integer(required=True, metadata={"description": "Known already, or of an earlier episode"})
    truncated = ma.fields.Integer(required=True, metadata={"description": "How many Alertmanager left out"})


@webhook_bp.post("/webhook")
@requires(*STAFF, scope="alerts")
@webhook_bp.arguments(DeliveryIn)
@webhook_bp.response(200, DeliveryOut)
def deliver(body: dict[str, Any]) -> dict[str, Any]:
    """Take in what Alertmanager delivers; repeated and late deliveries do no harm"""
    truncated = body["truncatedAlerts"]
    heard = alerts.deliver([_notice(entry) for entry in body["alerts"]], by=actor(), truncated=truncated)
    return {
        "fired": heard.fired,
        "resolved": heard.resolved,
        "unchanged": heard.unchanged,
        "truncated": truncated,
    }


def _notice(entry: dict[str, Any]) -> Notice:
    is_over = entry["status"] == "resolved"
    return Notice(
        fingerprint=entry["fingerprint"],
        labels=entry["labels"],
        annotations=entry["annotations"],
        starts_at=entry["startsAt"],
        ends_at=entry["endsAt"] if is_over else None,
    )


# What staff see


class AlertArgs(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(list(ALERT)))
    is_open = ma.fields.Boolean(metadata={"description": "true: firing and acknowledged ones"})
    severity = ma.fields.String(validate=ma.validate.OneOf(ALERT_SEVERITIES))
    machine_id = ma.fields.Integer(validate=ma.validate.Range(1, 2**31 - 1))
    name = ma.fields.String(validate=ma.validate.Length(1, 128))
    source = ma.fields.String(validate=ma.validate.OneOf(("alertmanager", "portal")))
    fingerprint = ma.fields.String(validate=ma.validate.Length(1, 64))
    acknowledged = ma.fields.Boolean()
    silenced = ma.fields.Boolean()
    since = ma.fields.AwareDateTime(metadata={"description": "Was open at some moment from then on"})
    until = ma.fields.AwareDateTime(metadata={"description": "Was open at some moment before then"})


class PersonOut(Schema):
    username = ma.fields.String(required=True)


class SilenceOut(Schema):
    id = ma.fields.Integer(required=True)
    fingerprint = ma.fields.String(required=True)
    labels = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.String(), required=True)
    state = ma.fields.String(required=True)
    reason = ma.fields.String(required=True)
    created_at = ma.fields.AwareDateTime(required=True)
    created_by = ma.fields.Pluck(PersonOut, "username", allow_none=True)
    ends_at = ma.fields.AwareDateTime(required=True)
    ended_at = ma.fields.AwareDateTime(allow_none=True)
    external_id = ma.fields.String(allow_none=True, metadata={"description": "In Alertmanager; null: ours alone"})


class AlertOut(Schema):
    id = ma.fields.Integer(attribute="alert.id", required=True)
    fingerprint = ma.fields.String(attribute="alert.fingerprint", required=True)
    source = ma.fields.String(attribute="alert.source", required=True)
    state = ma.fields.String(attribute="alert.state", required=True)
    name = ma.fields.String(attribute="alert.name", required=True)
    severity = ma.fields.String(attribute="alert.severity", required=True)
    summary = ma.fields.String(required=True)
    description = ma.fields.String(allow_none=True)
    way_out = ma.fields.String(allow_none=True, metadata={"description": "What to do about it"})
    labels = ma.fields.Dict(attribute="alert.labels", keys=ma.fields.String(), values=ma.fields.String(), required=True)
    machine_id = ma.fields.Integer(attribute="alert.machine_id", allow_none=True)
    machine_name = ma.fields.String(allow_none=True)
    starts_at = ma.fields.AwareDateTime(attribute="alert.starts_at", required=True)
    ends_at = ma.fields.AwareDateTime(attribute="alert.ends_at", allow_none=True)
    received_at = ma.fields.AwareDateTime(attribute="alert.received_at", required=True)
    last_heard_at = ma.fields.AwareDateTime(attribute="alert.last_heard_at", required=True)
    acknowledged_at = ma.fields.AwareDateTime(attribute="alert.acknowledged_at", allow_none=True)
    acknowledged_by = ma.fields.Pluck(PersonOut, "username", attribute="alert.acknowledged_by", allow_none=True)
    remark = ma.fields.String(attribute="alert.remark", allow_none=True)
    resolved_at = ma.fields.AwareDateTime(attribute="alert.resolved_at", allow_none=True)
    resolved_by = ma.fields.Pluck(PersonOut, "username", attribute="alert.resolved_by", allow_none=True)
    end_reason = ma.fields.String(attribute="alert.end_reason", allow_none=True)
    silence = ma.fields.Nested(SilenceOut, allow_none=True)


class RemarkIn(Schema):
    remark = ma.fields.String(allow_none=True, load_default=None, validate=ma.validate.Length(max=1000))


class CloseIn(Schema):
    remark = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))


class SilenceIn(Schema):
    until = ma.fields.AwareDateTime(required=True)
    reason = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))


@bp.get("")
@requires(*STAFF, scope="read")
@bp.arguments(AlertArgs, location="query")
@bp.response(200, page_schema(AlertOut))
def list_alerts(args: dict[str, Any]) -> dict[str, Any]:
    """Alerts, newest first, with filters"""
    page, filters = split_page(args)
    found = page_of(alerts.search(**filters), page)
    return {**found, "items": alerts.views(found["items"])}


@bp.get("/<int:alert_id>")
@requires(*STAFF, scope="read")
@bp.response(200, AlertOut)
def get_alert(alert_id: int) -> AlertView:
    """One alert"""
    return alerts.view(alerts.get(alert_id))


@bp.get("/<int:alert_id>/history")
@requires(*STAFF, scope="read")
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(AlertOut))
def list_episodes(args: dict[str, Any], alert_id: int) -> dict[str, Any]:
    """Each time that the same thing was wrong, newest first"""
    found = page_of(alerts.episodes(alerts.get(alert_id)), args)
    return {**found, "items": alerts.views(found["items"])}


@bp.post("/<int:alert_id>/acknowledge")
@requires(*STAFF)
@bp.arguments(RemarkIn)
@bp.response(200, AlertOut)
def acknowledge_alert(body: dict[str, Any], alert_id: int) -> AlertView:
    """Say that I have it in hand"""
    return alerts.view(alerts.acknowledge(alerts.get(alert_id), by=actor(), **body))


@bp.post("/<int:alert_id>/close")
@requires(*STAFF)
@bp.arguments(CloseIn)
@bp.response(200, AlertOut)
def close_alert(body: dict[str, Any], alert_id: int) -> AlertView:
    """Say that it is over, although its source has not"""
    return alerts.view(alerts.close(alerts.get(alert_id), by=actor(), **body))


@bp.post("/<int:alert_id>/silence")
@requires(*STAFF)
@bp.arguments(SilenceIn)
@bp.response(201, SilenceOut)
def silence_alert(body: dict[str, Any], alert_id: int) -> AlertSilence:
    """Hear nothing of it until then, in Alertmanager too where one is configured"""
    return alerts_silences.create(alerts.get(alert_id), by=actor(), **body)


class SilenceArgs(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(list(ALERT_SILENCE)))


@bp.get("/silences")
@requires(*STAFF, scope="read")
@bp.arguments(SilenceArgs, location="query")
@bp.response(200, page_schema(SilenceOut))
def list_silences(args: dict[str, Any]) -> dict[str, Any]:
    """Silences, newest first"""
    page, filters = split_page(args)
    return page_of(alerts_silences.search(**filters), page)


@bp.post("/silences/<int:silence_id>/end")
@requires(*STAFF)
@bp.response(200, SilenceOut)
def end_silence(silence_id: int) -> AlertSilence:
    """End a silence before its time"""
    return alerts_silences.end(alerts_silences.get(silence_id), by=actor())
