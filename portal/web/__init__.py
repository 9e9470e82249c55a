"""The pages: Jinja2, htmx and server-sent events over the same services as the API.

`frame.py` is what every page shares, `forms.py` a form that came back; the other modules are named after what they show.
"""

from __future__ import annotations

from flask import Blueprint

from portal.web import auth
from portal.web.blueprint import bp

BLUEPRINTS: tuple[Blueprint, ...] = (bp,)
VIEWS = (auth,)  # importing a module adds its views
