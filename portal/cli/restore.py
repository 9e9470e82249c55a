"""Fill an empty database from a backup. Stop the portal first. Hosts that saw newer orders will freeze and ask."""

from __future__ import annotations

import argparse
from pathlib import Path

from portal.cli import open_portal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what `backup` wrote")
    parser.add_argument("--force", action="store_true", help="delete the rows that are there first")


def run(args: argparse.Namespace) -> None:
    from portal.backup import restore
    from portal.migrate import migrate

    open_portal()
    migrate()
    rows = restore(args.file, force=args.force)
    print(f"{sum(rows.values())} rows of {len(rows)} tables are back.")
