"""How fast the host obeys: a click on Stop, a removed key, and the end of a lease while the portal is down.

`python -m bench.lease` onboards a Debian 13 (root or Docker). A click is the moment before its HTTP request is sent,
by a client that is signed in; what follows is seen on the host itself (watch.py). sshd keeps a grudge against addresses
whose sign-ins it refused (5 s each, shut out from 15 s on), so few are tried and none follow soon upon another.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bench.figures import Figure, percentile, show
from bench.rental import Rental, rental
from bench.watch import Watcher, watcher
from tests.e2e.world import new_key
from tests.hosts import Host
from tests.support.waiting import until

STOPS = 50
STUBBORN_STOPS = 5
STOP_GRACE_S = 2
KEYS = 5
ENDS = 3
HOUR_S = 3600
END_IN_S = 12  # from the extension to the end that comes while the portal is down
GRUDGE_S = 6.0  # after a refused sign-in
SIGN_INS_S = (-1.6, -0.9, -0.2, 0.0, 0.3)  # when one begins, seen from the agreed end

OBEDIENT = "sleep 90001 & sleep 90002 & wait"
STUBBORN = "trap '' TERM; sleep 90001 & sleep 90002 & wait"


def main() -> int:
    """Print the figures; 1 if a goal is missed."""
    with rental() as held:
        return show(take(held))


def take(held: Rental) -> list[Figure]:
    """All of it under one lease; its data is retained, so that each further end is one of the same login's."""
    lease = held.world.allocate(held.host, held.tenant_id, lasts_s=HOUR_S, retain_s=HOUR_S)
    with watcher(held.host) as watch:
        stops = [stop(held, lease, watch, OBEDIENT) for _try in range(STOPS)]
        stubborn = [stop(held, lease, watch, STUBBORN) for _try in range(STUBBORN_STOPS)]
        keys = [remove_a_key(held, lease, watch, number) for number in range(KEYS)]
        ends = []
        for _try in range(ENDS):
            lease = continue_until_soon(held, lease)
            ends.append(end_without_the_portal(held, lease, watch))
    return [
        Figure("Stop → last process dead, p50", percentile(stops, 50), at_most=0.3),
        Figure(f"Stop → last process dead, p99 of {STOPS}", percentile(stops, 99), at_most=1.0),
        Figure(
            f"Stop → last process dead, ignores TERM, grace {STOP_GRACE_S} s, slowest of {STUBBORN_STOPS}",
            max(stubborn), at_most=STOP_GRACE_S + 1.0,
        ),
        Figure(f"removed key → refused at the host, slowest of {KEYS}", max(keys), at_most=1.0),
        Figure(f"lease end without the portal → begin of the last sign-in let in, latest of {ENDS}",
               max(0.0, *(end.last_begun_s for end in ends)), at_most=0.0),
        Figure(f"lease end without the portal → sshd's word that it let one in, latest of {ENDS}",
               max(end.last_let_in_s for end in ends)),
        Figure(f"lease end without the portal → last process dead, slowest of {ENDS}",
               max(end.last_process_s for end in ends), at_most=1.0),
    ]  # fmt: skip


# -- a click on Stop


def stop(held: Rental, lease: Any, watch: Watcher, command: str) -> float:
    """Seconds from the click until the last process of the task is dead."""
    task_id = held.world.task(held.person, held.host, command, stop_grace_s=STOP_GRACE_S)
    task = held.world.wait_for_task(held.person, task_id, "running")
    until(lambda: count(held.host, lease["uid"], "sleep") == 2, "the task's children")
    watch.watch_processes(lease["uid"], unit=f"remotegpu-task-{task['attempts'][-1]['id']}.service")
    clicked_at = time.time()
    held.person.client.post(f"customer/tasks/{task_id}/stop")
    took_s = watch.gone_at() - clicked_at
    held.world.wait_for_task(held.person, task_id, "stopped")
    return took_s


def count(host: Host, uid: int, name: str) -> int:
    return int(host.run(["pgrep", "-c", "-u", str(uid), "-x", name], check=False).stdout)


# -- a removed key


def remove_a_key(held: Rental, lease: Any, watch: Watcher, number: int) -> float:
    """Seconds from the click until sshd finds the key no more; a sign-in that begins then must be refused."""
    key = new_key(held.world.folder / f"removed-{number}")
    public = key.with_suffix(".pub").read_text().strip()
    key_id = held.person.client.post("customer/keys", name=key.name, key=public)["id"]
    watch.watch_text(f"/etc/remotegpu/authorized_keys/{lease['login']}", public.split()[1])
    assert held.host.ssh(lease["login"], key, "true").ok, "the key never opened anything"
    clicked_at = time.time()
    held.person.client.delete(f"customer/keys/{key_id}")
    took_s = watch.gone_at() - clicked_at
    check_refused(held.host.ssh(lease["login"], key, "true"))
    time.sleep(GRUDGE_S)
    return took_s


def check_refused(result: Any) -> None:
    """By the key, not because the address is out of favour."""
    if result.ok or "Permission denied (publickey)" not in result.stderr:
        raise RuntimeError(f"not refused for its key: {result}")


# -- the end, without the portal


@dataclass(frozen=True)
class End:
    """Seconds after the agreed end; negative is before it. A sign-in that is on its way while the lease ends may be let
    in at the last moment, and sshd say so after it: what it started is among the processes that are dead soon.
    """

    last_begun_s: float
    last_let_in_s: float
    last_process_s: float


def continue_until_soon(held: Rental, lease: Any) -> Any:
    """End the lease if it has not ended, and extend it to a whole second that comes soon."""
    world = held.world
    if world.lease(lease["id"])["state"] == "active":
        world.admin.post(f"admin/leases/{lease['id']}/end", reason="a shorter one follows")
    until(lambda: world.lease(lease["id"])["state"] == "ended", f"lease {lease['id']} to end", timeout_s=60)
    ends_at = datetime.fromtimestamp(math.ceil(time.time()) + END_IN_S, UTC)
    lease = world.admin.post(f"admin/leases/{lease['id']}/extend", until=ends_at.isoformat()).body
    world.wait_for_grant(lease["id"], "keys", "open")
    world.wait_until_acknowledged(lease["id"])
    return world.lease(lease["id"])


def end_without_the_portal(held: Rental, lease: Any, watch: Watcher) -> End:
    """A task that ignores TERM and an open session go on until the end; sign-ins come before, at and after it."""
    world, host = held.world, held.host
    ends_at = datetime.fromisoformat(lease["ends_at"]).timestamp()
    task = world.task(held.person, host, STUBBORN)
    world.wait_for_task(held.person, task, "running")
    with session(held, lease):
        world.portal.stop()
        try:
            watch.watch_processes(lease["uid"])
            let_in = sign_in_around(held, lease, ends_at)
            last_process_s = watch.gone_at() - ends_at
        finally:
            world.portal.start("web", "worker")
    until(lambda: world.lease(lease["id"])["state"] == "ended", f"lease {lease['id']} to end", timeout_s=60)
    if left := host.run(["pgrep", "-l", "-u", str(lease["uid"])], check=False).stdout:
        raise RuntimeError(f"the lease has ended, and this goes on: {left}")
    accepted = accepted_at(host, lease["login"], since=ends_at - END_IN_S)
    if not let_in or not accepted:
        raise RuntimeError(f"nobody was let in before the end: sign-ins {let_in}, sshd says {accepted}")
    return End(max(let_in), max(accepted) - ends_at, last_process_s)


@contextmanager
def session(held: Rental, lease: Any) -> Iterator[None]:
    """Somebody is connected, and something runs there."""
    before = count(held.host, lease["uid"], "sleep")
    argv = held.host.ssh_argv(lease["login"], held.person.key, "sleep 90003")
    client = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: count(held.host, lease["uid"], "sleep") > before, "the session")
        yield
    finally:
        client.kill()
        client.wait()


def sign_in_around(held: Rental, lease: Any, ends_at: float) -> list[float]:
    """When the sign-ins began that were let in, in seconds after the end."""
    results: dict[float, Any] = {}

    def sign_in(offset_s: float) -> None:
        results[offset_s] = held.host.ssh(lease["login"], held.person.key, "true")

    begun = []
    for offset_s in SIGN_INS_S:
        at(ends_at + offset_s)
        begun.append(threading.Thread(target=sign_in, args=(offset_s,)))
        begun[-1].start()
    for thread in begun:
        thread.join()
    let_in = [offset_s for offset_s, result in results.items() if result.ok]
    for offset_s in SIGN_INS_S:
        if offset_s >= 0 and offset_s not in let_in:
            check_refused(results[offset_s])
    return let_in


def at(moment: float) -> None:
    left_s = moment - time.time()
    if left_s < 0:
        raise RuntimeError(f"{-left_s:.1f} s too late: this machine is too busy to measure an end")
    time.sleep(left_s)


def accepted_at(host: Host, login: str, *, since: float) -> list[float]:
    """When sshd accepted a key of this login, by the host's journal, to the microsecond."""
    argv = ["journalctl", "--output=json", f"--since=@{since:.0f}", f"--grep=Accepted publickey for {login} "]
    lines = host.run(argv, check=False).stdout.splitlines()
    return [int(json.loads(line)["__REALTIME_TIMESTAMP"]) / 1e6 for line in lines]


if __name__ == "__main__":
    sys.exit(main())
