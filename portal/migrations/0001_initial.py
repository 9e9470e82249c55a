"""The first schema. Frozen: these classes are a copy, independent of models/, and are never edited after a release."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import peewee as pw


def utcnow() -> datetime:
    return datetime.now(UTC)


USER_ROLES = ("admin", "operator", "customer")
MEMBER_ROLES = ("owner", "member", "viewer")
GRANT_KINDS = ("keys", "tasks")
GRANT_STATES = ("open", "closed", "unknown")
LEASE_OPEN = ("active", "ending")
MACHINE = ("registered", "provisioning", "failed", "ready", "leased", "reclaiming", "quarantined", "retired")
LEASE = ("scheduled", "active", "ending", "ended")
RUN = ("queued", "running", "lost", "succeeded", "failed", "cancelled")
TASK = ("queued", "starting", "running", "succeeded", "failed", "stopped", "timed_out", "lost")
RECLAIM = ("waiting", "cleaning", "verifying", "passed", "failed", "cancelled")
COMMAND = ("queued", "done", "failed", "cancelled")


class UtcDateTimeField(pw.Field):
    """An aware time in UTC, stored so that text order (SQLite) is time order."""

    field_type = "TIMESTAMPTZ"

    def db_value(self, value: datetime | None) -> str | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{self.name}: a time without a zone; use utcnow()")
        return value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")

    def python_value(self, value: Any) -> datetime | None:
        if value is None:
            return None
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        moment: datetime = value.astimezone(UTC)
        return moment


class JsonField(pw.TextField):
    """A JSON value as text; None stays NULL."""

    def db_value(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def python_value(self, value: str | None) -> Any:
        return None if value is None else json.loads(value)


database = pw.DatabaseProxy()


class Table(pw.Model):
    id: int

    class Meta:
        database = database
        legacy_table_names = False
        only_save_dirty = True


def one_of(column: str, values: tuple[str, ...]) -> Any:
    """A CHECK that lists the allowed words, so that no stray writer invents a state."""
    words = ", ".join(f"'{value}'" for value in values)
    return pw.Check(f"{column} IN ({words})")


class User(Table):
    """A person who signs in. `generation` is in every token; raising it ends all of them at the next request."""

    username = pw.CharField(64, unique=True)  # lower case
    email = pw.CharField(254, null=True)
    display_name = pw.CharField(100, null=True)
    full_name = pw.CharField(100, null=True)
    phone = pw.CharField(40, null=True)
    role = pw.CharField(16, constraints=[one_of("role", USER_ROLES)])
    password_hash = pw.CharField(255)
    must_change_password = pw.BooleanField(default=False)
    disabled_at = UtcDateTimeField(null=True)
    generation = pw.IntegerField(default=1)
    locale = pw.CharField(10, null=True)
    created_at = UtcDateTimeField(default=utcnow)
    last_sign_in_at = UtcDateTimeField(null=True)


class Tenant(Table):
    name = pw.CharField(100, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    archived_at = UtcDateTimeField(null=True)


class Membership(Table):
    tenant = pw.ForeignKeyField(Tenant, backref="memberships", on_delete="RESTRICT")
    user = pw.ForeignKeyField(User, backref="memberships", on_delete="RESTRICT")
    role = pw.CharField(16, constraints=[one_of("role", MEMBER_ROLES)])
    created_at = UtcDateTimeField(default=utcnow)

    class Meta:
        indexes = ((("tenant", "user"), True),)


class SshKey(Table):
    user = pw.ForeignKeyField(User, backref="keys", on_delete="RESTRICT")
    name = pw.CharField(64)
    type = pw.CharField(64)
    bits = pw.IntegerField()
    line = pw.TextField()  # canonical: type and base64, no comment, no options
    fingerprint = pw.CharField(80)  # SHA256:…
    created_at = UtcDateTimeField(default=utcnow)
    removed_at = UtcDateTimeField(null=True)


SshKey.add_index(
    SshKey.user, SshKey.fingerprint, unique=True, where=SshKey.removed_at.is_null(), name="ssh_key_once_per_user"
)


class RefreshFamily(Table):
    """One sign-in. `current_jti` is the only refresh token that may be used; use of an older one ends the family."""

    user = pw.ForeignKeyField(User, on_delete="RESTRICT")
    current_jti = pw.CharField(64, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    rotated_at = UtcDateTimeField(default=utcnow)
    expires_at = UtcDateTimeField(index=True)
    ended_at = UtcDateTimeField(null=True)
    end_reason = pw.CharField(40, null=True)
    address = pw.CharField(64, null=True)
    user_agent = pw.CharField(300, null=True)


class ApiToken(Table):
    """For CI and the inventory plugin. Only the SHA-256 of the token is kept."""

    user = pw.ForeignKeyField(User, on_delete="RESTRICT")
    name = pw.CharField(64)
    scopes = JsonField()  # list of words, see services/tokens.py
    token_sha256 = pw.CharField(64, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    expires_at = UtcDateTimeField()
    last_used_at = UtcDateTimeField(null=True)
    revoked_at = UtcDateTimeField(null=True)


class SignInFailure(Table):
    """Sign-ins that failed, by account and by address: what the throttle counts, whichever process saw them."""

    username = pw.CharField(64, index=True)
    address = pw.CharField(64, index=True)
    at = UtcDateTimeField(default=utcnow, index=True)


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
    facts = JsonField(null=True)
    created_at = UtcDateTimeField(default=utcnow)


Machine.add_index(
    Machine.address, Machine.ssh_port, unique=True, where=(Machine.state != "retired"), name="machine_address_in_use"
)


class Gpu(Table):
    """A GPU that this machine is expected to have."""

    machine = pw.ForeignKeyField(Machine, backref="gpus", on_delete="CASCADE")
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
    token_sha256 = pw.CharField(64, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    expires_at = UtcDateTimeField()
    used_at = UtcDateTimeField(null=True)


class AgentCredential(Table):
    """Bound to one machine. `pending` until the agent has called with it; then the one before it is ended."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    token_sha256 = pw.CharField(64, unique=True)
    state = pw.CharField(16, constraints=[one_of("state", ("pending", "current", "ended"))])
    created_at = UtcDateTimeField(default=utcnow)
    used_at = UtcDateTimeField(null=True)
    ended_at = UtcDateTimeField(null=True)


AgentCredential.add_index(
    AgentCredential.machine, unique=True, where=(AgentCredential.state == "current"), name="one_current_credential"
)


class Command(Table):
    """A one-off operation for the agent of one machine; executed once, its result kept."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
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
    digest = pw.CharField(64)
    content = JsonField()
    taken_at = UtcDateTimeField()
    created_at = UtcDateTimeField(default=utcnow)
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="SET NULL")


class JournalRecord(Table):
    """What happened on the host, by the agent's own record id: kept once however often it is sent."""

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    record_id = pw.CharField(64)
    at = UtcDateTimeField()
    received_at = UtcDateTimeField(default=utcnow)
    event = pw.CharField(64)
    lease_id = pw.IntegerField(null=True)
    attempt_id = pw.IntegerField(null=True)
    detail = JsonField(default=dict)

    class Meta:
        indexes = ((("machine", "record_id"), True),)


class Lease(Table):
    """One tenant, one machine, from, until. `login` and `uid` are the lease's own on the host and are never used twice,
    but by a lease that `continues` this one while its data was retained."""

    machine = pw.ForeignKeyField(Machine, backref="leases", on_delete="RESTRICT")
    tenant = pw.ForeignKeyField(Tenant, backref="leases", on_delete="RESTRICT")
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
    created_at = UtcDateTimeField(default=utcnow)
    created_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    activated_at = UtcDateTimeField(null=True)
    ending_at = UtcDateTimeField(null=True)
    ended_at = UtcDateTimeField(null=True)
    end_reason = pw.TextField(null=True)
    ended_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")  # None: its agreed end
    end_forced = pw.BooleanField(default=False)  # the reclaim skips the retention
    probe_key = pw.TextField(null=True)  # encrypted private key, placed among the lease's keys, tried after the end

    @property
    def host_id(self) -> int:
        """Its id on the host and in the agent's protocol: that of the lease which made the login."""
        return int(self.login.removeprefix("lease")) if self.login else self.id


Lease.add_index(Lease.machine, unique=True, where=(Lease.state << LEASE_OPEN), name="one_open_lease_a_machine")


class Grant(Table):
    """One thing a lease opens: what we want, and what was last seen."""

    lease = pw.ForeignKeyField(Lease, backref="grants", on_delete="CASCADE")
    kind = pw.CharField(16, constraints=[one_of("kind", GRANT_KINDS)])
    desired = pw.CharField(8, constraints=[one_of("desired", ("open", "closed"))])
    observed = pw.CharField(8, default="unknown", constraints=[one_of("observed", GRANT_STATES)])
    desired_at = UtcDateTimeField(default=utcnow)
    observed_at = UtcDateTimeField(null=True)
    detail = JsonField(default=dict)  # keys: the fingerprints the host has

    class Meta:
        indexes = ((("lease", "kind"), True),)


class Reclaim(Table):
    """Clean a machine after a lease and prove it. `report` is what was signed, byte for byte."""

    machine = pw.ForeignKeyField(Machine, backref="reclaims", on_delete="RESTRICT")
    lease = pw.ForeignKeyField(Lease, backref="reclaims", on_delete="RESTRICT")
    number = pw.IntegerField(default=1)
    state = pw.CharField(16, default="waiting", constraints=[one_of("state", tuple(RECLAIM))])
    due_at = UtcDateTimeField()
    force = pw.BooleanField(default=False)
    reason = pw.TextField(null=True)
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
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


class Run(Table):
    """One playbook run. It belongs to the worker whose `lock_token` it carries until `lock_expires_at`."""

    playbook = pw.CharField(64)
    purpose = pw.CharField(16, constraints=[one_of("purpose", ("provision", "verify", "operator"))])
    state = pw.CharField(16, default="queued", constraints=[one_of("state", tuple(RUN))])
    tags = JsonField(default=list)
    options = JsonField(default=dict)  # a closed set, see services/runs.py; no secrets
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
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
    machine = pw.ForeignKeyField(Machine, on_delete="RESTRICT")
    active = pw.BooleanField(default=False)

    class Meta:
        indexes = ((("run", "machine"), True),)


RunHost.add_index(RunHost.machine, unique=True, where=(RunHost.active == True), name="one_active_run_a_host")  # noqa: E712 - SQL


class RunEvent(Table):
    run = pw.ForeignKeyField(Run, backref="events", on_delete="CASCADE")
    counter = pw.IntegerField()
    at = UtcDateTimeField(default=utcnow)
    kind = pw.CharField(40)
    host = pw.CharField(63, null=True)
    task = pw.TextField(null=True)
    stdout = pw.TextField(default="")
    data = JsonField(null=True)

    class Meta:
        indexes = ((("run", "counter"), True),)


class Task(Table):
    """What is to be run. Its state is that of its newest attempt, or `queued` before there is one to send."""

    lease = pw.ForeignKeyField(Lease, backref="tasks", on_delete="RESTRICT")
    created_by = pw.ForeignKeyField(User, on_delete="RESTRICT")
    name = pw.CharField(100)
    command = pw.TextField()
    env = JsonField(default=dict)
    workdir = pw.CharField(1000, null=True)
    gpu_uuids = JsonField(null=True)  # None: all of the machine
    time_limit_s = pw.IntegerField(null=True, default=3600)
    stop_grace_s = pw.IntegerField(default=30)
    retries = pw.IntegerField(default=0)
    state = pw.CharField(16, default="queued", constraints=[one_of("state", tuple(TASK))])
    created_at = UtcDateTimeField(default=utcnow)
    ended_at = UtcDateTimeField(null=True)

    # No columns: put in by services/tasks.py where tasks are shown with their attempts.
    newest: Attempt
    all_attempts: list[Attempt]


class Attempt(Table):
    """One try. Ids come from the portal and are never used twice; the exit code is the host's word."""

    task = pw.ForeignKeyField(Task, backref="attempts", on_delete="CASCADE")
    number = pw.IntegerField()
    state = pw.CharField(16, default="queued", constraints=[one_of("state", tuple(TASK))])
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
    offset = pw.BigIntegerField()
    data = pw.BlobField()

    class Meta:
        indexes = ((("attempt", "offset"), True),)


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


TABLES = (
    User, Tenant, Membership, SshKey, RefreshFamily, ApiToken, SignInFailure,
    Machine, Gpu, MachineReport, EnrollToken, AgentCredential, Command, Baseline, JournalRecord,
    Lease, Grant, Reclaim, Run, RunHost, RunEvent, Task, Attempt, LogRange,
    AuditEntry, Event, Setting, NamedLock,
)  # fmt: skip


def up(migrator: Any, db: Any) -> None:
    database.initialize(db)
    db.create_tables(TABLES)
