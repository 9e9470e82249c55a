"""What is computed once however many ask, and kept for some seconds: in Redis for all processes, else in this one.

Nothing here is the truth, and losing all of it costs time alone. While one computes, the others wait for its answer: in
this process by a lock, in the others by a lock in Redis that ends by itself. An answer is never older than it may be:
its age counts from the moment in which it was computed, wherever it lies. A failure is told to all as well, for a few
seconds. Who waits here holds no database connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson
import redis
from redis.exceptions import LockError
from redis.lock import Lock

from portal.db import release_connection
from portal.errors import Unavailable
from portal.services import config
from portal.settings import Settings

LOCK_S = 20.0  # longer than any computation, which ends by the deadlines of Prometheus
LOOK_S = 0.05  # between two looks for what another process is computing
REFUSED_S = 5.0  # a failure is told again for so long, or everybody in turn would wait for the same deadline
AWAY_S = 5.0  # a Redis that failed is left alone for so long
MOST = 500  # answers kept in a process
PREFIX = "remotegpu:monitoring:"

log = logging.getLogger(__name__)


@dataclass
class Kept:
    """An answer, or why there was none."""

    until: float  # by the clock of the cache
    value: Any = None
    failure: Unavailable | None = None

    def told(self) -> Any:
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        return self.value


@dataclass
class Cache:
    """Of one process. Values are what JSON can hold; whoever gets one must not change it."""

    redis_url: str | None
    clock: Callable[[], float] = time.time  # which the processes share, as an answer's age does
    _kept: dict[str, Kept] = field(default_factory=dict)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=lambda: threading.Lock())
    _redis: redis.Redis | None = None
    _away_until: float = 0.0

    def get(self, key: str, compute: Callable[[], Any], *, keep_s: float) -> Any:
        """The value under `key`, at most `keep_s` old. Raises what `compute` raises."""
        if (kept := self._find(key)) is not None:
            return kept.told()
        release_connection()
        with self._lock_of(key):
            if (kept := self._find(key)) is None:  # else somebody has computed it while we waited
                kept = self._fetch_or_compute(key, compute, keep_s)
                self._remember(key, kept)
        return kept.told()

    def _find(self, key: str) -> Kept | None:
        kept = self._kept.get(key)
        return kept if kept is not None and self.clock() < kept.until else None

    def _lock_of(self, key: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())

    def _remember(self, key: str, kept: Kept) -> None:
        with self._guard:
            self._kept[key] = kept
            if len(self._kept) > MOST:
                now = self.clock()
                fresh = {name: each for name, each in self._kept.items() if each.until > now}
                self._kept = dict(list(fresh.items())[-MOST // 2 :])
                self._locks = {name: lock for name, lock in self._locks.items() if name in self._kept or lock.locked()}

    def _fetch_or_compute(self, key: str, compute: Callable[[], Any], keep_s: float) -> Kept:
        give_up_at = time.monotonic() + LOCK_S
        while (server := self._server()) is not None:
            try:
                if (found := server.get(PREFIX + key)) is not None:
                    return _unpacked(found)
                lock = server.lock(f"{PREFIX}lock:{key}", timeout=LOCK_S)
                if lock.acquire(blocking=False):
                    return self._compute_for_all(server, lock, key, compute, keep_s)
            except redis.RedisError as error:
                self._leave_alone(error)
                break
            if time.monotonic() > give_up_at:
                break  # whoever computes it takes too long, or died
            time.sleep(LOOK_S)
        return self._computed(compute, keep_s)

    def _compute_for_all(
        self, server: redis.Redis, lock: Lock, key: str, compute: Callable[[], Any], keep_s: float
    ) -> Kept:
        kept = None
        try:
            if (found := server.get(PREFIX + key)) is not None:  # computed between our look and the lock
                return _unpacked(found)
            kept = self._computed(compute, keep_s)
            return kept
        finally:
            self._tell_all(server, lock, key, kept)

    def _tell_all(self, server: redis.Redis, lock: Lock, key: str, kept: Kept | None) -> None:
        """What was computed, or why it could not be, and that the others need not wait any longer."""
        try:
            if kept is not None:
                left_ms = max(1, int((kept.until - self.clock()) * 1000))
                # A failure never takes the place of an answer that somebody else had meanwhile.
                server.set(PREFIX + key, _packed(kept), px=left_ms, nx=kept.failure is not None)
            with suppress(LockError):  # it took too long, and the lock is somebody else's by now
                lock.release()
        except redis.RedisError as error:
            self._leave_alone(error)

    def _computed(self, compute: Callable[[], Any], keep_s: float) -> Kept:
        began = self.clock()
        try:
            return Kept(began + keep_s, compute())
        except Unavailable as error:
            return Kept(self.clock() + min(REFUSED_S, keep_s), failure=error)

    def _server(self) -> redis.Redis | None:
        """None without Redis, and for a while after it has failed."""
        if self.redis_url is None or time.monotonic() < self._away_until:
            return None
        if self._redis is None:
            self._redis = redis.Redis.from_url(self.redis_url, socket_connect_timeout=0.5, socket_timeout=1.0)
        return self._redis

    def _leave_alone(self, error: redis.RedisError) -> None:
        log.warning("Redis does not answer; this process computes for itself: %s", error)
        self._away_until = time.monotonic() + AWAY_S


def _packed(kept: Kept) -> bytes:
    if kept.failure is not None:
        return orjson.dumps({"until": kept.until, "code": kept.failure.code, "message": kept.failure.message})
    return orjson.dumps({"until": kept.until, "value": kept.value})


def _unpacked(found: Any) -> Kept:
    held = orjson.loads(found)
    if "code" in held:
        return Kept(held["until"], failure=Unavailable(held["message"], code=held["code"]))
    return Kept(held["until"], held["value"])


_current: tuple[Settings, Cache] | None = None


def current() -> Cache:
    """The cache of this process and its settings."""
    global _current
    settings = config.current()
    if _current is None or _current[0] is not settings:
        _current = (settings, Cache(settings.redis_url))
    return _current[1]
