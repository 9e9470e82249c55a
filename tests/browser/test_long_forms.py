"""Somebody who types for longer than an access token lives: what was typed arrives, or comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import jwt
import pytest
from playwright.sync_api import Page, Response, expect

from portal.db import utcnow
from portal.models import AuditEntry, SshKey, User
from portal.services import sessions
from portal.services.actors import SYSTEM
from tests.browser.conftest import House
from tests.browser.people import sign_in
from tests.factories import PASSWORD, ssh_key_pair
from tests.support.portal import Portal, running
from tests.support.waiting import until

Open = Callable[..., Page]
LIFE_S = 2


@pytest.fixture(scope="module")
def hasty(served: House) -> Iterator[Portal]:
    """The same portal, with access tokens that live for two seconds."""
    portal = Portal(served.portal.instance, environ={**served.portal.environ, "ACCESS_TOKEN_S": str(LIFE_S)})
    with running(portal):
        portal.start("web")
        yield portal


@pytest.fixture
def typing(house: House, hasty: Portal, open_as: Open) -> Iterator[Page]:
    """The page of the keys, filled in by somebody whose browser slept meanwhile: no timer of the page ran."""
    page = open_as(house.new_customer(), "/my/keys", url=hasty.url, fresh=True)
    now = utcnow()
    page.clock.install(time=now)
    page.clock.pause_at(now + timedelta(minutes=1))  # still to come when the browser hears of it; no timer goes on
    page.goto("/my/keys")
    page.locator("#field-name").fill("Office")
    page.locator("#field-key").fill(ssh_key_pair()[0])
    until(lambda: expires_at(page) < time.time(), "the access token to run out")
    yield page
    page.context.close()


def now_of(page: Page) -> datetime:
    """What the page takes for the time."""
    return datetime.fromtimestamp(page.evaluate("Date.now()") / 1000, UTC)


def expires_at(page: Page) -> float:
    token = token_of(page)
    return float(jwt.decode(token, options={"verify_signature": False})["exp"])


def token_of(page: Page) -> str:
    return next(cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "access_token_cookie")


def test_a_form_that_was_typed_for_too_long_arrives(typing: Page) -> None:
    answers = answers_of(typing)
    typing.get_by_role("button", name="Add key").click()
    expect(typing.get_by_role("status").filter(has_text="The key Office is added")).to_be_visible()
    expect(typing.get_by_role("row").filter(has_text="Office")).to_have_count(1)
    assert ("POST", "/my/keys", 401) in answers, "the portal refused it once"
    assert SshKey.select().where(SshKey.name == "Office", SshKey.user == user_of(typing)).count() == 1


def test_a_browser_that_wakes_up_renews_its_sign_in_before_it_sends(typing: Page) -> None:
    answers = answers_of(typing)
    typing.clock.set_system_time(now_of(typing) + timedelta(minutes=16))
    typing.get_by_role("button", name="Add key").click()
    expect(typing.get_by_role("status").filter(has_text="The key Office is added")).to_be_visible()
    assert [answer for answer in answers if answer[2] == 401] == []


def test_a_form_survives_the_end_of_its_sign_in(typing: Page) -> None:
    user = User.get_by_id(user_of(typing))
    sessions.sign_out_everywhere(user, by=SYSTEM)
    typing.get_by_role("button", name="Add key").click()
    expect(typing.get_by_text("What you typed is not lost")).to_be_visible()
    with typing.context.expect_page() as opened:
        typing.get_by_role("link", name="Sign in").click()
    sign_in(opened.value, user.username, PASSWORD)
    expect(opened.value.get_by_role("heading", level=1)).to_have_text("My machines")
    typing.get_by_role("button", name="Send it").click()
    expect(typing.get_by_role("row").filter(has_text="Office")).to_have_count(1)


def test_a_page_that_refreshes_itself_tells_of_the_end_and_keeps_what_is_typed(house: House, open_as: Open) -> None:
    host = house.leased_host()
    page = open_as(house.admin, f"/machines/{host.id}", fresh=True)
    page.get_by_role("button", name="Maintenance").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Reason").fill("a fan is changed")
    page.context.clear_cookies()
    expect(dialog.get_by_role("alert")).to_contain_text("Your sign-in has ended.")
    expect(dialog.get_by_label("Reason")).to_have_value("a fan is changed")


def test_a_click_while_the_sign_in_is_renewed_does_not_end_it(house: House, hasty: Portal, open_as: Open) -> None:
    page = open_as(house.admin, "/machines", url=hasty.url, fresh=True)
    for _round in range(5):
        with page.expect_request("**/api/v1/auth/refresh"):
            page.goto("/runs")
        page.goto("/audit")
        expect(page.get_by_role("heading", level=1)).to_have_text("Audit")
    page.context.close()
    assert not AuditEntry.select().where(AuditEntry.action == "session.reuse_detected").exists()


def test_a_page_left_open_keeps_working_in_two_tabs(house: House, hasty: Portal, open_as: Open) -> None:
    first = open_as(house.admin, "/machines", url=hasty.url, fresh=True)
    second = first.context.new_page()
    second.goto("/customers")
    for renewals in range(2):
        before = token_of(first)
        until(lambda old=before: token_of(first) != old, f"a token after {renewals} renewals")  # type: ignore[misc]  # mypy knows no defaults of lambdas
    for page in (first, second):
        page.get_by_role("link", name="Runs").click()
        expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    first.context.close()
    assert not AuditEntry.select().where(AuditEntry.action.contains("reuse")).exists()


def answers_of(page: Page) -> list[tuple[str, str, int]]:
    """Method, path and status of every answer from now on."""
    answers: list[tuple[str, str, int]] = []

    def note(answer: Response) -> None:
        answers.append((answer.request.method, urlsplit(answer.url).path, answer.status))

    page.on("response", note)
    return answers


def user_of(page: Page) -> int:
    return int(jwt.decode(token_of(page), options={"verify_signature": False})["sub"])
