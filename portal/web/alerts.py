"""Alerts, for staff: what is wrong now, what was wrong, the rules, and machines that are offline."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from flask import Response, flash, redirect, render_template, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext, lazy_gettext

from portal.api.guard import actor, requires
from portal.db import utcnow
from portal.errors import Error, Invalid
from portal.models import Alert, AlertRule
from portal.models.states import ALERT_SEVERITIES
from portal.services import alerts as known
from portal.services import alerts_rules, alerts_silences, audit, machines, overviews
from portal.services.actors import STAFF
from portal.web.acting import PAGE_SIZE, Page, acting, page_asked
from portal.web.blueprint import bp
from portal.web.forms import Form
from portal.web.frame import is_fragment

FILTERS = ("severity", "acknowledged", "silenced", "machine", "since", "until", "name")
RULE_FIELDS = (
    *("name", "metric", "condition", "threshold", "duration_min", "severity", "region", "machines", "summary"),
    *("way_out", "is_on", "hours"),
)
SEVERITY_WORDS = {
    "critical": lazy_gettext("critical"),
    "warning": lazy_gettext("warning"),
    "info": lazy_gettext("for information"),
}
METRIC_WORDS = {
    "cpu_percent": lazy_gettext("Processors in use, percent"),
    "memory_percent": lazy_gettext("Memory in use, percent"),
    "disk_percent": lazy_gettext("A disk in use, percent"),
    "disk_free_gib": lazy_gettext("Free on a disk, GiB"),
    "load1": lazy_gettext("Load of one minute"),
    "gpu_utilization_percent": lazy_gettext("A GPU in use, percent"),
    "gpu_memory_percent": lazy_gettext("GPU memory in use, percent"),
    "gpu_temperature_c": lazy_gettext("Temperature of a GPU, °C"),
    "gpu_power_w": lazy_gettext("Power of a GPU, W"),
    "gpu_ecc_errors": lazy_gettext("Uncorrected memory errors of a GPU"),
    "clock_offset_s": lazy_gettext("Clock offset, s"),
    "agent_silence_s": lazy_gettext("Silence of the agent, s"),
}


@bp.get("/alerts")
@requires(*STAFF)
def alerts() -> ResponseReturnValue:
    shown, status = _asked(is_open=True)
    template = "alerts/_rows.html" if is_fragment() else "alerts/open.html"
    return render_template(template, **shown, truncated=known.find_truncated()), status


@bp.get("/alerts/history")
@requires(*STAFF)
def alert_history() -> ResponseReturnValue:
    shown, status = _asked(is_open=False)
    return render_template("alerts/history.html", **shown), status


@bp.get("/alerts/offline")
@requires(*STAFF)
def offline_machines() -> ResponseReturnValue:
    now = utcnow()
    page = page_asked(overviews.search(reachability="offline", now=now))
    template = "alerts/_offline.html" if is_fragment() else "alerts/offline.html"
    return render_template(template, page=page, machines=overviews.of_machines(page.items, now))


def _asked(*, is_open: bool) -> tuple[dict[str, Any], int]:
    """The list that the address asks for, and the status. Where a filter cannot be read nothing is listed, but what is
    wrong with it: what was not asked for would be taken for what was."""
    form = Form.of_address(keep=FILTERS)
    try:
        page, status = page_asked(known.search(is_open=is_open, **_filters(form)), *FILTERS), 200
    except Invalid as error:
        if is_fragment():
            raise
        form, page, status = form.refused(error), Page([], 1, PAGE_SIZE, 0, dict(form.values)), 422
    views = known.views(page.items)
    return {"form": form, "page": page, "views": views, "severity_words": SEVERITY_WORDS}, status


def _filters(form: Form) -> dict[str, Any]:
    """A word that is none of a choice's asks for nothing. Raises Invalid that names the field."""
    flags = {"yes": True, "no": False}
    severity = form.text("severity")
    return {
        "severity": severity if severity in ALERT_SEVERITIES else None,
        "acknowledged": flags.get(form.text("acknowledged")),
        "silenced": flags.get(form.text("silenced")),
        "machine_id": machines.named(form.text("machine")).id if form.text("machine") else None,
        "since": form.moment("since") if form.text("since") else None,
        "until": form.moment("until") if form.text("until") else None,
        "name": form.text("name")[:128] or None,
    }


@bp.get("/alerts/<int:alert_id>")
@requires(*STAFF)
def alert(alert_id: int) -> ResponseReturnValue:
    return _detail(known.get(alert_id))


def _detail(found: Alert, *, silencing: Form | None = None, closing: Form | None = None) -> str:
    return render_template(
        "alerts/detail.html",
        view=known.view(found),
        alert=found,
        episodes=known.views(list(known.episodes(found).limit(20))),
        trail=list(audit.search(resource_type="alert", resource_id=found.id).limit(50)),
        severity_words=SEVERITY_WORDS,
        silencing=silencing,
        closing=closing,
        until=(utcnow() + timedelta(hours=4)).strftime("%Y-%m-%dT%H:%M"),
    )


@bp.post("/alerts/<int:alert_id>/acknowledge")
@requires(*STAFF)
def acknowledge_alert(alert_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=())
    with acting(gettext("You have it in hand.")):
        known.acknowledge(known.get(alert_id), by=actor(), remark=form.optional("remark"))
    return _back(alert_id)


@bp.post("/alerts/<int:alert_id>/silence")
@requires(*STAFF)
def silence_alert(alert_id: int) -> ResponseReturnValue:
    found, form = known.get(alert_id), Form.of_request(keep=("until", "reason"))
    try:
        alerts_silences.create(found, until=form.moment("until"), reason=form.text("reason"), by=actor())
    except Error as error:
        return _detail(found, silencing=form.refused(error)), _status(error)
    flash(gettext("It is silenced."), "success")
    return _back(alert_id)


def _status(error: Error) -> int:
    """Of a form that came back: that Prometheus or Alertmanager is away is no failure of ours."""
    return error.status if error.status < 500 else 422


@bp.post("/alerts/<int:alert_id>/silences/<int:silence_id>/end")
@requires(*STAFF)
def end_alert_silence(alert_id: int, silence_id: int) -> ResponseReturnValue:
    with acting(gettext("The silence has ended.")):
        alerts_silences.end(alerts_silences.get(silence_id), by=actor())
    return _back(alert_id)


@bp.post("/alerts/<int:alert_id>/close")
@requires(*STAFF)
def close_alert(alert_id: int) -> ResponseReturnValue:
    form = Form.of_request(keep=("remark",))
    with acting(gettext("It is closed.")):
        known.close(known.get(alert_id), by=actor(), remark=form.text("remark"))
    return _back(alert_id)


def _back(alert_id: int) -> Response:
    return redirect(url_for("web.alert", alert_id=alert_id), 303)  # type: ignore[return-value]  # one class, two names


# Rules


@bp.get("/alerts/rules")
@requires(*STAFF)
def alert_rules() -> ResponseReturnValue:
    page = page_asked(alerts_rules.search())
    return render_template(
        "alerts/rules.html",
        page=page,
        severity_words=SEVERITY_WORDS,
        metric_words=METRIC_WORDS,
        metrics=alerts_rules.METRICS,
    )


@bp.get("/alerts/rules/new")
@requires(*STAFF)
def new_alert_rule() -> ResponseReturnValue:
    return _rule_page(None, None)


@bp.post("/alerts/rules/new")
@requires(*STAFF)
def create_alert_rule() -> ResponseReturnValue:
    return _written(None)


@bp.get("/alerts/rules/<int:rule_id>")
@requires(*STAFF)
def alert_rule(rule_id: int) -> ResponseReturnValue:
    return _rule_page(alerts_rules.get(rule_id), None)


@bp.post("/alerts/rules/<int:rule_id>")
@requires(*STAFF)
def edit_alert_rule(rule_id: int) -> ResponseReturnValue:
    return _written(alerts_rules.get(rule_id))


@bp.post("/alerts/rules/<int:rule_id>/remove")
@requires(*STAFF)
def remove_alert_rule(rule_id: int) -> ResponseReturnValue:
    with acting(gettext("The rule is removed.")):
        alerts_rules.remove(alerts_rules.get(rule_id), by=actor())
    return redirect(url_for("web.alert_rules"), 303)


def _written(rule: AlertRule | None) -> ResponseReturnValue:
    """Save what was typed, or with the other button try it against the past."""
    form = Form.of_request(keep=RULE_FIELDS)
    try:
        given = _typed(form)
        if form.is_checked("try"):
            trial = alerts_rules.try_out(hours=form.number("hours", default=24), **given)
            return _rule_page(rule, form, trial)
        if rule is None:
            alerts_rules.create(by=actor(), **given)
        else:
            alerts_rules.edit(rule, by=actor(), **given)
    except Error as error:
        return _rule_page(rule, form.refused(error)), _status(error)
    flash(gettext("The rule %(name)s is saved; Prometheus reads it within minutes.", name=given["name"]), "success")
    return redirect(url_for("web.alert_rules"), 303)


def _typed(form: Form) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    if form.text("region"):
        scope["region"] = form.text("region")
    if form.text("machines"):
        scope["machines"] = form.text("machines").replace(",", " ").split()
    return {
        "name": form.text("name"),
        "metric": form.text("metric"),
        "condition": form.text("condition"),
        "threshold": _decimal(form.text("threshold")),
        "duration_s": form.number("duration_min", default=0) * 60,
        "severity": form.text("severity"),
        "scope": scope,
        "summary": form.text("summary"),
        "way_out": form.optional("way_out"),
        "is_on": form.is_checked("is_on"),
    }


def _decimal(text: str) -> float | None:
    """The number that was typed; None is refused by the rule."""
    try:
        return float(text)
    except ValueError:
        return None


def _rule_page(rule: AlertRule | None, form: Form | None, trial: alerts_rules.Trial | None = None) -> str:
    return render_template(
        "alerts/rule.html",
        rule=rule,
        form=form,
        trial=trial,
        metrics=[(name, METRIC_WORDS[name]) for name in alerts_rules.METRICS],
        conditions=[(word, word) for word in alerts_rules.CONDITIONS],
        severities=[(word, SEVERITY_WORDS[word]) for word in ALERT_SEVERITIES],
    )
