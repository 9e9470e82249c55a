"""Seals: a chain of hashes over the audit trail, so that a row changed, removed or slipped in later shows.

Entries are written in the transactions they speak of (audit.py) and commit in any order; the sealer takes what is
committed, in one process at a time, and chains it. Each seal covers the entry, its number and the seal before. What is
not sealed yet is the tail: `verify` names it, and the head, which is worth writing down elsewhere: a chain that was cut
off at its end still fits together, only its head is another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from portal.db import atomic
from portal.models import AuditEntry
from portal.services import locks

BATCH = 1000
LOCK_S = 30.0
_COVERED = (
    "id", "at", "actor_kind", "actor_id", "actor_name", "actor_role", "address", "request", "action", "resource_type",
    "resource_id", "tenant_id", "detail", "outcome",
)  # fmt: skip
FIRST = "0" * 64


@dataclass(frozen=True)
class Verdict:
    """`broken_id` is the first entry that does not fit, with `reason`; None if all do. `head` is the last seal."""

    sealed: int
    unsealed: int
    head: str
    broken_id: int | None = None
    reason: str | None = None

    @property
    def is_whole(self) -> bool:
        return self.broken_id is None


def seal() -> int:
    """Chain what is committed and not sealed yet; returns how many entries. 0 too if another process is at it."""
    with locks.held("sealer", life_s=LOCK_S) as ours:
        if not ours:
            return 0
        sealed = 0
        while batch := _seal_batch():
            sealed += batch
        return sealed


def _seal_batch() -> int:
    with atomic():
        last = AuditEntry.select().where(AuditEntry.seal_seq.is_null(False)).order_by(-AuditEntry.seal_seq).first()
        number, before = (0, FIRST) if last is None else (last.seal_seq or 0, last.seal or FIRST)
        waiting = AuditEntry.select().where(AuditEntry.seal_seq.is_null()).order_by(AuditEntry.id).limit(BATCH)
        entries = list(waiting)
        for entry in entries:
            number += 1
            before = seal_of(entry, number, before)
            # The unique number refuses a second sealer whose lock ran out under it.
            AuditEntry.update(seal_seq=number, seal=before).where(
                (AuditEntry.id == entry.id) & AuditEntry.seal_seq.is_null()
            ).execute()
    return len(entries)


def seal_of(entry: AuditEntry, number: int, before: str) -> str:
    """SHA-256, in hex, of the seal before, the number and everything that the entry says."""
    said = {name: _plain(getattr(entry, name)) for name in _COVERED}
    text = json.dumps([before, number, said], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.isoformat(timespec="microseconds") if hasattr(value, "isoformat") else value


def verify() -> Verdict:
    """Walk the whole chain, first entry to last."""
    number, before = 0, FIRST
    unsealed = AuditEntry.select().where(AuditEntry.seal_seq.is_null()).count()
    for entry in _in_order():
        number += 1
        if entry.seal_seq != number:
            return Verdict(number - 1, unsealed, before, entry.id, f"number {number} is missing before it")
        if entry.seal != seal_of(entry, number, before):
            return Verdict(number - 1, unsealed, before, entry.id, "it is not what was sealed")
        before = entry.seal
    return Verdict(number, unsealed, before)


def _in_order() -> Iterator[AuditEntry]:
    """The sealed entries by number, a page at a time: the trail is longer than the memory."""
    after = 0
    while True:
        page = AuditEntry.select().where(AuditEntry.seal_seq > after).order_by(AuditEntry.seal_seq).limit(BATCH)
        entries = list(page)
        if not entries:
            return
        yield from entries
        after = entries[-1].seal_seq or 0


def holds(head: str) -> bool:
    """Whether the seal `head`, noted earlier, is still part of the chain."""
    return bool(AuditEntry.select().where(AuditEntry.seal == head).exists())
