"""What agents call: `agent/enroll` with a one-time token, `agent/sync` with the agent's own credential.

Bodies are those of agent/protocol/protocol.schema.json; what they mean is in services/agents.py and services/sync.py.
No cookie and no token of a person counts here, and none of an agent anywhere else.

The two calls come through a door of their own (`door`): a Flask application without sessions, languages, limits and
headers for browsers. Measured, these took as long as the call itself, and thousands of agents call for one person.
"""

from __future__ import annotations

from typing import Any

import orjson
from flask import Flask, Response, request
from werkzeug.exceptions import LengthRequired, UnsupportedMediaType

from portal.api import problems
from portal.api.blueprint import Blueprint
from portal.api.guard import says_who
from portal.db import release_connection
from portal.errors import NotSignedIn
from portal.integrations import protocol
from portal.services import agents, sync

PREFIX = "/api/v1/agent"
MAX_BODY_BYTES = 16 * 1024 * 1024  # log ranges and baselines

bp = Blueprint("agents", __name__, url_prefix=PREFIX, description="What the agents on the hosts call")

HEADER = {
    "name": "Authorization",
    "in": "header",
    "required": True,
    "schema": {"type": "string", "example": "Bearer …"},
}


def _documented(name: str) -> dict[str, Any]:
    """Request and answer of a call, from the protocol's schema."""

    def content(definition: str) -> dict[str, Any]:
        return {"application/json": {"schema": protocol.standalone(definition)}}

    return {
        "parameters": [HEADER],
        "requestBody": {"required": True, "content": content(f"{name}_request")},
        "responses": {
            "200": {"description": "See agent/protocol/README.md", "content": content(f"{name}_response")},
            "401": {"description": "The token or credential is not accepted"},
            "409": {"description": "Not for this machine, or not now"},
            "422": {"description": "Not of this protocol; the field is named"},
        },
    }


def _secret() -> str:
    kind, _, secret = request.headers.get("Authorization", "").partition(" ")
    if kind != "Bearer" or not secret:
        raise NotSignedIn("Send the agent's credential as `Authorization: Bearer …`.")
    return secret


def _body(definition: str) -> dict[str, Any]:
    if "Transfer-Encoding" in request.headers:
        raise LengthRequired("Send the body with a Content-Length.")  # see portal/app.py
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("Send the body as application/json.")
    return protocol.read(request.get_data(cache=False), definition)


def _answer(message: dict[str, Any]) -> Response:
    return Response(orjson.dumps(message), mimetype="application/json")


@bp.post("/enroll")
@says_who("agent")
@bp.doc(**_documented("enroll"))
def enroll() -> Response:
    """Enrol with the one-time token of a provisioning run; answers the agent's own credential, once"""
    invitation = agents.invitation_of(_secret())  # before the body is read: strangers do not make us parse it
    enrolled = agents.enroll(invitation, _body("enroll_request"), address=request.remote_addr)
    return _answer(
        {
            "protocol": protocol.VERSION,
            "machine_id": enrolled.machine.id,
            "credential_id": enrolled.credential_id,
            "credential": enrolled.credential,
            "epoch": enrolled.machine.epoch,
        }
    )


@bp.post("/sync")
@says_who("agent")
@bp.doc(**_documented("sync"))
def synchronise() -> Response:
    """Wait for the desired state, or report and be answered at once"""
    secret = _secret()
    agent = agents.authenticate(secret)
    message = _body("sync_request")
    if message["report"] is not None:
        return _answer(sync.report(agent, message))
    return _answer(sync.hold(agent, message, check=lambda: agents.authenticate(secret)))


def door() -> Flask:
    """What answers below PREFIX. The routes are those above, which stay in the portal's own map for its description."""
    app = Flask("portal.agents", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.add_url_rule("/enroll", view_func=enroll, methods=["POST"])
    app.add_url_rule("/sync", view_func=synchronise, methods=["POST"])
    app.teardown_request(lambda _error: release_connection())
    problems.install(app)
    return app
