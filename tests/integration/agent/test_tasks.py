"""A task on a real host: runs as the lease's user, tells everything it printed, ends with all its children."""

from __future__ import annotations

import hashlib
import time
from functools import partial

import pytest

from tests.integration.agent.conftest import Site
from tests.support.waiting import until

pytestmark = pytest.mark.hosts

FAMILY = """
trap '' HUP
sleep 1000 &
setsid sleep 1001 &
( setsid sh -c 'cd /; (trap "" HUP INT; sleep 1002 & exec sleep 1003) >/dev/null 2>&1 </dev/null &' )
echo ready
sleep 1004
"""


def test_a_task_runs_as_the_leases_user_with_its_gpus_and_tells_its_exit_code(site: Site) -> None:
    lease = site.open_lease()
    command = (
        'id -un; pwd; echo "$CUDA_VISIBLE_DEVICES $NVIDIA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER"; echo "$HARD"; exit 3'
    )
    hard = "a $HOME `id` \"quoted\" 'single' \\ \x1b[31m\ttab\nnew line %h €"
    attempt = site.run_task(lease, command, env={"HARD": hard})
    state, log = site.finished(attempt)
    assert (state["state"], state["exit_code"], state["signal"]) == ("failed", 3, None)
    assert log.decode() == f"{lease.login}\n/home/{lease.login}\nGPU-a,GPU-b GPU-a,GPU-b PCI_BUS_ID\n{hard}\n"
    assert state["started_at"] < state["ended_at"]


def test_a_command_and_its_environment_are_seen_by_no_other_user(site: Site) -> None:
    lease, neighbour = site.open_lease(), site.open_lease()
    attempt = site.run_task(lease, "echo here; sleep 60 # a secret word", env={"TOKEN": "a secret value"})
    until(lambda: site.portal.log_of(attempt) == b"here\n", "the first line", also=site.agent_log)
    seen = site.sign_in(neighbour, "ps", "-eo", "args")
    assert seen.ok
    assert "secret" not in seen.stdout
    looked = site.sign_in(neighbour, "cat", f"/var/lib/remotegpu-tasks/{attempt}/script")
    assert "Permission denied" in looked.stderr
    own = site.sign_in(lease, f"cat /var/lib/remotegpu-tasks/{attempt}/root/log; echo x > /var/lib/remotegpu-tasks/x")
    assert own.stdout == ""
    assert own.stderr.count("Permission denied") == 2


@pytest.mark.parametrize(
    ("command", "state", "exit_code", "signal"),
    [
        ("true", "succeeded", 0, None),
        ("exit 255", "failed", 255, None),
        ("kill -SEGV $$", "failed", None, 11),
        ("kill -KILL $$", "failed", None, 9),
    ],
)
def test_every_end_is_told_as_it_was(
    site: Site, command: str, state: str, exit_code: int | None, signal: int | None
) -> None:
    lease = site.open_lease()
    ended, _ = site.finished(site.run_task(lease, command))
    assert (ended["state"], ended["exit_code"], ended["signal"]) == (state, exit_code, signal)


def test_a_directory_that_is_not_there_is_said_to_be_the_reason(site: Site) -> None:
    lease = site.open_lease()
    ended, _ = site.finished(site.run_task(lease, "true", workdir="no/such place"))
    assert (ended["state"], ended["exit_code"]) == ("failed", 200)
    assert ended["reason"] == "cannot change to the working directory no/such place"


def test_a_task_starts_where_it_is_told_to(site: Site) -> None:
    lease = site.open_lease()
    site.sign_in(lease, "mkdir -p 'my %h dir/x'")
    for wanted in ("my %h dir/x", "~/my %h dir/x", f"/home/{lease.login}/my %h dir/x"):
        _, log = site.finished(site.run_task(lease, "pwd", workdir=wanted))
        assert log.decode() == f"/home/{lease.login}/my %h dir/x\n"


def test_a_task_that_is_stopped_leaves_no_child_wherever_it_hid(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, FAMILY)
    until(lambda: site.portal.log_of(attempt) == b"ready\n", "the task to be ready", also=site.agent_log)
    until(lambda: sum("sleep 100" in line for line in site.processes(lease)) >= 5, "all of its children")
    asked = time.monotonic()
    site.stop_task(attempt)
    until(lambda: not site.processes(lease), "every process to be gone", every_s=0.02)
    assert time.monotonic() - asked < 2
    ended, log = site.finished(attempt)
    assert (ended["state"], ended["reason"]) == ("stopped", "stopped by request")
    assert log == b"ready\n"


def test_a_task_that_ignores_term_is_killed_after_its_grace(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "trap '' TERM; echo ready; while :; do sleep 0.1; done", stop_grace_s=1)
    until(lambda: site.portal.log_of(attempt) == b"ready\n", "the task to be ready", also=site.agent_log)
    asked = time.monotonic()
    site.stop_task(attempt)
    ended, _ = site.finished(attempt)
    assert 1 <= time.monotonic() - asked < 4
    assert (ended["state"], ended["signal"]) == ("stopped", 9)
    assert site.processes(lease) == []


def test_no_grace_is_a_kill_at_once_that_is_told_all_the_same(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "trap '' TERM; echo ready; sleep 1000", stop_grace_s=0)
    until(lambda: site.portal.log_of(attempt) == b"ready\n", "the task to be ready", also=site.agent_log)
    site.stop_task(attempt)
    ended, _ = site.finished(attempt, timeout_s=5)
    assert (ended["state"], ended["signal"]) == ("stopped", 9)


def test_what_a_task_leaves_running_ends_with_it(site: Site) -> None:
    lease = site.open_lease()
    ended, _ = site.finished(site.run_task(lease, "setsid sleep 1000 & echo started", stop_grace_s=2))
    assert (ended["state"], ended["exit_code"]) == ("succeeded", 0)
    assert site.processes(lease) == []


def test_a_time_limit_ends_the_task(site: Site) -> None:
    lease = site.open_lease()
    ended, _ = site.finished(site.run_task(lease, "sleep 1000", time_limit_s=1))
    assert (ended["state"], ended["reason"]) == ("timed_out", "its time limit of 1 s was over")


def test_a_task_stopped_before_it_started_never_runs(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "touch /tmp/ran-$REMOTEGPU_ATTEMPT_ID", state="stop")
    ended, _ = site.finished(attempt)
    assert (ended["state"], ended["started_at"]) == ("stopped", None)
    assert not site.host.run(["test", "-e", f"/tmp/ran-{attempt}"], check=False).ok


def test_a_task_that_no_process_can_be_given_fails_and_says_why(site: Site) -> None:
    lease = site.open_lease()
    ended, _ = site.finished(site.run_task(lease, "true", env={"HALF": "a\0b"}))
    assert (ended["state"], ended["started_at"]) == ("failed", None)
    assert "NUL" in ended["reason"]


def test_a_log_is_whole_byte_for_byte_though_the_agent_was_killed(site: Site) -> None:
    lease = site.open_lease()
    command = (
        "for i in $(seq 1 400); do head -c 5000 /dev/urandom | tee -a whole; sleep 0.02; done; printf 'no newline'"
    )
    attempt = site.run_task(lease, command + " | tee -a whole")
    for _ in range(3):
        kept = len(site.portal.log_of(attempt))
        until(partial(_has_more, site, attempt, kept + 300_000), "some more log", also=site.agent_log)
        site.host.run(["systemctl", "kill", "--signal=KILL", "remotegpu-agent"])
    ended, log = site.finished(attempt, timeout_s=60)
    assert (ended["state"], ended["exit_code"]) == ("succeeded", 0)
    assert len(log) == 400 * 5000 + 10
    whole = site.host.run(["sha256sum", f"/home/{lease.login}/whole"]).stdout.split()[0]
    assert hashlib.sha256(log).hexdigest() == whole


def test_a_task_runs_on_through_a_cut_network_and_tells_everything_afterwards(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "for i in $(seq 1 40); do echo line $i; sleep 0.1; done; exit 4")
    until(lambda: site.portal.log_of(attempt), "the first line", also=site.agent_log)
    site.host.cut_network()
    try:
        exit_file = f"/var/lib/remotegpu-tasks/{attempt}/root/exit.json"
        until(lambda: site.host.run(["test", "-e", exit_file], check=False).ok, "the task to end without network")
        assert attempt not in site.portal.ended_logs
    finally:
        site.host.restore_network()
    ended, log = site.finished(attempt, timeout_s=90)
    assert (ended["state"], ended["exit_code"]) == ("failed", 4)
    assert log.decode() == "".join(f"line {i}\n" for i in range(1, 41))


def test_a_quota_is_visible_and_the_disk_is_given_back(site: Site) -> None:
    lease = site.open_lease()
    site.portal.change(log_quota_bytes=1_000_000)
    try:
        attempt = site.run_task(lease, "head -c 300000000 /dev/zero | tr '\\0' x; echo the end")
        ended, log = site.finished(attempt, timeout_s=60)
    finally:
        site.portal.change(log_quota_bytes=64 * 1024 * 1024)
    assert ended["exit_code"] == 0
    assert ended["log_truncated"]
    assert log[:1_000_000] == b"x" * 1_000_000
    assert log[1_000_000:].decode() == (
        "\n[RemoteGPU: the log quota of 1000000 bytes is used up; further output is not kept.]\n"
    )
    assert ended["log_bytes"] == len(log)
    log_file = f"/var/lib/remotegpu-tasks/{attempt}/root/log"
    until(
        lambda: int(site.host.run(["stat", "-c", "%b", log_file]).stdout) * 512 < 100_000,
        "the disk to be given back",
        also=lambda: site.host.run(["stat", log_file]).stdout,
    )


def test_what_the_portal_holds_is_dropped_on_the_host_and_offsets_stay(site: Site) -> None:
    lease = site.open_lease()
    attempt = site.run_task(lease, "head -c 5000000 /dev/urandom; read -r _ < <(sleep 3); echo; echo end")
    until(lambda: len(site.portal.log_of(attempt)) >= 5_000_000, "most of the log", also=site.agent_log)
    log_file = f"/var/lib/remotegpu-tasks/{attempt}/root/log"
    size, blocks = map(int, site.host.run(["stat", "-c", "%s %b", log_file]).stdout.split())
    assert size >= 5_000_000
    assert blocks * 512 < 1_500_000
    _, log = site.finished(attempt)
    assert len(log) == 5_000_005
    assert log.endswith(b"\nend\n")


def test_results_are_sent_until_acknowledged_and_then_never_again(site: Site) -> None:
    lease = site.open_lease()
    site.portal.acknowledges = False
    attempt = site.run_task(lease, "echo once")
    try:
        until(lambda: _naming(site, attempt) >= 3, "three reports that name it")
    finally:
        site.portal.acknowledges = True
    site.finished(attempt)
    named, count = _naming(site, attempt), len(site.portal.reports)
    until(lambda: len(site.portal.reports) >= count + 4, "four more reports")
    assert _naming(site, attempt) <= named + 1  # one may have been under way


def _has_more(site: Site, attempt_id: int, than: int) -> bool:
    return len(site.portal.log_of(attempt_id)) > than


def _naming(site: Site, attempt_id: int) -> int:
    """How many reports named the attempt."""
    return sum(attempt_id in [each["attempt_id"] for each in report["attempts"]] for report in site.portal.reports)
