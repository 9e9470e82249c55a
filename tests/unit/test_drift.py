"""Drift: what is said of a change, what is never said, and what the portal makes of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from portal.models import Machine
from portal.services import drift, runs
from portal.services.actors import SYSTEM
from portal.web import operations
from tests.support.rental import finish_run
from tests.support.runs import ROOT, make_machine


def _load() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "drift_callback", ROOT / "playbooks/callback_plugins/drift.py"
    )
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


plugin = _load()
CHANGE = {"role": "docker", "task": "Ensure it", "item": None, "path": "/etc/docker/daemon.json", "diff": "-a\n+b"}


# What is said


def shown(result: dict[str, Any], **arguments: Any) -> Any:
    return plugin.change_of("role", "Ensure it", arguments, {"changed": True, **result})["diff"]


def test_a_difference_reads_from_what_is_to_what_should_be() -> None:
    diff = {"before": "a\nb\n", "after": "a\nc\n"}
    assert shown({"diff": diff}, mode="0644").splitlines() == ["@@ -1,2 +1,2 @@", " a", "-b", "+c"]
    modes = {"before": {"path": "/x", "mode": "0600"}, "after": {"path": "/x", "mode": "0644"}}
    assert shown({"diff": [modes, {}]}) == "mode: 0600 → 0644"
    assert shown({}) is None


@pytest.mark.parametrize(
    ("has", "wants"), [("0600", "0644"), ("0644", "0600"), (None, None), (None, "{{ mode }}"), ("0640", None)]
)
def test_content_is_shown_only_where_everybody_on_the_host_may_read_it(has: str | None, wants: str | None) -> None:
    result = {"diff": {"before": "word", "after": "other"}} | ({"mode": has} if has else {})
    said = shown(result, **({"mode": wants} if wants else {}))
    assert said == plugin.HIDDEN


def test_a_page_has_words_for_all_that_stands_in_the_place_of_a_difference() -> None:
    assert set(operations.NOT_SHOWN) == set(plugin.NOT_SHOWN)


@pytest.mark.parametrize(
    "line",
    [
        "password = hunter22",
        "PGPASSWORD=hunter22",
        '  "auth_token": "hunter22",',
        "api-key: hunter22",
        "proxy http://ops:hunter22@192.0.2.1:3128/",
        "http://hunter22@192.0.2.1/",
        "Authorization: Bearer hunter22hunter22",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter22\n-----END OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nhunter22\n",
    ],
)
def test_what_looks_like_a_secret_is_masked(line: str) -> None:
    assert "hunter22" not in plugin.masked(line)
    assert plugin.MASK in plugin.masked(line)
    assert "hunter22" not in shown({"diff": {"before": line, "after": ""}}, mode="0644")


@pytest.mark.parametrize(
    "line", ["PasswordAuthentication no", "https://deb.example.org/debian", "token_life: ", "Port 22"]
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert plugin.masked(line) == line


def test_a_task_that_hides_its_result_stays_hidden() -> None:
    assert shown({"censored": "hidden", "diff": {"before": "hunter22"}}, mode="0644") == "what it is about is a secret"


def test_a_task_that_only_asked_about_a_file_makes_room_for_the_one_that_changes_it() -> None:
    asked = {**CHANGE, "task": "Ask whether it would change", "diff": None}
    other = {**CHANGE, "path": None, "diff": None}
    assert plugin.noted([asked, other], CHANGE) == [other, CHANGE]
    assert plugin.noted([CHANGE], asked) == [CHANGE, asked]
    assert plugin.noted([other], other) == [other, other]


def test_silence_is_not_agreement() -> None:
    def judge(*changes: Any, failed: str | None = None, unreachable: str | None = None, whole: bool = False) -> Any:
        found = plugin.verdict(list(changes), failed=failed, unreachable=unreachable, whole=whole)
        return found["state"], found["reason"]

    assert judge(whole=True) == ("none", None)
    assert judge() == ("unknown", plugin.CUT_SHORT)
    assert judge(failed="it broke") == ("unknown", "it broke")
    assert judge(unreachable="no route") == ("unknown", "no route")
    assert judge(CHANGE, failed="password=hunter22") == ("drifted", "password=•••")
    assert judge(CHANGE) == ("drifted", plugin.CUT_SHORT)


def test_a_host_that_differs_in_everything_is_told_in_bounds() -> None:
    many = [{**CHANGE, "path": f"/{number}", "diff": "x" * 3_000} for number in range(150)]
    kept = plugin.verdict(many, failed=None, unreachable=None, whole=True)["changes"]
    assert len(kept) == plugin.MOST_CHANGES + 1
    assert kept[-1]["task"] == "and 50 more"
    assert sum(len(change["diff"] or "") for change in kept) < plugin.MOST_CHARS + 100 * 50
    long = shown({"diff": {"before": "", "after": "y" * 9_000}}, mode="0644")
    assert len(long) < plugin.MOST_DIFF_CHARS + 50
    assert long.endswith("characters left out")


@pytest.mark.parametrize(
    "text",
    [
        "y" * 1_000_000,
        "a." * 500_000,
        "token" * 20_000,
        "http://" + "u" * 1_000_000,
        "token=" + " \n" * 500_000,
        "token" + " " * 1_000_000,
    ],
    ids=["a word", "a name", "keys", "an address", "nothing", "blanks"],
)
def test_a_file_of_one_long_line_holds_nobody_up(text: str) -> None:
    assert plugin.masked(text) == text
    assert plugin.masked(f"{text}\nmy_api-key.of_mine{' ' * 60}= abc").endswith(f"= {plugin.MASK}")
    assert plugin.masked(f"{text}\nmy_api-key.of_mine = abc").endswith(f"my_api-key.of_mine = {plugin.MASK}")


# What the playbook demands


def test_the_playbook_refuses_to_run_without_check(tmp_path: Path) -> None:
    """From a shell nothing but its first task stands between a look and a change of the whole fleet."""
    (tmp_path / "hosts.yml").write_text("gpu_hosts:\n  hosts:\n    nowhere: {ansible_host: 192.0.2.1}\n")
    program = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [program, "-i", tmp_path / "hosts.yml", ROOT / "playbooks" / "drift.yml"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "drift.yml only looks" in done.stdout
    assert "unreachable=0" in done.stdout, "nobody was even called"
    assert "drift: nowhere: unknown" in done.stdout


# What the portal makes of it


def looked(verdicts: dict[str, Any], *machines: Machine, state: str = "succeeded") -> None:
    finish_run(runs.queue(drift.PLAYBOOK, machines, by=SYSTEM), state, verdicts)


def test_a_machine_has_the_last_look_and_its_time(database: Any) -> None:
    machine = make_machine("gpu-1")
    assert drift.find(machine) is None
    looked({"gpu-1": {"state": "drifted", "reason": None, "changes": [CHANGE]}}, machine)
    first = drift.find(machine)
    assert first is not None
    assert (first.state, first.changes) == ("drifted", [CHANGE])
    looked({"gpu-1": {"state": "none", "reason": None, "changes": []}}, machine)
    again = drift.find(machine)
    assert again is not None
    assert (again.state, again.changes) == ("none", [])
    assert again.looked_at > first.looked_at
    assert runs.get_run(again.run_id).verdicts == {"gpu-1": {"state": "none", "reason": None, "changes": 0}}


@pytest.mark.parametrize("said", [{}, {"state": "fine", "changes": []}, {"passed": True}])
def test_a_host_of_which_nothing_was_said_is_unknown(database: Any, said: dict[str, Any]) -> None:
    machine, other = make_machine("gpu-1"), make_machine("gpu-2")
    looked({"gpu-1": said, "gpu-2": {"state": "none", "reason": None, "changes": []}}, machine, other, state="failed")
    found, fine = drift.find(machine), drift.find(other)
    assert found is not None
    assert (found.state, found.reason) == ("unknown", "it went wrong")
    assert fine is not None
    assert fine.state == "none"


def test_a_look_that_was_cancelled_has_seen_nothing(database: Any) -> None:
    machine = make_machine("gpu-1")
    looked({"gpu-1": {"state": "drifted", "reason": None, "changes": [CHANGE]}}, machine)
    runs.cancel(runs.queue(drift.PLAYBOOK, [machine], by=SYSTEM), by=SYSTEM)
    found = drift.find(machine)
    assert found is not None
    assert found.state == "drifted"


def test_machines_are_found_by_their_drift_and_one_without_a_look_is_unknown(database: Any) -> None:
    right, wrong, new = make_machine("gpu-1"), make_machine("gpu-2"), make_machine("gpu-3")
    make_machine("gpu-4", state="retired")
    none = {"state": "none", "reason": None, "changes": []}
    looked({"gpu-1": none, "gpu-2": {**none, "state": "drifted", "changes": [CHANGE]}}, right, wrong)
    names = {state: [machine.name for machine in drift.search(state=state)] for state in ("none", "drifted", "unknown")}
    assert names == {"none": [right.name], "drifted": [wrong.name], "unknown": [new.name]}
    assert [machine.name for machine in drift.search()] == ["gpu-1", "gpu-2", "gpu-3"]


def test_a_look_only_looks_whatever_is_asked(database: Any) -> None:
    machine = make_machine("gpu-1")
    run = runs.queue("drift", [machine], by=SYSTEM, check=False)
    assert run.options["check"] is True
    with pytest.raises(Exception, match="tags"):
        runs.queue("drift", [machine], by=SYSTEM, tags=["base"])
