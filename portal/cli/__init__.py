"""The command line: one module per command, found here by name and imported only when it is asked for.

A command's module has `run(args) -> int | None` (the exit code) and, where it takes arguments, `add_arguments(parser)`.
What goes wrong by the rules or the settings is one sentence on stderr and exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from portal.errors import Error
from portal.settings import Settings, SettingsError, load

# name → module, and what it does in one line
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("portal.cli.init", "make the secrets, the keys and the CA that are missing"),
    "serve": ("portal.cli.serve", "migrate, start web and worker, and end them together"),
    "web": ("portal.cli.web", "serve pages and API"),
    "worker": ("portal.cli.worker", "execute runs and sweep"),
    "migrate": ("portal.cli.migrate", "bring the database to the schema of this version"),
    "create-admin": ("portal.cli.create_admin", "create an administrator and print the one-time password"),
    "create-token": ("portal.cli.create_token", "make the token of a program such as Prometheus and print it"),
    "reset-password": ("portal.cli.reset_password", "give somebody a new one-time password and end their sign-ins"),
    "verify-report": ("portal.cli.verify_report", "check a reclaim report with the public key alone"),
    "export-network": ("portal.cli.export_network", "print the export of the network for the stacks in pulumi/"),
    "backup": ("portal.cli.backup", "write the whole database to a file"),
    "restore": ("portal.cli.restore", "fill an empty database from such a file"),
    "freeze": ("portal.cli.freeze", "say that the database was restored by other means than restore"),
    "audit": ("portal.cli.audit", "verify the chain of sealed audit entries"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"There is no command {name}.\n\n{usage()}", file=sys.stderr)
        return 2
    module = import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(f"python -m portal {name}", description=module.__doc__)
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(rest)) or 0)
    except (Error, SettingsError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def usage() -> str:
    lines = [f"  {name:<16}{what}" for name, (_module, what) in COMMANDS.items()]
    return "usage: python -m portal COMMAND [ARGUMENTS]\n\n" + "\n".join(lines)


def open_portal() -> Settings:
    """Load the settings and bind the services to them: what a command does before it calls one."""
    from portal import start

    settings = load()
    start.bind(settings)
    return settings
