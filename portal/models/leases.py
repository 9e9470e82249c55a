"""Leases, the grants they open, and the reclaims that follow them."""

from __future__ import annotations

from datetime import datetime

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField, one_of
from portal.models.machines import Machine
from portal.models.people import Tenant, User
from portal.models.states import GRANT_KINDS, GRANT_STATES, LEASE, LEASE_OPEN, RECLAIM


class Lease(Table):
    """One tenant, one machine, from, until. `login` and `uid` are the lease's own on the host and are never used twice,
    but by a lease that `continues` this one while its data was retained."""

    machine = pw.ForeignKeyField(Machine, backref="leases", on_delete="RESTRICT")
    machine_id: int
    tenant = pw.ForeignKeyField(Tenant, backref="leases", on_delete="RESTRICT")
    tenant_id: int
    state = pw.CharField(16, constraints=[one_of("state", tuple(LEASE))])
    login = pw.CharField(32, null=True)
    uid = pw.IntegerField(null=True)
    starts_at = UtcDateTimeField()
    ends_at = UtcDateTimeField()
    acknowledged_ends_at = UtcDateTimeField(null=True)  # the end that the host has armed
    retain_s = pw.IntegerField(default=86400)
    root = pw.BooleanField(default=False)
    remark = pw.TextField(null=True)
    continues = pw.ForeignKeyField("self", null=True, on_delete="RESTRICT")
    continues_id: int | None
    created_at = UtcDateTimeField(default=utcnow)
    created_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    created_by_id: int | None
    activated_at = UtcDateTimeField(null=True)
    ending_at = UtcDateTimeField(null=True)
    ended_at = UtcDateTimeField(null=True)
    end_reason = pw.TextField(null=True)
    ended_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")  # None: its agreed end
    ended_by_id: int | None
    end_forced = pw.BooleanField(default=False)  # the reclaim skips the retention
    probe_key = pw.TextField(null=True)  # encrypted private key, placed among the lease's keys, tried after the end
    log_bytes = pw.BigIntegerField(default=0)  # kept of all its tasks' output; counted at the lease `host_id`

    @property
    def host_id(self) -> int:
        """Its id on the host and in the agent's protocol: that of the lease which made the login."""
        return int(self.login.removeprefix("lease")) if self.login else self.id


Lease.add_index(Lease.machine, unique=True, where=(Lease.state << LEASE_OPEN), name="one_open_lease_a_machine")


class Grant(Table):
    """One thing a lease opens: what we want, and what was last seen."""

    lease = pw.ForeignKeyField(Lease, backref="grants", on_delete="CASCADE")
    lease_id: int
    kind = pw.CharField(16, constraints=[one_of("kind", GRANT_KINDS)])
    desired = pw.CharField(8, constraints=[one_of("desired", ("open", "closed"))])
    observed = pw.CharField(8, default="unknown", constraints=[one_of("observed", GRANT_STATES)])
    desired_at = UtcDateTimeField(default=utcnow)
    observed_at = UtcDateTimeField(null=True)
    detail = JsonField(default=dict)  # keys: the fingerprints the host has; else its parts
    generation = pw.IntegerField(null=True)  # of the network, when this was wanted: what a stack must have applied
    written_off_at = UtcDateTimeField(null=True)  # an operator waits for it no longer
    written_off_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    written_off_by_id: int | None
    written_off_reason = pw.TextField(null=True)

    @property
    def waits_since(self) -> datetime | None:
        """Since when it waits for an agent or a stack; None while it is as wanted, or nobody waits."""
        is_settled = self.observed == self.desired or self.written_off_at is not None
        return None if is_settled else self.desired_at

    @property
    def is_still_open(self) -> bool:
        """Wanted closed, not seen so, and somebody waits for it."""
        return bool(self.desired == "closed") and self.waits_since is not None

    class Meta:
        indexes = ((("lease", "kind"), True),)


class Reclaim(Table):
    """Clean a machine after a lease and prove it. `report` is what was signed, byte for byte."""

    machine = pw.ForeignKeyField(Machine, backref="reclaims", on_delete="RESTRICT")
    machine_id: int
    lease = pw.ForeignKeyField(Lease, backref="reclaims", on_delete="RESTRICT")
    lease_id: int
    number = pw.IntegerField(default=1)
    state = pw.CharField(16, default="waiting", constraints=[one_of("state", tuple(RECLAIM))])
    due_at = UtcDateTimeField()
    force = pw.BooleanField(default=False)
    reason = pw.TextField(null=True)
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    requested_by_id: int | None
    command_id = pw.IntegerField(null=True)
    run_id = pw.IntegerField(null=True)
    started_at = UtcDateTimeField(null=True)
    ended_at = UtcDateTimeField(null=True)
    failure = pw.TextField(null=True)
    report = pw.TextField(null=True)  # canonical JSON
    signature = pw.TextField(null=True)  # base64 Ed25519
    created_at = UtcDateTimeField(default=utcnow)

    class Meta:
        indexes = ((("lease", "number"), True),)


Reclaim.add_index(
    Reclaim.machine,
    unique=True,
    where=(Reclaim.state << ("waiting", "cleaning", "verifying")),
    name="one_open_reclaim_a_machine",
)
