"""Alerts, their silences, and rules of one's own. Frozen: never edited after a release."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import peewee as pw


def utcnow() -> datetime:
    return datetime.now(UTC)


ALERT = ("firing", "acknowledged", "resolved")
ALERT_OPEN = ("firing", "acknowledged")
ALERT_SILENCE = ("active", "ended")
ALERT_SEVERITIES = ("critical", "warning", "info")


class UtcDateTimeField(pw.Field):
    """An aware time in UTC, stored so that text order (SQLite) is time order."""

    field_type = "TIMESTAMPTZ"

    def db_value(self, value: datetime | None) -> str | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{self.name}: a time without a zone; use utcnow()")
        return value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")

    def python_value(self, value: Any) -> datetime | None:
        if value is None:
            return None
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        moment: datetime = value.astimezone(UTC)
        return moment


class JsonField(pw.TextField):
    """A JSON value as text; None stays NULL."""

    def db_value(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def python_value(self, value: str | None) -> Any:
        return None if value is None else json.loads(value)


database = pw.DatabaseProxy()


class Table(pw.Model):
    id: int

    class Meta:
        database = database
        legacy_table_names = False
        only_save_dirty = True


def one_of(column: str, values: tuple[str, ...]) -> Any:
    """A CHECK that lists the allowed words, so that no stray writer invents a state."""
    words = ", ".join(f"'{value}'" for value in values)
    return pw.Check(f"{column} IN ({words})")


class User(Table):
    """Of 0001; only its key is named here."""


class Machine(Table):
    """Of 0001; only its key is named here."""


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
    starts_at = UtcDateTimeField()
    ends_at = UtcDateTimeField(null=True)
    received_at = UtcDateTimeField(default=utcnow, index=True)
    last_heard_at = UtcDateTimeField(default=utcnow)
    acknowledged_at = UtcDateTimeField(null=True)
    acknowledged_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    remark = pw.TextField(null=True)
    resolved_at = UtcDateTimeField(null=True)
    resolved_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")  # None: by itself
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
    ends_at = UtcDateTimeField()
    external_id = pw.CharField(64, null=True)
    ended_at = UtcDateTimeField(null=True)
    ended_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")  # None: its time was up


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


TABLES = (Alert, AlertSilence, AlertRule)


def up(migrator: Any, db: Any) -> None:
    database.initialize(db)
    db.create_tables(TABLES)
