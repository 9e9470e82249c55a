"""Who is told that something has ended, without what ends knowing them.

Whoever waits for the end of a run or a command lies above it and imports it, never the other way round; so it leaves a
function there, which is called in the transaction that writes the end:

    @runs.when_ended("verify")
    def run_finished(run: Run) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Hearers(Generic[Row]):
    """One function for each kind of what ends."""

    def __init__(self) -> None:
        self.by_kind: dict[str, Callable[[Row], None]] = {}

    def __call__(self, kind: str) -> Callable[[Callable[[Row], None]], Callable[[Row], None]]:
        """Decorates the function that is called with every row of this kind."""

        def keep(hearer: Callable[[Row], None]) -> Callable[[Row], None]:
            self.by_kind[kind] = hearer
            return hearer

        return keep
