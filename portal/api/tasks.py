"""Tasks: `customer/tasks` for those who run them, `admin/tasks` for those who run the house.

What a task is allowed to be is in services/tasks.py, its output in services/logs.py.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from typing import Any

import marshmallow as ma
import peewee
from flask import Response

from portal.api import streams
from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, current_user, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.api.streams import Reader
from portal.db import connection
from portal.errors import NotFound
from portal.models import Attempt, Task, User
from portal.models.states import ATTEMPT
from portal.services import logs, tasks
from portal.services.actors import STAFF
from portal.services.logs import Piece

customer_bp = Blueprint("tasks", __name__, url_prefix="/api/v1/customer/tasks", description="A customer's tasks")
admin_bp = Blueprint("all_tasks", __name__, url_prefix="/api/v1/admin/tasks", description="The tasks of all customers")

LONGEST_WAIT_S = 20


class TaskIn(Schema):
    """What a caller may set; everything else is the portal's or the host's."""

    machine_id = ma.fields.Integer(required=True, strict=True, validate=ma.validate.Range(1, 2**31 - 1))
    name = ma.fields.String(required=True, validate=ma.validate.Length(1, 100))
    command = ma.fields.String(required=True, metadata={"description": "A script, run by bash as the lease's user"})
    env = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.String(), load_default=dict)
    workdir = ma.fields.String(load_default=None, allow_none=True)
    gpu_uuids = ma.fields.List(
        ma.fields.String(),
        load_default=None,
        allow_none=True,
        metadata={"description": "null: all GPUs of the machine"},
    )
    time_limit_s = ma.fields.Integer(load_default=3600, allow_none=True, strict=True)
    stop_grace_s = ma.fields.Integer(
        load_default=30, strict=True, metadata={"description": "From TERM to KILL: 0 to 300"}
    )
    retries = ma.fields.Integer(load_default=0, strict=True)


class AttemptOut(Schema):
    id = ma.fields.Integer(required=True)
    number = ma.fields.Integer(required=True)
    state = ma.fields.String(required=True, validate=ma.validate.OneOf(tuple(ATTEMPT)))
    created_at = ma.fields.AwareDateTime(required=True)
    started_at = ma.fields.AwareDateTime(allow_none=True)
    ended_at = ma.fields.AwareDateTime(allow_none=True)
    stop_requested_at = ma.fields.AwareDateTime(allow_none=True)
    exit_code = ma.fields.Integer(allow_none=True)
    signal = ma.fields.Integer(allow_none=True)
    reason = ma.fields.String(allow_none=True)
    log_bytes = ma.fields.Integer(required=True)
    log_complete = ma.fields.Boolean(required=True)
    log_truncated = ma.fields.Boolean(required=True)


def _log_kept_until(task: Task) -> str | None:
    until = logs.kept_until(task.lease)
    return None if until is None else until.isoformat()


class TaskOut(Schema):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)
    state = ma.fields.String(required=True, validate=ma.validate.OneOf(tuple(ATTEMPT)))
    lease_id = ma.fields.Integer(required=True)
    machine_id = ma.fields.Integer(required=True, attribute="lease.machine_id")
    machine_name = ma.fields.String(required=True, attribute="lease.machine.name")
    tenant_id = ma.fields.Integer(required=True, attribute="lease.tenant_id")
    tenant_name = ma.fields.String(required=True, attribute="lease.tenant.name")
    created_by = ma.fields.String(required=True, attribute="created_by.username")
    log_kept_until = ma.fields.Function(
        _log_kept_until,
        metadata={
            "type": ["string", "null"],
            "format": "date-time",
            "description": "When its output is deleted; null while the lease goes on",
        },
    )
    created_at = ma.fields.AwareDateTime(required=True)
    ended_at = ma.fields.AwareDateTime(allow_none=True)
    attempt = ma.fields.Nested(AttemptOut, attribute="newest", allow_none=True, metadata={"description": "The newest"})


class TaskDetailOut(TaskOut):
    command = ma.fields.String(required=True)
    env = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.String())
    workdir = ma.fields.String(allow_none=True)
    gpu_uuids = ma.fields.List(ma.fields.String(), allow_none=True)
    time_limit_s = ma.fields.Integer(allow_none=True)
    stop_grace_s = ma.fields.Integer(required=True)
    retries = ma.fields.Integer(required=True)
    attempts = ma.fields.List(ma.fields.Nested(AttemptOut), attribute="all_attempts")
    log_is_kept = ma.fields.Function(
        lambda task: logs.is_kept(task.lease),
        metadata={
            "type": "boolean",
            "description": "false: the lease's quota of output is used up. Its tasks run, and no more output is kept",
        },
    )


class TaskArgs(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(tuple(ATTEMPT)))
    machine_id = ma.fields.Integer(validate=ma.validate.Range(1, 2**31 - 1))
    keyword = ma.fields.String(validate=ma.validate.Length(max=100), metadata={"description": "In name or command"})


class AllTasksArgs(TaskArgs):
    tenant_id = ma.fields.Integer(validate=ma.validate.Range(1, 2**31 - 1))
    lease_id = ma.fields.Integer(validate=ma.validate.Range(1, 2**31 - 1))


class FiguresOut(Schema):
    figures = ma.fields.Dict(
        keys=ma.fields.String(validate=ma.validate.OneOf(tuple(ATTEMPT))),
        values=ma.fields.Integer(),
        required=True,
        metadata={"description": "How many of all matching tasks are in each state"},
    )


class LogArgs(Schema):
    offset = ma.fields.Integer(load_default=0, validate=ma.validate.Range(0, 2**53 - 1))
    wait_s = ma.fields.Float(load_default=0, validate=ma.validate.Range(0, LONGEST_WAIT_S))
    attempt = ma.fields.Integer(load_default=None, validate=ma.validate.Range(1, 2**31 - 1))


class AttemptArgs(Schema):
    attempt = ma.fields.Integer(load_default=None, validate=ma.validate.Range(1, 2**31 - 1))


def _page(found: peewee.ModelSelect, args: dict[str, Any]) -> dict[str, Any]:
    paging = {key: args.pop(key) for key in ("page", "page_size")}
    page = page_of(tasks.matching(found, **args), paging)
    tasks.with_newest_attempts(page["items"])
    return page


def _detail(task: Task) -> Task:
    task.all_attempts = tasks.attempts_of(task)
    task.newest = task.all_attempts[-1]
    return task


def _mine(task_id: int) -> Task:
    return tasks.get(tasks.of(current_user()), task_id)


@customer_bp.get("")
@requires("customer")
@customer_bp.arguments(TaskArgs, location="query")
@customer_bp.response(200, page_schema(TaskOut))
def list_mine(args: dict[str, Any]) -> dict[str, Any]:
    """The tasks of my tenants, newest first"""
    return _page(tasks.of(current_user()), args)


@customer_bp.post("/training")
@requires("customer")
@customer_bp.arguments(TaskIn)
@customer_bp.response(201, TaskDetailOut)
def create(body: dict[str, Any]) -> Task:
    """Run a command on a machine that my tenant has leased"""
    return _detail(tasks.create(body.pop("machine_id"), by=actor(), **body))


@customer_bp.get("/<int:task_id>")
@requires("customer")
@customer_bp.response(200, TaskDetailOut)
def show_mine(task_id: int) -> Task:
    """One of my tasks, with all its attempts"""
    return _detail(_mine(task_id))


@customer_bp.post("/<int:task_id>/stop")
@requires("customer")
@customer_bp.response(202, TaskDetailOut)
def stop_mine(task_id: int) -> Task:
    """End it with every process of it; asking again changes nothing"""
    return _detail(tasks.stop(_mine(task_id), by=actor()))


@customer_bp.post("/<int:task_id>/retry")
@requires("customer")
@customer_bp.response(202, TaskDetailOut)
def retry_mine(task_id: int) -> Task:
    """A new attempt of a task that has ended"""
    return _detail(tasks.retry(_mine(task_id), by=actor()))


@admin_bp.get("")
@requires(*STAFF)
@admin_bp.arguments(AllTasksArgs, location="query")
@admin_bp.response(200, page_schema(TaskOut))
def list_all(args: dict[str, Any]) -> dict[str, Any]:
    """The tasks of all customers, newest first"""
    return _page(tasks.every(), args)


@admin_bp.get("/figures")
@requires(*STAFF)
@admin_bp.arguments(AllTasksArgs(exclude=("page", "page_size")), location="query")
@admin_bp.response(200, FiguresOut)
def figures(args: dict[str, Any]) -> dict[str, Any]:
    """How many tasks are in each state, over all that match"""
    return {"figures": tasks.figures(tasks.matching(tasks.every(), **args))}


@admin_bp.get("/<int:task_id>")
@requires(*STAFF)
@admin_bp.response(200, TaskDetailOut)
def show(task_id: int) -> Task:
    """One task, with all its attempts"""
    return _detail(tasks.get(tasks.every(), task_id))


@admin_bp.post("/<int:task_id>/stop")
@requires(*STAFF)
@admin_bp.response(202, TaskDetailOut)
def stop(task_id: int) -> Task:
    """End it with every process of it; asking again changes nothing"""
    return _detail(tasks.stop(tasks.get(tasks.every(), task_id), by=actor()))


# The output


def _readable(user: User, task_id: int) -> Task:
    """A task whose output this person may read. Raises NotFound."""
    return tasks.get(tasks.of(user) if user.role == "customer" else tasks.every(), task_id)


@customer_bp.get("/<int:task_id>/log")
@requires("customer", *STAFF)
@customer_bp.arguments(LogArgs, location="query")
@customer_bp.alt_response(
    200,
    description="Bytes from `offset` on. Headers: Log-Offset, Log-Next-Offset, Log-Complete (true: nothing comes after "
    "this), Log-Truncated (true: something is missing)",
)
def read_log(args: dict[str, Any], task_id: int) -> Response:
    """The output from an offset on; with `wait_s`, as soon as there is any"""
    attempt = tasks.get_attempt(_readable(current_user(), task_id), args["attempt"])
    return _piece(logs.wait_for(attempt, offset=args["offset"], wait_s=args["wait_s"]))


def _piece(piece: Piece) -> Response:
    headers = {
        "Log-Offset": str(piece.offset),
        "Log-Next-Offset": str(piece.next_offset),
        "Log-Complete": str(piece.complete).lower(),
        "Log-Truncated": str(piece.truncated).lower(),
    }
    return Response(piece.data, mimetype="application/octet-stream", headers=headers)


@customer_bp.get("/<int:task_id>/log/download")
@requires("customer", *STAFF)
@customer_bp.arguments(AttemptArgs, location="query")
@customer_bp.alt_response(200, description="The whole output that is there now, as a file")
def download_log(args: dict[str, Any], task_id: int) -> Response:
    """The whole output as a file"""
    attempt = tasks.get_attempt(_readable(current_user(), task_id), args["attempt"])
    headers = {"Content-Disposition": f'attachment; filename="task-{task_id}-{attempt.number}.log"'}
    return Response(logs.read_all(attempt.id), mimetype="application/octet-stream", headers=headers)


@customer_bp.get("/<int:task_id>/log/stream")
@requires("customer", *STAFF)
@customer_bp.arguments(LogArgs(only=("offset", "attempt")), location="query")
@customer_bp.alt_response(
    200, description="Events `log` (text; the id is the offset after it), at the end `complete` (state and exit code)"
)
def stream_log(args: dict[str, Any], task_id: int) -> Response:
    """The output as it comes, for pages; goes on from Last-Event-ID"""
    attempt = tasks.get_attempt(_readable(current_user(), task_id), args["attempt"])
    offset = streams.last_event_id()
    return streams.stream(_log_lines(streams.reader(), attempt, args["offset"] if offset is None else offset))


def _log_lines(ask: Reader, attempt: Attempt, offset: int) -> Iterator[str]:
    """Whole characters only: the rest of one that is cut by a range waits for the next range."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    end_at = time.monotonic() + streams.LIFE_S
    yield streams.KEEP_ALIVE
    while time.monotonic() < end_at:
        piece = logs.wait_for(attempt, offset=offset, wait_s=streams.KEEP_ALIVE_S)
        offset = piece.next_offset
        text = decoder.decode(piece.data, final=piece.complete)
        if text:
            yield streams.line("log", {"text": text}, id=offset - len(decoder.getstate()[0]))
        if piece.complete:
            yield streams.line("complete", _outcome(attempt.id, piece), id=offset)
            return
        if not piece.data:
            yield streams.KEEP_ALIVE
            if not _may_still_read(ask, attempt):
                return


def _outcome(attempt_id: int, piece: Piece) -> dict[str, Any]:
    with connection():
        attempt = tasks.get_any_attempt(attempt_id)
    return {
        "state": attempt.state,
        "exit_code": attempt.exit_code,
        "bytes": piece.next_offset,
        "truncated": piece.truncated,
    }


def _may_still_read(ask: Reader, attempt: Attempt) -> bool:
    with connection():
        user = ask()
        try:
            return user is not None and _readable(user, attempt.task_id) is not None
        except NotFound:
            return False
