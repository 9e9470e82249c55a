"""A server that waits shorter or longer: the rules' patience and its own times, by one factor.

Of rules the lines `for:` and `keep_firing_for:` change, and for how long the last word of a series counts that comes no
more, down to a quarter of a minute; plain text in, plain text out, so that all else stays. How far an expression looks
back otherwise is its meaning, not its patience. A factor of 1 gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000, "y": 31_536_000_000}
PART = re.compile(r"(\d+)(ms|[smhdwy])")
DURATION = re.compile(r"(?:0|(?:\d+(?:ms|[smhdwy]))+)\Z")
PATIENCE = re.compile(
    r"^(?P<key> *(?:- )?(?:keep_firing_)?for: *)"
    r"(?P<quote>['\"]?)(?P<duration>[^'\"#\s]+)(?P=quote)(?P<rest>\s*(?:#.*)?)$",
    re.MULTILINE,
)
# What tells whether a series has ended: two minutes, and no other span; see the head of the delivered rules.
LAST_WORD = re.compile(r"(?P<start>\b(?:last|max)_over_time\([^()\[\]]*\[)2m\]")
LEAST_LAST_WORD_S = 15  # a busy machine is seconds late


def prometheus_scale_for(rules: str, factor: float) -> str:
    """The rules with the patience of every alert times `factor`. Raises ValueError for a duration that is none."""
    if checked(factor) == 1:
        return rules
    rules = PATIENCE.sub(lambda found: found["key"] + scale(found["duration"], factor) + found["rest"], rules)
    last_word = written(max(round(120_000 * factor), LEAST_LAST_WORD_S * 1000))
    return LAST_WORD.sub(lambda found: f"{found['start']}{last_word}]", rules)


def prometheus_seconds(seconds: float, factor: float) -> str:
    """So many seconds times a factor, as a duration. Raises ValueError for a factor that is none."""
    return written(round(float(seconds) * 1000 * checked(factor)))


def checked(factor: float) -> float:
    if not float(factor) > 0:
        raise ValueError(f"prometheus_time_scale is {factor}; it takes a number above 0")
    return float(factor)


def scale(duration: str, factor: float) -> str:
    """`1h30m` times a factor, as Prometheus writes it: whole milliseconds, rounded."""
    if not DURATION.match(duration):
        raise ValueError(f"for: {duration!r} is no duration such as 5m or 1h30m")
    return written(round(sum(int(number) * MS[unit] for number, unit in PART.findall(duration)) * float(factor)))


def written(total: int) -> str:
    """Milliseconds as Prometheus writes them."""
    return f"{total // 1000}s" if total % 1000 == 0 else f"{total}ms"


class FilterModule:
    """What Ansible finds here."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"prometheus_scale_for": prometheus_scale_for, "prometheus_seconds": prometheus_seconds}
