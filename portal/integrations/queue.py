"""The queue: a bell that wakes a worker. It carries nothing, so a lost message loses nothing: the run's row decides.

Huey keeps the messages, in Redis where there is one, otherwise in an SQLite file of the instance. `ring` is called
after the commit (`db.after_commit(queue.ring)`); workers that hear nothing look at the rows by themselves.
"""

from __future__ import annotations

import logging
import threading

import huey
import redis

from portal.settings import Settings

LOG = logging.getLogger(__name__)
IDLE_S = 0.1  # between two looks into SQLite; Redis blocks instead

_settings: Settings | None = None
_bell: Bell | None = None


class Bell:
    """One named queue. Safe to use from several threads and processes."""

    def __init__(self, settings: Settings) -> None:
        if settings.redis_url:
            # A request that queues a run must not hang on a Redis that does not answer.
            pool = redis.ConnectionPool.from_url(settings.redis_url, socket_connect_timeout=1, socket_timeout=3)
            self._huey = huey.RedisHuey("remotegpu-runs", connection_pool=pool, results=False, read_timeout=1)
        else:
            settings.instance_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._huey = huey.SqliteHuey(
                "remotegpu-runs", filename=str(settings.instance_dir / "queue.db"), results=False
            )
        self._look = self._huey.task(name="look")(_nothing)

    def ring(self) -> None:
        self._look()

    def listen(self, heard: threading.Event, stopping: threading.Event) -> None:
        """Set `heard` for every message until `stopping` is set. Runs in a thread of its own."""
        while not stopping.is_set():
            try:
                message = self._huey.dequeue()
            except Exception:
                # The queue is a convenience: without it the worker still looks at the rows every second.
                LOG.warning("the queue does not answer; runs are found by looking at the table", exc_info=True)
                stopping.wait(5)
                continue
            if message is not None:
                heard.set()
            else:
                stopping.wait(IDLE_S)


def _nothing() -> None:
    """The message says only: look."""


def use(settings: Settings) -> None:
    """Which queue this process rings; create_app and the worker say it once. It is opened when it is first needed."""
    global _settings, _bell
    _settings, _bell = settings, None


def bell() -> Bell:
    """Raises RuntimeError in a process that never said which queue is its own."""
    global _bell
    if _settings is None:
        raise RuntimeError("queue.use(settings) was not called in this process")
    if _bell is None:
        _bell = Bell(_settings)
    return _bell


def ring() -> None:
    """Wake the workers. Never raises: a run that is queued must not fail because the bell does."""
    if _settings is None:
        return
    try:
        bell().ring()
    except Exception:
        LOG.warning("the queue does not answer; the run waits until a worker looks at the table", exc_info=True)
