"""Which tests are told on PostgreSQL in `make test`, too: where the database decides. The others are slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import pytest


def leave_to_slow(items: Iterable[pytest.Item], folder: Path, *, but: Collection[str]) -> None:
    """Mark as slow what of `folder` runs on PostgreSQL, except the modules in `but`."""
    for item in items:
        is_left = item.path.parent == folder and item.path.stem not in but
        if is_left and item.get_closest_marker("postgresql"):
            item.add_marker(pytest.mark.slow)
