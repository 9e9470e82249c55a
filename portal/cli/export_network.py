"""Print the export of the network as the stacks in pulumi/ read it: the document of `GET /api/v1/admin/network`."""

from __future__ import annotations

import sys

from portal.cli import open_portal
from portal.db import connection
from portal.services import network_export


def run(_args: object) -> None:
    open_portal()
    with connection():
        export = network_export.current()
    sys.stdout.buffer.write(network_export.text_of(export) + b"\n")
    for left in export.left_out:
        print(f"left out {left['key']}: {left['reason']}", file=sys.stderr)
