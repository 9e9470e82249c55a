"""What it takes to make a Debian 13 a GPU host: by the portal, by the portal again, by hand, and ten at once.

`python -m bench.provisioning` boots two bare hosts (root or Docker). The portal provisions the first one twice; then
plain.sh, with the files that the roles had written, brings the second one to the same state over one SSH session, which
is compared. Both download the same packages. Seconds of a run are those between its start and its end; what each role
had of them is told by the runner's callback.

Then one prepared host (it has the packages already: no mirror is in the figure) and ten of them, all told to provision
at once, as a site does with new machines: a run each, of which a worker executes four at a time on two cores. Ten take
from the first one's start to the last one's end. At last a run over all ten that changes nothing. `--hosts N`: fewer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
from tests.support.waiting import until

GOAL = 0.5
AT_ONCE = 10
AT_ONCE_GOAL = 6.0  # times what one takes, on two cores that all hosts share with the portal
RUNS = ("first", "second")
LOOK_S = 2.0
SHOWN = 10
SCRIPT = Path(__file__).with_name("plain.sh")
FILES = (
    "etc/apt/apt.conf.d/20auto-upgrades",
    "etc/apt/apt.conf.d/52remotegpu-unattended-upgrades",
    "etc/needrestart/conf.d/remotegpu.conf",
    "etc/sudoers.d/remotegpu-operators",
    "etc/ssh/sshd_config.d/00-remotegpu.conf",
    "etc/docker/daemon.json",
    "etc/default/prometheus-node-exporter",
    "etc/remotegpu/agent.json",
    "etc/remotegpu/ca.pem",
    "etc/remotegpu/firewall.json",
    "etc/remotegpu/firewall.nft",
    "etc/remotegpu/operator_keys",
    "etc/systemd/system/nftables.service.d/remotegpu.conf",
    "etc/systemd/system/prometheus-node-exporter.service.d/remotegpu.conf",
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=AT_ONCE)
    return show(take(parser.parse_args().hosts))


def take(hosts: int = AT_ONCE) -> list[Figure]:
    return one_by_one() + at_once(hosts)


def one_by_one() -> list[Figure]:
    with portal() as world, booted("first", prepared=False) as host, booted("plain", prepared=False) as plain:
        introduce(world, host)
        (first,), (second,) = provision(world, host), provision(world, host)
        by_hand_s = by_hand(world, host, plain)
        check_same(host, plain)
        profiles = [tasks_of(world, run["id"]) for run in (first, second)]
    print_roles(*profiles)
    for name, run, tasks in zip(RUNS, (first, second), profiles, strict=True):
        print_slowest(f"{name} run: {seconds(run):.1f} s, of which in tasks", tasks)
    return [
        Figure("provisioning: first run", seconds(first)),
        Figure("provisioning: second run", seconds(second)),
        Figure("provisioning: second run / first run", seconds(second) / seconds(first), "", at_most=GOAL),
        Figure("provisioning: plain shell commands", by_hand_s),
        Figure("provisioning: first run / plain shell commands", seconds(first) / by_hand_s, ""),
        *(
            figure
            for name, tasks in zip(RUNS, profiles, strict=True)
            for figure in (
                Figure(f"provisioning: tasks, {name} run", len(tasks), ""),
                Figure(f"provisioning: a task of the {name} run", sum(done.seconds for done in tasks) / len(tasks)),
            )
        ),
    ]


def introduce(world: World, *hosts: Host) -> None:
    for host in hosts:
        world.add(host)
        world.confirm(host)


def provision(world: World, *hosts: Host) -> list[Any]:
    """The runs of hosts that are told at the same time, once all are ready."""
    run_ids = [world.provision(host) for host in hosts]
    for host in hosts:  # asked seldom: the runs know when they ended, and both cores are wanted for them
        world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S, every_s=LOOK_S)
    return [world.admin.get(f"admin/runs/{run_id}").body for run_id in run_ids]


def run_over(world: World, *hosts: Host) -> Any:
    """One run of the playbook over hosts that are right already, once it has succeeded."""
    asked = {"playbook": "gpu_hosts", "machines": [host.name for host in hosts]}
    run_id = world.admin.post("admin/runs", **asked)["id"]

    def ended() -> Any:
        run = world.admin.get(f"admin/runs/{run_id}").body
        return run if run["ended_at"] else None

    run = until(ended, "the run to end", timeout_s=PROVISION_TIMEOUT_S, every_s=LOOK_S, also=world.tell)
    if run["state"] != "succeeded":
        raise RuntimeError(world.tell())
    return run


def seconds(*runs: Any) -> float:
    """From the first start to the last end."""
    began = min(datetime.fromisoformat(run["started_at"]) for run in runs)
    return (max(datetime.fromisoformat(run["ended_at"]) for run in runs) - began).total_seconds()


# -- many


def at_once(hosts: int) -> list[Figure]:
    """One prepared host, then so many others at the same time, by the same portal."""
    with portal() as world, ExitStack() as stack:
        with booted("alone", prepared=True) as alone:
            introduce(world, alone)
            one_s = seconds(*provision(world, alone))
            again_s = seconds(run_over(world, alone))
        many = [stack.enter_context(booted(f"one-of-{hosts}", prepared=True)) for _ in range(hosts)]
        introduce(world, *many)
        many_s = seconds(*provision(world, *many))
        all_again_s = seconds(run_over(world, *many))
    return [
        Figure("provisioning: one prepared host", one_s),
        Figure(f"provisioning: {hosts} prepared hosts at once", many_s),
        Figure(f"provisioning: {hosts} at once / one", many_s / one_s, "", at_most=AT_ONCE_GOAL),
        Figure("provisioning: a run over one host that changes nothing", again_s),
        Figure(f"provisioning: a run over {hosts} hosts that changes nothing", all_again_s),
        Figure(f"provisioning: over {hosts} / over one", all_again_s / again_s, ""),
    ]


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


@dataclass(frozen=True)
class Done:
    """A task that a host has executed, by the runner's callback; what was skipped is none."""

    role: str
    name: str
    seconds: float


def tasks_of(world: World, run_id: int) -> list[Done]:
    """Of a run, in their order."""
    return [
        Done(data.get("role", "playbook"), event["task"], data["duration"])
        for event in events_of(world, run_id)
        if event["kind"] in ("runner_on_ok", "runner_on_failed") and "duration" in (data := event["data"] or {})
    ]


def events_of(world: World, run_id: int) -> Iterator[Any]:
    after, complete = 0, False
    while not complete:
        page = world.admin.get(f"admin/runs/{run_id}/events", after=after, limit=1000).body
        after, complete = page["next"], page["complete"]
        yield from page["items"]


def print_roles(*runs: Sequence[Done]) -> None:
    """Tasks and seconds of each role, in the order in which the roles come: a pair of columns for each run."""
    print(f"\n{'role':<26}" + "".join(f"{name + ' run: tasks':>20}{'seconds':>10}" for name in RUNS))
    for role in dict.fromkeys(done.role for run in runs for done in run):
        own = [[done.seconds for done in run if done.role == role] for run in runs]
        print(f"{role:<26}" + "".join(f"{len(each):>20}{sum(each):>10.2f}" for each in own))


def print_slowest(title: str, tasks: Iterable[Done]) -> None:
    """The tasks that took longest."""
    print(f"\nprovisioning, {title}")
    slowest = sorted(tasks, key=lambda done: -done.seconds)
    for done in slowest[:SHOWN]:
        print(f"  {done.seconds:7.2f} s  {done.role}: {done.name}")
    rest = slowest[SHOWN:]
    print(f"  {sum(done.seconds for done in rest):7.2f} s  {len(rest)} more together")


if __name__ == "__main__":
    sys.exit(main())
