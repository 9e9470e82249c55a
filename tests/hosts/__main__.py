"""Test hosts for shells and playbooks: `python -m tests.hosts boot NAME SUITE`, `list`, `destroy NAME...`.

Every answer is JSON on standard output; what went wrong is one line on standard error and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.hosts.docker import SUITES, Host, HostError, attach, boot, list_hosts, unique


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        json.dump(args.command(args), sys.stdout, indent=2)
    except (HostError, ValueError) as error:
        print(f"tests.hosts: {error}", file=sys.stderr)
        return 1
    print()
    return 0


def _boot(args: argparse.Namespace) -> dict[str, Any]:
    labels = dict(args.label)
    name = unique(args.name) if args.unique else args.name
    host = boot(name, args.suite, prepared=args.prepared, password=args.password, gpus=args.gpus, labels=labels)
    for user, path in args.authorize:
        host.authorize(user, Path(path).read_text())
    return _describe(host)


def _list(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [_describe(host) for host in list_hosts(dict(args.label))]


def _destroy(args: argparse.Namespace) -> list[str]:
    if not args.name and not args.label:
        raise ValueError("destroy what? Give names, or a --label that all of them carry")
    hosts = [attach(name) for name in args.name] + (list_hosts(dict(args.label)) if args.label else [])
    for host in hosts:
        host.destroy()
    return [host.name for host in hosts]


def _describe(host: Host) -> dict[str, Any]:
    return {
        "name": host.name,
        "suite": host.suite,
        "address": host.address,
        "address_v6": host.address_v6,
        "port": host.port,
        "host_keys": host.host_keys,
        "known_hosts": host.known_hosts,
    }


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, not {text!r}")
    return key, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("boot", help="a new host; answers with its addresses and keys once it is up")
    one.set_defaults(command=_boot)
    one.add_argument("name")
    one.add_argument("suite", choices=SUITES)
    one.add_argument("--unique", action="store_true", help="add to the name what no other run has")
    one.add_argument("--prepared", action="store_true", help="with the roles' packages installed")
    one.add_argument("--password", help="the password of the user `installer`; it is locked without one")
    one.add_argument("--gpus", type=int, default=2)
    one.add_argument("--authorize", type=_pair, action="append", default=[], metavar="USER=PUBLIC_KEY_FILE")
    one.add_argument("--label", type=_pair, action="append", default=[], metavar="KEY=VALUE")

    every = commands.add_parser("list", help="the test hosts of this checkout")
    every.set_defaults(command=_list)
    every.add_argument("--label", type=_pair, action="append", default=[], metavar="KEY=VALUE")

    gone = commands.add_parser("destroy", help="remove hosts with their volumes")
    gone.set_defaults(command=_destroy)
    gone.add_argument("name", nargs="*")
    gone.add_argument("--label", type=_pair, action="append", default=[], metavar="KEY=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
