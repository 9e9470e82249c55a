"""What tests of several roles need."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.hosts.fixtures import libraries

__all__ = ["libraries"]

HANGS = """#!/bin/sh
echo $$ >>{calls}
exec sleep 600
"""


@pytest.fixture
def hangs() -> Iterator[str]:
    """A program that is stuck in the driver: told to end, it stays. To be formatted with a file for its calls."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is started meanwhile ignores it too
    yield HANGS
    signal.signal(signal.SIGTERM, before)
