"""Runs of playbooks: the row is the truth, the queue only wakes a worker."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField, one_of
from portal.models.machines import Machine
from portal.models.people import User
from portal.models.states import DRIFT, RUN


class Run(Table):
    """One playbook run. It belongs to the worker whose `lock_token` it carries until `lock_expires_at`."""

    playbook = pw.CharField(64)
    purpose = pw.CharField(16, constraints=[one_of("purpose", ("provision", "verify", "operator"))])
    state = pw.CharField(16, default="queued", constraints=[one_of("state", tuple(RUN))])
    tags = JsonField(default=list)
    options = JsonField(default=dict)  # a closed set, see services/runs.py; no secrets
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    requested_by_id: int | None
    lock_token = pw.CharField(36, null=True)
    lock_expires_at = UtcDateTimeField(null=True)
    attempt = pw.IntegerField(default=0)
    child = JsonField(null=True)  # {pid, started_ticks, boot_id}: the mark of ansible-playbook
    cancel_requested_at = UtcDateTimeField(null=True)
    created_at = UtcDateTimeField(default=utcnow)
    started_at = UtcDateTimeField(null=True)
    ended_at = UtcDateTimeField(null=True)
    exit_code = pw.IntegerField(null=True)
    reason = pw.TextField(null=True)
    remains = pw.TextField(null=True)  # work that may be left on the hosts
    stats = JsonField(null=True)
    verdicts = JsonField(null=True)  # host name → verdict, from verify.yml
    event_count = pw.IntegerField(null=True)  # set at the end: the output is complete when this many are there


Run.add_index(Run.state, Run.lock_expires_at, name="run_to_take")


class RunHost(Table):
    """`active` is set while a worker holds the run: the index keeps two runs off one host."""

    run = pw.ForeignKeyField(Run, backref="hosts", on_delete="CASCADE")
    run_id: int
    machine = pw.ForeignKeyField(Machine, on_delete="RESTRICT")
    machine_id: int
    active = pw.BooleanField(default=False)

    class Meta:
        indexes = ((("run", "machine"), True),)


RunHost.add_index(RunHost.machine, unique=True, where=(RunHost.active == True), name="one_active_run_a_host")  # noqa: E712 - SQL


class RunEvent(Table):
    run = pw.ForeignKeyField(Run, backref="events", on_delete="CASCADE")
    run_id: int
    counter = pw.IntegerField()
    at = UtcDateTimeField(default=utcnow)
    kind = pw.CharField(40)
    host = pw.CharField(63, null=True)
    task = pw.TextField(null=True)
    stdout = pw.TextField(default="")
    data = JsonField(null=True)

    class Meta:
        indexes = ((("run", "counter"), True),)


class Drift(Table):
    """What the last look found that a provisioning run would change on this machine; one row a machine, overwritten."""

    machine = pw.ForeignKeyField(Machine, primary_key=True, on_delete="CASCADE")
    machine_id: int
    run = pw.ForeignKeyField(Run, on_delete="CASCADE")
    run_id: int
    state = pw.CharField(16, constraints=[one_of("state", DRIFT)])
    reason = pw.TextField(null=True)  # why it is unknown, or known in part only
    changes = JsonField(default=list)
    looked_at = UtcDateTimeField(default=utcnow)
