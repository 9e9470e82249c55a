"""Alerts: one open row a fingerprint, whatever order deliveries come in, and whoever delivers at the same time."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portal.db import connection, db, utcnow
from portal.errors import Conflict, Invalid
from portal.integrations.alertmanager import Known
from portal.models import Alert, AuditEntry, User
from portal.services import alerts, alerts_relay, alerts_silences
from portal.services.actors import SYSTEM
from portal.services.alerts import Notice, fingerprint_of
from portal.services.transitions import WrongState
from tests.factories import actor_of, make_machine

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
LABELS = {"alertname": "HostHot", "severity": "warning", "host": "gpu-1"}


def firing(start: datetime = NOW, **changes: Any) -> Notice:
    labels = changes.pop("labels", LABELS)
    return Notice(fingerprint_of(labels), labels, {"summary": "It is hot."}, start, **changes)


def resolved(start: datetime = NOW, end: datetime = NOW + MINUTE, **changes: Any) -> Notice:
    return firing(start, ends_at=end, **changes)


def deliver(*notices: Notice, now: datetime = NOW + MINUTE) -> alerts.Heard:
    return alerts.deliver(notices, by=SYSTEM, now=now)


def story() -> list[tuple[str, datetime, datetime | None]]:
    """Every episode, in the order they were made."""
    return [(row.state, row.starts_at, row.ends_at) for row in Alert.select().order_by(Alert.id)]


def trail(action: str, said: str) -> list[tuple[str, str, str | None]]:
    """What the audit keeps of these actions: which, by whom, and what was said under this name."""
    entries = AuditEntry.select().where(AuditEntry.action.startswith(action)).order_by(AuditEntry.id)
    return [(entry.action, entry.actor_name, entry.detail.get(said)) for entry in entries]


def test_a_fingerprint_is_that_of_prometheus() -> None:
    """FNV-1a over the sorted labels; tests/integration/test_alerts_relay.py compares with a real Alertmanager."""
    assert fingerprint_of({}) == "cbf29ce484222325"
    assert fingerprint_of({"alertname": "a"}) != fingerprint_of({"alertname": "b"})
    assert fingerprint_of({"a": "b", "c": "d"}) == fingerprint_of({"c": "d", "a": "b"})
    assert fingerprint_of({"a": "bÿc"}) != fingerprint_of({"a": "b", "c": ""}), "no text can look like two labels"


def test_an_alert_fires_once_however_often_it_is_delivered(database: Any) -> None:
    assert len(deliver(firing()).fired) == 1
    again = deliver(firing(), now=NOW + 60 * MINUTE)
    assert (again.fired, again.unchanged) == ([], 1)
    assert story() == [("firing", NOW, None)]
    assert Alert.get().last_heard_at == NOW + 60 * MINUTE
    assert [entry.action for entry in AuditEntry.select()] == ["alert.firing"], "a repeat changes nothing to tell"


def test_an_alert_that_is_over_is_over_once(database: Any) -> None:
    deliver(firing())
    assert len(deliver(resolved()).resolved) == 1
    assert deliver(resolved()).unchanged == 1
    assert story() == [("resolved", NOW, NOW + MINUTE)]
    assert [entry.action for entry in AuditEntry.select()] == ["alert.firing", "alert.resolved"]


def test_fired_again_it_is_another_episode(database: Any, operator: User) -> None:
    deliver(firing())
    alerts.acknowledge(Alert.get(), by=actor_of(operator), remark="on it")
    deliver(resolved())
    deliver(firing(NOW + 5 * MINUTE))
    assert story() == [("resolved", NOW, NOW + MINUTE), ("firing", NOW + 5 * MINUTE, None)]
    first, second = Alert.select().order_by(Alert.id)
    assert (first.remark, second.remark) == ("on it", None), "nobody has taken note of the new one"


FIRST, SECOND = NOW, NOW + 10 * MINUTE
DELIVERIES = (
    firing(FIRST),
    resolved(FIRST, FIRST + MINUTE),
    firing(SECOND),
    resolved(SECOND, SECOND + MINUTE),
)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_in_whatever_order_deliveries_come_nothing_stays_open(database: Any, order: Sequence[int]) -> None:
    """Each comes twice; at the end the alert is over, and the second episode has its own times."""
    for number in (*order, *order):
        deliver(DELIVERIES[number])
    assert [row for row in story() if row[0] != "resolved"] == []
    assert ("resolved", SECOND, SECOND + MINUTE) in story()
    assert len(story()) <= 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_late_end_of_the_first_episode_does_not_close_the_second(database: Any, order: Sequence[int]) -> None:
    for number in order:
        deliver(DELIVERIES[number])
    assert [row for row in story() if row[0] == "firing"] == [("firing", SECOND, None)]


def test_an_alert_that_alertmanager_took_for_over_opens_again_with_its_old_start(database: Any) -> None:
    """Prometheus was cut off from Alertmanager, and goes on with the start it knows."""
    deliver(firing())
    deliver(resolved(), now=NOW + MINUTE)
    assert deliver(firing(), now=NOW + 2 * MINUTE).unchanged == 1, "so soon it may be a delivery that was on its way"
    assert len(deliver(firing(), now=NOW + 10 * MINUTE).fired) == 1


def test_deliveries_at_the_same_moment_make_one_row(database: Any) -> None:
    gate, opened, lock = threading.Barrier(8), [], threading.Lock()

    def one() -> None:
        with connection():
            gate.wait(30)
            heard = deliver(firing())
        with lock:
            opened.extend(heard.fired)

    together(one, 8)
    assert len(opened) == 1
    assert story() == [("firing", NOW, None)]
    assert AuditEntry.select().count() == 1


def test_an_end_and_a_new_start_at_the_same_moment_leave_the_new_one_open(database: Any) -> None:
    deliver(firing())
    gate = threading.Barrier(8)
    notices = itertools.cycle([DELIVERIES[1], DELIVERIES[2]])
    lock = threading.Lock()

    def one() -> None:
        with lock:
            mine = next(notices)
        with connection():
            gate.wait(30)
            deliver(mine)

    together(one, 8)
    assert [row for row in story() if row[0] == "firing"] == [("firing", SECOND, None)]
    assert len(story()) == 2


def together(act: Any, count: int) -> None:
    threads = [threading.Thread(target=act) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({"host": "gpu-1"}, True),
        ({"machine": "gpu-1"}, True),
        ({"instance": "gpu-1"}, True),
        ({"instance": "10.0.0.7:9100"}, True),
        ({"instance": "10.0.0.8:9100"}, False),  # two machines behind one address
        ({"instance": "10.0.0.9:9100"}, False),  # a retired one's
        ({"host": "gpu-2x"}, False),
        ({}, False),
    ],
)
def test_the_machine_is_found_by_its_label(database: Any, labels: dict[str, str], found: bool) -> None:
    machine = make_machine("gpu-1", address="10.0.0.7")
    for port in (22, 2222):
        make_machine(address="10.0.0.8", ssh_port=port)
    make_machine(address="10.0.0.9", state="retired")
    deliver(firing(labels={"alertname": "x", **labels}))
    assert (Alert.get().machine_id == machine.id) is found


@pytest.mark.parametrize(
    ("said", "means"), [("critical", "critical"), ("INFO", "info"), ("page", "warning"), (None, "warning")]
)
def test_a_severity_that_is_none_of_ours_is_a_warning(database: Any, said: str | None, means: str) -> None:
    deliver(firing(labels={"alertname": "x", **({"severity": said} if said else {})}))
    assert Alert.get().severity == means


# People


def test_of_two_who_acknowledge_one_does(database: Any, operator: User, admin: User) -> None:
    deliver(firing())
    mine, theirs = alerts.get(Alert.get().id), alerts.get(Alert.get().id)
    alerts.acknowledge(mine, by=actor_of(operator), remark="  fan is broken ")
    with pytest.raises(WrongState, match="acknowledged by now"):
        alerts.acknowledge(theirs, by=actor_of(admin))
    kept = alerts.get(mine.id)
    assert (kept.state, kept.remark, kept.acknowledged_by.username) == ("acknowledged", "fan is broken", "olga")
    assert trail("alert.acknowledged", "remark") == [("alert.acknowledged", "olga", "fan is broken")]


def test_closed_by_hand_it_stays_closed_until_it_fires_anew(database: Any, operator: User) -> None:
    deliver(firing())
    closed = alerts.close(alerts.get(Alert.get().id), by=actor_of(operator), remark="the sensor is wrong")
    assert (closed.state, closed.end_reason, closed.resolved_by.username) == ("resolved", "the sensor is wrong", "olga")
    assert trail("alert.resolved", "reason") == [("alert.resolved", "olga", "the sensor is wrong")]
    for later in (2, 600):
        deliver(firing(), now=NOW + later * MINUTE)
    assert [row[0] for row in story()] == ["resolved"]
    deliver(firing(NOW + 700 * MINUTE))
    assert [row[0] for row in story()] == ["resolved", "firing"]


def test_closing_wants_a_reason_and_an_alert_that_is_open(database: Any, operator: User) -> None:
    deliver(firing())
    with pytest.raises(Invalid):
        alerts.close(Alert.get(), by=actor_of(operator), remark=" ")
    deliver(resolved())
    with pytest.raises(WrongState):
        alerts.close(Alert.get(), by=actor_of(operator), remark="over")


def test_a_silence_covers_the_next_episode_too_and_ends_at_its_time(database: Any, operator: User) -> None:
    deliver(firing())
    until = utcnow() + timedelta(hours=1)
    silence = alerts_silences.create(Alert.get(), until=until, reason="fan is ordered", by=actor_of(operator))
    deliver(resolved())
    deliver(firing(SECOND))
    assert alerts.count_open() == 0
    assert [view.silence for view in alerts.views(list(alerts.search(is_open=True)))] == [silence]
    assert alerts_silences.end_due(until) == 1
    assert alerts_silences.get(silence.id).state == "ended"
    assert alerts.count_open() == 1
    assert alerts_silences.end_due(until) == 0, "once"
    assert trail("alert_silence", "reason") == [
        ("alert_silence.active", "olga", "fan is ordered"), ("alert_silence.ended", SYSTEM.name, None),
    ]  # fmt: skip


def test_an_alert_has_one_silence_at_a_time(database: Any, operator: User) -> None:
    deliver(firing())
    given = {"until": utcnow() + timedelta(hours=1), "reason": "known", "by": actor_of(operator)}
    silence = alerts_silences.create(Alert.get(), **given)
    with pytest.raises(Conflict, match="is silenced until"):
        alerts_silences.create(Alert.get(), **given)
    alerts_silences.end(silence, by=actor_of(operator))
    with pytest.raises(WrongState):
        alerts_silences.end(alerts_silences.get(silence.id), by=actor_of(operator))
    alerts_silences.create(Alert.get(), **given)
    assert trail("alert_silence", "reason") == [
        ("alert_silence.active", "olga", "known"),
        ("alert_silence.ended", "olga", None),
        ("alert_silence.active", "olga", "known"),
    ]


@pytest.mark.parametrize("changes", [{"until": timedelta(0)}, {"until": timedelta(days=91)}, {"reason": " "}])
def test_a_silence_has_an_end_and_a_reason(database: Any, operator: User, changes: dict[str, Any]) -> None:
    deliver(firing())
    until = utcnow() + changes.get("until", timedelta(hours=1))
    with pytest.raises(Invalid):
        alerts_silences.create(Alert.get(), until=until, reason=changes.get("reason", "known"), by=actor_of(operator))


# What was lost on its way


def known(notice: Notice, **changes: Any) -> Known:
    given = {"updated_at": NOW, "is_suppressed": False, **changes}
    return Known(notice.fingerprint, notice.labels, notice.annotations, notice.starts_at, **given)


WATCHDOG = known(firing(labels={"alertname": "Watchdog"}))
LONG_AGO = NOW - timedelta(days=1)
HOT = firing()


def compare(*entries: Known, started_at: datetime = LONG_AGO, now: datetime = NOW + 5 * MINUTE) -> int:
    return alerts_relay.compare(entries, started_at, now)


def test_a_delivery_that_never_came_is_fetched(database: Any) -> None:
    assert compare(WATCHDOG, known(HOT)) == 1
    assert compare(WATCHDOG, known(HOT)) == 0
    assert story() == [("firing", NOW, None)]
    assert alerts.watchdog_heard_at() == NOW + 5 * MINUTE, "it is no alert, it says that Prometheus lives"


def test_while_alertmanager_is_asked_no_connection_is_held(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Asked:
        def alerts(self) -> list[Known]:
            held.append(not db.is_closed())
            return [WATCHDOG, known(HOT)]

        def started_at(self) -> datetime:
            held.append(not db.is_closed())
            return LONG_AGO

    monkeypatch.setattr(alerts_relay.alertmanager, "of", lambda _settings: Asked())
    monkeypatch.setattr(alerts_relay.config, "current", lambda: None)
    thread = threading.Thread(target=alerts_relay._reconcile_alone)
    thread.start()
    thread.join()
    assert held == [False, False]
    assert story() == [("firing", NOW, None)]


def test_an_alert_that_alertmanager_forgot_to_end_is_over(database: Any) -> None:
    """It does so when the alert was silenced."""
    deliver(HOT)
    assert compare(WATCHDOG) == 1
    assert (Alert.get().state, Alert.get().end_reason) == ("resolved", "Alertmanager does not know it any more.")


@pytest.mark.parametrize(
    ("entries", "given"),
    [
        ((), {}),  # Prometheus does not reach it: that it knows nothing says nothing
        ((known(firing(labels={"alertname": "Watchdog"}), updated_at=NOW - timedelta(hours=1)),), {}),
        ((WATCHDOG,), {"started_at": NOW}),  # just started: Prometheus has not told it everything yet
        ((WATCHDOG,), {"now": NOW + MINUTE}),  # heard of a moment ago
        ((WATCHDOG, known(HOT, is_suppressed=True)), {}),  # silenced there, and it fires still
    ],
)
def test_absence_alone_is_no_end(database: Any, entries: tuple[Known, ...], given: dict[str, Any]) -> None:
    deliver(HOT)
    assert compare(*entries, **given) == 0
    assert [row[0] for row in story()] == ["firing"]


def test_what_is_silenced_or_inhibited_there_is_not_opened_here(database: Any) -> None:
    assert compare(WATCHDOG, known(HOT, is_suppressed=True)) == 0
    assert story() == []


def test_an_alert_taken_for_over_is_open_again_as_soon_as_alertmanager_says_so(database: Any) -> None:
    deliver(HOT)
    deliver(resolved(), now=NOW + MINUTE)
    assert compare(WATCHDOG, known(HOT), now=NOW + MINUTE) == 1
    assert [row[0] for row in story()] == ["resolved", "firing"]


def test_alerts_left_out_of_a_delivery_are_named_until_they_were_fetched(database: Any) -> None:
    alerts.deliver([HOT], by=SYSTEM, truncated=7, now=NOW)
    assert alerts.find_truncated() == {"at": NOW, "count": 7}
    assert AuditEntry.select().where(AuditEntry.action == "alerts.truncated").get().detail == {"count": 7}
    compare(WATCHDOG, known(HOT))
    assert alerts.find_truncated() is None


def test_episodes_of_long_ago_are_forgotten_and_open_ones_never(database: Any) -> None:
    deliver(HOT)
    deliver(firing(labels={"alertname": "Over"}))
    deliver(resolved(labels={"alertname": "Over"}))
    assert alerts.prune(NOW + timedelta(days=399)) == 0
    assert alerts.prune(NOW + timedelta(days=402)) == 1
    assert [row.name for row in Alert.select()] == ["HostHot"]
