"""`audit verify`: walk the chain of sealed entries; name the tail that is not, and the first broken entry."""

from __future__ import annotations

import argparse

from portal.cli import open_portal
from portal.services import seals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["verify"])
    parser.add_argument("--head", help="the head that an earlier verify printed: its entries must still be there")


def run(args: argparse.Namespace) -> int:
    open_portal()
    verdict = seals.verify()
    if not verdict.is_whole:
        print(f"BROKEN at audit entry {verdict.broken_id}: {verdict.reason}. {verdict.sealed} entries before it fit.")
        return 1
    if args.head and not seals.holds(args.head):
        print(f"BROKEN: the chain fits together, but {args.head} is no longer part of it: its end was cut off.")
        return 1
    print(f"The chain is whole: {verdict.sealed} entries, head {verdict.head}.")
    print(f"Not sealed yet: {verdict.unsealed}.")
    return 0
