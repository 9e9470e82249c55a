"""The audit trail, for staff."""

from __future__ import annotations

from typing import Any

from flask import render_template, request
from flask.typing import ResponseReturnValue

from portal.api.guard import requires
from portal.services import audit as trail
from portal.services.actors import STAFF
from portal.web.acting import page_asked
from portal.web.blueprint import bp

FILTERS = ("action", "actor", "outcome", "resource_type", "resource_id")


@bp.get("/audit")
@requires(*STAFF)
def audit() -> ResponseReturnValue:
    wanted: dict[str, Any] = {name: request.args[name] for name in FILTERS if request.args.get(name)}
    if "resource_id" in wanted:
        wanted["resource_id"] = request.args.get("resource_id", type=int)
    return render_template("audit/list.html", page=page_asked(trail.search(**wanted), *FILTERS))
