"""The output of attempts, kept byte for byte by absolute offset. Told in order: take in, read, follow, forget.

The portal holds one contiguous piece from 0 to `Attempt.log_bytes`. A range that overlaps it is cut, one that lies
inside it changes nothing, one that would leave a gap is refused by answering the offset we hold. There is a quota of an
attempt, and one of all attempts of a lease, which `Lease.log_bytes` counts. Who may read is asked in tasks.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal import db
from portal.db import utcnow
from portal.integrations.wake import wake
from portal.models import Attempt, Lease, LogRange, Task
from portal.models.states import TASK_ENDED
from portal.services import audit, batch, config, events
from portal.services.actors import SYSTEM

READ_BYTES = 256 * 1024  # as much as one answer carries
SLACK_BYTES = 64 * 1024  # beyond the quota, for the agent's own note that it cut the output
LOST_AFTER = timedelta(minutes=1)  # the end of a lost attempt's output is no longer waited for
GIVEN_UP_AFTER = timedelta(minutes=10)  # nor, after this, that of any other
LOOK_AGAIN_S = 5.0  # that time has passed wakes nobody
FORGET_AT_ONCE = 50  # attempts, each in a transaction of its own; the rest in the next round


@dataclass(frozen=True)
class Held:
    """Up to where the portal holds everything, and whether that is all there will be."""

    offset: int
    complete: bool


def append(attempt_id: int, *, offset: int, data: bytes, end: bool) -> Held:
    """Take a range of output. The same range twice, in parallel or in any order, never doubles or loses a byte.

    The answer is committed when the caller's transaction is. Nobody is woken: call `announce` once all ranges are in.
    """
    with db.atomic():
        lease_id = _counting_lease_of(attempt_id)
        while True:
            kept = _kept_of(lease_id)
            held = of(attempt_id)
            if held.complete or offset > held.offset:
                return held
            fresh = data[held.offset - offset :]
            room = max(0, config.current().lease_log_quota_bytes - kept)
            is_over = len(fresh) > room
            if is_over:
                fresh = fresh[:room] + _notice()
            taken = Held(held.offset + len(fresh), end or is_over or held.offset + len(fresh) >= _most_bytes())
            if taken == held:
                return held
            # The lease's row before the attempt's, as where a lease ends: two transactions must not wait for each
            # other. Both rows are locks: who comes second finds another count than the one just read, and looks again.
            if fresh and not _count(lease_id, kept, kept + len(fresh)):
                continue
            condition = (Attempt.id == attempt_id) & (Attempt.log_bytes == held.offset) & ~Attempt.log_complete
            changes = {"log_bytes": taken.offset, "log_complete": taken.complete}
            if is_over or (taken.complete and not end):
                changes["log_truncated"] = True
            if Attempt.update(**changes).where(condition).execute() == 1:
                if fresh:
                    LogRange.insert(attempt=attempt_id, offset=held.offset, data=fresh).execute()
                return taken
            if fresh:
                _count(lease_id, kept + len(fresh), kept)


def _counting_lease_of(attempt_id: int) -> int:
    """The lease that counts this output: the one that made the login, also for those that continue it."""
    found = Lease.select(Lease.id, Lease.login).join(Task).join(Attempt).where(Attempt.id == attempt_id)
    lease: Lease = found.get()
    return lease.host_id


def _kept_of(lease_id: int) -> int:
    kept: int = Lease.select(Lease.log_bytes).where(Lease.id == lease_id).scalar()
    return kept


def _count(lease_id: int, before: int, after: int) -> bool:
    """Whether the count was still `before`; it is `after` now."""
    counted = Lease.update(log_bytes=after).where(Lease.id == lease_id, Lease.log_bytes == before)
    return bool(counted.execute() == 1)


def _notice() -> bytes:
    """What the reader sees where the output was cut, in the form that the agent has for an attempt's own quota."""
    quota = config.current().lease_log_quota_bytes
    told = f"the log quota of {quota} bytes for all tasks of this lease is used up; further output is not kept."
    return f"\n[RemoteGPU: {told}]\n".encode()


def _most_bytes() -> int:
    return config.current().log_quota_bytes + SLACK_BYTES


def is_kept(lease: Lease) -> bool:
    """Whether more output of the lease's tasks is kept. Without room they run all the same."""
    return _kept_of(lease.host_id) < config.current().lease_log_quota_bytes


def announce(attempt_id: int, *, task_id: int, tenant_id: int) -> None:
    """Wake those who follow this log. Inside the transaction that appended."""
    events.write("task.log", tenant_id=tenant_id, resource_id=task_id, attempt_id=attempt_id)


def of(attempt_id: int) -> Held:
    row: Any = Attempt.select(Attempt.log_bytes, Attempt.log_complete).where(Attempt.id == attempt_id).tuples().get()
    return Held(*row)


def read(attempt_id: int, *, offset: int, most_bytes: int = READ_BYTES) -> bytes:
    """The bytes from `offset` on, at most `most_bytes`; empty when there are none (yet)."""
    first = (
        LogRange.select(LogRange.offset)
        .where(LogRange.attempt == attempt_id, LogRange.offset <= offset)
        .order_by(LogRange.offset.desc())
        .limit(1)
    )
    ranges: Any = (
        LogRange.select(LogRange.offset, LogRange.data)
        .where(LogRange.attempt == attempt_id, LogRange.offset >= first, LogRange.offset < offset + most_bytes)
        .order_by(LogRange.offset)
        .tuples()
    )
    return b"".join(bytes(data)[max(0, offset - at) :] for at, data in ranges)[:most_bytes]


def read_all(attempt_id: int) -> Iterator[bytes]:
    """Everything held now, piece by piece; a database connection is used for each piece, not between them."""
    offset = 0
    while True:
        with db.connection():
            piece = read(attempt_id, offset=offset)
        if not piece:
            return
        yield piece
        offset += len(piece)


@dataclass(frozen=True)
class Piece:
    """A part of an output. `complete`: nothing comes after it. `truncated`: some of it is missing, or all of it was
    forgotten."""

    data: bytes
    offset: int
    complete: bool
    truncated: bool

    @property
    def next_offset(self) -> int:
        return self.offset + len(self.data)


def look(attempt_id: int, *, offset: int, now: datetime | None = None) -> Piece:
    """What there is from `offset` on."""
    attempt: Attempt = Attempt.get_by_id(attempt_id)  # before the bytes: what it calls complete is there
    data = read(attempt_id, offset=offset)
    no_more = attempt.log_complete or _is_given_up(attempt, now or utcnow())
    if no_more and not data and offset < attempt.log_bytes:
        return Piece(data, offset, complete=True, truncated=True)  # it was forgotten
    complete = no_more and offset + len(data) >= attempt.log_bytes
    return Piece(data, offset, complete, attempt.log_truncated or (no_more and not attempt.log_complete))


def is_end_missing(attempt: Attempt, now: datetime | None = None) -> bool:
    """It ran and has ended, and the end of its output has not come: it was lost, or its host is away."""
    began = attempt.started_at is not None or attempt.boot_id is not None
    return began and not attempt.log_complete and _is_given_up(attempt, now or utcnow())


def _is_given_up(attempt: Attempt, now: datetime) -> bool:
    """It has ended, and the rest of its output will not come: then nobody waits for it for ever."""
    if attempt.state not in TASK_ENDED or attempt.ended_at is None:
        return False
    if attempt.started_at is None and attempt.boot_id is None:
        return True  # it never began
    return bool(attempt.ended_at < now - (LOST_AFTER if attempt.state == "lost" else GIVEN_UP_AFTER))


def wait_for(attempt: Attempt, *, offset: int, wait_s: float) -> Piece:
    """The next piece, as soon as there is one, at the latest after `wait_s`. Holds no connection while it waits."""
    give_up_at = time.monotonic() + wait_s
    ends = [(f"task.{state}", attempt.task_id) for state in TASK_ENDED]
    with wake.listen(("task.log", attempt.task_id), *ends) as ear:
        while True:
            with db.connection():
                piece = look(attempt.id, offset=offset)
            remaining_s = give_up_at - time.monotonic()
            if piece.data or piece.complete or remaining_s <= 0:
                return piece
            ear.wait(min(remaining_s, LOOK_AGAIN_S))


def kept_until(lease: Lease) -> datetime | None:
    """When the output of the lease's tasks is forgotten; None while the lease goes on."""
    if lease.ended_at is None:
        return None
    ended_at: datetime = lease.ended_at
    return ended_at + timedelta(seconds=config.current().log_retain_s)


def forget_old(now: datetime | None = None) -> int:
    """Delete output of leases that ended long ago; returns of how many attempts. For the sweep.

    The attempt's `log_bytes` stays: how much there was, and from where on a host that comes back may send. Of the
    lease's own quota it is given back.
    """
    edge = (now or utcnow()) - timedelta(seconds=config.current().log_retain_s)
    some = LogRange.select(peewee.SQL("1")).where(LogRange.attempt == Attempt.id)
    old = (
        Attempt.select(Attempt, Task, Lease)
        .join(Task)
        .join(Lease)
        .where(Lease.ended_at <= edge, Attempt.log_bytes > 0, peewee.fn.EXISTS(some))
        .order_by(Attempt.id)
        .limit(FORGET_AT_ONCE)
    )
    return batch.each(old, _forget)


def _forget(attempt: Attempt) -> bool:
    own = LogRange.attempt == attempt.id
    task = attempt.task
    counting = Lease.id == task.lease.host_id
    with db.atomic():
        Lease.update(log_bytes=Lease.log_bytes).where(counting).execute()  # held: nothing of it is added meanwhile
        freed = LogRange.select(peewee.fn.SUM(peewee.fn.LENGTH(LogRange.data))).where(own).scalar()
        if not LogRange.delete().where(own).execute():
            return False
        Lease.update(log_bytes=Lease.log_bytes - int(freed)).where(counting).execute()
        told: dict[str, Any] = {"attempt": attempt.number, "bytes": attempt.log_bytes}
        audit.record("task.log_deleted", task, by=SYSTEM, tenant_id=task.lease.tenant_id, **told)
    return True
