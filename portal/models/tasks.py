"""A customer's work on a leased machine: tasks, their attempts, and the log by byte ranges."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField, one_of
from portal.models.leases import Lease
from portal.models.people import User
from portal.models.states import ATTEMPT


class Task(Table):
    """What is to be run. Its state is that of its newest attempt: a copy, which services/tasks.py keeps."""

    lease = pw.ForeignKeyField(Lease, backref="tasks", on_delete="RESTRICT")
    lease_id: int
    created_by = pw.ForeignKeyField(User, on_delete="RESTRICT")
    created_by_id: int
    name = pw.CharField(100)
    command = pw.TextField()
    env = JsonField(default=dict)
    workdir = pw.CharField(1000, null=True)
    gpu_uuids = JsonField(null=True)  # None: all of the machine
    time_limit_s = pw.IntegerField(null=True, default=3600)
    stop_grace_s = pw.IntegerField(default=30)
    retries = pw.IntegerField(default=0)
    state = pw.CharField(16, default="queued", constraints=[one_of("state", tuple(ATTEMPT))])
    created_at = UtcDateTimeField(default=utcnow)
    ended_at = UtcDateTimeField(null=True)

    # No columns: put in by services/tasks.py where tasks are shown with their attempts.
    newest: Attempt
    all_attempts: list[Attempt]


class Attempt(Table):
    """One try. Ids come from the portal and are never used twice; the exit code is the host's word."""

    task = pw.ForeignKeyField(Task, backref="attempts", on_delete="CASCADE")
    task_id: int
    number = pw.IntegerField()
    state = pw.CharField(16, default="queued", constraints=[one_of("state", tuple(ATTEMPT))])
    desired = pw.CharField(8, default="run", constraints=[one_of("desired", ("run", "stop"))])
    stop_requested_at = UtcDateTimeField(null=True)
    created_at = UtcDateTimeField(default=utcnow)
    started_at = UtcDateTimeField(null=True)
    ended_at = UtcDateTimeField(null=True)
    exit_code = pw.IntegerField(null=True)
    signal = pw.IntegerField(null=True)
    boot_id = pw.CharField(64, null=True)
    reason = pw.TextField(null=True)
    log_bytes = pw.BigIntegerField(default=0)  # contiguous bytes that the portal holds
    log_complete = pw.BooleanField(default=False)
    log_truncated = pw.BooleanField(default=False)

    class Meta:
        indexes = ((("task", "number"), True),)


class LogRange(Table):
    attempt = pw.ForeignKeyField(Attempt, backref="log", on_delete="CASCADE")
    attempt_id: int
    offset = pw.BigIntegerField()
    data = pw.BlobField()

    class Meta:
        indexes = ((("attempt", "offset"), True),)
