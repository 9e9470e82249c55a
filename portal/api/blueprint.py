"""What every JSON blueprint of the portal is made of: strict parsing of bodies, and the schemas' base.

bp = Blueprint("leases", __name__, url_prefix="/api/v1/admin/leases")
"""

from __future__ import annotations

from typing import Any

import flask_smorest
import marshmallow as ma
from flask import Request
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import UnsupportedMediaType


class Parser(FlaskParser):
    """A body must be JSON, and an object: webargs alone reads any other body as if it were empty."""

    def load_json(self, req: Request, schema: ma.Schema) -> Any:
        if not req.is_json and req.content_length:
            raise UnsupportedMediaType("Send the body as application/json.")
        body = super().load_json(req, schema)
        if b"\\u" in req.get_data() and not _can_be_kept(body):
            raise ma.ValidationError("Leave out NUL characters and halves of surrogate pairs.")
        if not schema.many and not isinstance(body, dict) and body is not ma.missing:
            raise ma.ValidationError("Send a JSON object.")
        return body


def _can_be_kept(value: Any) -> bool:
    """Whether every text in it can be: JSON lets through two things that no database does."""
    if isinstance(value, dict):
        return all(_can_be_kept(key) and _can_be_kept(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_can_be_kept(item) for item in value)
    if not isinstance(value, str):
        return True
    return "\x00" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


class Blueprint(flask_smorest.Blueprint):
    """flask-smorest's, with our parser. A view without a docstring is described by its name: `Get machine`."""

    ARGUMENTS_PARSER = Parser()

    def add_url_rule(self, rule: str, endpoint: str | None = None, view_func: Any = None, **options: Any) -> None:
        if view_func is not None and view_func.__doc__ is None:
            view_func.__doc__ = view_func.__name__.replace("_", " ").capitalize()
        super().add_url_rule(rule, endpoint, view_func, **options)


class Schema(ma.Schema):
    """Base of all that goes in and out. Fields that a caller may not set are refused by name, never ignored."""

    class Meta:
        unknown = ma.RAISE


class Empty(Schema):
    """The body of an answer that has none."""
