"""What happened: audit entries, events that wake waiting calls, and the few rows that hold the portal together."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField


class AuditEntry(Table):
    """Written in the transaction it speaks of. The sealer adds `seal_seq` and `seal` to committed rows."""

    at = UtcDateTimeField(default=utcnow, index=True)
    actor_kind = pw.CharField(16)  # user, agent, system, token
    actor_id = pw.IntegerField(null=True)
    actor_name = pw.CharField(64)
    actor_role = pw.CharField(16, null=True)
    address = pw.CharField(64, null=True)
    request = pw.CharField(300, null=True)  # method and path
    action = pw.CharField(64, index=True)
    resource_type = pw.CharField(32, null=True)
    resource_id = pw.IntegerField(null=True)
    tenant_id = pw.IntegerField(null=True, index=True)
    detail = JsonField(default=dict)
    outcome = pw.CharField(16, default="done")  # done, refused, failed
    seal_seq = pw.BigIntegerField(null=True, unique=True)
    seal = pw.CharField(64, null=True)


AuditEntry.add_index(AuditEntry.resource_type, AuditEntry.resource_id, name="audit_by_resource")


class Event(Table):
    """A change that somebody may be waiting for: a row, so that nobody hears of it before the commit. Kept an hour."""

    at = UtcDateTimeField(default=utcnow, index=True)
    topic = pw.CharField(64)  # machine.generation, lease.ending, run.event, task.log, …
    machine_id = pw.IntegerField(null=True)
    tenant_id = pw.IntegerField(null=True)
    resource_id = pw.IntegerField(null=True)
    data = JsonField(default=dict)


class Setting(Table):
    key = pw.CharField(64, primary_key=True)
    value = JsonField(null=True)
    changed_at = UtcDateTimeField(default=utcnow)


class NamedLock(Table):
    """Held by one process at a time, until it expires: the sweeper, the sealer, the migration."""

    name = pw.CharField(32, primary_key=True)
    token = pw.CharField(36)
    expires_at = UtcDateTimeField()
