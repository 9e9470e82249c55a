"""Runs of playbooks, for staff: what ran where, and its output as it comes."""

from __future__ import annotations

from flask import redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from portal.api.guard import actor, requires
from portal.services import runs as playbook_runs
from portal.services.actors import STAFF
from portal.web import operations
from portal.web.acting import acting, page_asked
from portal.web.blueprint import bp
from portal.web.frame import is_fragment


@bp.get("/runs")
@requires(*STAFF)
def runs() -> ResponseReturnValue:
    page = page_asked(playbook_runs.list_runs(state=request.args.get("state") or None), "state")
    return render_template(
        "runs/list.html",
        page=page,
        machines=playbook_runs.machines_by_run(page.items),
        operations=operations.WORDS,
        meanings=operations.MEANINGS,
    )


@bp.get("/runs/<int:run_id>")
@requires(*STAFF)
def run(run_id: int) -> ResponseReturnValue:
    found = playbook_runs.get_run(run_id)
    template = "runs/_state.html" if is_fragment() else "runs/detail.html"
    return render_template(
        template,
        run=found,
        machines=playbook_runs.machines_of(found),
        is_live=not playbook_runs.is_ended(found),
    )


@bp.post("/runs/<int:run_id>/cancel")
@requires(*STAFF)
def cancel_run(run_id: int) -> ResponseReturnValue:
    with acting(gettext("The run is being ended, with every process of it.")):
        playbook_runs.cancel(playbook_runs.get_run(run_id), by=actor())
    return redirect(url_for("web.run", run_id=run_id), 303)
