"""Alerts: what is wrong now, what was wrong, and who has taken note of it.

An alert's life is told here in order: it fires, somebody acknowledges it, it is resolved. Fired again later it is
another episode: a new row with the same fingerprint, of which the database lets one be open. Two sources speak of them,
Alertmanager (`hear`; what was lost on its way is fetched by alerts_relay.py) and the portal itself (alerts_own.py), in
one space of fingerprints. Silences are in alerts_silences.py, rules that staff wrote in alerts_rules.py.

Deliveries come twice, late and in the wrong order. What decides is the start that the source gives: one that is not
newer than the newest episode's belongs to something that is told already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.models import Alert, AlertSilence, Machine, Setting, User
from portal.models.states import ALERT_OPEN, ALERT_SEVERITIES
from portal.services import audit, events
from portal.services.actors import SYSTEM, Actor
from portal.services.transitions import WrongState, move

LOG = logging.getLogger(__name__)

WATCHDOG = "Watchdog"  # that it arrives proves the whole way, from here to Prometheus and back
LATE = timedelta(minutes=2)  # a delivery of before the end may still be on its way for so long
TRIES = 5  # somebody else was first: look again
KEEP = timedelta(days=400)
TRUNCATED, HEARD = "alerts.truncated", "alerts.watchdog"  # rows of `setting`

_PRIME, _OFFSET, _MASK = 1099511628211, 14695981039346656037, 2**64 - 1


@dataclass(frozen=True)
class Notice:
    """What a source says of one alert. `ends_at` None: it fires. `is_certain`: it is so now, not a late delivery."""

    fingerprint: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    starts_at: datetime
    ends_at: datetime | None = None
    source: str = "alertmanager"
    is_certain: bool = False

    @property
    def name(self) -> str:
        return (self.labels.get("alertname") or "unnamed")[:128]

    @property
    def severity(self) -> str:
        """A word of ours; what somebody else's rules say otherwise is a warning."""
        said = self.labels.get("severity", "").lower()
        return said if said in ALERT_SEVERITIES else "warning"


@dataclass
class Heard:
    """What came of a delivery, alert by alert."""

    fired: list[int] = field(default_factory=list)
    resolved: list[int] = field(default_factory=list)
    unchanged: int = 0


def fingerprint_of(labels: Mapping[str, str]) -> str:
    """As Prometheus computes it (FNV-1a over the sorted labels), so that both sources mean the same alert by it."""
    total = _OFFSET
    for byte in b"".join(name.encode() + b"\xff" + labels[name].encode() + b"\xff" for name in sorted(labels)):
        total = ((total ^ byte) * _PRIME) & _MASK
    return f"{total:016x}"


# Fire, be heard of again, be over


def deliver(notices: Iterable[Notice], *, by: Actor, truncated: int = 0, now: datetime | None = None) -> Heard:
    """Take in what Alertmanager delivered. Each alert is a transaction of its own, so that a repeat finishes the rest.

    `truncated` is how many it left out; that is kept until all of them were fetched, and shown.
    """
    now = now or utcnow()
    heard = Heard()
    for notice in notices:
        if notice.name == WATCHDOG:
            if notice.ends_at is None:
                note_watchdog(now)
            heard.unchanged += 1
            continue
        alert, what = hear(notice, by=by, now=now)
        if alert is None or what == "unchanged":
            heard.unchanged += 1
        else:
            (heard.fired if what == "fired" else heard.resolved).append(alert.id)
    if truncated:
        _note_truncated(truncated, by=by, now=now)
    return heard


def hear(notice: Notice, *, by: Actor, now: datetime) -> tuple[Alert | None, str]:
    """What one notice makes of its alert: `fired`, `resolved` or `unchanged`, and the row. Safe beside itself."""
    for left in reversed(range(TRIES)):
        try:
            with atomic():
                return _take_in(notice, by, now)
        except (peewee.IntegrityError, WrongState):
            if not left:
                raise
    raise AssertionError("unreachable")


def _take_in(notice: Notice, by: Actor, now: datetime) -> tuple[Alert | None, str]:
    newest = find_newest(notice.fingerprint)
    if newest is None:
        return _open(notice, by, now)
    if newest.state in ALERT_OPEN:
        return _of_open(newest, notice, by, now)
    if notice.starts_at > newest.starts_at or _fires_again(newest, notice, now):
        return _open(notice, by, now)
    return newest, "unchanged"


def _of_open(alert: Alert, notice: Notice, by: Actor, now: datetime) -> tuple[Alert, str]:
    """A notice about an alert that is open."""
    if alert.source != notice.source:
        return _other_source(alert, notice, now)
    if notice.starts_at < alert.starts_at:
        return alert, "unchanged"  # of an episode before this one
    if notice.ends_at is not None:
        _resolve(alert, by=by, ends_at=max(notice.ends_at, alert.starts_at), now=now)
        return alert, "resolved"
    if notice.starts_at > alert.starts_at:
        _resolve(alert, by=by, ends_at=notice.starts_at, now=now, end_reason="It fired anew at its source.")
        return _open(notice, by, now)
    _touch(alert, notice, now)
    return alert, "unchanged"


def _other_source(alert: Alert, notice: Notice, now: datetime) -> tuple[Alert, str]:
    """Prometheus takes over what the portal raised without it. Nobody else ends what another source raised."""
    if notice.source == "alertmanager" and notice.ends_at is None:
        _touch(alert, notice, now, source=notice.source, starts_at=notice.starts_at)
    return alert, "unchanged"


def _fires_again(ended: Alert, notice: Notice, now: datetime) -> bool:
    """Whether an alert with a start that we know fires once more.

    Alertmanager takes an alert for over when Prometheus was cut off from it, and says the old start afterwards. A
    delivery that was merely late comes soon after the end. What somebody closed by hand stays closed.
    """
    if notice.ends_at is not None or notice.starts_at < ended.starts_at or ended.resolved_by_id is not None:
        return False
    return notice.is_certain or now - ended.resolved_at > LATE


def _open(notice: Notice, by: Actor, now: datetime) -> tuple[Alert, str]:
    """A new episode. One whose firing was never heard is written down as over: its late firing opens nothing."""
    is_over = notice.ends_at is not None
    alert: Alert = Alert.create(
        fingerprint=notice.fingerprint,
        source=notice.source,
        state="resolved" if is_over else "firing",
        name=notice.name,
        severity=notice.severity,
        labels=dict(notice.labels),
        annotations=dict(notice.annotations),
        machine=find_machine(notice.labels),
        starts_at=notice.starts_at,
        ends_at=notice.ends_at,
        received_at=now,
        last_heard_at=now,
        resolved_at=now if is_over else None,
    )
    _tell("alert.resolved" if is_over else "alert.firing", alert, by=by)
    return alert, "resolved" if is_over else "fired"


def _touch(alert: Alert, notice: Notice, now: datetime, **changes: Any) -> None:
    """It still fires; its texts may carry newer values. No audit: nothing has changed."""
    changes |= {"last_heard_at": now, "annotations": dict(notice.annotations)}
    Alert.update(**changes).where(Alert.id == alert.id, Alert.state << ALERT_OPEN).execute()


def _resolve(alert: Alert, *, by: Actor, ends_at: datetime, now: datetime, **changes: Any) -> None:
    move(alert, leave=list(ALERT_OPEN), enter="resolved", ends_at=ends_at, resolved_at=now, **changes)
    _tell("alert.resolved", alert, by=by, reason=alert.end_reason)


def find_machine(labels: Mapping[str, str]) -> Machine | None:
    """The machine that the labels name: by `host` or `machine`, else by `instance`, its name or its address."""
    for label in ("host", "machine", "instance"):
        named = labels.get(label)
        if named:
            found: Machine | None = Machine.get_or_none(Machine.name == named)
            if found is not None:
                return found
    address = labels.get("instance", "").rsplit(":", 1)[0].strip("[]").lower()
    at = (
        list(Machine.select().where(Machine.address == address, Machine.state != "retired").limit(2)) if address else []
    )
    return at[0] if len(at) == 1 else None  # two behind one address: neither is guessed


# Acknowledge, close


def acknowledge(alert: Alert, *, by: Actor, remark: str | None = None) -> Alert:
    """Somebody has it in hand. Raises WrongState if somebody else has, or it is over."""
    with atomic():
        move(
            alert,
            leave="firing",
            enter="acknowledged",
            acknowledged_at=utcnow(),
            acknowledged_by=by.user,
            remark=(remark or "").strip() or None,
        )
        _tell("alert.acknowledged", alert, by=by, remark=alert.remark)
    return get(alert.id)


def close(alert: Alert, *, by: Actor, remark: str) -> Alert:
    """It is over, somebody says, although its source has not. It opens again only with a new start.

    Raises Conflict for an alert of the portal's own, which is over when its reason is; WrongState if it is over.
    """
    if not remark.strip():
        raise Invalid({"remark": ["Say why it is over; the history keeps it."]})
    if alert.source == "portal" and alert.state in ALERT_OPEN:
        raise Conflict(f"{alert.name} ends by itself when its reason is gone. Silence it instead.", code="ends_itself")
    with atomic():
        now = utcnow()
        _resolve(alert, by=by, ends_at=now, now=now, resolved_by=by.user, end_reason=remark.strip())
    return get(alert.id)


def end(alert: Alert, *, reason: str, by: Actor = SYSTEM, now: datetime) -> bool:
    """Its source does not speak of it any more. Returns whether we were the ones who ended it."""
    try:
        with atomic():
            _resolve(alert, by=by, ends_at=now, now=now, end_reason=reason)
    except WrongState:
        return False
    return True


def prune(now: datetime | None = None) -> int:
    """Forget episodes that were over long ago; returns how many."""
    old = (now or utcnow()) - KEEP
    with atomic():
        return int(Alert.delete().where(Alert.state == "resolved", Alert.resolved_at < old).execute())


# Whether Prometheus can be relied on


def note_watchdog(now: datetime) -> None:
    """What fires while all is well has arrived. How long after the time before it is kept: it may come seldom."""
    before = watchdog_heard_at()
    gap_s = None if before is None else max(0.0, (now - before).total_seconds())
    with atomic():
        _set(HEARD, {"at": now.isoformat(), "gap_s": gap_s})


def watchdog_heard_at() -> datetime | None:
    row = Setting.get_or_none(Setting.key == HEARD)
    return None if row is None else datetime.fromisoformat(row.value["at"])


def watchdog_gap() -> timedelta | None:
    """How long it was away between the last two times; None if it came once at most."""
    row = Setting.get_or_none(Setting.key == HEARD)
    gap_s = None if row is None else row.value.get("gap_s")
    return None if gap_s is None else timedelta(seconds=gap_s)


def _note_truncated(count: int, *, by: Actor, now: datetime) -> None:
    LOG.warning("Alertmanager left %s alerts out of a delivery: raise max_alerts of its webhook", count)
    with atomic():
        _set(TRUNCATED, {"at": now.isoformat(), "count": count})
        audit.record("alerts.truncated", None, by=by, count=count)


def find_truncated() -> dict[str, Any] | None:
    """`{at, count}` of the last delivery from which alerts were left out, until all of them were fetched."""
    row = Setting.get_or_none(Setting.key == TRUNCATED)
    return None if row is None else {"at": datetime.fromisoformat(row.value["at"]), "count": row.value["count"]}


def forget_truncated() -> None:
    with atomic():
        Setting.delete().where(Setting.key == TRUNCATED).execute()


def _set(key: str, value: Any) -> None:
    row = {"value": value, "changed_at": utcnow()}
    Setting.insert(key=key, **row).on_conflict(conflict_target=[Setting.key], update=row).execute()


# Look


@dataclass(frozen=True)
class AlertView:
    """An alert with what stands around it. `silence` is the one over it now."""

    alert: Alert
    silence: AlertSilence | None

    @property
    def machine_name(self) -> str | None:
        return None if self.alert.machine is None else str(self.alert.machine.name)

    @property
    def since(self) -> datetime:
        """Whichever source saw it first: the portal may have raised what Prometheus took over."""
        seen: datetime = min(self.alert.starts_at, self.alert.received_at)
        return seen

    @property
    def summary(self) -> str:
        return self._said("summary") or str(self.alert.name)

    @property
    def description(self) -> str | None:
        return self._said("description")

    @property
    def way_out(self) -> str | None:
        return self._said("way_out") or self._said("runbook_url")

    def _said(self, name: str) -> str | None:
        text: str | None = self.alert.annotations.get(name)
        return text or None


def get(alert_id: int) -> Alert:
    found: Alert | None = _with_people().where(Alert.id == alert_id).first()
    if found is None:
        raise NotFound(f"There is no alert {alert_id}.")
    return found


def find_newest(fingerprint: str) -> Alert | None:
    newest: Alert | None = Alert.select().where(Alert.fingerprint == fingerprint).order_by(Alert.id.desc()).first()
    return newest


def search(
    *,
    state: str | None = None,
    is_open: bool | None = None,
    severity: str | None = None,
    machine_id: int | None = None,
    name: str | None = None,
    source: str | None = None,
    fingerprint: str | None = None,
    acknowledged: bool | None = None,
    silenced: bool | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> peewee.ModelSelect[Alert]:
    """Alerts that fit, newest first. With `since` and `until`, those that were open at any moment between them."""
    query = _with_people().order_by(Alert.id.desc())
    exact: tuple[tuple[Any, Any], ...] = (
        (Alert.state, state),
        (Alert.severity, severity),
        (Alert.machine, machine_id),
        (Alert.name, name),
        (Alert.source, source),
        (Alert.fingerprint, fingerprint),
    )
    for column, wanted in exact:
        if wanted is not None:
            query = query.where(column == wanted)
    if is_open is not None:
        query = query.where(Alert.state << ALERT_OPEN if is_open else Alert.state == "resolved")
    if acknowledged is not None:
        query = query.where(Alert.acknowledged_at.is_null(not acknowledged))
    if silenced is not None:
        now_silent = AlertSilence.select(AlertSilence.fingerprint).where(_is_silencing(utcnow()))
        query = query.where(Alert.fingerprint << now_silent if silenced else Alert.fingerprint.not_in(now_silent))
    if since is not None:
        query = query.where(Alert.resolved_at.is_null() | (Alert.resolved_at >= since))
    return query if until is None else query.where(Alert.received_at < until)


def _with_people() -> peewee.ModelSelect[Alert]:
    acknowledger, closer, left = User.alias(), User.alias(), peewee.JOIN.LEFT_OUTER
    return (
        Alert.select(Alert, Machine, acknowledger, closer)
        .join(Machine, left)
        .switch(Alert)
        .join(acknowledger, left, on=(Alert.acknowledged_by == acknowledger.id), attr="acknowledged_by")
        .switch(Alert)
        .join(closer, left, on=(Alert.resolved_by == closer.id), attr="resolved_by")
    )


def _is_silencing(now: datetime) -> Any:
    return (AlertSilence.state == "active") & (AlertSilence.ends_at > now)


def views(rows: Sequence[Alert], now: datetime | None = None) -> list[AlertView]:
    """The views of these alerts, in the same order."""
    prints = sorted({row.fingerprint for row in rows})
    over = AlertSilence.select().where(AlertSilence.fingerprint << prints, _is_silencing(now or utcnow()))
    by_print = {silence.fingerprint: silence for silence in over}
    return [AlertView(row, by_print.get(row.fingerprint) if row.state in ALERT_OPEN else None) for row in rows]


def view(alert: Alert) -> AlertView:
    return views([alert])[0]


def episodes(alert: Alert) -> peewee.ModelSelect[Alert]:
    """Each time that the same thing was wrong, newest first, this time among them."""
    return search(fingerprint=alert.fingerprint)


def count_open() -> int:
    """How many want somebody to look: firing, and nobody has silenced them."""
    return int(search(state="firing", silenced=False).count())


def _tell(action: str, alert: Alert, *, by: Actor, **detail: Any) -> None:
    """The audit entry and the event of one change."""
    detail |= {"name": alert.name, "severity": alert.severity, "machine_id": alert.machine_id, "source": alert.source}
    audit.record(action, alert, by=by, **detail)
    events.write(action, machine_id=alert.machine_id, resource_id=alert.id)
