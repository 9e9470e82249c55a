"""The words that somebody reads on the host at three in the morning."""

from __future__ import annotations

from remotegpu_agent.cli import told
from remotegpu_agent.doctor import names_left


def step(name: str, result: str, reason: str | None = None) -> dict[str, object]:
    return {"id": name, "result": result, "reason": reason}


def test_a_cleaning_that_passed_says_so_in_one_line() -> None:
    assert told([step("home", "passed"), step("firewall", "not_applicable", "nft is not installed on this host")]) == [
        "clean: nothing of the lease is left (2 steps)"
    ]


def test_a_cleaning_that_did_not_pass_names_each_step_and_why() -> None:
    steps = [
        step("home", "failed", "/home/lease17 exists"),
        step("users", "unknown", "could not look"),
        step("at", "passed"),
    ]
    assert told(steps) == [
        "FAILED home: /home/lease17 exists",
        "UNKNOWN users: could not look",
        "NOT clean: 2 of 3 steps. What is named above is still there; run it again",
    ]


def test_a_disk_without_room_for_another_file_is_named_though_there_are_bytes() -> None:
    assert names_left(1_000_000).is_fine is True
    finding = names_left(3)
    assert finding.is_fine is False
    assert "only 3 more files can be made" in finding.text
    assert "du --inodes" in finding.text
