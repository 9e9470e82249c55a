"""`python -m bench [NAME…]`: all benches or the named ones, and one table of their figures at the end.

Each is a module here that can also be run by itself. Those that need a host that is ready to be leased share one. One
that fails does not keep the others from being taken; the exit status is 1 if a goal is missed or a bench failed.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack

from bench import agent, lease, monitoring, network, provisioning, reclaim, runs, start, sync
from bench.figures import Figure, show
from bench.rental import Rental, rental
from tests.lanes import docker_engine, install_packages


class Shared:
    """One rental for all who ask, made when the first one does."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._rental: Rental | None = None

    def rental(self) -> Rental:
        if self._rental is None:
            self._rental = self._stack.enter_context(rental())
        return self._rental

    def tell(self) -> str:
        return self._rental.tell() if self._rental else ""


# In this order: the agent is measured on a host that nobody has used, and the last one stops the portal.
BENCHES: dict[str, Callable[[Shared], list[Figure]]] = {
    "start": lambda _shared: start.take(),
    "sync": lambda _shared: sync.take(),
    "runs": lambda _shared: runs.take(),
    "monitoring": lambda _shared: monitoring.take(),
    "network": lambda _shared: network.take(),
    "provisioning": lambda _shared: provisioning.take(),
    "agent": lambda shared: agent.take(shared.rental()),
    "reclaim": lambda shared: reclaim.take(shared.rental()),
    "lease": lambda shared: lease.take(shared.rental()),
}


def main(names: list[str]) -> int:
    unknown = set(names) - set(BENCHES)
    if unknown:
        sys.exit(f"no such bench: {', '.join(sorted(unknown))}; there are: {', '.join(BENCHES)}")
    install_packages()
    began = time.monotonic()
    with docker_engine():
        figures, failed = take([name for name in BENCHES if name in names or not names])
    print(f"\n-- all of it, in {(time.monotonic() - began) / 60:.1f} minutes")
    status = show(figures)
    for name in failed:
        print(f"{name}: no figures; what went wrong is told above")
    return 1 if failed else status


def take(names: list[str]) -> tuple[list[Figure], list[str]]:
    """The figures of the benches that could be taken, and the names of those that could not."""
    figures: list[Figure] = []
    failed: list[str] = []
    with ExitStack() as stack:
        shared = Shared(stack)
        for name in names:
            print(f"\n-- {name}", flush=True)
            try:
                taken = BENCHES[name](shared)
            except Exception:
                traceback.print_exc()
                print(shared.tell(), file=sys.stderr)
                failed.append(name)
            else:
                show(taken)
                figures += taken
    return figures, failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
