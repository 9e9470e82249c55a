"""Heartbeats: the last report of each machine, gathered in the process and written in one statement twice a second.

Only what the next report replaces anyway may wait here: a crash loses half a second of metrics. Results, log offsets
and acknowledgements never come here; sync.py commits them before it answers. What must be there before them is written
at once.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import orjson

from portal import db
from portal.models import MachineReport

FLUSH_S = 0.5
ROWS = 500  # in one statement; SQLite takes 32,766 values
IDLE_S = 5.0  # the writer ends after this long without anything to write

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`clock_offset_s` is how far the host's clock is ahead of ours."""

    machine_id: int
    received_at: datetime
    clock_offset_s: float
    agent_version: str
    boot_id: str
    seq: int
    frozen: bool
    metrics: dict[str, Any] | None
    gpu: dict[str, Any] | None
    leases: list[dict[str, Any]]

    def after(self, earlier: Heartbeat | None) -> Heartbeat:
        """The same with what only the one before it has measured: a report between two full ones brings no values."""
        if earlier is None or earlier.received_at > self.received_at:
            return self if earlier is None else earlier
        return replace(self, metrics=self.metrics or earlier.metrics, gpu=self.gpu or earlier.gpu)

    def values(self) -> tuple[Any, ...]:
        """In the order of COLUMNS, as the database takes them."""
        return (
            self.machine_id,
            MachineReport.received_at.db_value(self.received_at),
            self.clock_offset_s,
            self.agent_version,
            self.boot_id,
            self.seq,
            self.frozen,
            _json(self.metrics),
            _json(self.gpu),
            _json(self.leases),
        )


COLUMNS = (
    "machine_id", "received_at", "clock_offset_s", "agent_version", "boot_id",
    "seq", "frozen", "metrics", "gpu", "leases",
)  # fmt: skip
MEASURED = ("metrics", "gpu")


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


class Buffer:
    """The newest heartbeat of each machine that is not yet written, and the writer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Heartbeat] = {}
        self._writer: threading.Thread | None = None
        self._stopping = threading.Event()  # the writer's own
        self._idle_since = 0.0
        os.register_at_fork(after_in_child=self._forget_writer)
        atexit.register(self.flush)

    def note(self, heartbeat: Heartbeat) -> None:
        """Write it within FLUSH_S. Returns at once."""
        writer = None
        with self._lock:
            self._waiting[heartbeat.machine_id] = heartbeat.after(self._waiting.get(heartbeat.machine_id))
            if self._writer is None:
                self._idle_since = time.monotonic()
                self._stopping = threading.Event()
                self._writer = writer = threading.Thread(
                    target=self._write, args=(self._stopping,), name="heartbeats", daemon=True
                )
        if writer is not None:
            writer.start()  # outside the lock: starting waits for the thread

    def write(self, heartbeat: Heartbeat) -> None:
        """Write it now, whatever the writer is at: when this returns, everybody can read it. Raises what is AWAY."""
        _write([heartbeat.after(self.newest(heartbeat.machine_id))])

    def _forget_writer(self) -> None:
        """A child has no thread of its parent's, and what waits there is the parent's to write."""
        self._lock, self._waiting, self._writer = threading.Lock(), {}, None

    def newest(self, machine_id: int) -> Heartbeat | None:
        """The one that waits to be written, if any."""
        return self._waiting.get(machine_id)

    def flush(self) -> int:
        """Write all that waits; returns how many. What cannot be written now is kept, unless a newer one has come."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        # In the order of the machines: two processes that write the same rows must not wait for each other.
        rows = [waiting[machine_id] for machine_id in sorted(waiting)]
        for start in range(0, len(rows), ROWS):
            try:
                _write(rows[start : start + ROWS])
            except db.AWAY:
                log.warning("Heartbeats cannot be written now; trying again.", exc_info=True)
                self._keep(rows[start:])
                break
        return len(rows)

    def stop(self) -> None:
        """Write what waits and end the writer: for the end of a process or a test."""
        with self._lock:
            writer, self._writer, stopping = self._writer, None, self._stopping
        self.flush()
        if writer is not None:
            stopping.set()
            writer.join(5.0)

    def _keep(self, rows: list[Heartbeat]) -> None:
        with self._lock:
            for heartbeat in rows:
                self._waiting.setdefault(heartbeat.machine_id, heartbeat)

    def _write(self, stopping: threading.Event) -> None:
        while not stopping.wait(FLUSH_S):
            try:
                if self.flush():
                    self._idle_since = time.monotonic()
            except Exception:  # a writer that is gone is not missed by `note`, and no host would be online any more
                log.exception("Heartbeats were not written; those that come are.")
            with self._lock:
                is_idle = not self._waiting and time.monotonic() - self._idle_since > IDLE_S
                if is_idle and not stopping.is_set():
                    self._writer = None
                    return


def _write(rows: list[Heartbeat]) -> None:
    """One statement; if the database refuses it, one for each: a machine that is gone must not silence the rest."""
    with db.connection():
        try:
            with db.atomic():
                _upsert(rows)
        except db.AWAY:
            raise
        except Exception as error:  # whatever is wrong with one of them, the writer goes on
            if len(rows) == 1:
                log.warning("The report of machine %s is not kept: %s", rows[0].machine_id, error)
                return
            for heartbeat in rows:
                _write([heartbeat])


def _upsert(rows: list[Heartbeat]) -> None:
    """Plain SQL, measured: building it with peewee took longer than running it. The newer report wins."""
    table = MachineReport._meta.table_name
    mark = "?" if db.is_sqlite() else "%s"
    one = "(" + ", ".join([mark] * len(COLUMNS)) + ")"
    # A report between two full ones has no measurements: those before it still stand.
    changes = ", ".join(
        f"{column} = COALESCE(excluded.{column}, {table}.{column})"
        if column in MEASURED
        else f"{column} = excluded.{column}"
        for column in COLUMNS[1:]
    )
    db.db.execute_sql(
        f"INSERT INTO {table} ({', '.join(COLUMNS)}) VALUES {', '.join([one] * len(rows))} "  # noqa: S608 - our own names
        f"ON CONFLICT (machine_id) DO UPDATE SET {changes} WHERE {table}.received_at <= excluded.received_at",
        [value for heartbeat in rows for value in heartbeat.values()],
    )


buffer = Buffer()
note, write, flush = buffer.note, buffer.write, buffer.flush
