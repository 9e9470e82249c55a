"""How long it takes to clean a host and to prove it, step by step, after a tenant who left it in every way dirty.

`python -m bench.reclaim` onboards a Debian 13, plants each way of tests/support/dirt.py and reads the durations from
the signed report: the agent's cleaning, and the checks that the verifying run made on the host and from outside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from bench.figures import Figure, show
from bench.rental import Rental, rental
from tests.e2e.world import RECLAIM_TIMEOUT_S
from tests.support.dirt import WAYS, Tenant, plant_all

HOUR_S = 3600


def main() -> int:
    """Print the figures; 1 if a goal is missed."""
    with rental() as held:
        return show(take(held))


def take(held: Rental) -> list[Figure]:
    world, host = held.world, held.host
    lease = world.allocate(host, held.tenant_id, lasts_s=HOUR_S)
    host.run("systemctl stop remotegpu-agent")  # it would close again what the dirt opens
    plant_all(host, Tenant.of(host, lease["login"]))
    host.run("systemctl start remotegpu-agent")
    machine_id = world.machines[host.name]
    world.admin.post(f"admin/machines/{machine_id}/reclaim", reason="measured", force=True, confirm=host.name)
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)
    reclaim = world.admin.get("admin/reclaims", machine_id=machine_id)["items"][0]
    report = json.loads(world.admin.download(f"admin/reclaims/{reclaim['id']}/report"))["report"]
    return figures(report)


def figures(report: Any) -> list[Figure]:
    """What there is to say of a report; the durations of all steps are printed."""
    cleaning, verdict = report["cleaning"]["result"], report["verification"]["verdict"]
    print(f"\nreclaim after {len(WAYS)} ways to leave a host dirty: {report['result']}")
    print(by_duration("cleaning step", cleaning["steps"]))
    print(by_duration("verification check", verdict["checks"]))
    return [
        Figure("reclaim: from the order to ready", seconds(report["reclaim"])),
        Figure(f"reclaim: cleaning, {len(cleaning['steps'])} steps", seconds(cleaning)),
        Figure(f"reclaim: verification, {len(verdict['checks'])} checks", seconds(verdict)),
    ]


def by_duration(kind: str, items: Sequence[Any]) -> str:
    """All of them, the longest first."""
    ordered = sorted(items, key=lambda item: float(item["duration_s"]), reverse=True)
    return "\n".join(f"  {item['duration_s']:7.2f} s  {kind} {item['id']}" for item in ordered)


def seconds(part: Any) -> float:
    began, ended = (datetime.fromisoformat(part[name]) for name in ("started_at", "ended_at"))
    return (ended - began).total_seconds()


if __name__ == "__main__":
    sys.exit(main())
