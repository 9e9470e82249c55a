"""The pages: Jinja2, htmx and server-sent events over the same services as the API.

`frame.py` is what every page shares, `forms.py` a form that came back, `acting.py` one action from a page; the other
modules are named after what they show.
"""

from __future__ import annotations

from flask import Blueprint

from portal.web import (
    account,
    alerts,
    audit,
    auth,
    customers,
    keys,
    leases,
    machines,
    monitoring,
    my_machines,
    network,
    network_openings,
    network_places,
    operations,
    runs,
    staff,
    tasks,
    tenants,
)
from portal.web.blueprint import bp

BLUEPRINTS: tuple[Blueprint, ...] = (bp,)
# importing one adds its views
VIEWS = (
    account,
    alerts,
    audit,
    auth,
    customers,
    keys,
    leases,
    machines,
    monitoring,
    my_machines,
    network,
    network_openings,
    network_places,
    operations,
    runs,
    staff,
    tasks,
    tenants,
)
