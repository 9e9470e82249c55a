"""A small world to click through: `python -m tests.hosts.demo up` (`make demo`), `down` (`make demo-down`).

Two prepared test hosts beside a portal that runs in the background as `python -m portal serve`. Everything in it came
to be through the front door, as it does for real machines: added by address and SSH password, fingerprint compared,
provisioned, leased. What `up` made is written down in `.cache/demo`, and `down` removes that and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import lanes
from tests.e2e.world import INSTALLER_PASSWORD, PROVISION_TIMEOUT_S, Person, World
from tests.hosts.docker import IMAGE_DIR, Host, HostError, boot, gateway_address, list_hosts, unique
from tests.hosts.owner import started_at
from tests.support.portal import OWN_PASSWORD, Client, Portal, free_port
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "demo"
RECORD = FOLDER / "made.json"
LOG = FOLDER / "portal.log"
LABEL = {"remotegpu-demo": "1"}
HOSTS = {"demo-1": "bookworm", "demo-2": "trixie"}
USUAL_PORT = 8443
STOP_S = 30.0
DAY_S = 24 * 3600
NEEDED = ("docker.io", "mmdebstrap", "iptables", "openssh-client", "gcc", "libc6-dev", "util-linux", "sshpass")

FINISHED = """\
echo "I am $(id -un), my GPUs are $CUDA_VISIBLE_DEVICES"
nvidia-smi
"""
RUNNING = """\
for epoch in $(seq 1 100000); do
  echo "epoch $epoch  loss $(awk -v e=$epoch 'BEGIN { printf "%.4f", 2.3 / sqrt(e) }')"
  sleep 2
done
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.demo", description=__doc__)
    parser.add_argument("what", choices=["up", "down"])
    what = parser.parse_args(argv).what
    try:
        return up() if what == "up" else down()
    except HostError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def up() -> int:
    """Make the world, or say why not; what was begun and did not come to its end is removed."""
    refuse_without_hosts()
    if RECORD.exists():
        print(f"The demo is there already, at {json.loads(RECORD.read_text())['url']}. Remove it: make demo-down")
        return 1
    install_packages()
    try:
        make()
    except BaseException:
        say("It did not work; removing what was begun.")
        down()
        raise
    return 0


def refuse_without_hosts() -> None:
    may_use_docker = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    if os.geteuid() != 0 and not may_use_docker:
        sys.exit("make demo boots two test hosts: it needs root or Docker. Without either: make run.")


def install_packages() -> None:
    missing = [name for name in NEEDED if not lanes.is_there(lanes.PACKAGES[name])]
    if missing and os.geteuid() != 0:
        sys.exit(f"make demo needs these packages: apt-get install {' '.join(missing)}")
    if missing:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], check=True, env=quiet, stdout=subprocess.DEVNULL)


def make() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    note(begun=True)
    say("Booting two hosts (the first time their images are built, which takes minutes)…")
    hosts = [
        boot(unique(name), suite, prepared=True, password=INSTALLER_PASSWORD, labels=LABEL)
        for name, suite in HOSTS.items()
    ]
    say("Starting the portal…")
    portal = portal_of(gateway_address())
    note(url=portal.url)
    admin = serve(portal)
    world = World(portal, admin, FOLDER)
    onboard(world, hosts)
    tell(world, fill(world, hosts), hosts)


# -- the portal, in the background


def portal_of(address: str) -> Portal:
    """At the usual port, or at any other where something listens there already."""
    with socket.socket() as asking:
        port = USUAL_PORT if asking.connect_ex((address, USUAL_PORT)) else free_port(address)
    return Portal(FOLDER / "instance", address=address, port=port, environ={"REPORT_INTERVAL_S": "5"})


def serve(portal: Portal) -> Client:
    """Start it as `make run` does, in a session of its own, and sign in with the password that it prints once."""
    environ = {**os.environ, **portal.environ, "INSTANCE_DIR": str(portal.instance), "PUBLIC_URL": portal.url}
    environ["BIND"] = portal.url.removeprefix("https://")
    command = [sys.executable, "-m", "portal", "serve", "--first-run"]
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    note(pid=process.pid, started_at=started_at(process.pid))
    subprocess.run([IMAGE_DIR / "dockerd", "start", str(process.pid)], check=True)  # its hosts go on when we have ended
    until(lambda: process.poll() is not None or "answers at" in LOG.read_text(), "the portal to answer", timeout_s=90)
    shown = re.search(r"one-time password: (\S+)", LOG.read_text())
    assert shown, LOG.read_text()
    admin = Client(portal)
    admin.sign_in_first_time("admin", shown[1])
    return admin


# -- the world


def onboard(world: World, hosts: Sequence[Host]) -> None:
    for host in hosts:
        world.add(host)
        world.confirm(host)
        world.provision(host)
    say(f"Provisioning both through the portal; watch it: {world.portal.url} (admin / {OWN_PASSWORD})")
    for host in hosts:
        world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S)
        world.wait_until_healthy(host)


def fill(world: World, hosts: Sequence[Host]) -> list[Person]:
    """Two companies, three people, one lease, a task that has ended and one that goes on."""
    quark, northern = world.tenant("Quark Labs"), world.tenant("Northern Lights")
    alice, bob = world.person("alice", quark, "owner"), world.person("bob", quark)
    carol = world.person("carol", northern, "owner")
    leased = hosts[0]
    world.allocate(leased, quark, lasts_s=7 * DAY_S, retain_s=DAY_S)
    task = world.task(alice, leased, FINISHED)
    world.wait_for_task(alice, task, "succeeded")
    world.task(alice, leased, RUNNING, time_limit_s=7 * DAY_S)
    busy = {"utilization_gpu": "93", "temperature_gpu": "61", "power_draw_mw": "548000", "memory_used": str(61 * 2**30)}
    leased.gpu.show(leased.gpu.scenario.having("gpu0", **busy))
    return [alice, bob, carol]


def tell(world: World, people: Sequence[Person], hosts: Sequence[Host]) -> None:
    alice, bob, carol = people
    leased, free = hosts
    connection = alice.client.get(f"customer/machines/{world.machines[leased.name]}/connection")
    print(
        f"""
RemoteGPU answers at {world.portal.url} (your browser will ask about its own CA: {world.portal.ca_file})

  admin    an operator's pages
  {alice.name:<9}owner in Quark Labs, which has leased {leased.name}
  {bob.name:<9}member of Quark Labs
  {carol.name:<9}owner in Northern Lights, which has leased nothing

  The password of each: {OWN_PASSWORD}

To click, as admin: {free.name} → Allocate; {leased.name} → Reclaim; any machine → Maintenance; Runs → the output.
To click, as alice: My machines → Connect; Tasks → the one that runs → Stop; SSH keys → Add.

From this shell, as alice:
  {connection["command"].replace("ssh ", f"ssh -i {alice.key} ", 1)}

make demo-down removes all of it.""",
        flush=True,
    )


# -- the end


def down() -> int:
    """Remove what `up` has made, however far it came."""
    made = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if made.get("pid"):
        end_process(made["pid"], made["started_at"])
    if made:
        for host in list_hosts(LABEL):
            host.destroy()
    if made:
        for pid in filter(None, (made.get("pid"), os.getpid())):
            subprocess.run([IMAGE_DIR / "dockerd", "stop", str(pid)], check=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    say("The demo is removed." if made else "There is no demo.")
    return 0


def end_process(pid: int, since: str | None) -> None:
    """End the portal, if that pid is still the process that was started; it ends its own parts."""
    if since is None or started_at(pid) != since:
        return
    os.kill(pid, 15)
    if not wait_until(lambda: started_at(pid) != since):
        os.killpg(pid, 9)


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + STOP_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def note(**facts: object) -> None:
    """Write down what was made before anything else is."""
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps({**before, **facts}))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
