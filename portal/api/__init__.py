"""The JSON API under /api/v1: one module per noun. A view is a sentence: who may, what comes in and goes out, one call.

No rule lives here. A new module adds its import and its line to BLUEPRINTS.
"""

from __future__ import annotations

from portal.api import audit, auth, customers, keys, staff, tenants, tokens
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
)  # fmt: skip
