"""Tasks: a customer's, or all of them for staff; one page for both, since what differs is the query."""

from __future__ import annotations

from datetime import timedelta

import peewee
from flask import redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import format_timedelta, gettext

from portal.api.guard import actor, current_user, requires
from portal.db import utcnow
from portal.errors import Error
from portal.models import Task
from portal.models.states import TASK_LIVE, USER_ROLES
from portal.services import config, leases, logs, tenants
from portal.services import tasks as work
from portal.web.acting import acting, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form

FIELDS = ("machine_id", "name", "command", "env", "workdir", "time_limit_s", "stop_grace_s", "retries")
FILTERS = ("state", "keyword")


def _mine() -> peewee.ModelSelect[Task]:
    """What this person may see."""
    user = current_user()
    seen: peewee.ModelSelect[Task] = work.of(user) if user.role == "customer" else work.every()
    return seen


@bp.get("/tasks")
@requires(*USER_ROLES)
def tasks() -> ResponseReturnValue:
    found = work.matching(_mine(), state=request.args.get("state") or None, keyword=request.args.get("keyword"))
    template = "tasks/_rows.html" if "HX-Request" in request.headers else "tasks/list.html"
    return render_template(
        template, page=page_asked(found, *FILTERS), figures=work.figures(_mine()), may_run=_may_run()
    )


def _may_run() -> bool:
    """Whether this person may start tasks anywhere; a viewer may not."""
    return bool(tenants.ids_of(current_user(), "use"))


@bp.get("/tasks/new")
@requires("customer")
def new_task() -> ResponseReturnValue:
    like = request.args.get("like", type=int)
    return _new_page(None if like is None else _form_like(work.get(_mine(), like)))


def _form_like(task: Task) -> Form:
    """The form as it was filled in for this task."""
    written = {name: getattr(task, name) for name in ("name", "command", "workdir", "time_limit_s", "stop_grace_s")}
    env = "\n".join(f"{name}={value}" for name, value in task.env.items())
    given = {**written, "env": env, "retries": task.retries, "machine_id": task.lease.machine_id}
    return Form({name: "" if value is None else str(value) for name, value in given.items()})


@bp.post("/tasks/new")
@requires("customer")
def create_task() -> ResponseReturnValue:
    form = Form.of_request(keep=FIELDS)
    try:
        task = work.create(
            form.number("machine_id"),
            name=form.text("name"),
            command=form.raw("command").replace("\r\n", "\n"),  # how browsers send a line's end
            env=form.pairs("env"),
            workdir=form.optional("workdir"),
            time_limit_s=form.number("time_limit_s"),
            stop_grace_s=form.number("stop_grace_s"),
            retries=form.number("retries", default=0),
            by=actor(),
        )
    except Error as error:
        return _new_page(form.refused(error)), error.status
    return redirect(url_for("web.task", task_id=task.id), 303)


@bp.get("/tasks/<int:task_id>")
@requires(*USER_ROLES)
def task(task_id: int) -> ResponseReturnValue:
    found = work.get(_mine(), task_id)
    attempts = work.attempts_of(found)
    facts = {
        "task": found,
        "attempts": attempts,
        "attempt": attempts[-1],
        "is_end_missing": logs.is_end_missing(attempts[-1]),
        "is_log_kept": logs.is_kept(found.lease),
        "is_live": found.state in TASK_LIVE,
        "may_steer": work.is_in_hand_of(found, current_user()),
        "may_run": _may_run(),
    }
    if "HX-Request" in request.headers:
        return render_template("tasks/_state.html", **facts)
    kept = {"kept_until": logs.kept_until(found.lease), "kept_for": _kept_for(), "now": utcnow()}
    return render_template("tasks/detail.html", log=f"/api/v1/customer/tasks/{task_id}/log", **kept, **facts)


def _kept_for() -> str:
    """In days: the 4 weeks that would be said of them end sooner."""
    span = timedelta(seconds=config.current().log_retain_s)
    if span < timedelta(days=1):
        return str(format_timedelta(span, granularity="hour"))
    return str(format_timedelta(span, granularity="day", threshold=span.days + 1))


@bp.post("/tasks/<int:task_id>/stop")
@requires(*USER_ROLES)
def stop_task(task_id: int) -> ResponseReturnValue:
    with acting(gettext("The task is being stopped, with every process of it.")):
        work.stop(work.get(_mine(), task_id), by=actor())
    return redirect(url_for("web.task", task_id=task_id), 303)


@bp.post("/tasks/<int:task_id>/retry")
@requires(*USER_ROLES)
def retry_task(task_id: int) -> ResponseReturnValue:
    with acting(gettext("A new attempt is queued.")):
        work.retry(work.get(_mine(), task_id), by=actor())
    return redirect(url_for("web.task", task_id=task_id), 303)


def _new_page(form: Form | None) -> str:
    now = utcnow()
    own = set(tenants.ids_of(current_user(), "use"))
    held = [lease for lease in leases.open_of_user(current_user()) if lease.tenant_id in own]
    usable = [lease for lease in held if lease.state == "active" and lease.ends_at > now]
    facts = {
        "machines": [(lease.machine_id, lease.machine.name) for lease in usable],
        "full": [lease.machine.name for lease in usable if not logs.is_kept(lease)],
        "chosen": request.args.get("machine", type=int),
        "may_run": bool(own),
    }
    return render_template("tasks/new.html", form=form, **facts)
