"""Wait for a condition, with a deadline. Nothing in the tests sleeps for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(
    condition: Callable[[], T | None],
    what: str,
    *,
    timeout_s: float = 30.0,
    every_s: float = 0.1,
    also: Callable[[], object] = str,
) -> T:
    """The first true answer of `condition`; AssertionError that says what was waited for, and what `also` knows."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}. {also()}")
        time.sleep(every_s)
