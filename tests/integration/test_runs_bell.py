"""The bell between web and workers: heard at once over SQLite and over Redis, and never missed when it is broken."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from portal.integrations import queue
from portal.settings import Settings
from tests.support.redis import server as redis_server


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path) as running:
        yield running.url


@contextmanager
def listening() -> Iterator[threading.Event]:
    """Somebody who hears the bell of this process."""
    heard, stopping = threading.Event(), threading.Event()
    thread = threading.Thread(target=queue.bell().listen, args=(heard, stopping))
    thread.start()
    try:
        yield heard
    finally:
        stopping.set()
        thread.join()


def test_the_bell_is_heard_over_sqlite(settings: Settings) -> None:
    queue.use(settings)
    with listening() as heard:
        queue.ring()
        assert heard.wait(10)


def test_the_bell_is_heard_over_redis(settings: Settings, redis_url: str) -> None:
    queue.use(dataclasses.replace(settings, redis_url=redis_url))
    with listening() as heard:
        queue.ring()
        assert heard.wait(10)


def test_a_bell_that_was_rung_before_anybody_listened_is_heard(settings: Settings) -> None:
    queue.use(settings)
    queue.ring()
    with listening() as heard:
        assert heard.wait(10)


def test_a_broken_bell_disturbs_nobody(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    queue.use(dataclasses.replace(settings, redis_url="redis://127.0.0.1:1/0"))
    queue.ring()
    assert "the queue does not answer" in caplog.text
