"""The network as data: zones, groups, openings, forwards, exports and what was applied of them; more kinds of grants.
Frozen: never edited after a release.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import peewee as pw


def utcnow() -> datetime:
    return datetime.now(UTC)


GRANT_KINDS = ("keys", "tasks", "firewall", "forward", "security_group", "name")
GRANT_STATES = ("open", "closed", "unknown")
HOLE_STATES = ("open", "closed", "failed", "unknown")
HOLE_PROTOCOLS = ("tcp", "udp")
DNS_CLOUDS = ("cloudflare", "aws", "alicloud", "tencent")
GROUP_CLOUDS = ("aws", "alicloud", "tencent")
RECORD_TYPES = ("A", "AAAA", "CNAME", "TXT", "MX", "SRV", "CAA")
RECORD_PURPOSES = ("ssh", "web", "other")
APPLY_OUTCOMES = ("applied", "failed")


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
    """Of 0001; only its key is named here."""


class Lease(Table):
    """Of 0001; only its key is named here."""


class Machine(Table):
    """Of 0001; only its key is named here."""


class Grant(Table):
    """Of 0001, with the new kinds and columns: SQLite makes the table anew, since it cannot change a CHECK."""

    lease = pw.ForeignKeyField(Lease, on_delete="CASCADE")
    kind = pw.CharField(16, constraints=[one_of("kind", GRANT_KINDS)])
    desired = pw.CharField(8, constraints=[one_of("desired", ("open", "closed"))])
    observed = pw.CharField(8, default="unknown", constraints=[one_of("observed", GRANT_STATES)])
    desired_at = UtcDateTimeField(default=utcnow)
    observed_at = UtcDateTimeField(null=True)
    detail = JsonField(default=dict)
    generation = pw.IntegerField(null=True)
    written_off_at = UtcDateTimeField(null=True)
    written_off_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    written_off_reason = pw.TextField(null=True)

    class Meta:
        indexes = ((("lease", "kind"), True),)


class DnsZone(Table):
    """One zone at one provider. At most one holds the machines' own names, and at most one those of leases."""

    name = pw.CharField(253)  # A-labels
    cloud = pw.CharField(16, constraints=[one_of("cloud", DNS_CLOUDS)])
    external_id = pw.CharField(64, null=True)  # the provider's id; NULL where it goes by name, or the stack makes it
    serves_machines = pw.BooleanField(default=False)
    serves_leases = pw.BooleanField(default=False)
    ttl_s = pw.IntegerField(null=True)  # of those names; NULL: what the provider does by itself
    created_at = UtcDateTimeField(default=utcnow)
    created_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")

    class Meta:
        indexes = ((("cloud", "name"), True),)


DnsZone.add_index(DnsZone.serves_machines, unique=True, where=DnsZone.serves_machines, name="one_zone_of_machines")
DnsZone.add_index(DnsZone.serves_leases, unique=True, where=DnsZone.serves_leases, name="one_zone_of_leases")


class SecurityGroup(Table):
    """A group in a cloud, in front of machines. With an `external_id` it was there before: only its rules are ours."""

    name = pw.CharField(200)
    cloud = pw.CharField(16, constraints=[one_of("cloud", GROUP_CLOUDS)])
    region = pw.CharField(40)
    vpc = pw.CharField(64, null=True)
    external_id = pw.CharField(64, null=True)
    created_at = UtcDateTimeField(default=utcnow)
    created_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")

    class Meta:
        indexes = ((("cloud", "region", "name"), True),)


class Opening(Table):
    """One hole in a machine's firewall, and in the group in front of it. Without a lease it is the machine's own.

    Wanted until `closed_at`, the end of its lease, or `ends_at`, whichever is first; `observed` is the agent's word.
    """

    machine = pw.ForeignKeyField(Machine, on_delete="CASCADE")
    lease = pw.ForeignKeyField(Lease, null=True, on_delete="CASCADE")
    protocol = pw.CharField(4, constraints=[one_of("protocol", HOLE_PROTOCOLS)])
    first_port = pw.IntegerField()
    last_port = pw.IntegerField()
    source = pw.CharField(49)  # canonical CIDR
    reason = pw.TextField(null=True)
    ends_at = UtcDateTimeField(null=True)  # NULL: with its lease, or when somebody closes it
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    created_at = UtcDateTimeField(default=utcnow)
    closed_at = UtcDateTimeField(null=True)  # wanted no longer since then
    observed = pw.CharField(8, default="unknown", constraints=[one_of("observed", HOLE_STATES)])
    observed_at = UtcDateTimeField(null=True)
    error = pw.TextField(null=True)


Opening.add_index(Opening.machine, Opening.closed_at, name="openings_of_machine")
Opening.add_index(Opening.ends_at, where=Opening.closed_at.is_null(), name="openings_due")


class Forward(Table):
    """A port of a gateway that leads to a leased machine behind it. The port is taken until `released_at`."""

    gateway = pw.ForeignKeyField(Machine, on_delete="RESTRICT")
    machine = pw.ForeignKeyField(Machine, on_delete="RESTRICT")
    lease = pw.ForeignKeyField(Lease, on_delete="RESTRICT")
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

    zone = pw.ForeignKeyField(DnsZone, on_delete="RESTRICT")
    machine = pw.ForeignKeyField(Machine, null=True, on_delete="CASCADE")  # gone with it
    lease = pw.ForeignKeyField(Lease, null=True, on_delete="CASCADE")  # there while it is active
    name = pw.CharField(253)  # whole, A-labels
    type = pw.CharField(8, constraints=[one_of("type", RECORD_TYPES)])
    values = JsonField()  # canonical, the principal first
    ttl_s = pw.IntegerField(null=True)
    proxied = pw.BooleanField(default=False)
    purpose = pw.CharField(8, default="other", constraints=[one_of("purpose", RECORD_PURPOSES)])
    requested_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    created_at = UtcDateTimeField(default=utcnow)
    removed_at = UtcDateTimeField(null=True)


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
    outcome = pw.CharField(8, constraints=[one_of("outcome", APPLY_OUTCOMES)])
    reason = pw.TextField(null=True)
    at = UtcDateTimeField(default=utcnow)
    posted_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")


AppliedNetwork.add_index(AppliedNetwork.stack, AppliedNetwork.id, name="applied_by_stack")


TABLES = (DnsZone, SecurityGroup, Opening, Forward, DnsRecord, NetworkState, NetworkExport, AppliedNetwork)
OF_BEFORE = ("id", "lease_id", "kind", "desired", "observed", "desired_at", "observed_at", "detail")


def up(migrator: Any, db: Any) -> None:
    database.initialize(db)
    is_sqlite = isinstance(db, pw.SqliteDatabase)
    db.create_tables(TABLES)
    _machine_columns(db, is_sqlite)
    if is_sqlite:
        _grants_anew(db)
    else:
        _grants_changed(db)


def _machine_columns(db: Any, is_sqlite: bool) -> None:
    flag = "INTEGER NOT NULL DEFAULT 0" if is_sqlite else "BOOLEAN NOT NULL DEFAULT FALSE"
    for column in (
        "gateway_id INTEGER REFERENCES machine (id) ON DELETE RESTRICT DEFERRABLE INITIALLY DEFERRED",
        "security_group_id INTEGER REFERENCES security_group (id) ON DELETE RESTRICT",
        "forward_ports VARCHAR(11)",
        f"hears_openings {flag}",
    ):
        db.execute_sql(f"ALTER TABLE machine ADD COLUMN {column}")
    db.execute_sql("CREATE INDEX machine_gateway_id ON machine (gateway_id)")
    db.execute_sql("CREATE INDEX machine_security_group_id ON machine (security_group_id)")


def _grants_anew(db: Any) -> None:
    db.execute_sql('ALTER TABLE "grant" RENAME TO grant_of_before')
    for index in ("grant_lease_id", "grant_lease_id_kind"):
        db.execute_sql(f"DROP INDEX {index}")
    db.create_tables([Grant])
    columns = ", ".join(OF_BEFORE)
    db.execute_sql(f'INSERT INTO "grant" ({columns}) SELECT {columns} FROM grant_of_before')  # noqa: S608 - our own names
    db.execute_sql("DROP TABLE grant_of_before")


def _grants_changed(db: Any) -> None:
    words = ", ".join(f"'{kind}'" for kind in GRANT_KINDS)
    db.execute_sql('ALTER TABLE "grant" DROP CONSTRAINT grant_kind_check')
    db.execute_sql(f'ALTER TABLE "grant" ADD CONSTRAINT grant_kind_check CHECK (kind IN ({words}))')
    for column in (
        "generation INTEGER",
        "written_off_at TIMESTAMPTZ",
        'written_off_by_id INTEGER REFERENCES "user" (id) ON DELETE RESTRICT',
        "written_off_reason TEXT",
    ):
        db.execute_sql(f'ALTER TABLE "grant" ADD COLUMN {column}')
    db.execute_sql('CREATE INDEX grant_written_off_by_id ON "grant" (written_off_by_id)')
