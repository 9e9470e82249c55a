"""The frame of every page: menu, words for states, language, and how a refusal looks to a person.

Pages hold no rule and no query: a view is who may, one call of a service, one template. Their guard is the API's
(`api/guard.py`), their cookies are the API's too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flask import Flask, current_app, g, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import format_timedelta, get_locale, gettext, lazy_gettext
from flask_jwt_extended import get_jwt

from portal.api.problems import Problem
from portal.models import User
from portal.web import refusals, resume, shapes

STATE_WORDS = {
    "registered": lazy_gettext("registered"),
    "provisioning": lazy_gettext("provisioning"),
    "ready": lazy_gettext("ready"),
    "leased": lazy_gettext("leased"),
    "reclaiming": lazy_gettext("reclaiming"),
    "quarantined": lazy_gettext("quarantined"),
    "retired": lazy_gettext("retired"),
    "failed": lazy_gettext("failed"),
    "scheduled": lazy_gettext("scheduled"),
    "active": lazy_gettext("active"),
    "ending": lazy_gettext("ending"),
    "ended": lazy_gettext("ended"),
    "waiting": lazy_gettext("waiting"),
    "cleaning": lazy_gettext("cleaning"),
    "verifying": lazy_gettext("verifying"),
    "passed": lazy_gettext("passed"),
    "cancelled": lazy_gettext("cancelled"),
    "queued": lazy_gettext("queued"),
    "starting": lazy_gettext("starting"),
    "running": lazy_gettext("running"),
    "succeeded": lazy_gettext("succeeded"),
    "stopped": lazy_gettext("stopped"),
    "timed_out": lazy_gettext("timed out"),
    "lost": lazy_gettext("lost"),
    "open": lazy_gettext("open"),
    "closed": lazy_gettext("closed"),
    "unknown": lazy_gettext("unknown"),
    "drifted": lazy_gettext("drifted"),
    "online": lazy_gettext("online"),
    "offline": lazy_gettext("offline"),
    "never": lazy_gettext("never reported"),
    "firing": lazy_gettext("firing"),
    "acknowledged": lazy_gettext("acknowledged"),
    "resolved": lazy_gettext("resolved"),
}

ROLE_WORDS = {
    "owner": lazy_gettext("owner"),
    "member": lazy_gettext("member"),
    "viewer": lazy_gettext("viewer"),
    "admin": lazy_gettext("admin"),
    "operator": lazy_gettext("operator"),
    "customer": lazy_gettext("customer"),
}
ACTOR_WORDS = {
    "user": lazy_gettext("person"),
    "token": lazy_gettext("API token"),
    "agent": lazy_gettext("agent"),
    "system": lazy_gettext("portal"),
}
GRANT_WORDS = {
    "keys": lazy_gettext("sign-in with keys"),
    "tasks": lazy_gettext("tasks"),
    "firewall": lazy_gettext("openings on the host"),
    "forward": lazy_gettext("forwarded port"),
    "security_group": lazy_gettext("rules of the security group"),
    "name": lazy_gettext("DNS names"),
}
OUTCOME_WORDS = {"done": lazy_gettext("done"), "refused": lazy_gettext("refused"), "failed": lazy_gettext("failed")}

NOUN_WORDS = {
    "machine": lazy_gettext("machine"),
    "lease": lazy_gettext("lease"),
    "reclaim": lazy_gettext("reclaim"),
    "run": lazy_gettext("run"),
    "attempt": lazy_gettext("attempt"),
    "task": lazy_gettext("task"),
}
VALUE_WORDS = STATE_WORDS | ROLE_WORDS | NOUN_WORDS | GRANT_WORDS


@dataclass(frozen=True)
class Entry:
    """A line of the menu."""

    label: str
    href: str
    icon: str
    is_current: bool


MENU = {
    "staff": (
        ("web.machines", lazy_gettext("Machines"), "server-2"),
        ("web.alerts", lazy_gettext("Alerts"), "alert-triangle"),
        ("web.monitoring", lazy_gettext("Monitoring"), "chart-line"),
        ("web.leases", lazy_gettext("Leases"), "clock"),
        ("web.network", lazy_gettext("Network"), "world"),
        ("web.tasks", lazy_gettext("Tasks"), "terminal-2"),
        ("web.customers", lazy_gettext("Customers"), "users"),
        ("web.runs", lazy_gettext("Runs"), "list-check"),
        ("web.audit", lazy_gettext("Audit"), "file-certificate"),
    ),
    "customer": (
        ("web.my_machines", lazy_gettext("My machines"), "server-2"),
        ("web.tasks", lazy_gettext("Tasks"), "terminal-2"),
        ("web.keys", lazy_gettext("SSH keys"), "key"),
    ),
    "admin": (("web.staff", lazy_gettext("Staff"), "shield-check"),),  # after the staff's own
}


def install(app: Flask) -> None:
    """Give `app` the frame: what templates may call, and pages for errors."""
    app.context_processor(_context)
    app.jinja_env.filters["duration"] = _duration
    app.jinja_env.filters["seconds"] = lambda span_s: _duration(timedelta(seconds=span_s))
    app.jinja_env.filters["told"] = told
    app.extensions["error_page"] = error_page


def told(sentence: str) -> str:
    """What a service said, in the reader's language."""
    return refusals.in_language(sentence, VALUE_WORDS)


def home_of(user: User) -> str:
    return url_for("web.my_machines" if user.role == "customer" else "web.machines")


def is_fragment() -> bool:
    """Whether htmx asks, and a fragment is to be answered instead of a page."""
    return "HX-Request" in request.headers


def error_page(problem: Problem) -> ResponseReturnValue:
    """What a person sees of a refusal: sign-in first, then the change of a given password, else the reason."""
    if problem.status == 401 and not is_fragment():
        return resume.after_sign_in()
    if problem.code == "password_change_required":
        return redirect(url_for("web.password"))
    if is_fragment():
        return render_template("parts/refusal.html", problem=problem), problem.status
    page = render_template(
        "error.html",
        title=title_of(problem.status),
        detail=_all_told(problem),
        reference=problem.info.get("incident"),
    )
    return page, problem.status, dict(problem.headers)


def _all_told(problem: Problem) -> str:
    """Its sentence; of faulty input what is wrong with each field."""
    texts = [text for texts in problem.errors.values() for text in texts]
    return " ".join(told(text) for text in texts or [problem.detail])


def title_of(status: int) -> str:
    titles: dict[int, str] = {
        403: gettext("Not for you"),
        404: gettext("Not found"),
        409: gettext("Not now"),
        429: gettext("Too many requests"),
        500: gettext("Something went wrong here"),
    }
    return titles.get(status) or str(gettext("That did not work"))


def _context() -> dict[str, Any]:
    me: User | None = g.get("user")
    life_s = current_app.config["SETTINGS"].access_token_s
    return {
        "me": me,
        "menu": _menu(me),
        "here": _here(),
        "with_port": shapes.with_port,
        "browser": shapes.browser,
        "language": str(get_locale()).replace("_", "-"),
        "is_chinese": str(get_locale()).startswith("zh"),
        "state_word": lambda word: STATE_WORDS.get(word, word),
        "state_options": lambda words: [(word, STATE_WORDS[word]) for word in words],
        "role_word": lambda word: ROLE_WORDS.get(word, word),
        "role_options": lambda roles: [(role, ROLE_WORDS[role]) for role in roles],
        "outcome_word": lambda word: OUTCOME_WORDS.get(word, word),
        "actor_word": lambda word: ACTOR_WORDS.get(word, word),
        "grant_word": lambda word: GRANT_WORDS.get(word, word),
        "grant_options": lambda kinds: [(kind, GRANT_WORDS[kind]) for kind in kinds],
        "csrf_value": csrf_value,
        "token_life_s": life_s,
        "renew_in_s": _renew_in_s(life_s),
    }


def _here() -> str:
    """This page's address, to come back to; home where a form was posted to what is no page."""
    adapter = current_app.create_url_adapter(request)
    is_page = request.method == "GET" or (adapter is not None and adapter.test(request.path, "GET"))
    return request.full_path.rstrip("?") if is_page else url_for("web.home")


def _renew_in_s(life_s: int) -> float | None:
    """When the page has to renew the access token that it came with: while a third of its life is left."""
    if g.get("family_id") is None:
        return None
    return float(max(0.5, get_jwt()["exp"] - time.time() - life_s / 3))


def _duration(span: timedelta) -> str:
    """`3 days`, `5 hours`: one unit is enough to know how long."""
    return str(format_timedelta(span, granularity="minute", threshold=1.5))


def csrf_value() -> str:
    """The token that a form sends back; empty for somebody who is not signed in.

    It is that of the token which this request was let in with, also if its time has run out since.
    """
    return "" if g.get("family_id") is None else str(get_jwt()["csrf"])


def _menu(me: User | None) -> list[Entry]:
    if me is None or me.must_change_password:
        return []
    lines: tuple[tuple[str, Any, str], ...] = MENU["customer" if me.role == "customer" else "staff"]
    lines += MENU["admin"] if me.role == "admin" else ()
    return [
        Entry(str(label), url_for(endpoint), icon, request.path.startswith(url_for(endpoint)))
        for endpoint, label, icon in lines
    ]
