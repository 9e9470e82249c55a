"""Bring the database to the schema of this version: one ledger (`schema_migration`), one source (`migrations/`).

A lock lets one process migrate while the others wait; `serve` migrates once, before it forks.
"""

from __future__ import annotations

from pathlib import Path

from playhouse.migrations import Runner

from portal.db import connection, db, is_sqlite

MIGRATIONS = Path(__file__).parent / "migrations"
LOCK = 0x52475055  # any number, the same in every process


def migrate() -> list[str]:
    """Apply what is pending, in order; returns the names. A second call does nothing."""
    with connection():
        if is_sqlite():
            # No advisory lock there: each migration is a transaction, and the ledger's unique name refuses a second.
            return _run()
        db.execute_sql("SET lock_timeout = 0")  # a migration may take long, and so may waiting for it
        db.execute_sql("SELECT pg_advisory_lock(%s)", (LOCK,))
        try:
            return _run()
        finally:
            db.execute_sql("SELECT pg_advisory_unlock(%s)", (LOCK,))
            db.execute_sql("RESET lock_timeout")


def _run() -> list[str]:
    runner = Runner(db.obj, directory=str(MIGRATIONS), table_name="schema_migration")
    return [str(name) for name in runner.up()]
