"""Alerts over HTTP: what Alertmanager delivers, and what staff see and do."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient

from portal.db import utcnow
from portal.models import Alert, AlertSilence, ApiToken, AuditEntry, User
from portal.services import alerts_silences, tokens
from portal.services.actors import SYSTEM
from tests.conftest import SignedIn
from tests.factories import actor_of, make_machine, make_user

SignIn = Callable[[User], SignedIn]
DROP = object()


def an_alert(**changes: Any) -> dict[str, Any]:
    """An alert as Alertmanager 0.25 writes it."""
    given = {
        "status": "firing",
        "labels": {"alertname": "GpuHot", "severity": "critical", "host": "gpu-1"},
        "annotations": {
            "summary": "A GPU of gpu-1 has 96 °C.",
            "description": "GPU 0.",
            "way_out": "Look at its fans.",
        },
        "startsAt": "2026-03-01T12:00:00.123456789Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph?g0.expr=x",
        "fingerprint": "00fa23fb8ae2dd5f",
        **changes,
    }
    return {name: value for name, value in given.items() if value is not DROP}


def a_delivery(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    given = {
        "receiver": "portal",
        "status": "firing",
        "alerts": list(entries or (an_alert(),)),
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager:9093",
        "version": "4",
        "groupKey": "{}:{}",
        "truncatedAlerts": 0,
        **changes,
    }
    return {name: value for name, value in given.items() if value is not DROP}


@pytest.fixture
def staff(sign_in: SignIn, operator: User) -> SignedIn:
    return sign_in(operator)


@pytest.fixture
def alert_id(staff: SignedIn) -> int:
    (found,) = staff.post("/alerts/webhook", a_delivery()).json["fired"]
    return int(found)


# Alertmanager


def token(owner: User, *scopes: str) -> dict[str, str]:
    _, secret = tokens.create(
        owner, name="t", scopes=list(scopes), expires_at=utcnow() + timedelta(days=1), by=actor_of(owner)
    )
    return {"Authorization": f"Bearer {secret}"}


def test_alertmanager_delivers_with_a_token_of_its_scope(client: FlaskClient, operator: User) -> None:
    machine = make_machine("gpu-1")
    answer = client.post("/api/v1/alerts/webhook", json=a_delivery(), headers=token(operator, "alerts"))
    alert = Alert.get()
    assert answer.json == {"fired": [alert.id], "resolved": [], "unchanged": 0, "truncated": 0}
    assert (alert.name, alert.severity, alert.machine_id, alert.state) == ("GpuHot", "critical", machine.id, "firing")
    entry = AuditEntry.select().where(AuditEntry.action == "alert.firing").get()
    assert (entry.actor_kind, entry.actor_name, entry.resource_id) == ("token", "olga", alert.id)


def test_no_other_token_delivers(client: FlaskClient, operator: User, customer: User) -> None:
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer rgt_x"}, 401),
        (token(operator, "read", "admin", "inventory"), 403),
        (token(customer, "read"), 403),
    ):
        answer = client.post("/api/v1/alerts/webhook", json=a_delivery(), headers=headers)
        assert answer.status_code == status, answer.text
    assert not Alert.select().exists()


def test_a_token_for_alerts_does_nothing_else(client: FlaskClient, operator: User, alert_id: int) -> None:
    headers = token(operator, "alerts")
    assert client.get("/api/v1/admin/alerts", headers=headers).status_code == 403
    assert client.post(f"/api/v1/admin/alerts/{alert_id}/acknowledge", json={}, headers=headers).status_code == 403
    assert Alert.get().state == "firing"


def test_one_delivery_tells_of_many_and_is_repeated_without_harm(staff: SignedIn) -> None:
    other = an_alert(labels={"alertname": "DiskFull", "host": "gpu-2"}, fingerprint="bb")
    first = staff.post("/alerts/webhook", a_delivery(an_alert(), other)).json
    again = staff.post("/alerts/webhook", a_delivery(an_alert(), other)).json
    assert (len(first["fired"]), first["unchanged"]) == (2, 0)
    assert (again["fired"], again["unchanged"]) == ([], 2)
    over = an_alert(status="resolved", endsAt="2026-03-01T12:05:00Z")
    assert staff.post("/alerts/webhook", a_delivery(over, other)).json["resolved"] == first["fired"][:1]


def test_alerts_that_alertmanager_left_out_are_named(staff: SignedIn) -> None:
    assert staff.post("/alerts/webhook", a_delivery(truncatedAlerts=12)).json["truncated"] == 12
    assert AuditEntry.select().where(AuditEntry.action == "alerts.truncated").get().detail == {"count": 12}


def test_what_a_later_alertmanager_says_besides_does_no_harm(staff: SignedIn) -> None:
    answer = staff.post("/alerts/webhook", a_delivery(an_alert(notificationReason="new"), routeID="x"))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("delivery", "field"),
    [
        (a_delivery(version="3"), "version"),
        (a_delivery(version=DROP), "version"),
        (a_delivery(alerts=DROP), "alerts"),
        (a_delivery(alerts={}), "alerts"),
        (a_delivery(truncatedAlerts="many"), "truncatedAlerts"),
        (a_delivery(an_alert(status="sleeping")), "alerts.0.status"),
        (a_delivery(an_alert(), an_alert(labels=DROP)), "alerts.1.labels"),
        (a_delivery(an_alert(labels={"alertname": 7})), "alerts.0.labels.alertname.value"),
        (a_delivery(an_alert(labels={"x": "y" * 1001})), "alerts.0.labels.x.value"),
        (a_delivery(an_alert(startsAt="yesterday")), "alerts.0.startsAt"),
        (a_delivery(an_alert(startsAt="2026-03-01T12:00:00")), "alerts.0.startsAt"),
        (a_delivery(an_alert(fingerprint="../x")), "alerts.0.fingerprint"),
        (a_delivery(an_alert(fingerprint="aa\n")), "alerts.0.fingerprint"),
        (a_delivery(an_alert(fingerprint=DROP)), "alerts.0.fingerprint"),
        (a_delivery(an_alert(status="resolved", endsAt=DROP)), "alerts.0.endsAt"),
    ],
)
def test_a_delivery_that_is_none_is_refused_by_field_and_changes_nothing(
    staff: SignedIn, delivery: dict[str, Any], field: str
) -> None:
    answer = staff.post("/alerts/webhook", delivery)
    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])
    assert not Alert.select().exists()


# Staff


def test_an_alert_says_what_is_wrong_and_the_way_out(staff: SignedIn, alert_id: int) -> None:
    told = staff.get(f"/admin/alerts/{alert_id}").json
    assert (told["summary"], told["way_out"]) == ("A GPU of gpu-1 has 96 °C.", "Look at its fans.")
    assert (told["state"], told["acknowledged_by"], told["silence"], told["ends_at"]) == ("firing", None, None, None)


FILTERS = [
    ("", ["b", "a", "c"]),
    ("is_open=true", ["b", "a"]),
    ("is_open=false", ["c"]),
    ("state=acknowledged", ["a"]),
    ("severity=critical", ["a"]),
    ("acknowledged=true", ["a"]),
    ("acknowledged=false", ["b", "c"]),
    ("silenced=true", ["b"]),
    ("silenced=false&is_open=true", ["a"]),
    ("machine_id={machine}", ["a"]),
    ("name=c", ["c"]),
    ("source=portal", []),
    ("fingerprint=bb", ["b"]),
    ("since={now}", ["b", "a"]),
    ("until={past}", []),
    ("since={past}&until={now}", ["b", "a", "c"]),
]


@pytest.mark.parametrize(("query", "expected"), FILTERS)
def test_the_list_is_filtered(staff: SignedIn, query: str, expected: list[str]) -> None:
    machine = make_machine("gpu-1")
    c = an_alert(labels={"alertname": "c"}, fingerprint="cc", status="resolved", endsAt="2026-03-01T12:05:00Z")
    a = an_alert(labels={"alertname": "a", "severity": "critical", "host": "gpu-1"}, fingerprint="aa")
    b = an_alert(labels={"alertname": "b"}, fingerprint="bb")
    past = stamp(utcnow() - timedelta(minutes=1))
    first, second = staff.post("/alerts/webhook", a_delivery(c, a, b)).json["fired"]
    staff.post(f"/admin/alerts/{first}/acknowledge")
    alerts_silences.create(Alert.get_by_id(second), until=utcnow() + timedelta(hours=1), reason="known", by=SYSTEM)
    now = stamp(utcnow() + timedelta(seconds=1))
    answer = staff.get("/admin/alerts?" + query.format(machine=machine.id, now=now, past=past))
    assert [item["name"] for item in answer.json["items"]] == expected
    assert answer.json["total"] == len(expected)


def stamp(moment: Any) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize("query", ["severity=bad", "state=open", "machine_id=x", "acknowledged=perhaps", "since=today"])
def test_a_filter_that_makes_no_sense_is_refused(staff: SignedIn, query: str) -> None:
    assert staff.get(f"/admin/alerts?{query}").status_code == 422


def test_acknowledged_by_one_it_is_not_taken_by_another(
    staff: SignedIn, sign_in: SignIn, admin: User, alert_id: int
) -> None:
    done = staff.post(f"/admin/alerts/{alert_id}/acknowledge", {"remark": "fans are ordered"})
    assert (done.json["state"], done.json["acknowledged_by"], done.json["remark"]) == (
        "acknowledged", "olga", "fans are ordered",
    )  # fmt: skip
    refused = sign_in(admin).post(f"/admin/alerts/{alert_id}/acknowledge", {"remark": "mine"})
    assert (refused.status_code, refused.json["code"]) == (409, "wrong_state")
    assert Alert.get().remark == "fans are ordered"


def test_the_same_thing_wrong_again_is_found_in_its_history(staff: SignedIn, alert_id: int) -> None:
    over = an_alert(status="resolved", endsAt="2026-03-01T12:05:00Z")
    again = an_alert(startsAt="2026-03-01T13:00:00Z")
    other = an_alert(labels={"alertname": "x"}, fingerprint="bb")
    for entry in (over, again, other):
        staff.post("/alerts/webhook", a_delivery(entry))
    told = staff.get(f"/admin/alerts/{alert_id}/history").json["items"]
    assert [(item["state"], item["starts_at"][:16]) for item in told] == [
        ("firing", "2026-03-01T13:00"), ("resolved", "2026-03-01T12:00"),
    ]  # fmt: skip


def test_a_silence_names_its_reason_and_end_and_is_ended_before_its_time(staff: SignedIn, alert_id: int) -> None:
    until = (utcnow() + timedelta(hours=2)).isoformat()
    made = staff.post(f"/admin/alerts/{alert_id}/silence", {"until": until, "reason": "fans are ordered"})
    assert (made.status_code, made.json["state"], made.json["created_by"]) == (201, "active", "olga")
    assert made.json["external_id"] is None, "there is no Alertmanager here"
    assert staff.get(f"/admin/alerts/{alert_id}").json["silence"]["reason"] == "fans are ordered"
    twice = staff.post(f"/admin/alerts/{alert_id}/silence", {"until": until, "reason": "again"})
    assert twice.status_code == 409
    assert staff.post(f"/admin/alerts/silences/{made.json['id']}/end").json["state"] == "ended"
    assert staff.get(f"/admin/alerts/{alert_id}").json["silence"] is None
    assert staff.get("/admin/alerts/silences?state=active").json["total"] == 0
    assert staff.get("/admin/alerts/silences").json["total"] == 1


def test_an_alertmanager_that_does_not_answer_is_said_and_nothing_is_silenced(
    staff: SignedIn, settings: Any, alert_id: int
) -> None:
    object.__setattr__(settings, "alertmanager_url", "http://127.0.0.1:1")
    until = (utcnow() + timedelta(hours=2)).isoformat()
    refused = staff.post(f"/admin/alerts/{alert_id}/silence", {"until": until, "reason": "known"})
    assert (refused.status_code, refused.json["code"]) == (503, "alertmanager_unreachable")
    assert not AlertSilence.select().exists()


def test_what_is_over_though_its_source_does_not_say_so_is_closed_by_hand_and_told(
    staff: SignedIn, alert_id: int
) -> None:
    closed = staff.post(f"/admin/alerts/{alert_id}/close", {"remark": "the card was taken out"})
    assert (closed.status_code, closed.json["state"]) == (200, "resolved")
    entry = AuditEntry.select().order_by(AuditEntry.id.desc()).get()
    assert (entry.action, entry.actor_name, entry.resource_id) == ("alert.resolved", "olga", alert_id)


@pytest.mark.parametrize("act", ["acknowledge", "close", "silence"])
def test_an_unknown_alert_is_404(staff: SignedIn, act: str) -> None:
    body = {
        "acknowledge": {},
        "close": {"remark": "x"},
        "silence": {"until": (utcnow() + timedelta(hours=1)).isoformat(), "reason": "x"},
    }[act]
    assert staff.post(f"/admin/alerts/4711/{act}", body).status_code == 404


def test_customers_see_and_change_nothing(sign_in: SignIn, customer: User, alert_id: int) -> None:
    theirs = sign_in(customer)
    for path in ("/admin/alerts", f"/admin/alerts/{alert_id}", f"/admin/alerts/{alert_id}/history"):
        assert theirs.get(path).status_code == 403
    assert theirs.post(f"/admin/alerts/{alert_id}/acknowledge").status_code == 403
    assert theirs.post("/alerts/webhook", a_delivery()).status_code == 403
    assert Alert.get().state == "firing"


def test_a_token_stops_delivering_with_its_owner(client: FlaskClient, admin: User) -> None:
    leaver = make_user("operator", username="leaver")
    headers = token(leaver, "alerts")
    tokens.revoke(ApiToken.get(), by=actor_of(admin))
    assert client.post("/api/v1/alerts/webhook", json=a_delivery(), headers=headers).status_code == 401
