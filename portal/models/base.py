"""Field types and the base class that every table shares."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import peewee

from portal.db import db


class UtcDateTimeField(peewee.Field):
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


class JsonField(peewee.TextField):
    """A JSON value as text; None stays NULL."""

    def db_value(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def python_value(self, value: str | None) -> Any:
        return None if value is None else json.loads(value)


class Table(peewee.Model):
    id: peewee.AutoField

    class Meta:
        database = db
        legacy_table_names = False
        only_save_dirty = True


def one_of(column: str, values: tuple[str, ...]) -> Any:
    """A CHECK that lists the allowed words, so that no stray writer invents a state."""
    words = ", ".join(f"'{value}'" for value in values)
    return peewee.Check(f"{column} IN ({words})")
