"""Write the whole database to a file. The secrets of the instance are no part of it: keep a copy of them elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from portal.cli import open_portal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="where to write it; must not exist")


def run(args: argparse.Namespace) -> None:
    from portal.backup import backup

    settings = open_portal()
    rows = backup(args.file)
    print(f"{args.file}: {sum(rows.values())} rows of {len(rows)} tables.")
    print(f"Without {settings.instance_dir / 'secrets'} what is encrypted in it cannot be read: keep that separately.")
