"""`verify-report FILE`: check a signed reclaim report with the public key alone, without database or secrets."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from portal.services import reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("INSTANCE_DIR") or "instance") / "secrets" / "report_signing_key.pub.pem"
    parser.add_argument("file", type=Path, help="the report, as downloaded from the portal")
    parser.add_argument("--public-key", type=Path, default=default, help=f"PEM file of the public key [{default}]")


def run(args: argparse.Namespace) -> int:
    try:
        key = reports.load_public_key(args.public_key)
        report = reports.verify(args.file.read_bytes(), key)
    except (OSError, ValueError) as error:
        print(f"Cannot check {args.file}: {error}")
        return 1
    except reports.NotGenuine as error:
        print(f"NOT GENUINE: {args.file}: {error}.")
        return 1
    print(f"Genuine, signed with {reports.fingerprint(key)}.")
    machine, lease, reclaim = report["machine"], report["lease"], report["reclaim"]
    print(f"Machine {machine['name']} ({machine['id']}) after lease {lease['id']}: {report['result']}.")
    print(f"Reclaim {reclaim['id']}, number {reclaim['number']}, ended {reclaim['ended_at']}, level {report['level']}.")
    for reason in report["reasons"]:
        print(f"  {reason}")
    return 0
