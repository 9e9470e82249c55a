"""Rules whose alerts wait shorter or longer: plain text in, plain text out, so that every comment and expression stays.

Only the lines `for:` and `keep_firing_for:` of a rule change; how far an expression looks back is its meaning, not its
patience. A factor of 1 gives the same bytes.
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


def prometheus_scale_for(rules: str, factor: float) -> str:
    """The rules with the patience of every alert times `factor`. Raises ValueError for a duration that is none."""
    factor = float(factor)
    if factor < 0:
        raise ValueError(f"prometheus_alert_for_scale is {factor}; it takes 0 or more")
    if factor == 1:
        return rules
    return PATIENCE.sub(lambda found: found["key"] + scale(found["duration"], factor) + found["rest"], rules)


def scale(duration: str, factor: float) -> str:
    """`1h30m` times a factor, as Prometheus writes it: whole milliseconds, rounded."""
    if not DURATION.match(duration):
        raise ValueError(f"for: {duration!r} is no duration such as 5m or 1h30m")
    total = round(sum(int(number) * MS[unit] for number, unit in PART.findall(duration)) * factor)
    return f"{total // 1000}s" if total % 1000 == 0 else f"{total}ms"


class FilterModule:
    """What Ansible finds here."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"prometheus_scale_for": prometheus_scale_for}
