"""What it takes to make a bare Debian 13 a GPU host: by the portal, by the portal again, and by hand.

`python -m bench.provisioning` boots two bare hosts (root or Docker). The portal provisions the first one twice; then
plain.sh, with the files that the roles had written, brings the second one to the same state over one SSH session, which
is compared. Both download the same packages. Seconds of a run are those between its start and its end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.figures import Figure, show
from bench.rental import booted, portal
from portal import db
from portal.services import agents, config, machines, vault
from portal.services.actors import SYSTEM
from portal.settings import load
from tests.e2e.world import PROVISION_TIMEOUT_S, World, new_key
from tests.hosts import Host

GOAL = 0.5
SHOWN = 10
SCRIPT = Path(__file__).with_name("plain.sh")
FILES = (
    "etc/apt/apt.conf.d/20auto-upgrades",
    "etc/apt/apt.conf.d/52remotegpu-unattended-upgrades",
    "etc/sudoers.d/remotegpu-operators",
    "etc/ssh/sshd_config.d/00-remotegpu.conf",
    "etc/docker/daemon.json",
    "etc/default/prometheus-node-exporter",
    "etc/remotegpu/agent.json",
    "etc/remotegpu/ca.pem",
    "etc/remotegpu/firewall.nft",
    "etc/remotegpu/operator_keys",
    "etc/systemd/system/nftables.service.d/remotegpu.conf",
    "etc/systemd/system/remotegpu-agent.service",
    "etc/systemd/system/remotegpu-firewall.service",
    "etc/systemd/system/remotegpu-lease-guard.service",
    "home/installer/.ssh",
    "opt/remotegpu/remotegpu-agent.pyz",
    "usr/local/bin/remotegpu-agent",
)
# Packages with their state, files with their content, units with theirs. What no two hosts share is left out.
STATE = r"""
dpkg-query --show --showformat='package ${Package} ${Version} ${db:Status-Abbrev}\n'
find /etc /opt /usr/local /home -xdev \( -type f -o -type l \) -not -path '*/__pycache__/*' -not -path '*/shiv/*' \
    -not -name 'ssh_host_*' -not -name '*-' -not -path /etc/shadow -not -path /etc/machine-id -not -path /etc/hostname \
    -not -path /etc/hosts -not -path /etc/resolv.conf -not -path '/etc/fake-gpu/*' -not -name ld.so.cache \
    -not -name '.sudo_as_admin_successful' -not -path /etc/passwd -not -path /etc/group -not -path /etc/gshadow \
    -not -path '/home/ops/*' -not -path /etc/apt/apt.conf.d/50testhost | sort |
    while read -r path; do
        if [ -L "$path" ]; then echo "link $path $(readlink "$path")"
        else echo "file $path $(stat -c '%a %U' "$path") $(sha256sum <"$path")"; fi
    done
getent passwd group | cut -d: -f1,4,6,7 | sed -E 's/^([^:]*):[0-9]+/\1/' | sort
for unit in ssh cron docker prometheus-node-exporter remotegpu-firewall remotegpu-lease-guard remotegpu-agent; do
    echo "unit $unit $(systemctl is-enabled $unit) $(systemctl is-active $unit)"
done
remotegpu-agent status --json | grep -o '"enrolled": *[a-z]*'
"""


def main() -> int:
    """Print the figures; 1 if a goal is missed."""
    return show(take())


def take() -> list[Figure]:
    with portal() as world, booted("first", prepared=False) as host, booted("plain", prepared=False) as plain:
        world.add(host)
        world.confirm(host)
        first = provision(world, host)
        second = provision(world, host)
        by_hand_s = by_hand(world, host, plain)
        check_same(host, plain)
        print_slowest(world, first, second)
    return [
        Figure("provisioning: first run", seconds(first)),
        Figure("provisioning: second run", seconds(second)),
        Figure("provisioning: second run / first run", seconds(second) / seconds(first), "", at_most=GOAL),
        Figure("provisioning: plain shell commands", by_hand_s),
        Figure("provisioning: first run / plain shell commands", seconds(first) / by_hand_s, ""),
    ]


def provision(world: World, host: Host) -> Any:
    """The run, once the machine is ready."""
    run_id = world.provision(host)
    world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S)
    return world.admin.get(f"admin/runs/{run_id}").body


def seconds(run: Any) -> float:
    began, ended = (datetime.fromisoformat(run[name]) for name in ("started_at", "ended_at"))
    return (ended - began).total_seconds()


# -- by hand


def by_hand(world: World, example: Host, host: Host) -> float:
    """Seconds of one SSH session as `ops`, who has sudo."""
    key = new_key(world.folder / "ops")
    host.authorize("ops", key.with_suffix(".pub").read_text())
    files = subprocess.run(
        ["docker", "exec", example.id, "tar", "-c", "-C", "/", *FILES], check=True, stdout=subprocess.PIPE
    ).stdout
    host.put("/root/plain.tar", files, mode="0600")
    host.put("/etc/remotegpu/enroll-token", enroll_token(world, host) + "\n", mode="0600")
    began = time.monotonic()
    done = subprocess.run(
        host.ssh_argv("ops", key, "sudo sh -s"), input=SCRIPT.read_bytes(), capture_output=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"{SCRIPT.name}: {done.returncode}\n{(done.stdout + done.stderr).decode()}")
    return time.monotonic() - began


def enroll_token(world: World, host: Host) -> str:
    """As a run is given one; nobody else gets to see it, so it is asked for in the portal's own process."""
    machine_id = world.add(host)
    settings = load({"INSTANCE_DIR": str(world.portal.instance), "PUBLIC_URL": world.portal.url})
    db.connect(settings.database_url)
    config.use(settings)
    vault.unlock(settings)
    with db.connection():
        return agents.new_enroll_token(machines.get(machine_id), by=SYSTEM)


def check_same(host: Host, other: Host) -> None:
    """Both ways lead to the same state. Raises RuntimeError with what is different."""
    mine, theirs = state_of(host), state_of(other)
    only = [f"  {host.name}: {line}" for line in sorted(mine - theirs)]
    only += [f"  {other.name}: {line}" for line in sorted(theirs - mine)]
    if only:
        raise RuntimeError("\n".join(["the hosts differ:", *only]))


def state_of(host: Host) -> set[str]:
    return set(host.run(STATE, timeout_s=300).stdout.splitlines())


# -- where the time goes


def print_slowest(world: World, *runs: Any) -> None:
    """The tasks that took longest, by the runner's own events."""
    for title, run in zip(("first", "second"), runs, strict=True):
        print(f"\nprovisioning, {title} run: {seconds(run):.1f} s, of which in tasks")
        took = seconds_per_task(world, run["id"])
        for task, task_s in took.most_common(SHOWN):
            print(f"  {task_s:7.2f} s  {task}")
        rest_s = sum(took.values()) - sum(task_s for _, task_s in took.most_common(SHOWN))
        print(f"  {rest_s:7.2f} s  {max(0, len(took) - SHOWN)} more together")


def seconds_per_task(world: World, run_id: int) -> Counter[str]:
    took: Counter[str] = Counter()
    after, complete = 0, False
    while not complete:
        page = world.admin.get(f"admin/runs/{run_id}/events", after=after, limit=1000).body
        after, complete = page["next"], page["complete"]
        for event in page["items"]:
            if event["kind"].startswith("runner_on_") and (data := event["data"]) and "duration" in data:
                took[f"{data.get('role', 'playbook')}: {event['task']}"] += data["duration"]
    return took


if __name__ == "__main__":
    sys.exit(main())
