"""Computed once however many ask, kept for so long and no longer; a failure is not asked for by everybody in turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from portal.errors import Unavailable
from portal.services import monitoring_cache
from portal.services.monitoring_cache import MOST, Cache
from portal.settings import Settings


class Clock:
    """The time that the cache goes by."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> Cache:
    return Cache(redis_url=None, clock=clock)


def test_an_answer_is_kept_for_so_long_and_no_longer(cache: Cache, clock: Clock) -> None:
    answers = iter(range(10))

    def ask() -> int:
        told: int = cache.get("key", lambda: next(answers), keep_s=30)
        return told

    assert [ask(), ask()] == [0, 0]
    clock.now += 29.9
    assert ask() == 0
    clock.now += 0.1
    assert ask() == 1
    assert cache.get("another key", lambda: next(answers), keep_s=30) == 2


def test_the_age_counts_from_the_moment_of_which_it_speaks(cache: Cache, clock: Clock) -> None:
    """A computation that took 20 s leaves an answer that is 20 s old."""

    def slow() -> str:
        clock.now += 20
        return "slow"

    cache.get("key", slow, keep_s=30)
    clock.now += 10
    assert cache.get("key", lambda: "new", keep_s=30) == "new"


def test_many_who_ask_at_once_wait_for_one_computation(cache: Cache) -> None:
    begun, go_on = threading.Event(), threading.Event()
    computed: list[int] = []

    def compute() -> list[int]:
        begun.set()
        assert go_on.wait(10)
        computed.append(1)
        return [42]

    with ThreadPoolExecutor(20) as people:
        asked = [people.submit(cache.get, "key", compute, keep_s=30) for _ in range(20)]
        assert begun.wait(10)
        assert cache.get("another key", lambda: "not held up", keep_s=30) == "not held up"
        go_on.set()
        assert [each.result(10) for each in asked] == [[42]] * 20
    assert computed == [1]


def test_a_failure_is_told_again_for_a_while_and_then_tried_again(cache: Cache, clock: Clock) -> None:
    tried: list[int] = []

    def fail() -> None:
        tried.append(1)
        raise Unavailable("Prometheus does not answer.", code="prometheus_down")

    for _ in range(3):
        with pytest.raises(Unavailable, match="does not answer"):
            cache.get("key", fail, keep_s=30)
    assert tried == [1]
    clock.now += 5
    assert cache.get("key", lambda: "well again", keep_s=30) == "well again"


def test_a_mistake_of_ours_is_not_kept(cache: Cache) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.get("key", lambda: 1 / 0, keep_s=30)
    assert cache.get("key", lambda: "mended", keep_s=30) == "mended"


def test_it_does_not_grow_without_end(cache: Cache) -> None:
    for number in range(3 * MOST):
        cache.get(f"key {number}", lambda: 0, keep_s=30)
    assert len(cache._kept) <= MOST
    assert len(cache._locks) <= MOST + 1


def test_a_portal_with_other_settings_has_another_cache(database: object, settings: Settings) -> None:
    assert monitoring_cache.current() is monitoring_cache.current()
    assert monitoring_cache.current().redis_url == settings.redis_url
