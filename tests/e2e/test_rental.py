"""The test that decides: from a bare machine to a rented one and back.

Real hosts (Debian 12 and 13), web and worker as separate processes, once on SQLite, once on PostgreSQL with Redis
(Debian 12 there is slow); and where there is time (slow), on hosts that have none of the packages. Only the front doors
are used: HTTP, SSH, the command line. A step is a function that says what it proves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import POISON, House
from tests.e2e.world import PROVISION_TIMEOUT_S, RECLAIM_TIMEOUT_S, Person, World, can_sign_in, new_key
from tests.hosts import Host, gateway_address
from tests.support.dirt import WAYS, Tenant, immutable, is_named, port_open_from_outside
from tests.support.portal import ROOT, Client
from tests.support.scanning import Scanner
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]

HOUR_S = 3600
OPENED = 8888
SHORT_S = 60  # until the end that comes while the portal is down; time enough to prepare for it on a busy machine
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


@dataclass
class Rental:
    """A house whose hosts have been onboarded through the portal, and its people."""

    world: World
    hosts: dict[str, Host]
    people: dict[str, Any]
    baselines: dict[str, Any]
    poisoned: Path


@pytest.fixture(scope="module")
def onboarded(house: House) -> Rental:
    """The first chapter, from bare to ready, is told once a module."""
    world, hosts = house.world, list(house.hosts.values())
    onboard(world, hosts, poison=POISON % house.poisoned)
    baselines = {host.name: json.loads(host.run("remotegpu-agent baseline --json").stdout) for host in hosts}
    return Rental(world, house.hosts, cast(world, poison=POISON % house.poisoned), baselines, house.poisoned)


@pytest.fixture
def rental(onboarded: Rental) -> Rental:
    """Machines that are ready: what a test that failed left leased is taken back."""
    world = onboarded.world
    for host in onboarded.hosts.values():
        host.run("systemctl start remotegpu-agent")
        if world.machine(host)["state"] == "leased":
            reclaim(world, host)
        world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)
    return onboarded


# What does not ask for a certain database is told on one of them.
on_sqlite = pytest.mark.parametrize("house", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize(
    "house", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
on_bare_hosts = pytest.mark.parametrize("house", ["bare"], indirect=True)


def test_a_bare_machine_is_rented_and_comes_back_clean(rental: Rental) -> None:
    world, hosts, people = rental.world, list(rental.hosts.values()), rental.people
    for host in hosts:
        lease = world.allocate(host, people["tenant"], lasts_s=HOUR_S, retain_s=HOUR_S)
        use(world, host, lease, people)
    the_portal_would_notice_a_key_that_still_works(world, hosts)
    leases = {host.name: continue_with_the_data(world, host, people) for host in hosts}
    survive_the_end_without_the_portal(world, hosts, leases, people)
    for host in hosts:
        dirty_and_reclaim(world, host, leases[host.name], rental.baselines[host.name])
    assert not rental.poisoned.exists(), "somebody's text was taken for a template"


@on_sqlite
@pytest.mark.parametrize("suite", ["bookworm"])
def test_a_leftover_that_cannot_be_removed_quarantines(rental: Rental, suite: str) -> None:
    world, host = rental.world, rental.hosts[suite]
    lease = world.allocate(host, rental.people["tenant"], lasts_s=HOUR_S)
    host.run(f"echo left >/home/{lease['login']}/kept", user=lease["login"])
    with immutable(host, f"/home/{lease['login']}/kept"):
        reclaim(world, host)
        machine = world.wait_for_state(host, "quarantined", timeout_s=RECLAIM_TIMEOUT_S)
        assert "home" in machine["state_reason"]
        nobody_gets_it(rental, host, "quarantined")
    clean_again(world, host)


@on_postgresql
@pytest.mark.parametrize("suite", ["trixie"])
def test_a_port_that_is_open_from_outside_alone_quarantines(rental: Rental, suite: str) -> None:
    """No process list of the host shows who listens, and its own firewall never sees the packet."""
    world, host = rental.world, rental.hosts[suite]
    world.allocate(host, rental.people["tenant"], lasts_s=HOUR_S)
    with port_open_from_outside(host, 31340):
        reclaim(world, host)
        machine = world.wait_for_state(host, "quarantined", timeout_s=RECLAIM_TIMEOUT_S)
        assert "31340" in machine["state_reason"]
        nobody_gets_it(rental, host, "quarantined")
    clean_again(world, host)


@on_postgresql
@pytest.mark.parametrize("suite", ["trixie"])
def test_an_agent_that_was_told_to_trust_somebody_else_quarantines(rental: Rental, suite: str) -> None:
    """The host cannot know whom the portal would have it trust: the run that verifies does."""
    world, host = rental.world, rental.hosts[suite]
    world.allocate(host, rental.people["tenant"], lasts_s=HOUR_S)
    host.run("cp -p /etc/remotegpu/ca.pem /root/ && cat /etc/ssl/certs/ISRG_Root_X1.pem >>/etc/remotegpu/ca.pem")
    reclaim(world, host)
    machine = world.wait_for_state(host, "quarantined", timeout_s=RECLAIM_TIMEOUT_S)
    assert "agent_settings failed: /etc/remotegpu/ca.pem" in machine["state_reason"]
    nobody_gets_it(rental, host, "quarantined")
    host.run("cp -p /root/ca.pem /etc/remotegpu/ && rm /root/ca.pem")
    clean_again(world, host)


@on_sqlite
def test_an_agent_speaks_for_its_own_host_alone(rental: Rental) -> None:
    """Root on one host, with that host's credential, says that the other host's lease is closed: refused, and kept."""
    world, (own, other) = rental.world, rental.hosts.values()
    lease = world.allocate(other, rental.people["tenant"], lasts_s=HOUR_S)
    said = {"lease_id": int(lease["login"][5:]), "login": lease["login"], "state": "closed", "processes": 0}
    answer = speak(
        world, own, [{**said, "ends_at": None, "key_fingerprints": [], "end_armed": False, "closed_at": None}]
    )
    assert answer["code"] == "not_yours", answer
    assert [grant["observed"] for grant in world.lease(lease["id"])["grants"]] == ["open", "open"]
    refused = world.admin.get("admin/audit/logs", outcome="refused", actor=own.name)["items"]
    assert refused, "nobody wrote down that it tried"
    reclaim(world, other)
    world.wait_for_state(other, "ready", timeout_s=RECLAIM_TIMEOUT_S)


@on_sqlite
@pytest.mark.parametrize("suite", ["trixie"])
def test_after_an_old_backup_the_host_freezes_and_nothing_is_cleaned(rental: Rental, suite: str) -> None:
    world, host, bob = rental.world, rental.hosts[suite], rental.people["bob"]
    lease = world.allocate(host, rental.people["tenant"], lasts_s=HOUR_S)
    assert host.ssh(lease["login"], bob.key, "echo precious >kept").ok
    backup = world.folder / f"backup-{host.name}.tar"
    world.portal.command("backup", str(backup))
    later = add_a_key(world, host, lease, bob)
    world.portal.stop()
    world.portal.command("restore", str(backup), "--force")
    world.portal.start("web", "worker")
    for client in (world.admin, *(person.client for person in rental.people.values() if isinstance(person, Person))):
        assert client.ask("GET", "auth/me").status == 401, "a sign-in of before outlived the restoration"
        client.sign_in_again()
    until(lambda: "frozen" in problems_of(world, host), "the host to freeze and ask", timeout_s=60)
    assert host.ssh(lease["login"], later, "cat kept").stdout == "precious\n", "an old word was followed"
    nobody_gets_it(rental, host, "leased")
    world.admin.post(f"admin/machines/{world.machines[host.name]}/thaw", reason="compared, the backup counts")
    until(lambda: not can_sign_in(host, lease["login"], later), "the host to follow the portal again", timeout_s=60)
    assert host.ssh(lease["login"], bob.key, "cat kept").stdout == "precious\n"
    reclaim(world, host)
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)


@pytest.mark.slow
@on_sqlite
@pytest.mark.parametrize("suite", ["trixie"])
def test_an_opening_lets_in_whom_it_names_and_closes_with_its_lease_by_itself(rental: Rental, suite: str) -> None:
    """It names this machine, and not the other host. Nothing listens: the kernel itself answers whom it lets in."""
    world, host = rental.world, rental.hosts[suite]
    (other,) = [each for each in rental.hosts.values() if each is not host]
    scanners = {"here": Scanner(), "there": Scanner.on(other)}

    def let_in() -> list[str]:
        again = [f"tcp/{OPENED}"]
        return [place for place, each in scanners.items() if each.hear(host.address, tcp=str(OPENED), again=again)]

    opening = {"protocol": "tcp", "first_port": OPENED, "source": f"{gateway_address()}/32"}
    assert let_in() == []
    lease = world.allocate(host, rental.people["tenant"], lasts_s=SHORT_S, openings=[opening])
    assert let_in() == ["here"]
    world.portal.stop()
    wait_for_the_end({host.name: lease})
    assert let_in() == []
    world.portal.start("web", "worker")
    wait_until_ended(world, lease["id"])
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)


def start_agent(host: Host) -> None:
    host.run("systemctl start remotegpu-agent")


# How an agent goes away, and how it comes back. One that is killed would come back by itself: it is kept down as well.
AWAY: dict[str, tuple[Callable[[Host], object], Callable[[Host], object]]] = {
    "cut": (Host.cut_network, Host.restore_network),
    "stopped": (lambda host: host.run("systemctl stop remotegpu-agent"), start_agent),
    "killed": (
        lambda host: host.run("systemctl kill -s KILL remotegpu-agent; systemctl stop remotegpu-agent"),
        start_agent,
    ),
}
LINES = 250
WRITES = f"""
for number in $(seq 1 {LINES}); do
    echo "line $number of a log that nobody reads meanwhile"
    sleep 0.05
done
exit 3
"""
WRITTEN = "".join(f"line {number} of a log that nobody reads meanwhile\n" for number in range(1, LINES + 1))
MINUTES_S = 180.0


@on_sqlite
@pytest.mark.parametrize("suite", ["bookworm"])
def test_work_goes_on_while_the_agent_is_away(rental: Rental, suite: str) -> None:
    """Network cut, agent stopped, agent killed: afterwards exit code and log are there, byte for byte."""
    stay_away_while_a_task_ends(rental, rental.hosts[suite], at_least_s=0)


@pytest.mark.slow
@on_bare_hosts
@pytest.mark.parametrize("suite", ["trixie"])
def test_work_goes_on_while_the_agent_is_away_for_minutes(rental: Rental, suite: str) -> None:
    stay_away_while_a_task_ends(rental, rental.hosts[suite], at_least_s=MINUTES_S)


def stay_away_while_a_task_ends(rental: Rental, host: Host, *, at_least_s: float) -> None:
    """In each way: one task ends while nobody listens, and another one runs when the agent is back."""
    world, alice = rental.world, rental.people["alice"]
    world.allocate(host, rental.people["tenant"], lasts_s=HOUR_S)
    for leave, come_back in AWAY.values():
        task = world.task(alice, host, WRITES)
        world.wait_for_task(alice, task, "running")
        leave(host)
        since = datetime.now(UTC)
        away(world, host, alice, task, until_at=since + timedelta(seconds=at_least_s))
        come_back(host)
        following = world.task(alice, host, WRITES)
        for each in (task, following):
            ended = world.wait_for_task(alice, each, "failed", "succeeded", "lost", "stopped", timeout_s=90)
            assert (ended["state"], ended["attempts"][-1]["exit_code"], len(ended["attempts"])) == ("failed", 3, 1)
            assert world.log(alice, each).decode() == WRITTEN
    reclaim(world, host)
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)


def away(world: World, host: Host, alice: Person, task: int, *, until_at: datetime) -> None:
    """Until the task has ended on the host, the portal has noticed the silence and knows nothing of the end."""
    attempt = alice.client.get(f"customer/tasks/{task}")["attempts"][-1]["id"]
    exit_record = f"/var/lib/remotegpu-tasks/{attempt}/root/exit.json"
    until(lambda: world.machine(host)["reachability"] == "offline", "the host to be offline", timeout_s=60)
    until(lambda: host.run(["test", "-e", exit_record], check=False).ok, "the task to end on the host", timeout_s=90)
    until(lambda: datetime.now(UTC) >= until_at, "the minutes to pass", timeout_s=MINUTES_S + 30, every_s=1)
    assert alice.client.get(f"customer/tasks/{task}")["state"] == "running", "somebody guessed"


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
    tenant, other = world.tenant(f"Quark {kind} {poison}"), world.tenant(poison)
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
    second = add_a_key(world, host, lease, bob)
    added = next(key for key in bob.client.get("customer/keys")["items"] if key["name"] == second.name)
    bob.client.delete(f"customer/keys/{added['id']}")
    until(lambda: not can_sign_in(host, lease["login"], second), "the removed key to be refused", timeout_s=20)
    assert can_sign_in(host, lease["login"], bob.key)


def the_portal_would_notice_a_key_that_still_works(world: World, hosts: list[Host]) -> None:
    """The control of the login that a reclaim tries from outside: while the lease is open, that very try succeeds."""
    known_hosts, verdicts = world.folder / "known_hosts", world.folder / "verdicts"
    known_hosts.write_text("".join(host.known_hosts for host in hosts))
    verdicts.mkdir(exist_ok=True)
    inventory: dict[str, Any] = {}
    for host in hosts:
        lease = world.admin.get("admin/leases", machine_id=world.machines[host.name])["items"][0]
        inventory[host.name] = {
            "ansible_host": host.address,
            "verify_probe_login": lease["login"],
            "verify_probe_key_file": str(world.probe_key(lease["id"])),
            "verify_known_hosts": str(known_hosts),
            "verify_output": str(verdicts),
        }
    file = world.folder / "probed.json"
    file.write_text(json.dumps({"gpu_hosts": {"hosts": inventory}}))
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    argv = [program, "--inventory", str(file), "playbooks/verify.yml"]
    played = subprocess.run(argv, cwd=ROOT, env=world.portal.environment(), capture_output=True, text=True, timeout=120)
    for host in hosts:
        checks = json.loads((verdicts / f"{host.name}.json").read_text())["checks"]
        found = next(check for check in checks if check["id"] == "login_from_outside")
        assert (found["result"], "still opens" in found["reason"]) == ("failed", True), found
    assert played.returncode == 2, played.stdout


def continue_with_the_data(world: World, host: Host, people: dict[str, Any]) -> Any:
    """End the lease, and extend it within its retention: the data is as it was."""
    lease = world.admin.get("admin/leases", machine_id=world.machines[host.name])["items"][0]
    put = host.ssh(lease["login"], people["alice"].key, "echo precious >kept")
    assert put.ok, put
    world.admin.post(f"admin/leases/{lease['id']}/end", reason="The project ended early.")
    wait_until_ended(world, lease["id"])
    assert not can_sign_in(host, lease["login"], people["alice"].key)
    following = extend(world, lease["id"], SHORT_S)
    world.wait_for_grant(following["id"], "keys", "open")
    assert host.ssh(lease["login"], people["alice"].key, "cat kept").stdout == "precious\n"
    return following


def extend(world: World, lease_id: int, lasts_s: float) -> Any:
    """A later end, once the host has acknowledged it; returns the lease that then holds the machine."""
    until_at = datetime.now(UTC) + timedelta(seconds=lasts_s)
    lease = world.admin.post(f"admin/leases/{lease_id}/extend", until=until_at.isoformat()).body
    world.wait_until_acknowledged(lease["id"])
    return world.lease(lease["id"])


# -- the end, without the portal


def survive_the_end_without_the_portal(
    world: World, hosts: list[Host], leases: dict[str, Any], people: dict[str, Any]
) -> None:
    """The host by itself refuses the key, ends connection and processes: one is awake, one reboots across the end."""
    alice = people["alice"]
    first = "trixie" if "DATABASE_URL" in world.portal.environ else "bookworm"  # so each release plays both
    awake = [host for host in hosts if host.suite == first]
    rebooted = [host for host in hosts if host not in awake]
    leases.update({host.name: extend(world, leases[host.name]["id"], SHORT_S + 5) for host in hosts})
    tasks = {host.name: world.task(alice, host, "echo before; sleep 80002") for host in hosts}
    for host in hosts:
        world.wait_for_task(alice, tasks[host.name], "running")
    masters = [open_master(world, host, leases[host.name]["login"], alice) for host in awake]
    world.portal.stop()
    for host in rebooted:
        turn_off(host)
    wait_for_the_end(leases)
    for host in awake:
        assert not can_sign_in(host, leases[host.name]["login"], alice.key)
    until(lambda: all(master.poll() is not None for master in masters), "the open connection to end", timeout_s=5)
    for host in rebooted:
        turn_on(host)
        assert not can_sign_in(host, leases[host.name]["login"], alice.key)
    for host in hosts:
        assert host.run(f"pgrep -u {leases[host.name]['uid']}", check=False).stdout == ""
    world.portal.start("web", "worker")
    for host in hosts:
        wait_until_ended(world, leases[host.name]["id"])
        ended = world.wait_for_task(alice, tasks[host.name], *(["stopped"] if host in awake else ["stopped", "lost"]))
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
    until(lambda: datetime.now(UTC) > last, "the agreed end", timeout_s=2 * SHORT_S)


# -- dirty, and proven clean


def dirty_and_reclaim(world: World, host: Host, lease: Any, baseline: Any) -> None:
    lease = extend(world, lease["id"], HOUR_S)
    world.wait_for_grant(lease["id"], "keys", "open")
    tenant = Tenant.of(host, lease["login"])
    host.run("systemctl stop remotegpu-agent")  # it would close again what the dirt opens, before anybody has looked
    marks = dirty(host, tenant)
    verification_alone_names_each(host, lease, baseline, world.machines[host.name], marks)
    host.run("systemctl start remotegpu-agent")
    reclaim(world, host)
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


# -- what several tests do


def reclaim(world: World, host: Host) -> None:
    """Take the machine back now, without retention."""
    world.admin.post(f"admin/machines/{world.machines[host.name]}/reclaim", reason="end", force=True, confirm=host.name)


def clean_again(world: World, host: Host) -> None:
    """An operator has mended what was named, and says so."""
    world.admin.post(f"admin/machines/{world.machines[host.name]}/reclaim", reason="mended")
    world.wait_for_state(host, "ready", timeout_s=RECLAIM_TIMEOUT_S)


def nobody_gets_it(rental: Rental, host: Host, why: str) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    wanted = {"tenant_id": rental.people["tenant"], "until": tomorrow}
    path = f"admin/machines/{rental.world.machines[host.name]}/allocate"
    answer = rental.world.admin.ask("POST", path, json=wanted)
    assert answer.status == 409
    assert why in answer["detail"]


def wait_until_ended(world: World, lease_id: int) -> None:
    until(lambda: world.lease(lease_id)["state"] == "ended", f"lease {lease_id} to end", timeout_s=60)


def problems_of(world: World, host: Host) -> list[str]:
    return [problem["code"] for problem in world.machine(host)["problems"]]


def add_a_key(world: World, host: Host, lease: Any, person: Person) -> Path:
    key = new_key(Path(tempfile.mkdtemp(dir=world.folder)) / f"later-{lease['id']}")
    person.client.post("customer/keys", name=key.name, key=key.with_suffix(".pub").read_text())
    until(lambda: can_sign_in(host, lease["login"], key), "the new key to work", timeout_s=20)
    return key


def speak(world: World, host: Host, leases: list[dict[str, Any]]) -> Any:
    """What the portal answers to a report made by hand with this host's own credential."""
    credential = json.loads(host.read("/var/lib/remotegpu-agent/credential.json"))["credential"]
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    report = {
        "seq": 1,
        "boot_id": host.boot_id,
        "agent_version": "0.1.0",
        "sent_at": now,
        "frozen": False,
        "facts": None,
        "metrics": None,
        "gpu": None,
        "leases": [{"message": None, **lease} for lease in leases],
        "applied_generation": 1,
        "attempts": [],
        "logs": [],
        "command_results": [],
        "journal": [],
    }
    body = {"protocol": 1, "epoch": None, "generation": 0, "wait_s": 0, "report": report}
    headers = {"Authorization": f"Bearer {credential}"}
    return Client(world.portal).ask("POST", "agent/sync", json=body, headers=headers)
