"""How much output of its tasks is kept of a lease, counted where it is added. Frozen: never edited after a release."""

from __future__ import annotations

from typing import Any

# Of a lease that continues another, and of that one, it is with the lease that made their login.
COUNTED = """
UPDATE lease SET log_bytes = (
    SELECT COALESCE(SUM(LENGTH(log_range.data)), 0)
    FROM log_range
    JOIN attempt ON attempt.id = log_range.attempt_id
    JOIN task ON task.id = attempt.task_id
    JOIN lease AS other ON other.id = task.lease_id
    WHERE COALESCE(other.login, 'lease' || other.id) = 'lease' || lease.id
)
"""


def up(migrator: Any, db: Any) -> None:
    db.execute_sql("ALTER TABLE lease ADD COLUMN log_bytes BIGINT NOT NULL DEFAULT 0")
    db.execute_sql(COUNTED)
