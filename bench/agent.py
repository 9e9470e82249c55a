"""What the agent costs a host that it looks after: memory and processor time, idle and beside a running task.

`python -m bench.agent` onboards a Debian 13 with eight (simulated) GPUs and reads /proc of the agent and of its NVML
child there, over SECONDS each, while they report every 15 s.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bench.figures import Figure, machine, show
from bench.rental import Rental, rental

SECONDS = 120
INTERVAL_S = 15
GPUS = 8
HOUR_S = 3600
MB = 1_000_000
# As a training does: a line now and then.
TASK = "while sleep 10; do echo loss 0.1; done"

# The main process, its children, and what children that have ended had used. Sizes in bytes, the largest of all looks.
MEASURE = """
import json, os, sys, time
main, seconds = int(sys.argv[1]), float(sys.argv[2])
tick = os.sysconf("SC_CLK_TCK")

def children():
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[1] == str(main):
                    found.append((int(name), open(f"/proc/{name}/cmdline").read().replace("\\0", " ")))
            except OSError:
                pass
    return [pid for pid, line in found if "nvml-child" in line]

def memory(pid, kind):
    lines = open(f"/proc/{pid}/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind + ":")) * 1024

def used(pid, with_ended):
    fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15 if with_ended else 13])) / tick

def processor(child):
    return used(main, True) + used(child, False)

(child,) = children()
began, before = time.monotonic(), processor(child)
rss, pss = [], []
while time.monotonic() - began < seconds:
    rss.append(memory(main, "Rss"))
    pss.append(memory(main, "Pss") + memory(child, "Pss"))
    time.sleep(5)
taken = time.monotonic() - began
print(json.dumps({"rss": max(rss), "pss": max(pss), "percent": 100 * (processor(child) - before) / taken}))
"""


def main() -> int:
    """Print the figures; 1 if a goal is missed."""
    with rental() as held:
        return show(take(held))


def take(held: Rental) -> list[Figure]:
    world, host = held.world, held.host
    check_as_said(held)
    lease = world.allocate(host, held.tenant_id, lasts_s=HOUR_S)
    with machine() as before:
        idle = measure(held)
    task = world.task(held.person, host, TASK, stop_grace_s=1)
    world.wait_for_task(held.person, task, "running")
    with machine() as beside:
        busy = measure(held)
    world.admin.post(f"admin/leases/{lease['id']}/end", reason="measured")
    world.wait_for_state(host, "ready", timeout_s=240)
    return [*figures("idle lease", idle, before.slowness), *figures("running task", busy, beside.slowness)]


def check_as_said(held: Rental) -> None:
    """Eight GPUs, and a report each 15 s: else the figures are those of something else."""
    gpus = held.world.machine(held.host)["gpus"]
    said = json.loads(held.host.read("/var/lib/remotegpu-agent/desired.json"))
    if len(gpus) != GPUS or said["desired"]["report_interval_s"] != INTERVAL_S:
        raise RuntimeError(f"{len(gpus)} GPUs, {said['desired']['report_interval_s']} s")


def measure(held: Rental) -> Any:
    pid = held.host.run("systemctl show --value --property=MainPID remotegpu-agent").stdout.strip()
    argv = ["python3", "-I", "-c", MEASURE, pid, str(SECONDS)]
    return json.loads(held.host.run(argv, timeout_s=SECONDS + 60).stdout)


def figures(when: str, found: Any, slowness: float) -> list[Figure]:
    share = Figure(f"agent, {when}: processor", found["percent"], "% of a core", at_most=0.5, slowness=slowness)
    return [
        Figure(f"agent, {when}: RSS of the main process", found["rss"] / MB, "MB", at_most=40),
        Figure(f"agent, {when}: PSS with its child", found["pss"] / MB, "MB", at_most=64),
        share,
    ]


if __name__ == "__main__":
    sys.exit(main())
