"""What every test on a host takes for granted: that the container is a machine, and what happens to it is real."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, HostError, attach, boot, gateway_address, list_hosts, unique
from tests.hosts.docker import LABEL, remove_leftovers
from tests.hosts.fixtures import EACH_SUITE, BootHost
from tests.hosts.owner import find_owner, started_at

# Whatever is tried on hosts shows every day that they are machines; in detail only here.
pytestmark = [pytest.mark.hosts, pytest.mark.slow]


@pytest.fixture(params=EACH_SUITE)
def host(request: pytest.FixtureRequest, prepared_host: Callable[[str], Host]) -> Host:
    return prepared_host(request.param)


def test_only_the_right_key_on_the_right_host_key_signs_in(host: Host, operator_key: Path, tmp_path: Path) -> None:
    assert host.ssh("ops", operator_key, "sudo", "-n", "id", "-u").stdout == "0\n"

    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    assert "Permission denied" in host.ssh("ops", other, "true").stderr

    wrong = tmp_path / "known_hosts"
    wrong.write_text(f"{host.address} {' '.join(other.with_suffix('.pub').read_text().split()[:2])}\n")
    refused = host.ssh("ops", operator_key, "true", options=[f"-oUserKnownHostsFile={wrong}"])
    assert "Host key verification failed" in refused.stderr


def test_a_command_runs_as_the_engine_would_run_it(host: Host) -> None:
    """Where, in which groups, with which rights and words: a short cut that nobody shall notice."""
    asked = (
        "cd . && pwd && env | sort && cat /proc/self/cgroup && readlink /proc/self/ns/* && grep Cap /proc/self/status"
    )
    by_engine = subprocess.run(["docker", "exec", host.id, "sh", "-c", asked], capture_output=True, text=True)
    assert host.run(["sh", "-c", asked]).stdout == by_engine.stdout
    assert "systemd:/\n" in by_engine.stdout or "0::/" in by_engine.stdout
    killed = host.run(["sh", "-c", "cat; kill -KILL $$"], stdin="through", check=False)
    assert (killed.returncode, killed.stdout) == (137, "through")
    stopped = host.run("(sleep 0.2; kill -KILL $$) & kill -STOP $$", check=False, timeout_s=30)
    assert stopped.returncode == 137, "it stops with what a host that goes down has stopped"
    pid = host.run("sleep 70003 >/dev/null & echo $!").stdout.strip()
    host.run(["kill", pid])
    assert not host.run(["test", "-d", f"/proc/{pid}"], check=False).ok, "a number of its own, and no other process"
    assert host.run("sleep 60 & echo begun", timeout_s=30).stdout == "begun\n", "it waits for what is in the background"


@pytest.mark.parametrize("suite", EACH_SUITE)
def test_a_bare_host_lets_the_installer_in_by_password_and_asks_for_it_again(boot_host: BootHost, suite: str) -> None:
    host = boot_host(suite, prepared=False, password="correct horse")
    options = ["-oBatchMode=no", "-oPubkeyAuthentication=no", "-oNumberOfPasswordPrompts=1"]

    def sign_in(password: str) -> subprocess.CompletedProcess[str]:
        command = host.ssh_argv("installer", "/dev/null", "sudo -n true; sudo -S -p '' id -u", options=options)
        return subprocess.run(
            ["sshpass", "-p", password, *command], input="correct horse\n", capture_output=True, text=True, timeout=30
        )

    right = sign_in("correct horse")
    assert right.stdout == "0\n"
    assert "a password is required" in right.stderr
    assert sign_in("wrong horse").returncode != 0


def test_a_reboot_keeps_what_a_machine_keeps(host: Host, operator_key: Path) -> None:
    before, keys = host.boot_id, host.host_keys
    gpus = host.gpu.scenario.uuids
    host.run("touch /var/kept /run/gone && hostnamectl set-hostname renamed")
    host.reboot()
    assert host.boot_id != before
    assert host.host_keys == keys
    assert host.gpu.scenario.uuids == gpus
    assert host.run("ls /var/kept /run/gone", check=False).stdout == "/var/kept\n"
    assert host.ssh("ops", operator_key, "hostname").stdout == "renamed\n"
    assert host.run("journalctl --list-boots --no-pager | wc -l").stdout.strip() != "1"


def test_a_cut_network_is_silent_and_comes_back_under_the_same_address(host: Host, operator_key: Path) -> None:
    quickly = ["-oConnectTimeout=1"]
    host.cut_network()
    try:
        assert host.ssh("ops", operator_key, "true", options=quickly).returncode == 255
        assert host.run(f"timeout 2 bash -c '</dev/tcp/{gateway_address()}/22'", check=False).returncode != 0
    finally:
        host.restore_network()
    assert eventually(lambda: host.ssh("ops", operator_key, "true", options=quickly).ok)


def test_the_engines_user_cuts_the_network_without_being_root(
    prepared_host: Callable[[str], Host], operator_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = prepared_host("trixie")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    host.cut_network()
    assert host.ssh("ops", operator_key, "true", options=["-oConnectTimeout=1"]).returncode == 255
    host.restore_network()
    assert eventually(lambda: host.ssh("ops", operator_key, "true", options=["-oConnectTimeout=1"]).ok)


def test_a_host_reaches_this_machine_and_answers_on_both_families(host: Host) -> None:
    assert host.run(["ping", "-c1", "-W2", gateway_address()]).ok
    assert host.address_v6, "this machine's Docker engine gives its default bridge no IPv6"
    scan = subprocess.run(
        ["ssh-keyscan", "-T", "5", "-t", "ed25519", host.address_v6], capture_output=True, text=True, check=True
    )
    assert " ".join(scan.stdout.split()[1:]) == host.host_keys[0]


def test_a_firewall_of_the_hosts_own_takes_effect_from_outside(host: Host, operator_key: Path) -> None:
    rules = """
        table inet test {
          chain input {
            type filter hook input priority 0; policy drop;
            ct state established,related accept
            icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
          }
        }
    """
    host.run(["nft", "-f", "-"], stdin=rules)
    try:
        assert host.ssh("ops", operator_key, "true", options=["-oConnectTimeout=1"]).returncode == 255
    finally:
        host.run("nft delete table inet test")
    assert host.ssh("ops", operator_key, "true").ok


def test_units_are_limited_and_contained(host: Host) -> None:
    limit = "systemd-run --wait --quiet -p MemoryMax=20M -p MemorySwapMax=0 -p OOMPolicy=kill"
    hungry = f"{limit} python3 -c 'b = bytearray(200 * 2**20)'"
    assert host.run(hungry, check=False).returncode != 0
    assert host.run(hungry.replace("200", "2")).ok
    assert "0::" in host.run("systemd-run --wait --pipe --quiet cat /proc/self/cgroup").stdout


def test_nested_containers_run(host: Host) -> None:
    host.run("systemctl start docker")
    try:
        system = "bin lib lib64 usr/bin usr/lib64 usr/lib/x86_64-linux-gnu"
        host.run(f"tar -C / -c {system} 2>/dev/null | docker import - nested:test")
        assert host.run("docker run --rm -m 64m nested:test /usr/bin/id -u").stdout == "0\n"
    finally:
        host.run("docker rmi -f nested:test; systemctl stop docker.socket docker.service")


def test_the_gpus_are_seen_by_library_and_shell_and_lost_by_both(host: Host) -> None:
    scenario = host.gpu.scenario
    ask = (
        'python3 -c \'import ctypes; n = ctypes.CDLL("libnvidia-ml.so.1"); h = ctypes.c_void_p();'
        " n.nvmlInit_v2(); print([n.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(h)) for i in (0, 1)])'"
    )
    assert all(uuid in host.run("nvidia-smi -L").stdout for uuid in scenario.uuids)
    assert host.run(ask).stdout == "[0, 0]\n"
    host.run('python3 -c \'open("/dev/nvidia1", "rb+", buffering=0)\'')
    try:
        host.gpu.show(scenario.lost(1))
        assert host.run("nvidia-smi -L", check=False).returncode == 15
        assert host.run(ask).stdout == "[0, 15]\n"
    finally:
        host.gpu.show(scenario)


def test_cards_of_the_machine_that_runs_the_host_are_out_of_its_sight(host: Host) -> None:
    """A role that saw one would give the host a driver for it."""
    assert host.run("ls -A /sys/bus/pci/devices").stdout == ""
    assert not host.run("test -e /proc/driver/nvidia/version", check=False).ok
    assert host.run("ls /dev/nvidia[0-9]*").stdout.split() == ["/dev/nvidia0", "/dev/nvidia1"], "its own, fake ones"


def test_an_old_driver_takes_the_new_ones_place(host: Host) -> None:
    ask = "python3 -c 'import ctypes; ctypes.CDLL(\"libnvidia-ml.so.1\").nvmlDeviceGetMemoryInfo_v2'"
    assert host.run(ask).ok
    host.gpu.plug(driver="old-driver")
    try:
        assert "undefined symbol: nvmlDeviceGetMemoryInfo_v2" in host.run(ask, check=False).stderr
        assert host.run("nvidia-smi -L").ok
    finally:
        host.gpu.plug()


def test_a_machine_without_gpus_has_no_driver(boot_host: BootHost) -> None:
    host = boot_host("trixie", prepared=False, gpus=0)
    assert host.run("command -v nvidia-smi", check=False).returncode == 1
    assert host.run("ls /dev/nvidia*", check=False).stdout == ""
    assert "cannot open shared object" in host.run(
        "python3 -c 'import ctypes; ctypes.CDLL(\"libnvidia-ml.so.1\")'", check=False
    ).stderr  # fmt: skip


def test_no_two_hosts_share_an_address_a_key_or_a_gpu(boot_host: BootHost) -> None:
    one, two = boot_host("trixie", gpus=3), boot_host("trixie", gpus=3)
    assert one.address != two.address
    assert not set(one.host_keys) & set(two.host_keys)
    assert not set(one.gpu.scenario.uuids) & set(two.gpu.scenario.uuids)
    assert one.gpu.scenario.count == 3
    assert one.run("cat /etc/machine-id").stdout != two.run("cat /etc/machine-id").stdout


def test_a_destroyed_host_leaves_nothing_and_its_name_is_free(named: str) -> None:
    host = boot(named, "trixie", labels={"purpose": named})
    assert [found.name for found in list_hosts({"purpose": named})] == [named]
    assert attach(named).address == host.address
    with pytest.raises(HostError, match="already in use"):
        boot(named, "trixie")
    host.destroy()
    host.destroy()
    assert list_hosts({"purpose": named}) == []
    with pytest.raises(HostError):
        attach(named)


def test_what_a_killed_run_of_this_checkout_left_is_removed_and_nothing_else(boot_host: BootHost) -> None:
    with subprocess.Popen(["sleep", "600"]) as run:
        killed = f"{run.pid} {started_at(run.pid)} {' '.join(str(find_owner()).split()[2:])}"
        run.kill()
    named, labels = unique("left"), {f"{LABEL}.owner": killed}
    left = boot(named, "trixie", labels=labels)
    elsewhere = boot(f"{named}-2", "trixie", labels={**labels, f"{LABEL}.checkout": "/somewhere/else"})
    try:
        mine = boot_host("trixie", prepared=False)  # whoever boots a host removes what was left before
        with pytest.raises(HostError):
            attach(named)
        assert remove_leftovers() == []
        assert elsewhere.run("true").ok
        assert mine.run("true").ok
        assert elsewhere.name not in [host.name for host in list_hosts()]
    finally:
        left.destroy()
        elsewhere.destroy()


@pytest.fixture
def named(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of the test's own, free afterwards even when the test failed halfway."""
    name = f"named-{abs(hash(request.node.nodeid)) % 10**8}"
    yield name
    for host in list_hosts({"purpose": name}):
        host.destroy()


def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
