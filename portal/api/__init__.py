"""The JSON API under /api/v1: one module per noun. A view is a sentence: who may, what comes in and goes out, one call.

No rule lives here. A new module adds its import and its line to BLUEPRINTS.
"""

from __future__ import annotations

from portal.api import auth
from portal.api.blueprint import Blueprint

BLUEPRINTS: tuple[Blueprint, ...] = (
    auth.bp,
)  # fmt: skip
