"""Names and openings: the pure plan of a large fleet, and the whole program beside the bare library.

The bare library registers the same resources with the same arguments in one loop, before the same engine double: what
is left is what our reading, checking and planning cost. Each is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.figures import Figure, machine, show

ROOT = Path(__file__).parent.parent
ZONE = "023e105f4ecef8ad9ca31a8372d0c353"
BARE = """
import json
from pathlib import Path
import pulumi
import pulumi_cloudflare as sdk

provider = sdk.Provider("cloudflare", sdk.ProviderArgs(api_token=pulumi.Config("cloudflare").get_secret("apiToken")))
for row in (json.loads(Path(pulumi.Config("remotegpu").require("export")).read_bytes())["names"]):
    sdk.DnsRecord(
        row["key"],
        sdk.DnsRecordArgs(
            zone_id="ZONE", name=row["name"], type=row["type"], ttl=1, proxied=False, comment="RemoteGPU " + row["key"],
            content=row["values"][0],
        ),
        pulumi.ResourceOptions(provider=provider, delete_before_replace=True),
    )
""".replace("ZONE", ZONE)
PLAN = """
import resource, sys, time
sys.path.insert(0, "pulumi")
from remotegpu_network import __main__ as command
began = time.monotonic()
status = command.main(["plan", sys.argv[2], "--applied", sys.argv[1], "--stack", sys.argv[3]])
took = time.monotonic() - began
print(status, took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""
STACK = """
config:
  remotegpu:environment: production
  remotegpu:clouds: [cloudflare, aws]
"""


def take(machines: int = 10_000, resources: int = 4_000, rounds: int = 3) -> list[Figure]:
    """The figures. `rounds`: how often each is run, the two programs in turns; the fastest counts."""
    with TemporaryDirectory() as folder:
        return [*plan_of(machines, rounds, Path(folder)), *whole_program(resources, rounds, Path(folder))]


def plan_of(machines: int, rounds: int, folder: Path) -> list[Figure]:
    """Two exports of so many machines with 3 records and 5 rules each, of which every hundredth differs."""
    for file, generation in (("before.json", 1), ("after.json", 2)):
        (folder / file).write_text(json.dumps(fleet(machines, generation)))
    (folder / "Pulumi.bench.yaml").write_text(STACK)
    files = [str(folder / file) for file in ("before.json", "after.json", "Pulumi.bench.yaml")]
    command = [sys.executable, "-c", PLAN, *files]
    taken = list[tuple[float, float]]()
    with machine() as beside:
        for _ in range(rounds):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            status, seconds, peak = (float(part) for part in done.stderr.split())
            if status:
                raise RuntimeError(done.stderr)
            taken.append((seconds, peak))
    print(f"{machines} machines: {done.stdout.splitlines()[-1]}")
    seconds, peak = min(taken)
    name = f"plan of {machines:,} machines, 3 records and 5 rules each, two exports"
    return [
        Figure(name, seconds, at_most=5, slowness=beside.slowness),
        Figure("its peak of memory", peak / 1e6, "MB", at_most=400),
    ]


def whole_program(resources: int, rounds: int, folder: Path) -> list[Figure]:
    """Creating so many records by the program, and by the bare library."""
    from tests.network.engine import Engine

    bare = folder / "bare"
    bare.mkdir()
    (bare / "__main__.py").write_text(BARE)
    export = fleet(resources, 1, records=1, rules=0)
    ours, theirs = list[float](), list[float]()
    for number in range(rounds):
        for kept, program in ((ours, None), (theirs, bare)):
            engine = Engine(folder, stack=f"bench{number}", **({"program": program} if program else {}))
            began = time.monotonic()
            done = engine.up(export)
            kept.append(time.monotonic() - began)
            if done.code or len(engine.cloud.things) != resources:
                raise RuntimeError(done.told)
    return [
        Figure(f"the program with {resources:,} records before an engine double", min(ours)),
        Figure("the same / the bare library registering the same", min(ours) / min(theirs), "", at_most=1.1),
    ]


def fleet(machines: int, generation: int, *, records: int = 3, rules: int = 5) -> dict[str, Any]:
    """A sealed export. Of generation 2 every hundredth machine has another address and another source."""
    sys.path.insert(0, str(ROOT / "pulumi"))
    from remotegpu_network import document

    names, openings = [], []
    for number in range(machines):
        address = f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        if generation == 2 and number % 100 == 0:
            address = f"203.0.113.{number // 100 % 250}"
        values = [
            ("address", "A", address),
            ("address6", "AAAA", f"2001:db8::{number + 1:x}"),
            ("text", "TXT", f"m{number}"),
        ]
        names += [_name(number, *value) for value in values[:records]]
        openings += [_opening(number, rule, generation) for rule in range(rules)]
    groups = [
        {"key": f"g{part}", "name": f"g{part}", "cloud": "aws", "region": "eu-central-1", "vpc": "vpc-1", "id": None}
        for part in range(-(-machines // 10) if rules else 0)
    ]
    sealed: dict[str, Any] = document.seal(
        {
            "environment": "production", "generation": generation, "generated_at": "2026-11-26T00:00:00Z",
            "machines": [{"key": f"m{number}", "name": f"gpu-{number}"} for number in range(machines)],
            "zones": [{"key": "z", "name": "gpu.example.org", "cloud": "cloudflare", "id": ZONE}],
            "groups": groups, "names": names, "openings": openings,
        }
    )  # fmt: skip
    return sealed


def _name(number: int, slot: str, kind: str, value: str) -> dict[str, Any]:
    return {
        "key": f"m{number}.{slot}", "machine": f"m{number}", "lease": None, "zone": "z",
        "name": f"gpu-{number}.gpu.example.org", "type": kind, "ttl_s": None, "proxied": False,
        "purpose": "other", "values": [value], "previous_keys": [],
    }  # fmt: skip


def _opening(number: int, rule: int, generation: int) -> dict[str, Any]:
    changed = generation == 2 and number % 100 == 0
    network = "203.0.113.0/24" if changed else f"10.{number >> 8 & 255}.{number & 255}.{rule * 8}/29"
    return {
        "key": f"m{number}.o{rule}", "machine": f"m{number}", "lease": None, "group": f"g{number // 10}",
        "protocol": "tcp", "ports": [22 + rule * 1000, 22 + rule * 1000], "source": network,
        "reason": None, "ends_at": None,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=int, default=10_000)
    parser.add_argument("--resources", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    sys.exit(show(take(chosen.machines, chosen.resources, chosen.rounds)))
