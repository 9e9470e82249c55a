"""Server-sent events: how a stream is written, and the one that tells pages what changes, `events/stream`.

A stream holds no database connection while it waits, asks again every KEEP_ALIVE_S whether its reader still may, and
ends after LIFE_S; the browser comes back with Last-Event-ID and misses nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import marshmallow as ma
from flask import Response, request
from flask_jwt_extended import get_jwt

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import current_user, requires
from portal.db import connection
from portal.integrations.wake import EVERYTHING, Heard, Key, wake
from portal.models import User
from portal.services import events, sessions, tenants
from portal.services.actors import STAFF

bp = Blueprint("events", __name__, url_prefix="/api/v1/events", description="What changes, as it changes")

KEEP_ALIVE_S = 15.0
LIFE_S = 600.0  # shorter than an access token lives
KEEP_ALIVE = ": still here\n\n"
Reader = Callable[[], User | None]


def stream(lines: Iterator[str]) -> Response:
    """A response that sends `lines` as they come."""
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}  # the first is for nginx
    return Response(lines, mimetype="text/event-stream", headers=headers)


def line(event: str, data: Any, *, id: int | None = None) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {event}\ndata: {text}\n\n"


def last_event_id() -> int | None:
    """Where a browser that comes back stopped reading."""
    text = request.headers.get("Last-Event-ID", "")
    return int(text) if text.isdecimal() and len(text) < 19 else None


def reader() -> Reader:
    """Who reads, asked again each time: None once they signed out, were disabled, or lost their role."""
    claims, role = dict(get_jwt()), current_user().role

    def ask() -> User | None:
        user = sessions.find_user(claims) if claims["exp"] > time.time() else None
        return user if user is not None and user.role == role else None

    return ask


class StreamArgs(Schema):
    topics = ma.fields.String(
        load_default="",
        validate=ma.validate.Length(max=400),
        metadata={"description": "Beginnings of topics, separated by commas: `task.,lease.`", "example": "task."},
    )


@bp.get("/stream")
@requires(*STAFF, "customer")
@bp.arguments(StreamArgs, location="query")
@bp.alt_response(200, description="A stream of events: `event` is the topic, `data` says which thing it is about")
def events_stream(args: dict[str, Any]) -> Response:
    """Follow what changes: customers hear of their tenants, staff of everything"""
    wanted = tuple(topic for topic in args["topics"].split(",") if topic) or ("",)
    return stream(_events(reader(), wanted, last_event_id()))


def _events(ask: Reader, wanted: tuple[str, ...], last: int | None) -> Iterator[str]:
    with connection():
        keys = _keys(ask())
    end_at = time.monotonic() + LIFE_S
    with wake.listen(*keys) as ear:
        yield KEEP_ALIVE
        sent: set[int] = set()
        whose = None if EVERYTHING in keys else [tenant_id for _, tenant_id in keys]
        for heard in () if last is None else events.missed(last, of_tenants=whose):
            sent.add(heard.id)
            yield from _told(heard, wanted)
        asked_at = time.monotonic()
        while time.monotonic() < end_at:
            ear.wait(KEEP_ALIVE_S)
            told = [text for heard in ear.take() if heard.id not in sent for text in _told(heard, wanted)]
            yield "".join(told) or KEEP_ALIVE
            if time.monotonic() - asked_at >= KEEP_ALIVE_S:
                asked_at = time.monotonic()
                with connection():
                    if _keys(ask()) != keys:
                        return


def _keys(user: User | None) -> tuple[Key, ...]:
    """What somebody may hear; nothing for nobody."""
    if user is None:
        return ()
    if user.role in STAFF:
        return (EVERYTHING,)
    return tuple(("tenant", tenant_id) for tenant_id in tenants.ids_of(user))


def _told(heard: Heard, wanted: tuple[str, ...]) -> Iterator[str]:
    if heard.topic.startswith(wanted) and heard.topic not in events.INTERNAL:
        about = {"machine_id": heard.machine_id, "resource_id": heard.resource_id, **heard.data}
        yield line(heard.topic, about, id=heard.id)
