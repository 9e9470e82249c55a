"""Silences: nobody wants to hear of an alert until a given time, and says why.

A silence's life: made, ended by hand or by its time. It is held here, for the portal's own list and whatever tells
people; where an Alertmanager is configured it holds the same silence, so that nothing else rings either. Alertmanager
is asked first and outside any transaction: what it does not take is not silenced.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Error, Invalid, NotFound
from portal.integrations import alertmanager
from portal.models import Alert, AlertSilence, User
from portal.models.states import ALERT_OPEN
from portal.services import audit, batch, config, events
from portal.services.actors import SYSTEM, Actor
from portal.services.transitions import WrongState, move

LOG = logging.getLogger(__name__)

LONGEST = timedelta(days=90)


def create(alert: Alert, *, until: datetime, reason: str, by: Actor) -> AlertSilence:
    """Silence this alert, and each time that it fires again, until then.

    Raises Invalid, WrongState for an alert that is over, Conflict if it is silenced already, and what Alertmanager
    says if it does not take the silence of an alert that it delivered.
    """
    _check(alert, until, reason)
    existing = find_active(alert.fingerprint)
    if existing is not None:
        raise Conflict(f"{alert.name} is silenced until {_told(existing.ends_at)}. End that silence first.")
    external_id = _silence_outside(alert, until, reason, by)
    try:
        return _write(alert, until, reason.strip(), by, external_id)
    except peewee.IntegrityError:
        _end_outside(external_id)
        raise Conflict(f"{alert.name} was silenced by somebody else just now.") from None


def _check(alert: Alert, until: datetime, reason: str) -> None:
    now = utcnow()
    faults: dict[str, list[str]] = {}
    if not reason.strip():
        faults["reason"] = ["Say why; whoever wonders at the silence reads it."]
    if not now < until <= now + LONGEST:
        faults["until"] = [f"Choose a time from now on, at most {LONGEST.days} days ahead."]
    if faults:
        raise Invalid(faults)
    if alert.state not in ALERT_OPEN:
        raise WrongState(f"The alert is {alert.state} by now; there is nothing to silence.", state=alert.state)


def _silence_outside(alert: Alert, until: datetime, reason: str, by: Actor) -> str | None:
    outside = alertmanager.of(config.current())
    if outside is None:
        return None
    try:
        return outside.silence(alert.labels, until=until, by=by.name, reason=reason)
    except Error:
        if alert.source == "alertmanager":
            raise
        LOG.warning("alert %s is silenced here alone: Alertmanager does not take it", alert.id, exc_info=True)
        return None  # the portal raised it because that side is down


def _write(alert: Alert, until: datetime, reason: str, by: Actor, external_id: str | None) -> AlertSilence:
    with atomic():
        silence: AlertSilence = AlertSilence.create(
            fingerprint=alert.fingerprint,
            labels=alert.labels,
            reason=reason,
            created_by=by.user,
            ends_at=until,
            external_id=external_id,
        )
        _tell("alert_silence.active", silence, by=by, alert=alert.name, alert_id=alert.id, until=until, reason=reason)
    return get(silence.id)


def end(silence: AlertSilence, *, by: Actor) -> AlertSilence:
    """End it now; Alertmanager first. Raises WrongState if it has ended."""
    if silence.state != "active":
        raise WrongState("The silence has ended already.", state=silence.state)
    _end_outside(silence.external_id)
    with atomic():
        move(silence, leave="active", enter="ended", ended_at=utcnow(), ended_by=by.user)
        _tell("alert_silence.ended", silence, by=by)
    return get(silence.id)


def end_due(now: datetime | None = None) -> int:
    """End those whose time is up; returns how many. Alertmanager keeps the same time by itself. For the sweep."""
    due = AlertSilence.select().where(AlertSilence.state == "active", AlertSilence.ends_at <= (now or utcnow()))
    return batch.each(due, _end_by_time)


def _end_by_time(silence: AlertSilence) -> bool:
    with atomic():
        move(silence, leave="active", enter="ended", ended_at=silence.ends_at)
        _tell("alert_silence.ended", silence, by=SYSTEM)
    return True


def find_active(fingerprint: str) -> AlertSilence | None:
    """The silence over it now. One whose time is up, and which no sweep has seen yet, is ended on the way."""
    end_due()
    found: AlertSilence | None = _with_maker().where(
        AlertSilence.fingerprint == fingerprint, AlertSilence.state == "active"
    ).first()  # fmt: skip
    return found


def get(silence_id: int) -> AlertSilence:
    found: AlertSilence | None = _with_maker().where(AlertSilence.id == silence_id).first()
    if found is None:
        raise NotFound(f"There is no silence {silence_id}.")
    return found


def search(*, state: str | None = None) -> peewee.ModelSelect[AlertSilence]:
    """Silences, newest first."""
    query = _with_maker().order_by(AlertSilence.id.desc())
    return query if state is None else query.where(AlertSilence.state == state)


def _with_maker() -> peewee.ModelSelect[AlertSilence]:
    maker = User.alias()
    on = AlertSilence.created_by == maker.id
    return AlertSilence.select(AlertSilence, maker).join(maker, peewee.JOIN.LEFT_OUTER, on=on, attr="created_by")


def _end_outside(external_id: str | None) -> None:
    outside = alertmanager.of(config.current())
    if outside is not None and external_id is not None:
        outside.end_silence(external_id)


def _told(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _tell(action: str, silence: AlertSilence, *, by: Actor, **detail: Any) -> None:
    audit.record(action, silence, by=by, fingerprint=silence.fingerprint, **detail)
    events.write(action, resource_id=silence.id)
