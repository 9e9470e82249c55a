"""How much output of its tasks is kept of a lease, counted where it is added. Frozen: never edited after a release."""

from __future__ import annotations

from typing import Any

# Of a lease that continues another, and of that one, it is with the lease that made their login. All is read only once.
COUNTED = """
WITH kept AS MATERIALIZED (
    SELECT COALESCE(lease.login, 'lease' || lease.id) AS login, CAST(SUM(LENGTH(log_range.data)) AS BIGINT) AS bytes
    FROM log_range
    JOIN attempt ON attempt.id = log_range.attempt_id
    JOIN task ON task.id = attempt.task_id
    JOIN lease ON lease.id = task.lease_id
    GROUP BY 1
)
UPDATE lease SET log_bytes = (SELECT bytes FROM kept WHERE kept.login = 'lease' || lease.id)
WHERE 'lease' || id IN (SELECT login FROM kept)
"""


def up(migrator: Any, db: Any) -> None:
    db.execute_sql("ALTER TABLE lease ADD COLUMN log_bytes BIGINT NOT NULL DEFAULT 0")
    db.execute_sql(COUNTED)
