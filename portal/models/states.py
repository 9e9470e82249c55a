"""The states of each noun and the only ways between them.

`services/transitions.py` moves a row along one of these arrows, or refuses. `docs/developer.md` explains them, and
a test walks every pair. A fact that is not a state (reachability, health, maintenance) has no place here.
"""

from __future__ import annotations

from types import MappingProxyType

Transitions = MappingProxyType[str, tuple[str, ...]]

MACHINE: Transitions = MappingProxyType(
    {
        "registered": ("provisioning",),
        "provisioning": ("ready", "failed"),
        "failed": ("provisioning", "retired"),
        "ready": ("provisioning", "leased", "quarantined", "retired"),
        "leased": ("reclaiming",),
        "reclaiming": ("ready", "quarantined"),
        "quarantined": ("reclaiming", "provisioning", "retired"),
        "retired": (),
    }
)

LEASE: Transitions = MappingProxyType(
    {"scheduled": ("active", "ended"), "active": ("ending",), "ending": ("ended",), "ended": ()}
)

RUN: Transitions = MappingProxyType(
    {
        "queued": ("running", "cancelled"),
        "running": ("succeeded", "failed", "cancelled", "lost"),
        "lost": ("queued",),
        "succeeded": (),
        "failed": (),
        "cancelled": (),
    }
)

# Of one try of a task. A task has no way of its own: its state is that of its newest attempt, and so begins at `queued`
# again with a retry (services/tasks.py, `_mirror`).
ATTEMPT: Transitions = MappingProxyType(
    {
        "queued": ("starting", "stopped"),
        "starting": ("running", "failed", "stopped", "lost"),
        "running": ("succeeded", "failed", "stopped", "timed_out", "lost"),
        "succeeded": (),
        "failed": (),
        "stopped": (),
        "timed_out": (),
        "lost": (),
    }
)

# A reclaim waits while the data is retained, cleans, verifies, and ends with a verdict. Extending the lease while it
# waits cancels it. A failed one is followed by a new one, never taken up again.
RECLAIM: Transitions = MappingProxyType(
    {
        "waiting": ("cleaning", "cancelled"),
        "cleaning": ("verifying", "failed"),
        "verifying": ("passed", "failed"),
        "passed": (),
        "failed": (),
        "cancelled": (),
    }
)

COMMAND: Transitions = MappingProxyType(
    {"queued": ("done", "failed", "cancelled"), "done": (), "failed": (), "cancelled": ()}
)

# One episode of an alert. Fired again after it was resolved, it is a new row with the same fingerprint.
ALERT: Transitions = MappingProxyType(
    {"firing": ("acknowledged", "resolved"), "acknowledged": ("resolved",), "resolved": ()}
)

ALERT_SILENCE: Transitions = MappingProxyType({"active": ("ended",), "ended": ()})

LEASE_OPEN = ("active", "ending")
TASK_LIVE = ("queued", "starting", "running")
TASK_ENDED = ("succeeded", "failed", "stopped", "timed_out", "lost")
RUN_ENDED = ("succeeded", "failed", "cancelled")
GRANT_KINDS = ("keys", "tasks", "firewall", "forward", "security_group", "name")
GRANTS_OF_EVERY_LEASE = ("keys", "tasks")
GRANTS_BY_AGENTS = ("firewall", "forward")
GRANTS_BY_STACKS = ("security_group", "name")
GRANT_STATES = ("open", "closed", "unknown")
USER_ROLES = ("admin", "operator", "customer")
MEMBER_ROLES = ("owner", "member", "viewer")
ALERT_OPEN = ("firing", "acknowledged")
DRIFT = ("none", "drifted", "unknown")
ALERT_SEVERITIES = ("critical", "warning", "info")
HOLE_STATES = ("open", "closed", "failed", "unknown")  # of an opening or a forward, as seen on the host
HOLE_PROTOCOLS = ("tcp", "udp")
DNS_CLOUDS = ("cloudflare", "aws", "alicloud", "tencent")
GROUP_CLOUDS = ("aws", "alicloud", "tencent")
RECORD_TYPES = ("A", "AAAA", "CNAME", "TXT", "MX", "SRV", "CAA")
RECORD_PURPOSES = ("ssh", "web", "other")
APPLY_OUTCOMES = ("applied", "failed")
