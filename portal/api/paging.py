"""Lists: bounded pages in a stable order.

    @bp.get("")
    @requires(*STAFF)
    @bp.arguments(PageArgs, location="query")
    @bp.response(200, page_schema(MachineOut))
    def list_machines(args):
        return page_of(machines.search(...), args)

Filters are a schema that inherits PageArgs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import marshmallow as ma
import peewee

from portal.api.blueprint import Schema

MAX_PAGE_SIZE = 200
MAX_PAGE = 1_000_000  # beyond it OFFSET leaves the range of SQLite's integers


class PageArgs(Schema):
    page = ma.fields.Integer(load_default=1, validate=ma.validate.Range(1, MAX_PAGE), metadata={"example": 1})
    page_size = ma.fields.Integer(load_default=20, validate=ma.validate.Range(1, MAX_PAGE_SIZE))


def page_of(
    query: peewee.ModelSelect[Any], args: dict[str, Any], shape: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """One page of `query`. The primary key breaks ties, so that no row is seen twice or never.

    `shape` turns each row into what the response schema reads, where that is not the row itself.
    """
    total = query.count()
    rows = query.order_by_extend(query.model._meta.primary_key).paginate(args["page"], args["page_size"])
    items = list(rows) if shape is None else [shape(row) for row in rows]
    return {"items": items, "page": args["page"], "page_size": args["page_size"], "total": total}


_schemas: dict[type[ma.Schema], type[ma.Schema]] = {}


def page_schema(item: type[ma.Schema]) -> type[ma.Schema]:
    """The schema of a page of `item`s; the same class each time, so that OpenAPI names it once."""
    if item not in _schemas:
        name = item.__name__.removesuffix("Out").removesuffix("Schema") + "Page"
        _schemas[item] = Schema.from_dict(
            {
                "items": ma.fields.List(ma.fields.Nested(item), required=True),
                "page": ma.fields.Integer(required=True),
                "page_size": ma.fields.Integer(required=True),
                "total": ma.fields.Integer(required=True),
            },
            name=name,
        )
    return _schemas[item]
