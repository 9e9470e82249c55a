"""The JSON API under /api/v1: one module per noun. A view is a sentence: who may, what comes in and goes out, one call.

No rule lives here. A new module adds its import and its line to BLUEPRINTS.
"""

from __future__ import annotations

from portal.api import (
    agents,
    alerts,
    alerts_rules,
    audit,
    auth,
    customer_machines,
    customers,
    drift,
    inventory,
    keys,
    leases,
    machines,
    monitoring,
    network,
    openings,
    prometheus,
    runs,
    staff,
    streams,
    tasks,
    tenants,
    tokens,
)
from portal.api.blueprint import Blueprint

BLUEPRINTS: tuple[Blueprint, ...] = (
    auth.bp,
    tokens.bp,
    customers.bp,
    staff.bp,
    tenants.bp,
    tenants.customer_bp,
    keys.bp,
    audit.bp,
    machines.bp,
    leases.bp,
    leases.reclaims_bp,
    customer_machines.bp,
    runs.bp,
    drift.bp,
    inventory.bp,
    network.bp,
    openings.bp,
    openings.limits_bp,
    openings.customer_bp,
    openings.forwards_bp,
    agents.bp,
    tasks.customer_bp,
    tasks.admin_bp,
    streams.bp,
    prometheus.bp,
    monitoring.bp,
    monitoring.dashboard_bp,
    monitoring.customer_bp,
    alerts.bp,
    alerts.webhook_bp,
    alerts_rules.bp,
    alerts_rules.file_bp,
)  # fmt: skip
