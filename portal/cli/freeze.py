"""Say that the database was restored by other means than `restore`: pg_restore, a copied file. Stop the portal first.

No host is told anything before it has said what it knows. Without this a host that was away while the restored portal
counted on would take its word, and close what the portal has forgotten.
"""

from __future__ import annotations

import argparse

from portal.cli import open_portal
from portal.db import atomic, connection
from portal.services import frozen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reason", help="what was restored, for the operator who will compare")


def run(args: argparse.Namespace) -> None:
    open_portal()
    with connection(), atomic():
        count = frozen.freeze_all(args.reason)
    print(f"{count} hosts are told nothing until they have said what they know.")
