"""The network as data: what shall be open and under which name, what the stacks were given and have applied."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField, one_of
from portal.models.leases import Lease
from portal.models.machines import Machine
from portal.models.network_places import DnsZone
from portal.models.people import User
from portal.models.states import (
    APPLY_OUTCOMES,
    HOLE_PROTOCOLS,
    HOLE_STATES,
    RECORD_PURPOSES,
    RECORD_TYPES,
)


class Opening(Table):
    """One hole in a machine's firewall, and in the group in front of it. Without a lease it is the machine's own.

    Wanted until `closed_at`, the end of its lease, or `ends_at`, whichever is first; `observed` is the agent's word.
    """

    machine = pw.ForeignKeyField(Machine, backref="openings", on_delete="CASCADE")
    machine_id: int
    lease = pw.ForeignKeyField(Lease, null=True, backref="openings", on_delete="CASCADE")
    lease_id: int | None
    protocol = pw.CharField(4, constraints=[one_of("protocol", HOLE_PROTOCOLS)])
    first_port = pw.IntegerField()
    last_port = pw.IntegerField()
    source = pw.CharField(49)  # canonical CIDR
    reason = pw.TextField(null=True)
    ends_at = UtcDateTimeField(null=True)  # NULL: with its lease, or when somebody closes it
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    requested_by_id: int | None
    created_at = UtcDateTimeField(default=utcnow)
    closed_at = UtcDateTimeField(null=True)  # wanted no longer since then
    observed = pw.CharField(8, default="unknown", constraints=[one_of("observed", HOLE_STATES)])
    observed_at = UtcDateTimeField(null=True)
    error = pw.TextField(null=True)

    @property
    def key(self) -> str:
        return f"o{self.id}"


Opening.add_index(Opening.machine, Opening.closed_at, name="openings_of_machine")
Opening.add_index(Opening.ends_at, where=Opening.closed_at.is_null(), name="openings_due")


class Forward(Table):
    """A port of a gateway that leads to a leased machine behind it. The port is taken until `released_at`."""

    gateway = pw.ForeignKeyField(Machine, backref="forwards", on_delete="RESTRICT")
    gateway_id: int
    machine = pw.ForeignKeyField(Machine, on_delete="RESTRICT")
    machine_id: int
    lease = pw.ForeignKeyField(Lease, backref="forwards", on_delete="RESTRICT")
    lease_id: int
    protocol = pw.CharField(4, constraints=[one_of("protocol", HOLE_PROTOCOLS)])
    public_port = pw.IntegerField()
    source = pw.CharField(49)
    target_port = pw.IntegerField()
    created_at = UtcDateTimeField(default=utcnow)
    closed_at = UtcDateTimeField(null=True)  # wanted no longer since then
    released_at = UtcDateTimeField(null=True)  # seen closed: somebody else may have the port
    observed = pw.CharField(8, default="unknown", constraints=[one_of("observed", HOLE_STATES)])
    observed_at = UtcDateTimeField(null=True)
    error = pw.TextField(null=True)


Forward.add_index(
    Forward.gateway,
    Forward.protocol,
    Forward.public_port,
    unique=True,
    where=Forward.released_at.is_null(),
    name="forward_port_in_use",
)


class DnsRecord(Table):
    """What somebody wants under a name, beside the names that machines and leases have by themselves."""

    zone = pw.ForeignKeyField(DnsZone, backref="records", on_delete="RESTRICT")
    zone_id: int
    machine = pw.ForeignKeyField(Machine, null=True, on_delete="CASCADE")  # gone with it
    machine_id: int | None
    lease = pw.ForeignKeyField(Lease, null=True, on_delete="CASCADE")  # there while it is active
    lease_id: int | None
    name = pw.CharField(253)  # whole, A-labels
    type = pw.CharField(8, constraints=[one_of("type", RECORD_TYPES)])
    values = JsonField()  # canonical, the principal first
    ttl_s = pw.IntegerField(null=True)
    proxied = pw.BooleanField(default=False)
    purpose = pw.CharField(8, default="other", constraints=[one_of("purpose", RECORD_PURPOSES)])
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    requested_by_id: int | None
    created_at = UtcDateTimeField(default=utcnow)
    removed_at = UtcDateTimeField(null=True)

    @property
    def key(self) -> str:
        return f"n{self.id}"


DnsRecord.add_index(
    DnsRecord.zone,
    DnsRecord.name,
    DnsRecord.type,
    unique=True,
    where=DnsRecord.removed_at.is_null(),
    name="dns_record_once",
)


class NetworkState(Table):
    """One row. `generation` counts changes of what the stacks shall make; `told_generation` is the last one that the
    pipeline was called for."""

    generation = pw.IntegerField(default=0)
    changed_at = UtcDateTimeField(default=utcnow)
    untold_since = UtcDateTimeField(null=True)  # the first change that the pipeline was not called for
    behind_since = UtcDateTimeField(null=True)  # the first change that some stack has not applied
    told_generation = pw.IntegerField(default=0)
    told_at = UtcDateTimeField(null=True)
    failures = pw.IntegerField(default=0)  # calls in a row that were not answered well
    next_try_at = UtcDateTimeField(null=True)
    last_error = pw.TextField(null=True)
    frozen_reason = pw.TextField(null=True)  # restored from a backup: no export before an operator has compared
    frozen_at = UtcDateTimeField(null=True)


class NetworkExport(Table):
    """A document that was given out, to know what a stack says that it has applied."""

    generation = pw.IntegerField(unique=True)
    checksum = pw.CharField(71, unique=True)
    counts = JsonField()
    left_out = JsonField(default=list)
    document = pw.BlobField()  # JSON, compressed
    created_at = UtcDateTimeField(default=utcnow, index=True)


class AppliedNetwork(Table):
    """One word of CI: this stack was brought to that export, or could not be."""

    stack = pw.CharField(100)
    environment = pw.CharField(32)
    clouds = JsonField(default=list)
    generation = pw.IntegerField()
    checksum = pw.CharField(71, null=True)
    counts = JsonField(default=dict)
    outputs = JsonField(default=dict)
    export = pw.ForeignKeyField(
        NetworkExport, null=True, on_delete="SET NULL"
    )  # NULL: a step between two, or forgotten
    export_id: int | None
    outcome = pw.CharField(8, constraints=[one_of("outcome", APPLY_OUTCOMES)])
    reason = pw.TextField(null=True)
    at = UtcDateTimeField(default=utcnow)
    posted_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    posted_by_id: int | None

    @property
    def is_gone(self) -> bool:
        """A person's word that the stack was taken down, with all that it made: it has applied nothing, not even an
        empty document."""
        return bool(self.outcome == "applied") and self.checksum is None


AppliedNetwork.add_index(AppliedNetwork.stack, AppliedNetwork.id, name="applied_by_stack")
