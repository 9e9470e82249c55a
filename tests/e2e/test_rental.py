"""The test that decides: from a bare machine to a rented one and back.

Real hosts (Debian 12 and 13), web and worker as separate processes, once on SQLite, once on PostgreSQL with Redis. Only
the front doors are used: HTTP, SSH, the command line. A step is a function that says what it proves.
"""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.e2e.conftest import POISON, House
from tests.e2e.world import PROVISION_TIMEOUT_S, RECLAIM_TIMEOUT_S, Person, World, can_sign_in, new_key
from tests.hosts import Host
from tests.support.dirt import WAYS, Tenant, is_named
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]

HOUR_S = 3600
SHORT_S = 25  # until the end that comes while the portal is down
FORKS = """
for i in 1 2 3; do (sleep 80001 &) ; done
setsid -f sleep 80001
nohup bash -c 'trap "" TERM; sleep 80001; sleep 80001' >/dev/null 2>&1 &
echo ready
wait
"""
TELLS = """
echo "user $(id -un)"
echo "gpus $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER"
while [ ! -e /tmp/go ]; do sleep 0.1; done
seq 1 20000
exit 7
"""


def test_a_bare_machine_is_rented_and_comes_back_clean(house: House) -> None:
    world, hosts = house.world, list(house.hosts.values())
    onboard(world, hosts, poison=POISON % house.poisoned)
    baselines = {host.name: json.loads(host.run("remotegpu-agent baseline --json").stdout) for host in hosts}
    people = cast(world, poison=POISON % house.poisoned)
    for host in hosts:
        lease = world.allocate(host, people["tenant"], lasts_s=HOUR_S, retain_s=HOUR_S)
        use(world, host, lease, people)
    leases = {host.name: continue_shortly(world, host, people) for host in hosts}
    survive_the_end_without_the_portal(world, hosts, leases, people)
    for host in hosts:
        dirty_and_reclaim(world, host, leases[host.name], baselines[host.name], people)
    assert not house.poisoned.exists(), "somebody's text was taken for a template"


# -- from bare to ready


def onboard(world: World, hosts: list[Host], *, poison: str) -> None:
    for host in hosts:
        world.add(host)
        refused = world.admin.ask("POST", f"admin/machines/{world.machines[host.name]}/provision")
        assert refused.status == 409, "provisioned before anybody confirmed the host key"
        world.confirm(host)
        world.admin.patch(f"admin/machines/{world.machines[host.name]}", labels={"note": poison}, remark=poison)
    runs = [world.provision(host) for host in hosts]
    follow_live(world, runs[0])
    for host in hosts:
        machine = world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S)
        assert not machine["has_first_contact"], "the password is still kept"
        reported = world.wait_until_healthy(host)["gpus"]
        assert sorted(gpu["uuid"] for gpu in reported) == sorted(host.gpu.scenario.uuids)
        assert all(gpu["live"] for gpu in reported)
        kept = world.admin.get("admin/audit/logs", action="machine.ready", resource_id=machine["id"])["items"]
        assert len(kept[0]["detail"]["baseline"]) == 64


def follow_live(world: World, run_id: int) -> None:
    """Output arrives while the run goes on, and is complete when it has ended."""
    after, seen_live = 0, 0
    while True:
        page = world.admin.get(f"admin/runs/{run_id}/events", after=after, wait_s=10).body
        after = page["next"]
        if page["state"] == "running":
            seen_live += len(page["items"])
        if page["complete"]:
            break
    run = world.admin.get(f"admin/runs/{run_id}").body
    assert run["state"] == "succeeded", world.run_output(run_id)[-3000:]
    assert seen_live > 10
    assert after == run["event_count"]


def cast(world: World, *, poison: str) -> dict[str, Any]:
    """A tenant with two members, and a stranger."""
    kind = world.portal.environ.get("DATABASE_URL", "sqlite")[:4]
    tenant, other = world.tenant(f"Quark {kind}"), world.tenant(poison)
    refused = world.admin.ask("POST", "admin/customers", json={"username": poison, "tenant_id": other})
    assert refused.status == 422, "a template as a user name"
    named = {"name": poison, "address": "192.0.2.1", "ssh_user": "root"}
    assert world.admin.ask("POST", "admin/machines", json=named).status == 422, "a template as a machine's name"
    return {
        "tenant": tenant,
        "alice": world.person(f"alice-{kind}", tenant, "owner"),
        "bob": world.person(f"bob-{kind}", tenant),
        "carol": world.person(f"carol-{kind}", other),
    }


# -- in use


def use(world: World, host: Host, lease: Any, people: dict[str, Any]) -> None:
    alice, bob, carol = people["alice"], people["bob"], people["carol"]
    assert can_sign_in(host, lease["login"], alice.key)
    assert can_sign_in(host, lease["login"], bob.key)
    assert not can_sign_in(host, lease["login"], carol.key)
    assert carol.client.ask("GET", f"customer/machines/{world.machines[host.name]}").status == 404
    run_a_task(world, host, lease, alice)
    stop_a_task_with_all_its_children(world, host, alice)
    change_keys(world, host, lease, bob)


def run_a_task(world: World, host: Host, lease: Any, alice: Person) -> None:
    task = world.task(alice, host, TELLS)
    first = until(lambda: alice.client.ask("GET", f"customer/tasks/{task}/log").body, "the log to stream", timeout_s=30)
    assert f"user {lease['login']}\n".encode() in first
    assert alice.client.get(f"customer/tasks/{task}")["state"] == "running"
    host.run("touch /tmp/go")
    ended = world.wait_for_task(alice, task, "failed", "succeeded", "lost", "stopped")
    assert (ended["state"], ended["attempts"][-1]["exit_code"]) == ("failed", 7)
    numbers = "".join(f"{number}\n" for number in range(1, 20001))
    gpus = ",".join(host.gpu.scenario.uuids)
    assert world.log(alice, task).decode() == f"user {lease['login']}\ngpus {gpus} PCI_BUS_ID\n{numbers}"
    host.run("rm /tmp/go")


def stop_a_task_with_all_its_children(world: World, host: Host, alice: Person) -> None:
    task = world.task(alice, host, FORKS, stop_grace_s=1)
    until(lambda: b"ready" in alice.client.ask("GET", f"customer/tasks/{task}/log").body, "its children", timeout_s=30)
    assert host.run("pgrep -fc 'sleep 80001'").stdout.strip() != "0"
    alice.client.post(f"customer/tasks/{task}/stop")
    world.wait_for_task(alice, task, "stopped")
    assert host.run("pgrep -f 'sleep 80001'", check=False).stdout == "", "a child outlived the stop"


def change_keys(world: World, host: Host, lease: Any, bob: Person) -> None:
    second = new_key(world.folder / f"second-{host.name}")
    added = bob.client.post("customer/keys", name=host.name, key=second.with_suffix(".pub").read_text())
    until(lambda: can_sign_in(host, lease["login"], second), "the new key to work", timeout_s=20)
    bob.client.delete(f"customer/keys/{added['id']}")
    until(lambda: not can_sign_in(host, lease["login"], second), "the removed key to be refused", timeout_s=20)
    assert can_sign_in(host, lease["login"], bob.key)


def continue_shortly(world: World, host: Host, people: dict[str, Any]) -> Any:
    """End the lease, extend it within its retention with the data intact, to an end that comes soon."""
    lease = world.admin.get("admin/leases", machine_id=world.machines[host.name])["items"][0]
    put = host.ssh(lease["login"], people["alice"].key, "echo precious >kept")
    assert put.ok, put
    world.admin.post(f"admin/leases/{lease['id']}/end", reason="The project ended early.")
    until(lambda: world.lease(lease["id"])["state"] == "ended", "the lease to end", timeout_s=60)
    assert not can_sign_in(host, lease["login"], people["alice"].key)
    soon = datetime.now(UTC) + timedelta(seconds=2 * SHORT_S)
    following = world.admin.post(f"admin/leases/{lease['id']}/extend", until=soon.isoformat()).body
    world.wait_for_grant(following["id"], "keys", "open")
    assert host.ssh(lease["login"], people["alice"].key, "cat kept").stdout == "precious\n"
    later = datetime.now(UTC) + timedelta(seconds=2 * SHORT_S + 5)
    world.admin.post(f"admin/leases/{following['id']}/extend", until=later.isoformat())
    world.wait_until_acknowledged(following["id"])
    return world.lease(following["id"])


# -- the end, without the portal


def survive_the_end_without_the_portal(
    world: World, hosts: list[Host], leases: dict[str, Any], people: dict[str, Any]
) -> None:
    """The host by itself refuses the key, ends connection and processes: one is awake, one reboots across the end."""
    alice = people["alice"]
    awake, rebooted = hosts
    tasks = {host.name: world.task(alice, host, "echo before; sleep 80002") for host in hosts}
    for host in hosts:
        world.wait_for_task(alice, tasks[host.name], "running")
    master = open_master(world, awake, leases[awake.name]["login"], alice)
    world.portal.stop()
    turn_off(rebooted)
    wait_for_the_end(leases)
    assert not can_sign_in(awake, leases[awake.name]["login"], alice.key)
    until(lambda: master.poll() is not None, "the open connection to end", timeout_s=5)
    assert awake.run(f"pgrep -u {leases[awake.name]['uid']}", check=False).stdout == ""
    turn_on(rebooted)
    assert not can_sign_in(rebooted, leases[rebooted.name]["login"], alice.key)
    assert rebooted.run(f"pgrep -u {leases[rebooted.name]['uid']}", check=False).stdout == ""
    world.portal.start("web", "worker")
    for host in hosts:
        lease = leases[host.name]
        until(lambda id=lease["id"]: world.lease(id)["state"] == "ended", "the lease to end", timeout_s=60)
        ended = world.wait_for_task(alice, tasks[host.name], "stopped", "lost")
        assert world.log(alice, ended["id"]) == b"before\n"


def open_master(world: World, host: Host, login: str, person: Person) -> subprocess.Popen[bytes]:
    control = world.folder / f"master-{host.name}"
    options = ["-M", "-N", f"-oControlPath={control}", "-oControlMaster=yes"]
    master = subprocess.Popen(
        host.ssh_argv(login, person.key, options=options), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until(control.exists, "the master connection", timeout_s=15)
    return master


def turn_off(host: Host) -> None:
    subprocess.run(["docker", "stop", "--time", "10", host.id], check=True, capture_output=True)


def turn_on(host: Host) -> None:
    subprocess.run(["docker", "start", host.id], check=True, capture_output=True)
    host.wait_until_up()


def wait_for_the_end(leases: dict[str, Any]) -> None:
    last = max(datetime.fromisoformat(lease["ends_at"]) for lease in leases.values())
    until(lambda: datetime.now(UTC) > last, "the agreed end", timeout_s=3 * SHORT_S)


# -- dirty, and proven clean


def dirty_and_reclaim(world: World, host: Host, lease: Any, baseline: Any, people: dict[str, Any]) -> None:
    again = datetime.now(UTC) + timedelta(seconds=HOUR_S)
    lease = world.admin.post(f"admin/leases/{lease['id']}/extend", until=again.isoformat()).body
    world.wait_for_grant(lease["id"], "keys", "open")
    tenant = Tenant.of(host, lease["login"])
    host.run("systemctl stop remotegpu-agent")  # it would close again what the dirt opens, before anybody has looked
    marks = dirty(host, tenant)
    verification_alone_names_each(host, lease, baseline, world.machines[host.name], marks)
    host.run("systemctl start remotegpu-agent")
    world.admin.post(f"admin/machines/{world.machines[host.name]}/reclaim", reason="end", force=True, confirm=host.name)
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)
    assert [way.name for way in WAYS if way.seen(host, tenant)] == []
    check_report(world, host, lease)


def dirty(host: Host, tenant: Tenant) -> dict[str, str]:
    """Plant every way, and see each of them."""
    assert len(WAYS) >= 25
    for way in WAYS:
        way.plant(host, tenant)
    assert [way.name for way in WAYS if not way.seen(host, tenant)] == []
    return {way.name: way.mark(host, tenant) for way in WAYS}


def verification_alone_names_each(
    host: Host, lease: Any, baseline: Any, machine_id: int, marks: dict[str, str]
) -> None:
    login = lease["login"]
    request = {
        "schema": 1,
        "machine_id": machine_id,
        "lease_id": int(login.removeprefix("lease")),
        "login": login,
        "uid": lease["uid"],
        "baseline": baseline,
    }
    host.put("/root/request.json", json.dumps(request), mode="0600")
    said = host.run("remotegpu-agent verify --json --request /root/request.json; rm /root/request.json", timeout_s=300)
    verdict = json.loads(said.stdout)
    assert not verdict["passed"]
    assert [way.name for way in WAYS if not is_named(verdict["checks"], way.id, marks[way.name])] == []


def check_report(world: World, host: Host, lease: Any) -> None:
    """Signed, complete, and worth nothing once a byte of it is another."""
    reclaim = world.admin.get("admin/reclaims", machine_id=world.machines[host.name])["items"][0]
    assert (reclaim["lease_id"], reclaim["state"]) == (lease["id"], "passed")
    report, key = world.folder / f"report-{host.name}.json", world.folder / "public.pem"
    signed = world.admin.download(f"admin/reclaims/{reclaim['id']}/report")
    report.write_bytes(signed)
    key.write_bytes(world.admin.download("admin/reclaims/public-key"))
    verify = ["verify-report", str(report), "--public-key", str(key)]
    world.portal.command(*verify)
    at = signed.index(b'"result":"passed"') + len(b'"result":"passe')
    report.write_bytes(signed[:at] + b"t" + signed[at + 1 :])
    refused = world.portal.command(*verify, check=False)
    assert "signature" in refused, refused
