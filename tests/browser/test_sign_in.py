"""Signing in and out. A sign-in that lasts as long as somebody works is in test_long_forms.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from playwright.sync_api import Page, expect

from portal.services import users
from portal.services.actors import SYSTEM
from tests.browser.conftest import House, Windows
from tests.browser.people import sign_in
from tests.factories import PASSWORD
from tests.support.portal import OWN_PASSWORD

Open = Callable[..., Page]


def test_a_page_asked_for_before_sign_in_is_opened_afterwards(house: House, windows: Windows) -> None:
    page = windows.new()
    page.goto("/leases?state=active")
    expect(page.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()
    sign_in(page, "admin", PASSWORD)
    expect(page.get_by_role("heading", name="Leases")).to_be_visible()
    assert page.url == f"{house.url}/leases?state=active"


def test_sign_in_leads_nowhere_outside(house: House, windows: Windows) -> None:
    page = windows.new()
    page.goto("/sign-in?next=https://example.org/")
    sign_in(page, "admin", PASSWORD)
    expect(page.get_by_role("heading", name="Machines", exact=True)).to_be_visible()
    assert page.url.startswith(house.url)


def test_a_wrong_password_is_said_and_the_name_kept(windows: Windows) -> None:
    page = windows.new()
    page.goto("/sign-in")
    sign_in(page, "admin", "not the password")
    expect(page.get_by_role("alert")).to_have_text("User name or password is wrong.")
    expect(page.locator("#field-username")).to_have_value("admin")
    expect(page.locator("#field-password")).to_have_value("")


def test_a_given_password_must_be_changed_before_anything_else(house: House, windows: Windows) -> None:
    user, given = users.create_customer("newcomer", by=SYSTEM, tenant=house.tenant, member_role="member")
    page = windows.new()
    page.goto("/my/keys")
    sign_in(page, user.username, given)
    page.goto("/my/machines")
    expect(page.get_by_text("This password was given to you.")).to_be_visible()
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_count(0)
    page.locator("#field-old_password").fill(given)
    page.locator("#field-new_password").fill("newcomer has this one")
    page.get_by_role("button", name="Change password").click()
    expect(page.locator("#fault-new_password")).to_have_text("It must not contain the user name.")
    page.locator("#field-old_password").fill(given)
    page.locator("#field-new_password").fill(OWN_PASSWORD)
    page.get_by_role("button", name="Change password").click()
    expect(page.get_by_role("heading", name="My machines")).to_be_visible()


def test_sign_out_ends_it(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/machines", fresh=True)
    kept = page.context.cookies()
    page.locator("details.account summary").click()
    page.get_by_role("button", name="Sign out", exact=True).click()
    expect(page.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()
    page.context.add_cookies(cast(Any, kept))  # what somebody copied before is worth nothing
    page.goto("/machines")
    expect(page.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()


def test_a_sign_in_that_only_ran_out_of_time_renews_itself(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/machines", fresh=True)
    page.context.clear_cookies(name="access_token_cookie")
    page.goto("/customers")
    expect(page.get_by_role("heading", name="Customers")).to_be_visible()
