"""What `make bench` says of a goal."""

from __future__ import annotations

from bench.figures import Figure


def test_a_goal_in_seconds_of_processor_is_held_to_what_the_machine_takes_and_says_so() -> None:
    beside = Figure("make test-fast", 147.5, at_most=90, slowness=1.9)
    assert (beside.goal, beside.verdict) == ("≤ 90 s x 1.9", "ok")
    alone = Figure("make test-fast", 147.5, at_most=90)
    assert (alone.goal, alone.verdict) == ("≤ 90 s", "MISSED")
    assert Figure("make test-fast", 180.1, at_most=90, slowness=2.0).verdict == "MISSED"


def test_a_number_without_a_goal_cannot_be_missed() -> None:
    told = Figure("make run: first start", 3.07)
    assert (told.goal, told.verdict) == ("", "-")
