"""Customers, as staff make them."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Page, expect

from portal.services import users
from tests.browser.conftest import House, Windows
from tests.browser.people import clipboard, press, sign_in
from tests.factories import PASSWORD

Open = Callable[..., Page]


def test_a_tenant_and_a_customer_are_made_and_the_password_is_shown_once(
    house: House, windows: Windows, open_as: Open
) -> None:
    page = open_as(house.admin, "/customers")
    page.get_by_label("Company").fill("Northern Lights")
    page.get_by_role("button", name="Make tenant").click()
    page.get_by_label("User name").fill("aurora")
    page.locator("#field-tenant_id").select_option("Northern Lights")
    page.get_by_role("button", name="Make customer").click()
    expect(page.get_by_role("heading", name="One-time password for aurora")).to_be_visible()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    password = clipboard(page)
    page.get_by_role("link", name="Done").click()
    expect(page.get_by_role("row", name=re.compile("aurora"))).to_contain_text("Northern Lights")
    assert password not in page.content()
    page.go_back()
    expect(page.get_by_role("heading", name="Customers")).to_be_visible()
    assert password not in page.content()
    new = windows.new()
    new.goto("/sign-in")
    sign_in(new, "aurora", password)
    expect(new.get_by_text("This password was given to you.")).to_be_visible()


def test_a_taken_name_is_said_where_it_was_typed_and_the_rest_is_kept(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/customers")
    page.get_by_label("User name").fill(house.customer.username)
    page.get_by_label("Display name").fill("Li Wei")
    page.get_by_role("button", name="Make customer").click()
    expect(page.get_by_role("alert")).to_contain_text("already")
    expect(page.get_by_label("Display name")).to_have_value("Li Wei")


def test_a_disabled_customer_is_shut_out_at_once_and_let_in_again(house: House, open_as: Open) -> None:
    user = house.new_customer()
    theirs, page = open_as(user, "/my/keys"), open_as(house.admin, f"/customers?keyword={user.username}")
    press(page, "Disable")
    expect(page.get_by_text("disabled", exact=True)).to_be_visible()
    theirs.goto("/my/keys")
    expect(theirs.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()
    page.goto(f"/customers?keyword={user.username}")
    press(page, "Enable")
    expect(page.get_by_text("may sign in again")).to_be_visible()
    sign_in(theirs, user.username, PASSWORD)
    expect(theirs.get_by_role("heading", name="SSH keys")).to_be_visible()


def test_a_new_password_ends_the_old_one(house: House, windows: Windows, open_as: Open) -> None:
    user = house.new_customer()
    page = open_as(house.admin, f"/customers?keyword={user.username}")
    press(page, "New password")
    expect(page.get_by_role("heading", name=f"One-time password for {user.username}")).to_be_visible()
    new = windows.new()
    new.goto("/sign-in")
    sign_in(new, user.username, PASSWORD)
    expect(new.get_by_role("alert")).to_have_text("User name or password is wrong.")


def test_somebody_taken_out_of_a_tenant_sees_nothing_of_it(house: House, open_as: Open) -> None:
    user = house.new_customer()
    page = open_as(house.admin, f"/customers?keyword={user.username}")
    press(page, "Take out")
    expect(page.get_by_text("The keys leave the machines of Quark Labs now.")).to_be_visible()
    theirs = open_as(user, "/my/machines")
    expect(theirs.get_by_text("No machine is leased to you now.")).to_be_visible()
    assert users.find(user.username) is not None
