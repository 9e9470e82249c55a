"""Say that the database was restored by other means than `restore`: pg_restore, a copied file. Stop the portal first.

No host is told anything before it has said what it knows, and every sign-in ends. Without this a host that was away
while the restored portal counted on would take its word, and a sign-in that was ended since would work again.
"""

from __future__ import annotations

import argparse

from portal.backup import settle
from portal.cli import open_portal
from portal.db import atomic, connection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reason", help="what was restored, for the operator who will compare")


def run(args: argparse.Namespace) -> None:
    open_portal()
    with connection(), atomic():
        count = settle(args.reason)
    print(f"{count} hosts are told nothing until they have said what they know; everybody signs in again.")
