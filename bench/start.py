"""How long somebody waits at a keyboard: `make run` in a checkout that is set up, and `make test-fast`.

`python -m bench.start` takes a new instance folder each round, so that the first start makes keys, CA and database and
the second finds them. Until the console says where the portal answers.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.figures import Figure, machine, show
from tests.support.make_run import make_run
from tests.support.portal import ROOT

ROUNDS = 3
SECOND_START_GOAL_S = 5.0
FAST_TESTS_GOAL_S = 90.0


def main() -> int:
    """Print the figures; 1 if a goal is missed."""
    return show(take())


def take() -> list[Figure]:
    first_s, second_s = starts()
    with machine() as beside:
        tests_s = fast_tests()
    return [
        Figure("make run: first start", first_s),
        Figure("make run: second start", second_s, at_most=SECOND_START_GOAL_S),
        Figure("make test-fast", tests_s, at_most=FAST_TESTS_GOAL_S, slowness=beside.slowness),
    ]


def starts(rounds: int = ROUNDS) -> tuple[float, float]:
    """Seconds until a new portal answers, and until it does so again: medians."""
    subprocess.run(["make", "setup"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    first: list[float] = []
    second: list[float] = []
    for _round in range(rounds):
        with tempfile.TemporaryDirectory(prefix="rgpu-bench-") as folder:
            for seconds in (first, second):
                with make_run(Path(folder) / "instance") as started:
                    seconds.append(started.seconds)
    return statistics.median(first), statistics.median(second)


def fast_tests() -> float:
    """Seconds that `make test-fast` takes. Raises CalledProcessError if a test of it fails: then it is no figure."""
    began = time.monotonic()
    subprocess.run(["make", "test-fast"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
