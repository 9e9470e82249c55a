"""Alerts: each time that something was wrong, the silences over them, and the rules that staff wrote themselves."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField, one_of
from portal.models.machines import Machine
from portal.models.people import User
from portal.models.states import ALERT, ALERT_OPEN, ALERT_SEVERITIES, ALERT_SILENCE


class Alert(Table):
    """One episode: from the moment it fires until it is over. The index allows one open episode a fingerprint.

    `starts_at` and `ends_at` are the source's word and its clock; `received_at` and `resolved_at` are ours.
    """

    fingerprint = pw.CharField(64)  # of the labels, as Prometheus computes it, whichever source raised it
    source = pw.CharField(16, constraints=[one_of("source", ("alertmanager", "portal"))])
    state = pw.CharField(16, default="firing", constraints=[one_of("state", tuple(ALERT))])
    name = pw.CharField(128)
    severity = pw.CharField(16, constraints=[one_of("severity", ALERT_SEVERITIES)])
    labels = JsonField(default=dict)
    annotations = JsonField(default=dict)
    machine = pw.ForeignKeyField(Machine, null=True, backref="alerts", on_delete="SET NULL")
    machine_id: int | None
    starts_at = UtcDateTimeField()
    ends_at = UtcDateTimeField(null=True)
    received_at = UtcDateTimeField(default=utcnow, index=True)
    last_heard_at = UtcDateTimeField(default=utcnow)
    acknowledged_at = UtcDateTimeField(null=True)
    acknowledged_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    acknowledged_by_id: int | None
    remark = pw.TextField(null=True)
    resolved_at = UtcDateTimeField(null=True)
    resolved_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")  # None: by itself
    resolved_by_id: int | None
    end_reason = pw.TextField(null=True)


Alert.add_index(Alert.fingerprint, unique=True, where=(Alert.state << ALERT_OPEN), name="one_open_alert_a_fingerprint")
Alert.add_index(Alert.fingerprint, Alert.id, name="alert_episodes")


class AlertSilence(Table):
    """Somebody wants to hear nothing of a fingerprint until `ends_at`. `external_id` is Alertmanager's copy of it."""

    fingerprint = pw.CharField(64)
    labels = JsonField(default=dict)
    state = pw.CharField(16, default="active", constraints=[one_of("state", tuple(ALERT_SILENCE))])
    reason = pw.TextField()
    created_at = UtcDateTimeField(default=utcnow)
    created_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    created_by_id: int | None
    ends_at = UtcDateTimeField()
    external_id = pw.CharField(64, null=True)
    ended_at = UtcDateTimeField(null=True)
    ended_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")  # None: its time was up
    ended_by_id: int | None


AlertSilence.add_index(
    AlertSilence.fingerprint,
    unique=True,
    where=(AlertSilence.state == "active"),
    name="one_active_silence_a_fingerprint",
)


class AlertRule(Table):
    """A rule that staff wrote: `metric` is a word of the list in services/alerts_rules.py, rendered for Prometheus."""

    name = pw.CharField(64, unique=True)
    metric = pw.CharField(40)
    condition = pw.CharField(4, constraints=[one_of("condition", (">", ">=", "<", "<="))])
    threshold = pw.DoubleField()
    duration_s = pw.IntegerField()
    severity = pw.CharField(16, constraints=[one_of("severity", ALERT_SEVERITIES)])
    scope = JsonField(default=dict)  # {} is every machine, {"region": …}, {"machines": [name, …]}
    summary = pw.TextField()
    way_out = pw.TextField(null=True)
    is_on = pw.BooleanField(default=False)
    created_at = UtcDateTimeField(default=utcnow)
    changed_at = UtcDateTimeField(default=utcnow)
    changed_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    changed_by_id: int | None
