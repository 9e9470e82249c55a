"""Which key of ours opens a machine, and what differs from what provisioning would make of it. Frozen: never edited
after a release.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import peewee as pw


def utcnow() -> datetime:
    return datetime.now(UTC)


DRIFT = ("none", "drifted", "unknown")


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


class Machine(Table):
    """Of 0001; only its key is named here."""


class Run(Table):
    """Of 0001; only its key is named here."""


class LoginKey(Table):
    """Which key of the portal's own opens this machine's login, and no other one of ours: proven, one row a machine."""

    machine = pw.ForeignKeyField(Machine, primary_key=True, on_delete="CASCADE")
    fingerprint = pw.CharField(64)
    proven_at = UtcDateTimeField(default=utcnow)


class Drift(Table):
    """What the last look found that a provisioning run would change on this machine; one row a machine, overwritten."""

    machine = pw.ForeignKeyField(Machine, primary_key=True, on_delete="CASCADE")
    run = pw.ForeignKeyField(Run, on_delete="CASCADE")
    state = pw.CharField(16, constraints=[one_of("state", DRIFT)])
    reason = pw.TextField(null=True)
    changes = JsonField(default=list)
    looked_at = UtcDateTimeField(default=utcnow)


TABLES = (LoginKey, Drift)


def up(migrator: Any, db: Any) -> None:
    database.initialize(db)
    db.create_tables(TABLES)
