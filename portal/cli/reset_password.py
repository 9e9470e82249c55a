"""Give somebody a new one-time password; all their sign-ins end."""

from __future__ import annotations

import argparse

from portal.cli import open_portal
from portal.errors import NotFound
from portal.services import users
from portal.services.actors import SYSTEM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("username")


def run(args: argparse.Namespace) -> None:
    open_portal()
    user = users.find(args.username)
    if user is None:
        raise NotFound(f"There is no user called {args.username}.")
    print(f"one-time password: {users.reset_password(user, by=SYSTEM)}")
