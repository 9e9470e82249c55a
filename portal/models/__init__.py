"""The tables. No rule lives here; `services/` is the only caller that writes."""

from portal.models.alerts import Alert, AlertRule, AlertSilence
from portal.models.base import Table
from portal.models.leases import Grant, Lease, Reclaim
from portal.models.machines import (
    AgentCredential,
    Baseline,
    Command,
    EnrollToken,
    Gpu,
    JournalRecord,
    LoginKey,
    Machine,
    MachineReport,
)
from portal.models.network import AppliedNetwork, DnsRecord, Forward, NetworkExport, NetworkState, Opening
from portal.models.network_places import DnsZone, SecurityGroup
from portal.models.people import (
    ApiToken,
    Membership,
    RefreshFamily,
    SignInFailure,
    SshKey,
    Tenant,
    User,
)
from portal.models.runs import Drift, Run, RunEvent, RunHost
from portal.models.tasks import Attempt, LogRange, Task
from portal.models.trail import AuditEntry, Event, NamedLock, Setting

TABLES: tuple[type[Table], ...] = (
    User, Tenant, Membership, SshKey, RefreshFamily, ApiToken, SignInFailure,
    DnsZone, SecurityGroup, Machine, Gpu, MachineReport, EnrollToken, AgentCredential, Command, Baseline, JournalRecord,
    Lease, Grant, Reclaim, Run, RunHost, RunEvent, Task, Attempt, LogRange,
    AuditEntry, Event, Setting, NamedLock, Alert, AlertSilence, AlertRule,
    LoginKey, Drift,
    Opening, Forward, DnsRecord, NetworkState, NetworkExport, AppliedNetwork,
)  # fmt: skip

__all__ = [
    "TABLES",
    "AgentCredential",
    "Alert",
    "AlertRule",
    "AlertSilence",
    "ApiToken",
    "AppliedNetwork",
    "Attempt",
    "AuditEntry",
    "Baseline",
    "Command",
    "DnsRecord",
    "DnsZone",
    "Drift",
    "EnrollToken",
    "Event",
    "Forward",
    "Gpu",
    "Grant",
    "JournalRecord",
    "Lease",
    "LogRange",
    "LoginKey",
    "Machine",
    "MachineReport",
    "Membership",
    "NamedLock",
    "NetworkExport",
    "NetworkState",
    "Opening",
    "Reclaim",
    "RefreshFamily",
    "Run",
    "RunEvent",
    "RunHost",
    "SecurityGroup",
    "Setting",
    "SignInFailure",
    "SshKey",
    "Table",
    "Task",
    "Tenant",
    "User",
]
