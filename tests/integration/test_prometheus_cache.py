"""What is asked of Prometheus is asked once for all processes that share a Redis; one that is lost costs time alone."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from portal.errors import Unavailable
from portal.integrations.prometheus import PrometheusDown
from portal.services.monitoring_cache import LOCK_S, PREFIX, REFUSED_S, Cache
from tests.support.redis import Server
from tests.support.redis import server as redis_server
from tests.support.waiting import until

PROCESSES = 3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with redis_server(tmp_path) as running:
        yield running


def ask_at_once(url: str, together: multiprocessing.synchronize.Barrier) -> int:
    """One process: wait for the others, then ask. What is computed is a number that nobody else gets."""
    together.wait(60)

    def compute() -> int:
        own = redis.Redis.from_url(url)
        until(lambda: len(own.client_list()) > PROCESSES, "the others to have asked meanwhile")
        return int(own.incr("computed"))

    answer: int = Cache(url).get("key", compute, keep_s=30)
    return answer


def test_of_several_processes_one_computes(server: Server) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(PROCESSES) as pool:
        together = manager.Barrier(PROCESSES)
        answers = pool.starmap(ask_at_once, [(server.url, together)] * PROCESSES)
    assert answers == [1] * PROCESSES


def fail_at_once(url: str, together: multiprocessing.synchronize.Barrier) -> tuple[str, str]:
    """The same, but Prometheus does not answer whoever computes."""
    together.wait(60)

    def compute() -> None:
        own = redis.Redis.from_url(url)
        own.incr("computed")
        until(lambda: len(own.client_list()) > PROCESSES, "the others to have asked meanwhile")
        raise PrometheusDown("Prometheus does not answer.")

    try:
        Cache(url).get("key", compute, keep_s=30)
    except Unavailable as error:
        return error.code, error.message
    return "", ""


def test_nor_do_they_wait_for_the_same_deadline_in_turn(server: Server) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(PROCESSES) as pool:
        together = manager.Barrier(PROCESSES)
        told = pool.starmap(fail_at_once, [(server.url, together)] * PROCESSES)
    assert told == [("prometheus_down", "Prometheus does not answer.")] * PROCESSES
    assert redis.Redis.from_url(server.url).get("computed") == b"1"


def test_a_failure_is_told_for_a_while_and_then_tried_again(server: Server) -> None:
    now = [1000.0]
    first, second = (Cache(server.url, clock=lambda: now[0]) for _ in range(2))

    def fail() -> None:
        raise Unavailable("Prometheus does not answer.", code="prometheus_down")

    with pytest.raises(Unavailable, match="does not answer"):
        first.get("key", fail, keep_s=30)
    now[0] += REFUSED_S - 0.1
    with pytest.raises(Unavailable, match="does not answer"):
        second.get("key", lambda: "well again", keep_s=30)
    assert 0 < redis.Redis.from_url(server.url).pttl(f"{PREFIX}key") <= 1000 * REFUSED_S
    now[0] += 0.1
    redis.Redis.from_url(server.url).delete(f"{PREFIX}key")  # Redis goes by its own clock
    assert second.get("key", lambda: "well again", keep_s=30) == "well again"


def test_a_failure_does_not_take_the_place_of_an_answer(server: Server) -> None:
    """Whoever takes longer than the lock is held has been overtaken by another process."""
    slow, other = Cache(server.url), Cache(server.url)

    def overtaken() -> None:
        redis.Redis.from_url(server.url).delete(f"{PREFIX}lock:key")  # its time is up
        assert other.get("key", lambda: "theirs", keep_s=30) == "theirs"
        raise Unavailable("Prometheus does not answer.")

    with pytest.raises(Unavailable):
        slow.get("key", overtaken, keep_s=30)
    assert Cache(server.url).get("key", lambda: "ours", keep_s=30) == "theirs"


def test_an_answer_that_came_between_the_look_and_the_lock_is_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, cache = Cache(server.url), Cache(server.url)
    look = redis.Redis.get

    def too_early(client: redis.Redis, name: str) -> object:
        monkeypatch.setattr(redis.Redis, "get", look)
        found = look(client, name)
        assert other.get("key", lambda: "theirs", keep_s=30) == "theirs"
        return found

    monkeypatch.setattr(redis.Redis, "get", too_early)
    assert cache.get("key", lambda: "ours", keep_s=30) == "theirs"
    assert redis.Redis.from_url(server.url).get(f"{PREFIX}lock:key") is None


def test_an_answer_is_not_kept_longer_for_having_been_fetched(server: Server) -> None:
    """The second process fetches what is 25 s old: it asks again after five more, not after thirty."""
    now = [1000.0]
    first, second = (Cache(server.url, clock=lambda: now[0]) for _ in range(2))
    assert first.get("key", lambda: "old", keep_s=30) == "old"
    now[0] += 25
    assert second.get("key", lambda: "new", keep_s=30) == "old"
    now[0] += 5
    redis.Redis.from_url(server.url).delete(f"{PREFIX}key")  # Redis goes by its own clock
    assert second.get("key", lambda: "new", keep_s=30) == "new"


def test_whoever_computes_and_dies_holds_the_others_up_for_a_while_only(server: Server) -> None:
    redis.Redis.from_url(server.url).set(f"{PREFIX}lock:key", "somebody who died", px=500)
    began = time.monotonic()
    assert Cache(server.url).get("key", lambda: "computed", keep_s=30) == "computed"
    assert time.monotonic() - began < LOCK_S / 2


def test_a_mistake_lets_go_of_the_lock(server: Server) -> None:
    with pytest.raises(ZeroDivisionError):
        Cache(server.url).get("key", lambda: 1 / 0, keep_s=30)
    assert redis.Redis.from_url(server.url).get(f"{PREFIX}lock:key") is None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hanging"])
def test_a_redis_that_is_lost_costs_time_alone(
    server: Server, how: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(server.url)
    assert cache.get("before", lambda: "computed", keep_s=30) == "computed"
    server.process.send_signal(how)
    began = time.monotonic()
    assert [cache.get(f"{number}", lambda: "by ourselves", keep_s=30) for number in range(20)] == ["by ourselves"] * 20
    assert time.monotonic() - began < 12, "asked once, then left alone for a while: twenty times would take 20 s"
    assert "Redis does not answer; this process computes for itself" in caplog.text
