"""Machines: the record, its GPUs, its last report, its agent's credentials and commands, its baselines."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField, one_of
from portal.models.network_places import SecurityGroup
from portal.models.people import User
from portal.models.states import COMMAND, MACHINE


class Machine(Table):
    """One rented unit.

    `state` moves only by services/transitions.py; reachability and health are computed from the last report;
    maintenance is a flag. `generation` counts changes of what the agent must do.
    """

    name = pw.CharField(63, unique=True)  # [a-z0-9.-]
    address = pw.CharField(253)  # normalised
    ssh_port = pw.IntegerField(default=22)
    ssh_user = pw.CharField(32)
    state = pw.CharField(16, default="registered", constraints=[one_of("state", tuple(MACHINE))])
    state_reason = pw.TextField(null=True)
    state_changed_at = UtcDateTimeField(default=utcnow)
    region = pw.CharField(64, null=True)
    rack = pw.CharField(64, null=True)
    public_address = pw.CharField(253, null=True)
    labels = JsonField(default=dict)
    remark = pw.TextField(null=True)
    host_keys_offered = JsonField(null=True)  # [{type, line, fingerprint}] seen at the last scan, not trusted
    host_key = pw.TextField(null=True)  # the pinned one: type and base64
    host_key_confirmed_at = UtcDateTimeField(null=True)
    first_contact = pw.TextField(null=True)  # encrypted; NULL once the portal's own key works
    maintenance_since = UtcDateTimeField(null=True)
    maintenance_until = UtcDateTimeField(null=True)
    maintenance_reason = pw.TextField(null=True)
    epoch = pw.CharField(36)
    generation = pw.IntegerField(default=1)
    applied_generation = pw.IntegerField(null=True)
    frozen_reason = pw.TextField(null=True)
    frozen_at = UtcDateTimeField(null=True)
    frozen_generation = pw.IntegerField(null=True)  # ours when it froze: what the host is told until it is thawed
    host_generation = pw.IntegerField(null=True)  # the host's, once it has contradicted us; NULL: it has not spoken yet
    needs_reimage = pw.BooleanField(default=False)
    reimaged_at = UtcDateTimeField(null=True)  # installed anew since the last lease: the other way to be clean
    next_uid = pw.IntegerField(default=20000)
    leases_above = pw.IntegerField(default=0)  # ids of new leases: the host may know those up to here from a lost past
    attempts_above = pw.IntegerField(default=0)  # the same of attempts of tasks
    facts = JsonField(null=True)
    created_at = UtcDateTimeField(default=utcnow)
    # Deferred: in a backup the gateway may come after those behind it.
    gateway = pw.ForeignKeyField("self", null=True, on_delete="RESTRICT", deferrable="INITIALLY DEFERRED")
    gateway_id: int | None
    security_group = pw.ForeignKeyField(SecurityGroup, null=True, on_delete="RESTRICT")  # in front of it, in a cloud
    security_group_id: int | None
    forward_ports = pw.CharField(11, null=True)  # "20000-20999": it is a gateway, and leased to nobody
    hears_openings = pw.BooleanField(default=False)  # its agent reports openings, so it may be told of them

    @property
    def is_gateway(self) -> bool:
        return self.forward_ports is not None


Machine.add_index(
    Machine.address, Machine.ssh_port, unique=True, where=(Machine.state != "retired"), name="machine_address_in_use"
)


class Gpu(Table):
    """A GPU that this machine is expected to have."""

    machine = pw.ForeignKeyField(Machine, backref="gpus", on_delete="CASCADE")
    machine_id: int
    uuid = pw.CharField(96, unique=True)
    slot = pw.IntegerField(null=True)  # NVML's index; not stable, the UUID is the identity
    name = pw.CharField(96, null=True)
    memory_bytes = pw.BigIntegerField(null=True)
    serial = pw.CharField(64, null=True)
    pci_bus_id = pw.CharField(32, null=True)
    first_seen_at = UtcDateTimeField(default=utcnow)


class MachineReport(Table):
    """The last report, one row a machine, overwritten. History is Prometheus's."""

    machine = pw.ForeignKeyField(Machine, primary_key=True, on_delete="CASCADE", backref="report")
    machine_id: int
    received_at = UtcDateTimeField()
    clock_offset_s = pw.FloatField(null=True)
    agent_version = pw.CharField(40)
    boot_id = pw.CharField(64)
    seq = pw.BigIntegerField()
    frozen = pw.BooleanField(default=False)
    metrics = JsonField(null=True)
    gpu = JsonField(null=True)
    leases = JsonField(default=list)


class EnrollToken(Table):
    """One use, for one machine. Only the SHA-256 is kept."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    machine_id: int
    token_sha256 = pw.CharField(64, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    expires_at = UtcDateTimeField()
    used_at = UtcDateTimeField(null=True)


class AgentCredential(Table):
    """Bound to one machine. `pending` until the agent has called with it; then the one before it is ended."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    machine_id: int
    token_sha256 = pw.CharField(64, unique=True)
    state = pw.CharField(16, constraints=[one_of("state", ("pending", "current", "ended"))])
    created_at = UtcDateTimeField(default=utcnow)
    used_at = UtcDateTimeField(null=True)
    ended_at = UtcDateTimeField(null=True)


AgentCredential.add_index(
    AgentCredential.machine, unique=True, where=(AgentCredential.state == "current"), name="one_current_credential"
)


class LoginKey(Table):
    """Which key of the portal's own opens this machine's login, and no other one of ours: proven, one row a machine."""

    machine = pw.ForeignKeyField(Machine, primary_key=True, on_delete="CASCADE")
    machine_id: int
    fingerprint = pw.CharField(64)
    proven_at = UtcDateTimeField(default=utcnow)


class Command(Table):
    """A one-off operation for the agent of one machine; executed once, its result kept."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    machine_id: int
    lease_id = pw.IntegerField(null=True)
    kind = pw.CharField(32)
    args = JsonField(default=dict)  # large parts (a baseline) are joined when it is sent
    state = pw.CharField(16, default="queued", constraints=[one_of("state", tuple(COMMAND))])
    created_at = UtcDateTimeField(default=utcnow)
    ended_at = UtcDateTimeField(null=True)
    message = pw.TextField(null=True)
    result = JsonField(null=True)


class Baseline(Table):
    """What the host looked like when nobody had leased it yet. Reclaim compares with the newest one."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    machine_id: int
    digest = pw.CharField(64)
    content = JsonField()
    taken_at = UtcDateTimeField()
    created_at = UtcDateTimeField(default=utcnow)
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="SET NULL")
    requested_by_id: int | None


class JournalRecord(Table):
    """What happened on the host, by the agent's own record id: kept once however often it is sent."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    machine_id: int
    record_id = pw.CharField(64)
    at = UtcDateTimeField()
    received_at = UtcDateTimeField(default=utcnow)
    event = pw.CharField(64)
    lease_id = pw.IntegerField(null=True)
    attempt_id = pw.IntegerField(null=True)
    detail = JsonField(default=dict)

    class Meta:
        indexes = ((("machine", "record_id"), True),)
