"""How each cloud wants a record or a rule written: one module each, plain values in, one frozen value out.

Quirks of a cloud live here and nowhere else, each with the report that taught it. Here is no SDK: clouds/ hands the
values over.
"""

from __future__ import annotations

from remotegpu_network.records import Mx, Value


class Unfit(ValueError):
    """This cloud would refuse it, or show a difference for ever. The message says why and what to do."""


def ttl(wanted_s: int | None, *, default_s: int, at_least_s: int, cloud: str) -> int:
    """Seconds. Raises Unfit: a silently raised one would be a difference between the portal and the cloud."""
    if wanted_s is None:
        return default_s
    if wanted_s < at_least_s:
        raise Unfit(f"ttl {wanted_s} s: {cloud} takes {at_least_s} s and more")
    return wanted_s


def mx_priority(value: Value, allowed: range, *, cloud: str) -> int | None:
    """None of what is no MX. Raises Unfit."""
    if not isinstance(value, Mx):
        return None
    if value.priority not in allowed:
        raise Unfit(f"MX priority {value.priority}: {cloud} takes {allowed.start} to {allowed.stop - 1}")
    return value.priority
