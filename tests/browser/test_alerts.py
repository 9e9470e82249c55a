"""Alerts, as staff see and handle them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from playwright.sync_api import Page, expect

from portal.db import utcnow
from portal.models import Alert, AlertRule
from portal.services import alerts, alerts_rules
from portal.services.actors import SYSTEM
from portal.services.alerts import Notice, fingerprint_of
from tests.browser.conftest import House
from tests.browser.people import press

Open = Callable[..., Page]
_numbers = itertools.count(1)


def fire(host: str, **changes: Any) -> Alert:
    """The delivered alert of a GPU that is too hot."""
    labels = {"alertname": "GpuTooHot", "severity": "critical", "host": host, "uuid": f"{next(_numbers):08d}-7c2e"}
    annotations = {
        "summary": f"GPU {labels['uuid']} of {host} has 97 °C.",
        "way_out": "Take load off it now, and look at fans and the room. The hardware may switch itself off.",
    }
    notice = Notice(fingerprint_of(labels), labels, annotations, utcnow(), **changes)
    alert, _ = alerts.hear(notice, by=SYSTEM, now=utcnow())
    assert alert is not None
    return alert


def test_an_alert_appears_by_itself_is_acknowledged_and_leaves_the_list_when_it_is_over(
    house: House, open_as: Open
) -> None:
    page, name = open_as(house.admin, "/alerts"), house.ready_host().machine.name
    alert = fire(name)
    line = page.get_by_role("row").filter(has_text=f"of {name} has 97")
    expect(line).to_contain_text("Take load off it now")
    expect(line).to_contain_text("critical")
    line.get_by_role("link", name=f"of {name} has 97").click()
    page.get_by_label("Remark").fill("FAN-7 → 22:00")
    page.get_by_role("button", name="I have it in hand").click()
    expect(page.get_by_text("You have it in hand.")).to_be_visible()
    expect(page.get_by_text("FAN-7 → 22:00")).to_be_visible()
    expect(page.get_by_role("button", name="I have it in hand")).not_to_be_visible()
    page.goto("/alerts?acknowledged=yes")
    expect(line).to_contain_text("FAN-7 → 22:00")
    alerts.end(Alert.get_by_id(alert.id), reason="It is over.", now=utcnow())
    expect(line).not_to_be_visible()
    page.get_by_role("link", name="History").click()
    expect(page.get_by_role("row").filter(has_text=f"of {name} has 97")).to_contain_text("FAN-7 → 22:00")


def test_alerts_are_found_by_machine_and_by_when_they_were_open(house: House, open_as: Open) -> None:
    name, other = house.ready_host().machine.name, house.ready_host().machine.name
    alert = fire(name)
    fire(other)
    page = open_as(house.admin, "/alerts")
    rows = page.get_by_role("row").filter(has_text="97 °C")
    ask(page, Machine=name)
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(f"of {name} has 97")
    ask(page, Before=a_time(hours=-1))
    expect(page.get_by_text("No alert fits.")).to_be_visible()
    expect(page.get_by_label("Name of a machine")).to_have_value(name)
    alerts.end(Alert.get_by_id(alert.id), reason="It is over.", now=utcnow())
    page.get_by_role("link", name="History").click()
    ask(page, Machine=name, From=a_time(hours=-1), Before=a_time(hours=1))
    expect(rows).to_contain_text(f"of {name} has 97")
    ask(page, From=a_time(hours=1), Before="")
    expect(page.get_by_text("No alert fits.")).to_be_visible()


def ask(page: Page, **filters: str) -> None:
    for label, value in filters.items():
        page.get_by_label("Name of a machine" if label == "Machine" else f"{label} (UTC)").fill(value)
    page.get_by_role("button", name="Search").click()


def a_time(*, hours: int) -> str:
    return (utcnow() + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M")


def test_a_filter_that_cannot_be_read_is_named_and_nothing_is_listed(house: House, open_as: Open) -> None:
    alert = fire(house.ready_host().machine.name)
    page = open_as(house.admin)
    for path in ("/alerts", "/alerts/history"):
        for name, text, fault in (
            ("machine", "no-such-host", "There is no machine called no-such-host."),
            ("since", "yesterday", "Write a time such as"),
            ("until", "2026-13-01T00:00", "Write a time such as"),
        ):
            answer = page.goto(f"{path}?{name}={text}")
            assert answer is not None
            assert answer.status == 422, (path, name)
            expect(page.locator(f"#fault-{name}")).to_contain_text(fault)
            expect(page.locator(f"#field-{name}")).to_have_attribute("aria-invalid", "true")
            assert alert.labels["uuid"] not in page.content()


def test_a_silence_wants_a_reason_and_ends_before_its_time(house: House, open_as: Open) -> None:
    alert = fire(house.ready_host().machine.name)
    page = open_as(house.admin, f"/alerts/{alert.id}")
    page.get_by_label("Until (UTC)").fill((utcnow() - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M"))
    page.locator("#field-silence-reason").fill("known")
    page.get_by_role("button", name="Silence", exact=True).click()
    expect(page.get_by_text("Choose a time from now on").first).to_be_visible()
    expect(page.locator("#field-silence-reason")).to_have_value("known")
    page.get_by_label("Until (UTC)").fill((utcnow() + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M"))
    page.get_by_role("button", name="Silence", exact=True).click()
    expect(page.get_by_text("It is silenced.")).to_be_visible()
    page.goto("/alerts?silenced=yes")
    expect(page.get_by_role("row").filter(has_text=alert.labels["uuid"] + " of")).to_contain_text("silenced until")
    page.goto(f"/alerts/{alert.id}")
    page.get_by_role("button", name="End the silence").click()
    expect(page.get_by_text("The silence has ended.")).to_be_visible()


def test_an_alert_that_cannot_end_by_itself_is_closed_with_a_reason(house: House, open_as: Open) -> None:
    alert = fire(house.ready_host().machine.name)
    page = open_as(house.admin, f"/alerts/{alert.id}")
    page.locator("#field-close-remark").fill("XID-79")
    press(page, "Close")
    expect(page.get_by_text("It is closed.")).to_be_visible()
    expect(page.get_by_text("XID-79")).to_be_visible()


def test_what_prometheus_says_is_read_in_chinese(house: House, open_as: Open) -> None:
    name = house.ready_host().machine.name
    alert = fire(name)
    page = open_as(house.admin, f"/alerts/{alert.id}", locale="zh-CN")
    expect(page.get_by_text(f"{name} 的 GPU {alert.labels['uuid']} 温度为 97 °C。")).to_be_visible()
    expect(page.get_by_text("请立即减轻其负载")).to_be_visible()


def test_offline_machines_have_a_tab(house: House, open_as: Open) -> None:
    host = house.ready_host()
    host.report(received_at=utcnow() - timedelta(hours=1))
    page = open_as(house.admin, "/alerts")
    page.get_by_role("link", name="Offline machines").click()
    expect(page.get_by_role("row").filter(has_text=host.machine.name)).to_be_visible()
    host.report()
    expect(page.get_by_role("row").filter(has_text=host.machine.name)).not_to_be_visible()


def test_a_rule_is_written_refused_field_by_field_switched_on_and_removed(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/alerts/rules")
    page.get_by_role("link", name="New rule").click()
    page.get_by_label("Name", exact=True).fill("idle gpu")
    page.get_by_label("What is looked at").select_option("A GPU in use, percent")
    page.get_by_label("Threshold").fill("5")
    page.get_by_label("What is wrong when it fires").fill("A leased GPU does nothing")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("begin with a capital letter")).to_be_visible()
    expect(page.get_by_label("Threshold")).to_have_value("5")
    page.get_by_label("Name", exact=True).fill("GpuIdle")
    page.get_by_role("button", name="Try against the past").click()
    expect(page.get_by_role("alert")).to_contain_text("There is no Prometheus to ask")
    page.get_by_label("Switched on").check()
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row").filter(has_text="GpuIdle")).to_contain_text("> 5")
    assert AlertRule.get(AlertRule.name == "GpuIdle").is_on
    page.get_by_role("link", name="GpuIdle").click()
    expect(page.get_by_label("Switched on")).to_be_checked()
    press(page, "Remove")
    expect(page.get_by_text("The rule is removed.")).to_be_visible()
    assert not alerts_rules.search().where(AlertRule.name == "GpuIdle").exists()


def test_a_customer_finds_no_page_of_alerts(house: House, open_as: Open) -> None:
    alert = fire(house.leased.machine.name)
    page = open_as(house.customer)
    for path in ("/alerts", "/alerts/history", "/alerts/rules", "/alerts/offline", f"/alerts/{alert.id}"):
        answer = page.goto(path)
        assert answer is not None
        assert answer.status == 403, path
        assert alert.labels["uuid"] not in page.content()
