"""Accounts: those of the staff, and everybody's own: profile, language, sign-ins, API tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

import requests
from playwright.sync_api import Page, expect

from portal.models import ApiToken, AuditEntry, User
from tests.browser.conftest import House, Windows
from tests.browser.people import clipboard, press, sign_in
from tests.factories import PASSWORD, make_user

Open = Callable[..., Page]


def test_an_admin_makes_an_operator_who_then_works_and_makes_no_staff(
    house: House, windows: Windows, open_as: Open
) -> None:
    page = open_as(house.admin, "/machines")
    page.get_by_role("navigation").get_by_role("link", name="Staff").click()
    page.get_by_label("User name").fill("night-shift")
    page.get_by_role("button", name="Make account").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    password = clipboard(page)
    page.get_by_role("link", name="Done").click()
    expect(page.get_by_role("row", name=re.compile("night-shift"))).to_contain_text("operator")
    assert password not in page.content()
    theirs = windows.new()
    theirs.goto("/sign-in")
    sign_in(theirs, "night-shift", password)
    theirs.locator("#field-old_password").fill(password)
    theirs.locator("#field-new_password").fill(PASSWORD)
    theirs.get_by_role("button", name="Change password").click()
    expect(theirs.get_by_role("heading", level=1)).to_have_text("Machines")
    expect(theirs.get_by_role("navigation").get_by_role("link", name="Staff")).to_have_count(0)
    theirs.goto("/staff")
    expect(theirs.get_by_role("heading", level=1)).to_have_text("Not for you")


def test_somebody_of_the_staff_is_shut_out_and_let_in_again_but_never_oneself(house: House, open_as: Open) -> None:
    other = make_user("operator", username="leaver")
    theirs, page = open_as(other, "/machines"), open_as(house.admin, "/staff?keyword=leaver")
    press(page, "Disable")
    expect(page.get_by_text("leaver is disabled: sign-ins and tokens.")).to_be_visible()
    theirs.goto("/leases")
    expect(theirs.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()
    page.goto("/staff?keyword=leaver")
    page.get_by_role("button", name="Enable").click()
    expect(page.get_by_text("leaver may sign in again.")).to_be_visible()
    own = page.goto("/staff?keyword=admin")
    assert own is not None
    expect(page.get_by_role("row", name=re.compile("^admin"))).to_contain_text("That is you.")
    expect(page.get_by_role("row", name=re.compile("^admin")).get_by_role("button")).to_have_count(0)


def test_a_token_is_shown_once_works_and_is_refused_once_revoked(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/machines")
    page.locator("details.account summary").click()
    page.get_by_role("link", name="API tokens").click()
    page.locator("#field-name").fill("nightly inventory")
    page.get_by_label("Valid for (days)").fill("7")
    page.get_by_role("button", name="Make token").click()
    expect(page.get_by_role("alert")).to_contain_text("Choose from")
    expect(page.locator("#field-name")).to_have_value("nightly inventory")
    page.get_by_label("inventory read the machines").check()
    page.get_by_role("button", name="Make token").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    secret = clipboard(page)
    assert answer_to(house, secret) == 200
    page.get_by_role("link", name="Done").click()
    row = page.get_by_role("row", name=re.compile("nightly inventory"))
    expect(row).to_contain_text("inventory")
    assert secret not in page.content()
    page.once("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="Revoke").click()
    expect(page.get_by_text("The token nightly inventory is revoked")).to_be_visible()
    assert answer_to(house, secret) == 401
    token = ApiToken.get(ApiToken.name == "nightly inventory")
    told = AuditEntry.select().where(AuditEntry.resource_type == "apitoken", AuditEntry.resource_id == token.id)
    assert [entry.action for entry in told.order_by(AuditEntry.id)] == ["api_token.created", "api_token.revoked"]


def answer_to(house: House, secret: str) -> int:
    """What the portal says to a program that shows this token."""
    with requests.Session() as session:
        session.trust_env = False
        bearer = {"Authorization": f"Bearer {secret}"}
        url = f"{house.url}/api/v1/admin/inventory"
        return session.get(url, headers=bearer, verify=str(house.portal.ca_file), timeout=30).status_code


def test_a_customers_token_can_only_be_made_to_read(house: House, open_as: Open) -> None:
    page = open_as(house.customer, "/account/tokens")
    expect(page.get_by_role("checkbox")).to_have_count(1)
    page.locator("#field-name").fill("watcher")
    page.get_by_role("button", name="Make token").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The token watcher")
    assert ApiToken.get(ApiToken.name == "watcher").scopes == ["read"]


def test_the_profile_and_its_language_are_saved(house: House, open_as: Open) -> None:
    user = house.new_customer()
    page = open_as(user, "/account")
    page.get_by_label("Display name").fill("王小明")
    page.get_by_label("Language").select_option("zh_CN")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("我的账户")
    expect(page.locator("details.account summary")).to_have_text("王小明")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("My account")
    assert User.get_by_id(user.id).locale == "en", "the switch counts, also where a language is in the profile"


def test_every_other_sign_in_is_seen_and_ended(house: House, open_as: Open) -> None:
    user = house.new_customer()
    here, there = open_as(user, "/account", fresh=True), open_as(user, "/my/keys", fresh=True)
    here.reload()
    expect(here.get_by_text("this one")).to_have_count(1)
    expect(here.get_by_role("cell", name=re.compile("Chrome"))).to_have_count(2)
    press(here, "End")
    expect(here.get_by_text("That sign-in has ended.")).to_be_visible()
    there.goto("/my/keys")
    expect(there.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()


def test_signing_out_everywhere_ends_this_one_too(house: House, open_as: Open) -> None:
    user = house.new_customer()
    here, there = open_as(user, "/account", fresh=True), open_as(user, "/my/keys", fresh=True)
    press(here, "Sign out everywhere")
    expect(here.get_by_text("You are signed out everywhere, here too.")).to_be_visible()
    for page in (here, there):
        page.goto("/my/keys")
        expect(page.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()


def test_the_menus_can_be_used_with_the_keyboard_alone(house: House, open_as: Open) -> None:
    page = open_as(house.customer, "/my/machines")
    page.keyboard.press("Tab")
    expect(page.locator(".skip-link")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    menu = page.locator("details.account")
    menu.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(menu.get_by_role("link", name="My account")).to_be_visible()
    page.keyboard.press("Escape")
    expect(menu.get_by_role("link", name="My account")).to_be_hidden()
    expect(menu.locator("summary")).to_be_focused()


def test_on_a_narrow_screen_the_menu_opens(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/machines", width=390)
    link = page.get_by_role("navigation").get_by_role("link", name="Audit")
    expect(link).to_be_hidden()
    page.get_by_role("button", name="Menu").click()
    expect(page.get_by_role("button", name="Menu")).to_have_attribute("aria-expanded", "true")
    link.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Audit")
