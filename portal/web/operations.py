"""Operations, for staff: look for drift, upgrade agents, rotate credentials; on one machine or on the whole fleet."""

from __future__ import annotations

from flask import redirect, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext, lazy_gettext

from portal.api.guard import actor, requires
from portal.errors import Invalid
from portal.services import machines, runs
from portal.services.actors import STAFF
from portal.web.acting import acting
from portal.web.blueprint import bp
from portal.web.forms import Form

WORDS = {
    "drift": lazy_gettext("Look for drift"),
    "upgrade_agent": lazy_gettext("Upgrade agents"),
    "rotate_credentials": lazy_gettext("Rotate credentials"),
}
MEANINGS = {
    "drift": lazy_gettext("Look what provisioning would change? Nothing is changed by looking."),
    "upgrade_agent": lazy_gettext(
        "Put the portal's agent on the host? Leases and tasks go on; one that is not heard makes room for the old one."
    ),
    "rotate_credentials": lazy_gettext(
        "Replace the portal's login key and the agent's credential? The old ones are refused afterwards."
    ),
}
# What playbooks/callback_plugins/drift.py says in the place of a difference.
NOT_SHOWN = {
    "its content is not shown: not everybody on the host may read it": lazy_gettext(
        "Its content is not shown: not everybody on the host may read it."
    ),
    "what it is about is a secret": lazy_gettext("What it is about is a secret."),
    "left out: there is too much of it": lazy_gettext("Left out: there is too much of it."),
}


@bp.post("/machines/<int:machine_id>/operations")
@requires(*STAFF)
def operate_on_machine(machine_id: int) -> ResponseReturnValue:
    found = machines.get(machine_id)
    with acting(gettext("The run is queued; its output follows here.")):
        runs.queue(_wanted(), [found], by=actor())
    return redirect(url_for("web.machine", machine_id=found.id), 303)


@bp.post("/runs/operations")
@requires(*STAFF)
def operate_on_fleet() -> ResponseReturnValue:
    run = None
    with acting(gettext("The run is queued; its output follows here.")):
        run = runs.queue(_wanted(), runs.fleet(), by=actor())
    return redirect(url_for("web.runs") if run is None else url_for("web.run", run_id=run.id), 303)


def _wanted() -> str:
    playbook = Form.of_request(keep=()).text("playbook")
    if playbook not in WORDS:
        raise Invalid({"playbook": [gettext("This is no operation.")]})
    return playbook
