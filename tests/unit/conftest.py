"""Rules are told on SQLite in `make test`, and on PostgreSQL as well in `make test-slow`.

Where the database decides (locks, conditions in SQL, what two at once may do, migrations) it is always both.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.both import leave_to_slow

ON_BOTH = {
    "test_batch",
    "test_commands",
    "test_databases_of_tests",
    "test_db",
    "test_desired",
    "test_grants",
    "test_login_keys",
    "test_network_forwards",
    "test_network_migration",
    "test_network_openings",
    "test_network_switch",
    "test_sweeps",
    "test_transitions",
    "test_wake",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_to_slow(items, Path(__file__).parent, but=ON_BOTH)
