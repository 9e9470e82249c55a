"""The journals of the hosts: what agents say happened there, each record once, and of each machine only so much.

Nothing is decided by it: what counts is in the audit trail. Whoever has a host has its agent's credential too, so all
of this has a bound: a record's detail where it comes in, a machine's records there as well, and their age in the sweep.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal import db
from portal.db import utcnow
from portal.integrations import protocol
from portal.models import JournalRecord, Machine

LOG = logging.getLogger(__name__)

MOST_DETAIL_BYTES = 8 * 1024
MOST_A_MACHINE = 2000
KEPT_FOR = timedelta(days=90)


def take(machine: Machine, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keep each once, by the agent's own id; returns the ids, which need not be sent again."""
    rows = [_row(machine, record) for record in records]
    if rows:
        with db.atomic():
            db.one_at_a_time(f"journal {machine.id}")
            JournalRecord.insert_many(rows).on_conflict_ignore().execute()
            _keep_newest(machine.id)
    return [row["record_id"] for row in rows]


def _row(machine: Machine, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "machine": machine.id,
        "record_id": record["id"],
        "at": protocol.parse_time(record["at"]),
        "event": record["event"],
        "lease_id": record["lease_id"],
        "attempt_id": record["attempt_id"],
        "detail": _bounded(machine, record),
    }


def _bounded(machine: Machine, record: Mapping[str, Any]) -> Any:
    """The detail, or in its place how large it was: a report that is refused for ever would cut the host off."""
    size = len(json.dumps(record["detail"], ensure_ascii=False).encode())
    if size <= MOST_DETAIL_BYTES:
        return record["detail"]
    LOG.warning("%s: the detail of %s was left out of its journal: %d bytes", machine.name, record["event"], size)
    return {"left_out_bytes": size}


def _keep_newest(machine_id: int) -> int:
    own = JournalRecord.machine == machine_id
    newest_first = JournalRecord.select(JournalRecord.id).where(own).order_by(JournalRecord.id.desc())
    edge = newest_first.offset(MOST_A_MACHINE).limit(1).scalar()
    return 0 if edge is None else int(JournalRecord.delete().where(own, JournalRecord.id <= edge).execute())


def prune(now: datetime | None = None) -> int:
    """Forget what is old, and of each machine what is too much; returns how many. For the sweep."""
    too_many = JournalRecord.select(JournalRecord.machine).group_by(JournalRecord.machine)
    with db.atomic():
        gone = int(JournalRecord.delete().where(JournalRecord.received_at < (now or utcnow()) - KEPT_FOR).execute())
    for row in list(too_many.having(peewee.fn.COUNT(JournalRecord.id) > MOST_A_MACHINE)):
        with db.atomic():
            db.one_at_a_time(f"journal {row.machine_id}")
            gone += _keep_newest(row.machine_id)
    return gone
