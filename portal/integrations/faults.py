"""Places where a test may end this process the hard way, to prove that the next one picks the pieces up.

`REMOTEGPU_FAULT=point:n` kills the process with SIGKILL the n-th time it passes `point`. Without the variable a point
costs one comparison. POINTS is the whole list; tests/integration/test_runs_faults.py walks it, and prints it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

# Each one transaction of a worker.
STEPS = ("claim", "give_up", "child", "events", "renew", "finish", "take_over", "lose")
POINTS = (
    *(f"{step}.{moment}" for step in STEPS for moment in ("before_commit", "committed")),
    "directory.made",
    "directory.written",
    "child.started",
    "end.seen",
    "directory.removed",
    "take_over.killed",
)

_passed: Counter[str] = Counter()


def point(name: str) -> None:
    """Die here if a test asked for it."""
    wanted = os.environ.get("REMOTEGPU_FAULT")
    if not wanted:
        return
    if name not in POINTS:
        raise ValueError(f"{name} is not in the list of fault points")
    _passed[name] += 1
    if wanted == f"{name}:{_passed[name]}":
        os.kill(os.getpid(), signal.SIGKILL)
