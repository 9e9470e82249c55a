"""Create an administrator; the one-time password is printed once and must be changed at the first sign-in."""

from __future__ import annotations

import argparse

from portal.cli import open_portal
from portal.services import users
from portal.services.actors import SYSTEM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("username")


def run(args: argparse.Namespace) -> None:
    open_portal()
    user, password = users.create_staff(args.username, "admin", by=SYSTEM)
    print(f"user name: {user.username}\none-time password: {password}")
