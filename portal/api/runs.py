"""Runs of playbooks: `admin/runs*`. Output is read in pages that may wait, or as a stream of server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import marshmallow as ma
from flask import Response, request

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.api.people import split_page
from portal.db import connection
from portal.integrations import wake
from portal.models import Machine, Run, RunEvent
from portal.models.states import RUN
from portal.services import login_keys, runs
from portal.services.actors import STAFF

bp = Blueprint("runs", __name__, url_prefix="/api/v1/admin/runs", description="Playbook runs, their output, cancel")

MAX_WAIT_S = 20
KEEP_ALIVE_S = 15.0  # proxies cut a connection that is silent for a minute
STREAM_S = 300.0  # then the browser comes back with Last-Event-ID, and is asked again who it is


class RunIn(Schema):
    playbook = ma.fields.String(required=True, validate=ma.validate.OneOf(tuple(runs.PLAYBOOKS)))
    machines = ma.fields.List(
        ma.fields.String(),
        required=True,
        metadata={"description": "Names of machines, each exactly; never a pattern", "example": ["gpu-1"]},
    )
    tags = ma.fields.List(ma.fields.String(), load_default=list)
    check = ma.fields.Boolean(load_default=False, metadata={"description": "Change nothing, show what would change"})


class RunFilters(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(tuple(RUN)))
    machine_id = ma.fields.Integer()


class ImpactArgs(Schema):
    machines = ma.fields.List(ma.fields.String(), required=True)


class LoginKeyOut(Schema):
    fingerprint = ma.fields.String(allow_none=True)
    is_rotating = ma.fields.Boolean(required=True)
    pending = ma.fields.List(
        ma.fields.String(),
        required=True,
        metadata={"description": "Machines that have not proven it yet; as long as there is one, the key before stays"},
    )


class OutputArgs(Schema):
    after = ma.fields.Integer(
        load_default=0, validate=ma.validate.Range(0, 2**31 - 1), metadata={"description": "A counter seen before"}
    )
    limit = ma.fields.Integer(load_default=500, validate=ma.validate.Range(1, 1000))
    wait_s = ma.fields.Float(
        load_default=0, validate=ma.validate.Range(0, MAX_WAIT_S), metadata={"description": "If there is nothing yet"}
    )


class HostOut(Schema):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)


class RunOut(Schema):
    id = ma.fields.Integer(required=True)
    playbook = ma.fields.String(required=True)
    purpose = ma.fields.String(required=True)
    state = ma.fields.String(required=True)
    machines = ma.fields.List(ma.fields.Nested(HostOut), required=True)
    tags = ma.fields.List(ma.fields.String(), required=True)
    options = ma.fields.Dict(keys=ma.fields.String(), required=True)
    requested_by = ma.fields.String(allow_none=True)
    attempt = ma.fields.Integer(required=True)
    created_at = ma.fields.AwareDateTime(required=True)
    started_at = ma.fields.AwareDateTime(allow_none=True)
    ended_at = ma.fields.AwareDateTime(allow_none=True)
    cancel_requested_at = ma.fields.AwareDateTime(allow_none=True)
    exit_code = ma.fields.Integer(allow_none=True)
    reason = ma.fields.String(allow_none=True)
    remains = ma.fields.String(
        allow_none=True, metadata={"description": "Work that may be left on the hosts after it was ended"}
    )
    stats = ma.fields.Dict(keys=ma.fields.String(), allow_none=True)
    event_count = ma.fields.Integer(
        allow_none=True, metadata={"description": "Set at the end: the output is complete when this many are there"}
    )


class RunDetailOut(RunOut):
    verdicts = ma.fields.Dict(
        keys=ma.fields.String(), allow_none=True, metadata={"description": "Machine → verdict of verify.yml"}
    )


class ImpactLeaseOut(Schema):
    id = ma.fields.Integer(required=True)
    machine = ma.fields.String(attribute="machine.name", required=True)
    tenant = ma.fields.String(attribute="tenant.name", required=True)
    ends_at = ma.fields.AwareDateTime(required=True)


class ImpactTaskOut(Schema):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)
    state = ma.fields.String(required=True)


class ImpactOut(Schema):
    leases = ma.fields.List(ma.fields.Nested(ImpactLeaseOut), required=True)
    tasks = ma.fields.List(ma.fields.Nested(ImpactTaskOut), required=True)


class RunQueuedOut(RunOut):
    impact = ma.fields.Nested(ImpactOut, required=True)


class EventOut(Schema):
    counter = ma.fields.Integer(required=True)
    at = ma.fields.AwareDateTime(required=True)
    kind = ma.fields.String(required=True)
    host = ma.fields.String(allow_none=True)
    task = ma.fields.String(allow_none=True)
    stdout = ma.fields.String(required=True)
    data = ma.fields.Dict(keys=ma.fields.String(), allow_none=True)


class OutputOut(Schema):
    items = ma.fields.List(ma.fields.Nested(EventOut), required=True)
    next = ma.fields.Integer(required=True, metadata={"description": "What to send as `after` next time"})
    state = ma.fields.String(required=True)
    complete = ma.fields.Boolean(required=True, metadata={"description": "The run has ended and this is its last page"})


@bp.get("")
@requires(*STAFF, scope="read")
@bp.arguments(RunFilters, location="query")
@bp.response(200, page_schema(RunOut))
def list_runs(args: dict[str, Any]) -> dict[str, Any]:
    """Runs, newest first, with filters"""
    page, filters = split_page(args)
    answer = page_of(runs.list_runs(**filters), page)
    machines = runs.machines_by_run(answer["items"])
    return {**answer, "items": [_shown(run, machines[run.id]) for run in answer["items"]]}


@bp.post("")
@requires(*STAFF, scope="admin")
@bp.arguments(RunIn)
@bp.response(201, RunQueuedOut)
def create_run(body: dict[str, Any]) -> dict[str, Any]:
    """Queue a run on exactly these machines; the answer says which leases and tasks it meets"""
    machines = runs.machines_named(body.pop("machines"))
    run = runs.queue(body.pop("playbook"), machines, by=actor(), **body)
    return {**_shown(run, machines), "impact": runs.impact(machines)}


@bp.get("/impact")
@requires(*STAFF, scope="read")
@bp.arguments(ImpactArgs, location="query")
@bp.response(200, ImpactOut)
def get_impact(args: dict[str, Any]) -> runs.Impact:
    """Which open leases and live tasks a run on these machines would meet"""
    return runs.impact(runs.machines_named(args["machines"]))


@bp.get("/login-key")
@requires(*STAFF, scope="read")
@bp.response(200, LoginKeyOut)
def get_login_key() -> dict[str, Any]:
    """The portal's own SSH key, and how far its rotation has come"""
    return login_keys.overview()


@bp.get("/<int:run_id>")
@requires(*STAFF, scope="read")
@bp.response(200, RunDetailOut)
def get_run(run_id: int) -> dict[str, Any]:
    """One run, with the verdicts if it verified"""
    run = runs.get_run(run_id)
    return {**_shown(run, runs.machines_of(run)), "verdicts": run.verdicts}


@bp.post("/<int:run_id>/cancel")
@requires(*STAFF, scope="admin")
@bp.response(202, RunOut)
def cancel_run(run_id: int) -> dict[str, Any]:
    """Stop it: every process of it ends, and what may be left on the hosts is named"""
    run = runs.cancel(runs.get_run(run_id), by=actor())
    return _shown(run, runs.machines_of(run))


@bp.get("/<int:run_id>/events")
@requires(*STAFF, scope="read")
@bp.arguments(OutputArgs, location="query")
@bp.response(200, OutputOut)
def list_events(args: dict[str, Any], run_id: int) -> dict[str, Any]:
    """Output after a counter; waits for some if there is none and the run goes on"""
    run = runs.get_run(run_id)
    ends_at = time.monotonic() + args["wait_s"]
    with wake.listen(*_topics(run_id)) as ear:
        while True:
            run, found = runs.look_after(run_id, args["after"], limit=args["limit"])
            left_s = ends_at - time.monotonic()
            if found or runs.is_ended(run) or left_s <= 0:
                break
            ear.wait(left_s)
    return {
        "items": found,
        "next": found[-1].counter if found else args["after"],
        "state": run.state,
        "complete": runs.is_ended(run) and len(found) < args["limit"],
    }


@bp.get("/<int:run_id>/stream")
@requires(*STAFF)
@bp.response(200, content_type="text/event-stream", description="`output` events, and `end` with the run's state")
def stream_events(run_id: int) -> Response:
    """Output as it comes; resumes after `Last-Event-ID`"""
    runs.get_run(run_id)
    last = request.headers.get("Last-Event-ID", "0")
    after = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else 0
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx must not keep it back
    return Response(_stream(run_id, after), mimetype="text/event-stream", headers=headers)


def _stream(run_id: int, after: int) -> Iterator[str]:
    """Holds no database connection while it waits."""
    ends_at = time.monotonic() + STREAM_S
    with wake.listen(*_topics(run_id)) as ear:
        while time.monotonic() < ends_at:
            with connection():
                run, found = runs.look_after(run_id, after)
            for event in found:
                after = event.counter
                yield f"id: {after}\nevent: output\ndata: {json.dumps(_told(event))}\n\n"
            if found:
                continue
            if runs.is_ended(run):
                yield f"event: end\ndata: {json.dumps({'state': run.state, 'reason': run.reason})}\n\n"
                return
            if not ear.wait(KEEP_ALIVE_S):
                yield ": still here\n\n"


def _topics(run_id: int) -> list[tuple[str, int | None]]:
    """What a follower of the run must hear: output, and each of its states."""
    return [("run.event", run_id), *((f"run.{state}", run_id) for state in RUN)]


def _told(event: RunEvent) -> dict[str, Any]:
    told: dict[str, Any] = EventOut().dump(event)
    return told


def _shown(run: Run, machines: list[Machine]) -> dict[str, Any]:
    """What RunOut reads: the row, its machines, and the name of who asked for it."""
    return {**run.__data__, "machines": machines, "requested_by": run.requested_by and run.requested_by.username}
