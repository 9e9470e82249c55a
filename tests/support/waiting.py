"""Wait for a condition, with a deadline. Nothing in the tests sleeps for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SOON_S = 0.1  # between the first two looks, where a test does not say how often
LATE = 0.02  # how late one may learn of it, as a part of the wait: to look costs those who are waited for
SELDOM_S = 1.0


def until(
    condition: Callable[[], T | None],
    what: str,
    *,
    timeout_s: float = 30.0,
    every_s: float | None = None,
    also: Callable[[], object] = str,
) -> T:
    """The first true answer of `condition`; AssertionError that says what was waited for, and what `also` knows.

    It is asked ever more seldom, unless `every_s` says how often.
    """
    began = time.monotonic()
    while True:
        answer = condition()
        if answer:
            return answer
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}. {also()}")
        time.sleep(every_s or min(SELDOM_S, max(SOON_S, LATE * waited_s)))
