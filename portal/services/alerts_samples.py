"""Samples for Prometheus that only the delivered alerts rest on: ends, failures, and what may run full.

They come from the same rows as the portal's own alerts (alerts_own.py). What charts are made of is in
monitoring_samples.py; both are the answer of /metrics. No name of a tenant, person or token is in a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime

import redis

from portal.db import db, is_sqlite
from portal.models import ApiToken, Lease, Machine
from portal.services import alerts_own, config, network, sweeps
from portal.services.monitoring_samples import Samples, labelled

REDIS_TIMEOUT_S = 1.0

FAMILIES: Mapping[str, tuple[str, str]] = {
    "remotegpu_lease_end_timestamp_seconds": ("gauge", "When an active lease ends"),
    "remotegpu_run_failed": ("gauge", "1 where the newest run of a playbook on a machine has failed within a day"),
    "remotegpu_grant_closing_timestamp_seconds": ("gauge", "Since when a part of an ended lease is to be closed"),
    "remotegpu_opening_stuck": ("gauge", "1 where an opening is not as it is wanted on the host"),
    "remotegpu_forward_stuck": ("gauge", "1 where a forward is not as it is wanted on the gateway"),
    "remotegpu_network_behind_timestamp_seconds": ("gauge", "Since when a change of the network waits for a stack"),
    "remotegpu_network_frozen": ("gauge", "1 while no stack is given an export, after a restoration"),
    "remotegpu_certificate_end_timestamp_seconds": ("gauge", "When a certificate of the portal ends"),
    "remotegpu_token_end_timestamp_seconds": ("gauge", "When the API token of a program ends"),
    "remotegpu_sweep_success_timestamp_seconds": ("gauge", "When a worker last made a round in which no sweep failed"),
    "remotegpu_database_connections": ("gauge", "Connections to the database server, of everybody"),
    "remotegpu_database_connections_limit": ("gauge", "How many connections the database server takes"),
    "remotegpu_redis_up": ("gauge", "1 if Redis answers, 0 if not; nothing where there is none"),
    "remotegpu_redis_memory_used_bytes": ("gauge", "Memory that Redis uses"),
    "remotegpu_redis_memory_limit_bytes": ("gauge", "Memory that Redis may use; nothing where it has no limit"),
}

Sample = tuple[str, Mapping[str, str], float]


def exposition(now: datetime) -> str:
    """Everything, in the text format of Prometheus. What cannot be asked now has no sample."""
    samples = Samples(FAMILIES)
    for name, labels, value in _samples(now):
        samples.add(name, labelled(labels), value)
    return samples.text()


def _samples(now: datetime) -> Iterator[Sample]:
    for lease in Lease.select(Lease, Machine).join(Machine).where(Lease.state == "active"):
        labels = {"host": lease.machine.name, "machine_id": str(lease.machine_id), "lease": str(lease.id)}
        yield "remotegpu_lease_end_timestamp_seconds", labels, lease.ends_at.timestamp()
    for (host, playbook), run in alerts_own.newest_runs(now).items():
        yield "remotegpu_run_failed", {"host": host, "playbook": playbook}, run.state != "succeeded"
    yield from _network(now)
    for certificate, ends_at in alerts_own.certificates().items():
        yield "remotegpu_certificate_end_timestamp_seconds", {"certificate": certificate}, ends_at.timestamp()
    for token in ApiToken.select().where(ApiToken.revoked_at.is_null(), ApiToken.expires_at > now):
        yield "remotegpu_token_end_timestamp_seconds", {"token": str(token.id)}, token.expires_at.timestamp()
    if (swept_at := sweeps.swept_at()) is not None:
        yield "remotegpu_sweep_success_timestamp_seconds", {}, swept_at.timestamp()
    yield from _database()
    yield from _redis()


def _network(now: datetime) -> Iterator[Sample]:
    for grant in alerts_own.grants_still_open():
        labels = {"host": grant.lease.machine.name, "lease": str(grant.lease_id), "part": grant.kind}
        yield "remotegpu_grant_closing_timestamp_seconds", labels, grant.desired_at.timestamp()
    for opening in alerts_own.openings_stuck(now):
        yield "remotegpu_opening_stuck", {"host": opening.machine.name, "opening": str(opening.id)}, 1
    for forward in alerts_own.forwards_stuck(now):
        yield "remotegpu_forward_stuck", {"host": forward.gateway.name, "forward": str(forward.id)}, 1
    if network.state().frozen_reason is not None:
        yield "remotegpu_network_frozen", {}, 1
    elif (since := alerts_own.network_behind_since()) is not None:
        yield "remotegpu_network_behind_timestamp_seconds", {}, since.timestamp()


def _database() -> Iterator[Sample]:
    """PostgreSQL's; SQLite has no connections that could run out."""
    if is_sqlite():
        return
    (taken, limit) = db.execute_sql(
        "SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),"
        " current_setting('max_connections')::int"
    ).fetchone()
    yield "remotegpu_database_connections", {}, taken
    yield "remotegpu_database_connections_limit", {}, limit


def _redis() -> Iterator[Sample]:
    """Redis's; a portal without one misses none."""
    url = config.current().redis_url
    if url is None:
        return
    try:
        with redis.Redis.from_url(
            url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S
        ) as client:
            memory = client.info("memory")
    except redis.RedisError:
        yield "remotegpu_redis_up", {}, 0
        return
    yield "remotegpu_redis_up", {}, 1
    yield "remotegpu_redis_memory_used_bytes", {}, memory["used_memory"]
    if memory.get("maxmemory"):
        yield "remotegpu_redis_memory_limit_bytes", {}, memory["maxmemory"]
