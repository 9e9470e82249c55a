"""Bring the database to the schema of this version; a second run does nothing."""

from __future__ import annotations

import argparse

from portal.cli import open_portal
from portal.migrate import migrate


def run(_args: argparse.Namespace) -> None:
    open_portal()
    applied = migrate()
    print("\n".join(f"applied {name}" for name in applied) or "The database is up to date.")
