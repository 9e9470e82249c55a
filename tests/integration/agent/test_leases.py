"""A lease on a real host, through the front door: who gets in, until when, and that the end comes by itself."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tests.integration.agent.conftest import Lease, Site
from tests.integration.agent.portal_double import in_seconds
from tests.support.waiting import until

pytestmark = pytest.mark.hosts

DAEMON = "setsid sh -c '(trap \"\" HUP TERM; exec sleep 5000) >/dev/null 2>&1 </dev/null & '; true"


@contextmanager
def portal_down(site: Site) -> Iterator[None]:
    site.portal.stop()
    try:
        yield
    finally:
        site.portal.start()


@contextmanager
def ending_without_the_portal(site: Site, lease: Lease) -> Iterator[None]:
    site.end_soon(lease)
    with portal_down(site):
        yield


@contextmanager
def open_connection(site: Site, lease: Lease, *, key: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A ControlMaster connection without any session, as `ssh -MN` holds it."""
    key = key or lease.key
    socket = site.directory / f"control-{lease.lease_id}-{key.name}"
    options = ("-MN", f"-oControlPath={socket}", "-oServerAliveInterval=1")
    master = subprocess.Popen(site.host.ssh_argv(lease.login, key, options=options), stderr=subprocess.DEVNULL)
    try:
        until(socket.exists, "the master connection")
        yield master
    finally:
        master.kill()
        master.wait()


def ends_in(lease: Lease) -> float:
    """Seconds from now to the lease's end."""
    ends_at = datetime.fromisoformat(lease.wanted["ends_at"].replace("Z", "+00:00"))
    return (ends_at - datetime.now(timezone.utc)).total_seconds()


def test_a_lease_lets_in_its_key_and_no_other(site: Site) -> None:
    lease = site.open_lease()
    assert site.sign_in(lease, "id", "-un").stdout.strip() == lease.login
    stranger, _ = site.new_key()
    assert site.sign_in(lease, key=stranger).returncode == 255
    groups = site.sign_in(lease, "id", "-nG").stdout.split()
    assert groups == [lease.login, "remotegpu-leases"]
    assert site.sign_in(lease, "stat", "-c", "%a", ".").stdout.strip() == "700"


def test_a_key_planted_in_the_home_opens_nothing(site: Site) -> None:
    lease = site.open_lease()
    planted, public = site.new_key()
    site.sign_in(lease, f"mkdir -m 700 .ssh; echo '{public['line']}' > .ssh/authorized_keys; chmod 600 .ssh/*")
    assert site.sign_in(lease, key=planted).returncode == 255
    keys_file = f"/etc/remotegpu/authorized_keys/{lease.login}"
    assert site.host.run(["stat", "-c", "%U %a", keys_file]).stdout.strip() == "root 644"


def test_a_key_that_is_added_opens_and_one_that_is_removed_is_refused(site: Site) -> None:
    lease = site.open_lease()
    second, public = site.new_key()
    site.change_lease(lease, keys=[*lease.wanted["keys"], public])
    until(lambda: site.sign_in(lease, key=second).ok, "the second key to open", timeout_s=5)
    site.change_lease(lease, keys=[public])
    changed = time.monotonic()
    until(lambda: not site.sign_in(lease).ok, "the first key to be refused", timeout_s=5, every_s=0.05)
    assert time.monotonic() - changed < 2
    assert site.sign_in(lease, key=second).ok
    until(lambda: _fingerprints(site, lease) == [public["fingerprint"]], "the report")


def test_a_key_that_is_removed_takes_its_open_sessions_along_and_no_others(site: Site) -> None:
    lease = site.open_lease()
    second, public = site.new_key()
    site.change_lease(lease, keys=[*lease.wanted["keys"], public])
    until(lambda: site.sign_in(lease, key=second).ok, "the second key to open", timeout_s=5)
    task = site.run_task(lease, "echo ready; sleep 5000")
    until(lambda: site.portal.log_of(task) == b"ready\n", "the task to be ready", also=site.agent_log)
    with open_connection(site, lease) as theirs, open_connection(site, lease, key=second) as ours:
        socket = f"-oControlPath={site.directory / f'control-{lease.lease_id}-{lease.key.name}'}"
        assert site.sign_in(lease, "sleep 5001 >/dev/null 2>&1 </dev/null & echo in", options=(socket,)).ok
        assert any("sleep 5001" in line for line in site.processes(lease))
        site.change_lease(lease, keys=[public])
        until(lambda: theirs.poll() is not None, "the connection of the removed key to end", also=site.agent_log)
        assert ours.poll() is None
        assert site.sign_in(lease, key=second).ok
        until(lambda: _fingerprints(site, lease) == [public["fingerprint"]], "the report")
        keys_file = site.host.read(f"/etc/remotegpu/authorized_keys/{lease.login}")
        assert len(keys_file.splitlines()) == 1, "nothing is left to do"
        time.sleep(2)
        assert ours.poll() is None
    assert site.portal.states[task]["state"] == "running"


def test_where_the_journal_has_forgotten_who_came_in_nobody_stays_once_a_key_is_removed(site: Site) -> None:
    lease = site.open_lease()
    second, public = site.new_key()
    site.change_lease(lease, keys=[*lease.wanted["keys"], public])
    until(lambda: site.sign_in(lease, key=second).ok, "the second key to open", timeout_s=5)
    with open_connection(site, lease) as theirs, open_connection(site, lease, key=second) as ours:
        site.host.run("journalctl --rotate && journalctl --vacuum-time=1us")
        site.change_lease(lease, keys=[public])
        for connection in (theirs, ours):
            until(lambda gone=connection: gone.poll() is not None, "every connection to end", also=site.agent_log)
    assert site.sign_in(lease, key=second).ok


def _fingerprints(site: Site, lease: Lease) -> list[str]:
    seen = site.portal.lease(lease.lease_id)
    return list(seen["key_fingerprints"]) if seen else []


def test_an_extension_is_acknowledged_when_host_and_timer_have_it(site: Site) -> None:
    lease = site.open_lease(seconds=600)
    site.change_lease(lease, ends_at=in_seconds(7200))
    seen = site.wait_for_lease(lease, "open")
    assert seen["end_armed"] is True
    timer = site.host.run(["systemctl", "cat", f"remotegpu-lease-end-{lease.lease_id}.timer"]).stdout
    wanted = lease.wanted["ends_at"].replace("T", " ").replace("Z", " UTC")
    assert f"OnCalendar={wanted}" in timer.splitlines()
    assert site.sign_in(lease).ok


def test_a_lease_that_the_portal_closes_is_closed_at_once(site: Site) -> None:
    lease = site.open_lease()
    site.sign_in(lease, DAEMON)
    assert site.processes(lease) != []
    asked = time.monotonic()
    site.change_lease(lease, state="closed")
    site.wait_for_lease(lease, "closed")
    assert time.monotonic() - asked < 3
    assert site.processes(lease) == []
    assert not site.sign_in(lease).ok
    assert site.portal.lease(lease.lease_id)["closed_at"] is not None  # type: ignore[index]  # it was just waited for


def test_a_lease_that_is_no_longer_named_is_closed_and_its_home_stays(site: Site) -> None:
    lease = site.open_lease()
    site.sign_in(lease, "echo data > kept")
    site.applied(site.portal.change(leases=[]))
    assert not site.sign_in(lease).ok
    assert site.host.read(f"/home/{lease.login}/kept") == "data\n"


def test_a_lease_opened_again_finds_its_data(site: Site) -> None:
    lease = site.open_lease()
    site.sign_in(lease, "echo data > kept")
    site.change_lease(lease, state="closed")
    site.wait_for_lease(lease, "closed")
    site.change_lease(lease, state="open", ends_at=in_seconds(3600))
    site.wait_for_lease(lease, "open")
    assert site.sign_in(lease, "cat", "kept").stdout == "data\n"


def test_without_the_portal_the_lease_ends_by_itself(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "trap '' TERM; echo ready; while :; do sleep 0.2; done", stop_grace_s=600)
    until(lambda: site.portal.log_of(attempt) == b"ready\n", "the task to be ready", also=site.agent_log)
    site.sign_in(lease, DAEMON)
    with open_connection(site, lease) as master, ending_without_the_portal(site, lease):
        until(lambda: ends_in(lease) <= 0, "the end to come", timeout_s=15, every_s=0.01)
        refused = site.sign_in(lease)
        assert refused.returncode == 255
        until(lambda: not site.processes(lease), "every process to be gone", timeout_s=5, every_s=0.05)
        assert ends_in(lease) > -5  # the bench measures it; here a busy machine has its say
        until(lambda: master.poll() is not None, "the master connection to die", timeout_s=5)
    seen = site.wait_for_lease(lease, "closed", timeout_s=90)
    assert seen["ends_at"] == lease.wanted["ends_at"]
    ended, _ = site.finished(attempt, timeout_s=60)
    assert ended["state"] == "stopped"
    assert ended["reason"] == "its lease ended: its end has come"
    events = site.portal.events(lease_id=lease.lease_id)
    assert events.count("lease.closed") == 1
    assert max(site.portal.received.values()) == 1


def test_the_timer_ends_the_lease_though_the_agent_is_gone(site: Site) -> None:
    lease = site.open_lease()
    site.sign_in(lease, DAEMON)
    site.end_soon(lease)
    site.host.run(["systemctl", "stop", "remotegpu-agent"])
    try:
        until(lambda: ends_in(lease) <= 0, "the end to come", timeout_s=15, every_s=0.01)
        assert not site.sign_in(lease).ok
        until(lambda: not site.processes(lease), "every process to be gone", timeout_s=5, every_s=0.05)
        expiry = site.host.run(["chage", "-l", lease.login]).stdout
        assert "Jan 01, 1970" in expiry
    finally:
        site.host.run(["systemctl", "start", "remotegpu-agent"])
    site.wait_for_lease(lease, "closed")


def test_a_reboot_across_the_end_finds_the_door_closed(site: Site) -> None:
    ending, staying = site.open_lease(), site.open_lease()
    site.sign_in(ending, "mkdir -p .config/systemd/user/default.target.wants")
    site.host.run(["touch", f"/var/lib/systemd/linger/{ending.login}"], check=False)
    with ending_without_the_portal(site, ending):
        # The host is off when the end comes: systemd takes longer to go down than what is left.
        site.host.run(f"{LATE_SHUTDOWN.format(seconds=6)}")
        site.host.reboot(wait=False)
        until(lambda: ends_in(ending) < 0, "the end to pass while the host is down", timeout_s=20)
        site.host.wait_until_up()
        assert not site.sign_in(ending).ok
        assert site.processes(ending) == []
        assert site.sign_in(staying).ok
        order = site.host.run(["systemctl", "show", "-P", "Before", "remotegpu-lease-guard"]).stdout.split()
        assert "ssh.service" in order
        timer = f"remotegpu-lease-end-{staying.lease_id}.timer"
        assert site.host.run(["systemctl", "is-active", timer]).stdout.strip() == "active"
    assert site.wait_for_lease(ending, "closed", timeout_s=60)["closed_at"] is not None
    assert site.wait_for_lease(staying, "open", timeout_s=60)["end_armed"] is True


LATE_SHUTDOWN = (
    "systemd-run --quiet --unit=late --property=ExecStop='/bin/sleep {seconds}' --property=RemainAfterExit=yes true"
)


def test_somebody_elses_login_is_never_touched(site: Site) -> None:
    site.host.run("useradd --uid 5999 --create-home lease9999")
    _, public = site.new_key()
    wanted = {"lease_id": 9999, "login": "lease9999", "uid": 29999, "state": "open", "ends_at": in_seconds(600)}
    site.portal.change(leases=[wanted | {"keys": [public]}])
    seen = until(lambda: (found := site.portal.lease(9999)) and found["state"] == "error" and found, "the refusal")
    assert "a login lease9999 (UID 5999) exists that RemoteGPU did not make" in seen["message"]
    assert not site.host.run(["test", "-e", "/etc/remotegpu/authorized_keys/lease9999"], check=False).ok
    assert site.host.run(["getent", "passwd", "lease9999"]).stdout.split(":")[2] == "5999"
    site.applied(site.portal.change(leases=[]))
    site.host.run("userdel -r lease9999")


def test_a_uid_is_never_used_twice(site: Site) -> None:
    first = site.open_lease()
    site.change_lease(first, state="closed")
    site.wait_for_lease(first, "closed")
    second = site.open_lease(wait=False)
    site.change_lease(second, uid=first.uid)
    seen = site.wait_for_lease(second, "error")
    assert f"UID {first.uid} was lease {first.lease_id}'s" in seen["message"]
    assert not site.host.run(["getent", "passwd", second.login], check=False).ok


def test_the_leases_containers_end_with_it_and_nobody_elses(site: Site) -> None:
    lease = site.open_lease()
    site.host.run("systemctl start docker")
    site.host.run(
        "cd / && tar -cf - usr/bin/sleep $(ldd usr/bin/sleep | grep -o '/[^ )]*' | xargs -n1 readlink -f)"
        " $(ldd usr/bin/sleep | grep -o '/lib64/[^ ]*') lib64 lib 2>/dev/null | docker import - tiny:1"
    )
    run = "docker run -d --restart=always --network=none"
    site.host.run(f"{run} --label remotegpu.lease={lease.lease_id} --name mine tiny:1 sleep 10000")
    site.host.run(f"{run} --label remotegpu.lease={lease.lease_id + 1} --name other tiny:1 sleep 10000")
    try:
        site.change_lease(lease, state="closed")
        site.wait_for_lease(lease, "closed", timeout_s=30)
        assert site.host.run("docker ps --format '{{.Names}}'").stdout.split() == ["other"]
    finally:
        site.host.run("docker rm -f mine other; docker rmi tiny:1; systemctl stop docker docker.socket containerd")
        # Its socket stays behind, as it does on a host: from here on leases must close without a daemon.


def test_a_fork_bomb_does_not_outlive_its_lease(site: Site) -> None:
    lease = site.open_lease()
    bomb = "bomb() { while :; do (sleep 0.05; bomb) & sleep 0.02; done; }; ulimit -u 300; bomb 2>/dev/null"
    site.run_task(lease, bomb)
    until(lambda: len(site.processes(lease)) > 100, "the bomb to go off")
    site.change_lease(lease, state="closed")
    site.wait_for_lease(lease, "closed", timeout_s=20)
    assert site.processes(lease) == []


def test_the_end_is_told_in_the_hosts_time(site: Site) -> None:
    """Whatever zone the host is in: the same moment."""
    site.host.run(["timedatectl", "set-timezone", "Asia/Shanghai"])
    try:
        lease = site.open_lease()
        assert site.sign_in(lease).ok
        site.end_soon(lease)
        until(lambda: ends_in(lease) <= 0, "the end to come", timeout_s=15, every_s=0.01)
        assert not site.sign_in(lease).ok
        site.wait_for_lease(lease, "closed")
    finally:
        site.host.run(["timedatectl", "set-timezone", "Etc/UTC"])


def test_a_login_is_one_user_and_lent_no_further_ones(site: Site) -> None:
    """What runs as a subordinate uid would be counted as nobody's, and outlive the lease."""
    lease = site.open_lease()
    for path in ("/etc/subuid", "/etc/subgid"):
        assert "ops:" in site.host.read(path), "this system lends them to whoever is added"
        assert lease.login not in site.host.read(path)


@contextmanager
def full_disk(site: Site) -> Iterator[None]:
    """What the agent writes to lies on a small disk of its own, which somebody fills to the last name."""
    folders = ("/var/lib/remotegpu-agent", "/etc/remotegpu/authorized_keys")
    site.host.run(["systemctl", "stop", "remotegpu-agent"])
    for folder in folders:
        copy = f"copy=$(mktemp -d) && cp -a {folder}/. $copy/"
        small = f"mount -t tmpfs -o size=64m,nr_inodes=4k,mode=$(stat -c %a {folder}) full {folder}"
        site.host.run(f"{copy} && {small} && cp -a $copy/. {folder}/ && rm -r $copy")
    site.host.run(["systemctl", "start", "remotegpu-agent"])
    count = len(site.portal.reports)
    until(lambda: len(site.portal.reports) > count, "the agent to be back", also=site.agent_log)
    for folder in folders:
        site.host.run(f"mkdir {folder}/all; cd {folder}/all; i=0; while : >$i; do i=$((i+1)); done 2>/dev/null; true")
    try:
        yield
    finally:
        site.host.run(["systemctl", "stop", "remotegpu-agent"])
        for folder in folders:
            site.host.run(f"rm -rf {folder}/all; mount --bind / /mnt; cp -a {folder}/. /mnt{folder}/")
            site.host.run(f"umount /mnt {folder}")
        site.host.run(["systemctl", "start", "remotegpu-agent"])


@pytest.mark.slow  # the end has to be far enough away for a disk to be filled
def test_a_lease_ends_though_its_tenant_has_filled_the_disk(site: Site) -> None:
    lease = site.open_lease(seconds=90)
    attempt = site.run_task(lease, "trap '' TERM; echo ready; while :; do sleep 0.2; done", stop_grace_s=600)
    until(lambda: site.portal.log_of(attempt) == b"ready\n", "the task to be ready", also=site.agent_log)
    site.sign_in(lease, DAEMON)
    with full_disk(site):
        assert site.processes(lease) != []
        until(lambda: ends_in(lease) <= 0, "the end to come", timeout_s=120, every_s=0.05)
        assert not site.sign_in(lease).ok
        until(lambda: not site.processes(lease), "every process to be gone", timeout_s=10, every_s=0.05)
        seen = site.wait_for_lease(lease, "closed", timeout_s=30)
        assert seen["closed_at"] is not None


@pytest.mark.slow  # cron and at look once a minute
def test_what_a_tenant_has_left_to_cron_and_at_does_not_run_after_the_end(site: Site) -> None:
    lease = site.open_lease()
    site.host.run("command -v at >/dev/null || apt-get install -y -qq --no-install-recommends at cron", timeout_s=300)
    site.host.run("systemctl start cron atd")
    planted = site.sign_in(
        lease, "echo '* * * * * date >>~/cron' | crontab - && echo 'date >>~/at' | at now + 2 minutes 2>/dev/null; atq"
    )
    assert lease.login in planted.stdout
    home = f"/home/{lease.login}"
    until(lambda: site.host.run(["test", "-e", f"{home}/cron"], check=False).ok, "cron to work at all", timeout_s=70)
    site.change_lease(lease, state="closed")
    site.wait_for_lease(lease, "closed")
    ran = site.host.read(f"{home}/cron")
    # Queue "a" is for jobs to come; one that atd has taken up and was refused stays behind in "=".
    until(lambda: f" a {lease.login}" not in site.host.run(["atq"]).stdout, "the job's turn", timeout_s=180, every_s=1)
    assert site.host.read(f"{home}/cron") == ran
    assert not site.host.run(["test", "-e", f"{home}/at"], check=False).ok
    assert site.processes(lease) == []
