"""Which ids of attempts a host may know from a past that the portal has lost. Frozen: never edited after a release."""

from __future__ import annotations

from typing import Any


def up(migrator: Any, db: Any) -> None:
    db.execute_sql("ALTER TABLE machine ADD COLUMN attempts_above INTEGER NOT NULL DEFAULT 0")
