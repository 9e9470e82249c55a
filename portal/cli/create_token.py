"""Make the one token of a program of the house (Prometheus, Alertmanager) and print it, alone, on standard output."""

from __future__ import annotations

import argparse
from datetime import timedelta

from portal.cli import open_portal
from portal.services import robots, tokens
from portal.services.actors import SYSTEM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("program", help="its name; the token of before, of the same name, ends")
    parser.add_argument("--scope", required=True, choices=sorted(tokens.SCOPES))
    parser.add_argument("--days", type=int, default=365, help="how long it is good for, at most 366")


def run(args: argparse.Namespace) -> None:
    open_portal()
    life = timedelta(days=args.days)
    print(robots.new_token(args.program, scope=args.scope, life=life, by=SYSTEM))
