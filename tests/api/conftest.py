"""Routes are asked of SQLite in `make test`, and of PostgreSQL as well in `make test-slow`.

Where the database decides (who comes first, what a restoration brings back, how often a list asks, who has its
connections) it is always both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.both import leave_to_slow
from tests.support.trail import Requests, Watch

ON_BOTH = {
    "test_agents_enrolment",
    "test_agents_restored",
    "test_agents_sync",
    "test_allocation_race",
    "test_connections",
    "test_events_stream",
    "test_keys",
    "test_leases",
    "test_lists",
    "test_network",
    "test_reclaims",
    "test_runs",
    "test_tasks",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_to_slow(items, Path(__file__).parent, but=ON_BOTH)


@pytest.fixture(autouse=True)
def every_transition_is_in_the_trail(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    watch = Watch(monkeypatch)
    yield
    assert watch.untold == []


@pytest.fixture(autouse=True)
def every_write_of_a_request_is_in_the_trail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    requests = Requests(monkeypatch)
    yield requests
    assert requests.untold == []
