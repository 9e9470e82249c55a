"""The API's description for people: Swagger UI at /api/docs, from files of our own, under a strict content policy."""

from __future__ import annotations

from typing import Any

import flask_smorest
import marshmallow as ma
from apispec.ext.marshmallow import MarshmallowPlugin
from apispec.ext.marshmallow.common import resolve_schema_instance
from flask import Blueprint, Flask, render_template
from flask.typing import ResponseReturnValue

from portal.api.blueprint import Schema
from portal.api.guard import public

SECURITY_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": "access_token_cookie"},
    "api_token": {"type": "http", "scheme": "bearer", "bearerFormat": "rgt_…"},
}

bp = Blueprint(
    "docs",
    __name__,
    url_prefix="/api",
    static_folder="static",
    static_url_path="/docs/static",
    template_folder="templates",
)


class ProblemOut(Schema):
    """An error, as RFC 9457 has it. `code` is stable, `detail` is for people."""

    type = ma.fields.String(required=True)
    title = ma.fields.String(required=True)
    status = ma.fields.Integer(required=True)
    detail = ma.fields.String(required=True)
    code = ma.fields.String(required=True)
    errors = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.List(ma.fields.String()))
    info = ma.fields.Dict(keys=ma.fields.String())


class Api(flask_smorest.Api):
    """flask-smorest with our form of errors, and without its error handler: api/problems.py answers."""

    ERROR_SCHEMA = ProblemOut

    def __init__(self, app: Flask) -> None:
        plugin = MarshmallowPlugin(schema_name_resolver=name_of)  # type: ignore[arg-type]  # None is allowed, its docs say
        super().__init__(app, spec_kwargs={"marshmallow_plugin": plugin})

    def _register_responses(self) -> None:
        self.DEFAULT_RESPONSE_CONTENT_TYPE = "application/problem+json"  # of the error responses alone
        super()._register_responses()
        del self.DEFAULT_RESPONSE_CONTENT_TYPE

    def _register_error_handlers(self) -> None:
        pass


def name_of(schema: type[ma.Schema] | ma.Schema | str) -> str | None:
    """A schema's name in the description. One that was cut (`only`, `exclude`) has none: it stands where it is used."""
    made = resolve_schema_instance(schema)
    is_cut = made.only is not None or set(made.exclude) - set(made.opts.exclude) or made.partial
    return None if is_cut else type(made).__name__


@bp.get("/docs")
@public("the description holds no data")
def show() -> ResponseReturnValue:
    return render_template("api_docs.html")
