"""What a bench answers with: figures with their goals, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.lanes import MOST_SLOWNESS, how_slow


@dataclass(frozen=True)
class Figure:
    """One measured number. Without a goal it is told for comparison only, and cannot be missed.

    `slowness` is of figures that are processor and nothing else: a goal in seconds is written for one machine, and one
    that takes as many times as long for the same work has as many times the seconds, as `make test` has its minutes.
    """

    name: str
    measured: float
    unit: str = "s"
    at_most: float | None = None
    at_least: float | None = None
    slowness: float = 1.0

    @property
    def is_met(self) -> bool:
        enough = self.at_least is None or self.measured >= self.at_least
        return enough and (self.at_most is None or self.measured <= self.at_most * self.slowness)

    @property
    def goal(self) -> str:
        bounds = [("≥", self.at_least), ("≤", self.at_most)]
        told = " and ".join(f"{sign} {bound:g} {self.unit}".rstrip() for sign, bound in bounds if bound is not None)
        return f"{told} x {self.slowness:.1f}" if self.slowness > 1 else told

    @property
    def verdict(self) -> str:
        return ("ok" if self.is_met else "MISSED") if self.goal else "-"

    @property
    def shown(self) -> str:
        digits = 3 if abs(self.measured) < 1 else 2 if abs(self.measured) < 10 else 1
        return f"{self.measured:,.{digits}f} {self.unit}".rstrip()


def table(figures: Sequence[Figure]) -> str:
    """Figure, measured, goal, verdict: a line each, in columns."""
    rows = [("figure", "measured", "goal", ""), *((f.name, f.shown, f.goal or "-", f.verdict) for f in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: tuple[str, ...], widths: Sequence[int]) -> str:
    name, measured, goal, verdict = row
    return f"{name:<{widths[0]}}  {measured:>{widths[1]}}  {goal:<{widths[2]}}  {verdict}".rstrip()


def show(figures: Sequence[Figure]) -> int:
    """Print the table; 1 if a goal is missed."""
    print(table(figures), flush=True)
    return 0 if all(figure.is_met for figure in figures) else 1


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest measured value that so many percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


@dataclass
class Beside:
    """How slow this machine was while something was measured, once that is over."""

    slowness: float = 1.0


@contextmanager
def machine() -> Iterator[Beside]:
    """Measure the machine before and after what is measured, which it leaves alone."""
    found, before = Beside(), how_slow()
    yield found
    found.slowness = min(MOST_SLOWNESS, max(1.0, (before + how_slow()) / 2))
