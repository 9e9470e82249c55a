"""The agent as a whole: enrolment, credential, orders, freezing, GPUs that hang, and what it costs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.hosts import Scenario
from tests.integration.agent.conftest import Site
from tests.integration.agent.portal_double import MACHINE_ID, in_seconds
from tests.support.waiting import until

pytestmark = pytest.mark.hosts


@contextmanager
def another_portal_state(site: Site, **fields: Any) -> Iterator[None]:
    """The portal as it comes back from a backup."""
    portal = site.portal
    before = {name: getattr(portal, name) for name in fields}
    for name, value in fields.items():
        setattr(portal, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(portal, name, value)


def test_enrolment_uses_up_the_token_and_keeps_a_credential_that_only_root_reads(site: Site) -> None:
    assert site.portal.token == ""
    assert not site.host.run(["test", "-e", "/etc/remotegpu/enroll-token"], check=False).ok
    credential = "/var/lib/remotegpu-agent/credential.json"
    assert site.host.run(["stat", "-c", "%U %a", credential]).stdout.strip() == "root 600"
    status = site.status()
    assert status["enrolled"] is True
    assert status["machine_id"] == MACHINE_ID
    assert status["frozen"] is False
    assert status["last_contact_at"] > in_seconds(-30)
    assert status["gpu"]["state"] == "ok"
    facts = site.portal.facts
    assert facts is not None
    assert facts["hostname"] == site.host.run(["hostname"]).stdout.strip()
    assert facts["openssh"].startswith("OpenSSH_")


def test_the_host_opens_no_port_for_the_agent(site: Site) -> None:
    pids = [site.agent_pid(), _nvml_child(site)]
    assert all(pids)
    listening = site.host.run(["ss", "-Hlnap", "--tcp", "--udp", "--raw", "state", "listening"]).stdout
    assert "sshd" in listening, "whoever listens is named"
    assert [line for line in listening.splitlines() if any(f"pid={pid}," in line for pid in pids)] == []


def test_the_host_tells_of_its_gpus_and_itself(site: Site) -> None:
    gpu = site.portal.gpu
    assert gpu is not None
    assert [each["uuid"] for each in gpu["gpus"]] == site.host.gpu.scenario.uuids
    assert {each["state"] for each in gpu["gpus"]} == {"ok"}
    until(lambda: site.portal.metrics and site.portal.metrics["cpu_percent"] is not None, "a processor share")
    metrics = site.portal.metrics
    assert metrics is not None
    assert 0 < metrics["memory_used_bytes"] < metrics["memory_total_bytes"]
    assert metrics["disks"]
    assert [each["interface"] for each in metrics["network"]] == ["eth0"]


def test_a_lost_gpu_is_named_and_the_other_is_well(site: Site) -> None:
    before = site.host.gpu.scenario
    try:
        site.host.gpu.show(before.lost(1))
        states = until(
            lambda: _states(site) == ["ok", "lost"] and _states(site), "the loss", also=lambda: site.portal.gpu
        )
        assert states == ["ok", "lost"]
        assert site.portal.gpu is not None
        lost = site.portal.gpu["gpus"][1]
        assert lost["uuid"] == before.uuids[1]
        assert lost["memory_used_bytes"] is None
        assert lost["errors"][0]["code"] == 15
    finally:
        site.host.gpu.show(before)
    until(lambda: _states(site) == ["ok", "ok"], "both GPUs", also=lambda: site.portal.gpu)


def _states(site: Site) -> list[str]:
    assert site.portal.gpu is not None
    return [gpu["state"] for gpu in site.portal.gpu["gpus"]]


def test_a_process_that_holds_a_gpu_is_told_and_rubbish_is_not(site: Site) -> None:
    """A pid by NVML alone proves nothing: early 535 drivers list entries that are wider than anybody reads."""
    before = site.host.gpu.scenario
    unit = "test-gpu-holder"
    site.host.run(
        ["systemd-run", "-q", f"--unit={unit}", "-p", "User=nobody", "sh", "-c", "exec sleep 1000 3</dev/nvidia0"]
    )
    pid = int(site.host.run(["systemctl", "show", "-P", "MainPID", unit]).stdout)
    uid = int(site.host.run(["id", "-u", "nobody"]).stdout)
    listed = {pid: None, 1: 2**20, 2**31 - 7: 2**20}  # pid 1 lives and holds no GPU, the last one is nobody
    try:
        site.host.gpu.show(before.using(0, listed).having("procnames", **{str(pid): "/\udcff"}))
        told = [{"pid": pid, "memory_bytes": None, "uid": uid}]
        until(lambda: _processes(site) == told, "the holder alone", also=lambda: site.portal.gpu)
        site.host.gpu.plug(driver="early-535")
        site.host.gpu.show(before.using(0, {pid: 2**20, 1: 2**20, 2: 2**20}))
        told = [{"pid": pid, "memory_bytes": 2**20, "uid": uid}]
        until(lambda: _processes(site) == told, "what is right of the wider entries", also=lambda: site.portal.gpu)
    finally:
        site.host.run(["systemctl", "stop", unit], check=False)
        site.host.gpu.plug()
        site.host.gpu.show(before)
    until(lambda: _processes(site) == [], "no process any more", also=lambda: site.portal.gpu)


def _processes(site: Site) -> list[dict[str, Any]] | None:
    gpus = site.portal.gpu["gpus"] if site.portal.gpu else []
    return gpus[0]["processes"] if gpus else None


def test_a_hung_driver_stops_no_heartbeat_and_no_stop(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "sleep 1000")
    site.wait_for_task(attempt, "running")
    before = site.host.gpu.scenario
    site.host.gpu.show(before.hang(0))
    try:
        stale = until(
            lambda: (found := site.portal.gpu) and found["state"] == "stale" and found, "a stale sample", timeout_s=40
        )
        assert "a reboot may be needed" in stale["message"]
        assert [gpu["uuid"] for gpu in stale["gpus"]] == before.uuids
        count = len(site.portal.reports)
        until(lambda: len(site.portal.reports) >= count + 3, "three more reports", timeout_s=15)
        children = site.host.run(["ps", "-o", "args=", "--ppid", str(site.agent_pid())]).stdout.splitlines()
        assert sum("nvml-child" in line for line in children) == 1
        asked = time.monotonic()
        site.stop_task(attempt)
        site.finished(attempt)
        assert time.monotonic() - asked < 3
    finally:
        site.host.gpu.show(before)
        # The fake driver hangs for ever: only the end of its process frees it, as a reboot would.
        site.host.run("pkill --signal KILL -f '[n]vml-child'; true")
    until(lambda: site.portal.gpu and site.portal.gpu["state"] == "ok", "a fresh sample", timeout_s=30)


@pytest.mark.slow  # patience and grace are a minute each
def test_a_hung_child_that_ignores_term_is_killed_and_nobody_waits_for_it(site: Site) -> None:
    before = site.host.gpu.scenario
    well = until(lambda: (found := site.portal.gpu) and found["state"] == "ok" and found, "a good sample")
    first = _nvml_child(site)
    site.host.gpu.show(before.hang(0))
    try:
        until(lambda: site.portal.gpu and site.portal.gpu["state"] == "stale", "a stale sample", timeout_s=40)
        until(lambda: _state_of(site, first).startswith("D"), "the child to be in the kernel's hands", timeout_s=20)
        reports = len(site.portal.reports)
        until(lambda: not _state_of(site, first), "the child to be killed", timeout_s=180, every_s=1)
        assert len(site.portal.reports) - reports > 30, "a heartbeat every two seconds, all the while"
        until(lambda: _nvml_child(site) not in (0, first), "another child to try", timeout_s=30)
        stale = site.portal.gpu
        assert stale is not None
        assert (stale["state"], [gpu["uuid"] for gpu in stale["gpus"]]) == ("stale", before.uuids)
        assert stale["sampled_at"] >= well["sampled_at"]
        assert f"the last values are of {stale['sampled_at']}" in stale["message"]
    finally:
        site.host.gpu.show(before)
        site.host.run("pkill --signal KILL -f '[n]vml-child'; true")
    until(lambda: site.portal.gpu and site.portal.gpu["state"] == "ok", "a fresh sample", timeout_s=30)


def _nvml_child(site: Site) -> int:
    found = site.host.run("pgrep -f '[n]vml-child'", check=False).stdout.split()
    return int(found[0]) if found else 0


def _state_of(site: Site, pid: int) -> str:
    """As ps has it: D is deaf to everything; empty once the process is gone."""
    return site.host.run(["ps", "-o", "stat=", "-p", str(pid)], check=False).stdout.strip()


def test_a_driver_that_is_upgraded_by_hand_is_told_by_the_agent_that_runs_on(site: Site) -> None:
    before, agent = site.host.gpu.scenario, site.agent_pid()
    site.host.gpu.show(before.mismatch())
    site.host.gpu.plug()
    try:
        _wait_for_state(site, "mismatch")
        assert site.agent_pid() == agent
    finally:
        site.host.gpu.show(before)
    _wait_for_state(site, "ok")


def test_a_driver_that_is_not_loaded_is_called_so(site: Site) -> None:
    before = site.host.gpu.scenario
    site.host.gpu.show(before.without_driver())
    site.host.run("pkill -f '[n]vml-child'; true")
    try:
        _wait_for_state(site, "driver_not_loaded")
    finally:
        site.host.gpu.show(before)
    _wait_for_state(site, "ok")


def _wait_for_state(site: Site, state: str) -> None:
    until(lambda: site.portal.gpu and site.portal.gpu["state"] == state, state, also=lambda: site.portal.gpu)


def test_an_xid_outlives_the_agent_that_heard_it(site: Site) -> None:
    before = site.host.gpu.scenario
    site.host.gpu.show(before.xid(1, 48))
    try:
        until(lambda: _xids(site) == [[], [48]], "the XID", also=lambda: site.portal.gpu)
        site.host.run("systemctl restart remotegpu-agent")
        site.portal.gpu = None
        until(lambda: _xids(site) is not None, "the next agent's word", also=lambda: site.portal.gpu)
        assert _xids(site) == [[], [48]]
    finally:
        site.host.gpu.show(before.having("system", loaded="2"))
    until(lambda: _xids(site) == [[], []], "the driver that was loaded again", also=lambda: site.portal.gpu)
    site.host.gpu.show(before)


def _xids(site: Site) -> list[list[int]] | None:
    gpu = site.portal.gpu
    return [[each["xid"] for each in card["xids"]] for card in gpu["gpus"]] if gpu and gpu["state"] == "ok" else None


def test_a_rotated_credential_replaces_the_old_one(site: Site) -> None:
    old, new = site.portal.credential, "rotated-" + uuid.uuid4().hex
    site.portal.next_credential = new
    result = site.result(site.portal.order("rotate_credential", credential=new, credential_id=2))
    assert result["ok"] is True
    until(lambda: site.portal.credential == new, "a call with the new credential")
    kept = "/var/lib/remotegpu-agent/credential.json"
    until(lambda: "previous" not in json.loads(site.host.read(kept)), "the old one to be dropped")
    assert old not in site.host.read(kept)
    assert site.portal.refused[old] == 0


def test_a_rotation_that_the_portal_forgot_locks_nobody_out(site: Site) -> None:
    current = site.portal.credential
    result = site.result(site.portal.order("rotate_credential", credential="never-known", credential_id=3))
    assert result["ok"] is True
    count = len(site.portal.reports)
    until(lambda: len(site.portal.reports) > count + 1, "reports with the old credential")
    assert site.portal.refused["never-known"] > 0
    site.result(site.portal.order("rotate_credential", credential=current, credential_id=2))


def test_a_baseline_is_taken_once_and_its_result_sent_until_acknowledged(site: Site) -> None:
    # A host that nobody has leased: what earlier tests left would be refused.
    register = "/var/lib/remotegpu-agent/leases.json"
    site.host.run(f"systemctl stop remotegpu-agent && rm -f {register} && systemctl start remotegpu-agent")
    command_id = site.portal.order("baseline")
    result = site.result(command_id, timeout_s=120)
    assert result["ok"] is True, result["message"]
    assert result["result"]["schema"] == 1
    count = len(site.portal.reports)
    until(lambda: len(site.portal.reports) >= count + 3, "three more reports")
    assert site.portal.received[f"result {command_id}"] == 1


def test_no_baseline_is_taken_while_a_lease_is_there_that_was_not_cleaned(site: Site) -> None:
    lease = site.open_lease()
    for state in ("open", "closed"):
        site.applied(site.portal.change(leases=[{**lease.wanted, "state": state}]), timeout_s=30)
        result = site.result(site.portal.order("baseline"))
        assert result["ok"] is False
        assert "has not been cleaned from this host" in result["message"]


def test_cleaning_is_refused_for_an_open_lease_another_lease_and_another_machine(site: Site) -> None:
    lease, other = site.open_lease(), site.open_lease()
    baseline = {
        "schema": 1,
        "taken_at": in_seconds(0),
        "boot_id": "x",
        "agent_version": "0.1.0",
        "sections": {},
    }
    args = {"lease_id": lease.lease_id, "login": lease.login, "uid": lease.uid, "baseline": baseline}
    wanted_open = site.result(site.portal.order("clean", **args))
    assert wanted_open["message"] == f"lease {lease.lease_id} is wanted open: close it first"
    site.change_lease(lease, state="closed")
    site.wait_for_lease(lease, "closed")
    beside = site.result(site.portal.order("clean", **args))
    assert beside["message"] == f"lease {other.lease_id} is wanted open on this machine: it must end first"
    elsewhere = site.result(site.portal.order("clean", **args | {"machine_id": MACHINE_ID + 1}))
    assert elsewhere["message"] == f"the order is for machine {MACHINE_ID + 1}, this is machine {MACHINE_ID}"
    assert site.sign_in(other).ok
    assert site.host.run(["test", "-d", f"/home/{lease.login}"]).ok


def test_a_portal_from_a_backup_freezes_the_host_until_an_operator_thaws_it(site: Site) -> None:
    lease, ending = site.open_lease(), site.open_lease()
    attempt = site.run_task(lease, "while :; do echo on; sleep 0.5; done")
    site.wait_for_task(attempt, "running")
    site.end_soon(ending)
    portal = site.portal
    restored = {"generation": portal.generation - 3, "leases": [], "attempts": [], "epoch": uuid.uuid4().hex}
    for name, value in restored.items():
        setattr(portal, name, value)
    portal.change()
    until(lambda: portal.reports[-1]["frozen"], "the host to say that it is frozen", also=site.agent_log)
    assert site.status()["frozen"] is True
    assert site.sign_in(lease).ok
    assert site.processes(lease) != []
    until(lambda: not site.sign_in(ending).ok, "a frozen lease to end at its time all the same", timeout_s=15)
    command_id = portal.order("clean", **_clean_args(lease))
    count = len(portal.reports)
    until(lambda: len(portal.reports) >= count + 3, "three more reports")
    assert command_id not in portal.results
    assert site.host.run(["test", "-d", f"/home/{lease.login}"]).ok

    retained = [ending.lease_id]
    thaw = portal.order("thaw", epoch=portal.epoch, generation=portal.generation + 1, retained=retained)
    assert site.result(thaw)["ok"] is True
    until(lambda: not portal.reports[-1]["frozen"], "the thaw", also=site.agent_log)
    until(lambda: not site.sign_in(lease).ok, "what the portal no longer names to be closed", timeout_s=15)
    assert {"agent.frozen", "agent.thawed"} <= set(portal.events())
    # Its id comes a second time, for somebody else: the first one's data must not be his.
    portal.change(leases=[lease.wanted | {"ends_at": in_seconds(600)}])
    seen = until(lambda: (found := portal.lease(lease.lease_id)) and found["state"] == "error" and found, "a refusal")
    assert "clean the machine before this id is used again" in seen["message"]
    # One that the portal remembers as ended may go on, its data intact.
    portal.change(leases=[ending.wanted | {"ends_at": in_seconds(600)}])
    until(lambda: site.sign_in(ending).ok, "a retained lease to be opened again", also=site.agent_log)


def _clean_args(lease: Any) -> dict[str, Any]:
    baseline = {"schema": 1, "taken_at": in_seconds(0), "boot_id": "x", "agent_version": "0.1.0", "sections": {}}
    return {"lease_id": lease.lease_id, "login": lease.login, "uid": lease.uid, "baseline": baseline}


def test_a_reboot_loses_the_task_and_says_so(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "echo started; sleep 1000")
    until(lambda: site.portal.log_of(attempt) == b"started\n", "the first line", also=site.agent_log)
    boot_id = site.host.boot_id
    site.host.reboot()
    ended, log = site.finished(attempt, timeout_s=60)
    assert ended["state"] == "lost"
    assert ended["boot_id"] == boot_id
    assert log == b"started\n"
    assert site.host.boot_id != boot_id
    until(lambda: site.sign_in(lease).ok, "the lease to go on after the reboot", timeout_s=15)


def test_the_doctor_finds_nothing_and_then_names_a_portal_that_is_down(site: Site) -> None:
    site.open_lease()
    well = site.host.run(["remotegpu-agent", "doctor"], check=False)
    assert well.ok, well.stdout
    assert "ok   portal: " in well.stdout
    assert "ok   sshd: " in well.stdout
    site.portal.stop()
    try:
        ill = site.host.run(["remotegpu-agent", "doctor"], check=False)
    finally:
        site.portal.start()
    assert ill.returncode == 1
    assert "FAIL portal: " in ill.stdout


def test_the_agent_is_small(site: Site) -> None:
    before = site.host.gpu.scenario
    site.host.gpu.show(Scenario.h100(8))
    try:
        until(lambda: site.portal.gpu and len(site.portal.gpu["gpus"]) == 8, "eight GPUs")
        count = len(site.portal.reports)
        until(lambda: len(site.portal.reports) >= count + 5, "five more reports")
        main = site.agent_pid()
        child = int(site.host.run("pgrep -f '[n]vml-child'").stdout.split()[0])
        rss = int(site.host.run(["ps", "-o", "rss=", "-p", str(main)]).stdout) * 1024
        pss = sum(_pss(site, pid) for pid in (main, child))
        print(f"rss {rss / 1e6:.1f} MB, pss together {pss / 1e6:.1f} MB")
        assert rss <= 40e6
        assert pss <= 64e6
    finally:
        site.host.gpu.show(before)


def _pss(site: Site, pid: int) -> int:
    text = site.host.read(f"/proc/{pid}/smaps_rollup")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
