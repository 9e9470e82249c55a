"""Waking those who wait: held calls of agents, live logs, event streams.

One poller a process reads the `event` table, about every 50 ms and only while somebody waits; whoever waits holds no
database connection. An event is a row, so nobody hears of it before its commit; and since ids commit out of order, the
poller never asks for `id > last`: it reads everything younger than a window again and skips what it has delivered. The
window is short for most looks and WINDOW_S once a second, so that a long transaction is heard of as well. From one far
look to the next the poller keeps its connection, on which SQLite says for next to nothing whether anybody committed.

To miss nothing, open an ear first, then look, then wait:

    with wake.listen(("machine.generation", machine_id)) as ear:
        while not (answer := look()):
            ear.wait(5.0)

Only `threading` is used: under gunicorn's gevent worker, which patches it, poller and waiters are greenlets; elsewhere
they are threads. What is waited for, and who may, is told in services/ and api/.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from operator import itemgetter
from typing import Any

from portal.db import db, is_sqlite, release_connection, utcnow
from portal.models import Event

INTERVAL_S = 0.05
SHORT_WINDOW_S = 2.0
WINDOW_S = 15.0  # longer than the longest transaction, and than the difference between the clocks of two processes
FRESH_S = 1.0  # after this long without a look, nobody may rely on hearing of a change
MOST_HEARD = 1000  # of an ear that nobody empties, the oldest are dropped

Key = tuple[str, int | None]
EVERYTHING: Key = ("*", None)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heard:
    """One event, as it was read."""

    id: int
    topic: str
    machine_id: int | None
    tenant_id: int | None
    resource_id: int | None
    data: dict[str, Any]

    def heard_under(self) -> tuple[Key, ...]:
        """Under which keys one hears it: topic with resource (or machine), tenant, everything."""
        about = self.machine_id if self.resource_id is None else self.resource_id
        return ((self.topic, about), ("tenant", self.tenant_id), EVERYTHING)


HEARD = (Event.id, Event.topic, Event.machine_id, Event.tenant_id, Event.resource_id, Event.data)  # a row of it


@dataclass(eq=False)
class Ear:
    """What one waiter listens to. Belongs to one thread or greenlet."""

    keys: tuple[Key, ...]
    # Looked up when an ear is made: this module may have been imported before gevent patched `threading`.
    _rung: threading.Event = field(default_factory=lambda: threading.Event())
    _heard: deque[Heard] = field(default_factory=lambda: deque(maxlen=MOST_HEARD))

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something is heard, at most `timeout_s`; whether it was. Holds no database connection."""
        release_connection()
        rung = self._rung.wait(max(0.0, timeout_s))
        self._rung.clear()
        return rung

    def take(self) -> list[Heard]:
        """What was heard since the last time, in the order of its arrival."""
        taken = []
        while self._heard:
            taken.append(self._heard.popleft())
        return taken

    def tell(self, heard: Heard) -> None:
        self._heard.append(heard)
        self._rung.set()


class Wake:
    """The poller of one process and the ears it rings. It starts with the first ear and ends with the last."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._ears: dict[Key, set[Ear]] = defaultdict(set)
        self._callbacks: list[Callable[[Heard], None]] = []
        self._until = 0.0  # keep looking until then, even when no ear is open
        self._poller: threading.Thread | None = None
        self._delivered: dict[int, float] = {}  # event id → when it was read, for those younger than the window
        self._version: int | None = None  # of the database on this connection, by which SQLite tells of commits
        self._looked_at = self._looked_far_at = float("-inf")
        self.unbroken_since = float("inf")  # since then, no event has escaped the poller
        self.looks = 0  # how often the table was read; for tests and figures

    @contextmanager
    def listen(self, *keys: Key) -> Iterator[Ear]:
        """An ear for these keys, for as long as the block lasts."""
        ear = Ear(keys)
        self._open(ear)
        try:
            yield ear
        finally:
            self._close(ear)

    def keep_listening(self, seconds: float) -> None:
        """Go on looking for that long, for the sake of the callbacks."""
        self._after_fork()
        self._until = max(self._until, time.monotonic() + seconds)
        if self._poller is None:
            with self._lock:
                self._start()

    def on_event(self, callback: Callable[[Heard], None]) -> None:
        """Call this for every event that the poller reads. It must be quick and must not wait."""
        self._after_fork()
        self._callbacks.append(callback)

    def would_have_told(self, since: float) -> bool:
        """Whether a change that another process has committed since then (`time.monotonic()`) would be known by now."""
        return self.unbroken_since <= since and time.monotonic() - self._looked_at < FRESH_S

    def waiting(self) -> int:
        """How many ears are open."""
        with self._lock:
            return len({ear for ears in self._ears.values() for ear in ears})

    def stop(self) -> None:
        """End the poller and forget everything heard; open ears are rung. For the end of a process or a test."""
        with self._lock:
            poller, self._poller = self._poller, None
            ears = {ear for group in self._ears.values() for ear in group}
            self._until = 0.0
        for ear in ears:
            ear._rung.set()
        if poller is not None:
            poller.join(5.0)  # before forgetting: it may be reading at this moment
        self._delivered.clear()
        self._looked_at = self._looked_far_at = float("-inf")
        self.unbroken_since = float("inf")

    def _open(self, ear: Ear) -> None:
        self._after_fork()
        with self._lock:
            for key in ear.keys:
                self._ears[key].add(ear)
            self._start()

    def _close(self, ear: Ear) -> None:
        with self._lock:
            for key in ear.keys:
                self._ears[key].discard(ear)
                if not self._ears[key]:
                    del self._ears[key]

    def _after_fork(self) -> None:
        """A child has its parent's ears but not its poller: begin anew."""
        if self._pid != os.getpid():
            callbacks = self._callbacks
            self._reset()
            self._callbacks = callbacks

    def _start(self) -> None:
        if self._poller is None:
            self._poller = threading.Thread(target=self._poll, name="wake", daemon=True)
            self._poller.start()

    def _poll(self) -> None:
        me = threading.current_thread()
        while self._goes_on(me):
            try:
                self._deliver(self._read())
                pause = INTERVAL_S
            except Exception:  # the poller is the only one of its process: without it nobody would be woken again
                log.warning(
                    "The event table cannot be read; waiting calls are answered when their time is up.", exc_info=True
                )
                with suppress(Exception):  # what was lost with the server cannot be given back
                    release_connection()
                pause = 1.0
            time.sleep(pause)
        release_connection()

    def _goes_on(self, me: threading.Thread) -> bool:
        """Decided under the lock, so that an ear opened at this moment finds either this poller or none."""
        with self._lock:
            if self._poller is not me:
                return False
            if self._ears or time.monotonic() < self._until:
                return True
            self._poller = None
            return False

    def _read(self) -> Iterable[Heard]:
        """Everything in the window that has not been delivered, in the order of the ids."""
        now = time.monotonic()
        far = now - self._looked_far_at >= 1.0
        since = utcnow() - timedelta(seconds=WINDOW_S if far else SHORT_WINDOW_S)
        if far:
            release_connection()  # and to the file of that name again: a restoration may have put another there
        if db.connect(reuse_if_open=True):
            self._version = None
        has_changed = self._has_changed()
        rows: list[Any] = []
        if has_changed or far:
            rows = list(Event.select(*HEARD).where(Event.at > since).tuples())
        self.looks += 1
        if now - self._looked_at > WINDOW_S / 2:
            self.unbroken_since = now
        self._looked_at = now
        self._looked_far_at = now if far else self._looked_far_at
        fresh = sorted((row for row in rows if row[0] not in self._delivered), key=itemgetter(0))
        self._delivered.update((row[0], now) for row in fresh)
        # Twice the window: `at` was set by another clock, and what is forgotten too early is delivered twice.
        for old in [id for id, at in self._delivered.items() if now - at > 2 * WINDOW_S]:
            del self._delivered[old]
        return [Heard(*row) for row in fresh]

    def _has_changed(self) -> bool:
        """Whether somebody else has committed since the last look, as far as this connection can tell."""
        if not is_sqlite():
            return True
        before, self._version = self._version, db.execute_sql("PRAGMA data_version").fetchone()[0]
        return before != self._version

    def _deliver(self, fresh: Iterable[Heard]) -> None:
        for heard in fresh:
            for callback in self._callbacks:
                callback(heard)
            with self._lock:
                ears = {ear for key in heard.heard_under() for ear in self._ears.get(key, ())}
            for ear in ears:
                ear.tell(heard)


wake = Wake()
listen = wake.listen
