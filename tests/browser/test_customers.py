"""Customers and their tenants, as staff make them."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Page, expect

from portal.services import users
from tests.browser.conftest import House, Windows
from tests.browser.people import clipboard, press, sign_in
from tests.factories import PASSWORD, make_tenant, make_user

Open = Callable[..., Page]


def test_a_tenant_and_a_customer_are_made_and_the_password_is_shown_once(
    house: House, windows: Windows, open_as: Open
) -> None:
    page = open_as(house.admin, "/customers")
    page.get_by_role("link", name="Tenants").click()
    page.get_by_label("Company").last.fill("Northern Lights")
    page.get_by_role("button", name="Make tenant").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Northern Lights")
    page.get_by_role("link", name="New customer").click()
    expect(page.locator("#field-tenant_id")).to_have_value(re.compile(r"\d+"))
    page.get_by_label("User name").fill("aurora")
    with page.expect_response(lambda answer: answer.request.method == "POST") as made:
        page.get_by_role("button", name="Make customer").click()
    assert made.value.header_value("cache-control") == "no-store", "the way back does not show it again"
    expect(page.get_by_role("heading", name="One-time password for aurora")).to_be_visible()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    password = clipboard(page)
    page.get_by_role("link", name="Done").click()
    expect(page.get_by_role("row", name=re.compile("Northern Lights"))).to_contain_text("member")
    assert password not in page.content()
    new = windows.new()
    new.goto("/sign-in")
    sign_in(new, "aurora", password)
    expect(new.get_by_text("This password was given to you.")).to_be_visible()


def test_a_double_click_does_not_hide_the_password(house: House, open_as: Open) -> None:
    page = open_as(house.admin, f"/customers?tenant={house.tenant.id}")
    page.get_by_label("User name").fill("clicked-twice")
    page.get_by_role("button", name="Make customer").dblclick()
    expect(page.get_by_role("heading", name="One-time password for clicked-twice")).to_be_visible()
    expect(page.locator("#one-time")).to_have_text(re.compile(r"[a-z0-9-]{20,}"))


def test_nobody_is_put_into_a_tenant_that_was_not_chosen(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/customers")
    page.get_by_label("User name").fill("unplaced")
    page.get_by_role("button", name="Make customer").click()
    assert page.evaluate("document.querySelector('#field-tenant_id').validity.valueMissing")
    assert users.find("unplaced") is None


def test_a_taken_name_is_said_where_it_was_typed_and_the_rest_is_kept(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/customers")
    page.get_by_label("User name").fill(house.customer.username)
    page.get_by_label("Tenant").select_option("Quark Labs")
    page.get_by_label("Display name").fill("Li Wei")
    page.get_by_role("button", name="Make customer").click()
    expect(page.get_by_role("alert")).to_contain_text("already")
    expect(page.get_by_label("Display name")).to_have_value("Li Wei")
    expect(page.locator("#field-tenant_id")).to_have_value(str(house.tenant.id))


def test_a_disabled_customer_is_shut_out_at_once_and_let_in_again(house: House, open_as: Open) -> None:
    user = house.new_customer()
    theirs, page = open_as(user, "/my/keys"), open_as(house.admin, f"/customers?keyword={user.username}")
    page.get_by_role("link", name=user.username, exact=True).click()
    press(page, "Disable")
    expect(page.get_by_text("Disabled since")).to_be_visible()
    theirs.goto("/my/keys")
    expect(theirs.get_by_role("heading", name="Sign in to RemoteGPU")).to_be_visible()
    page.get_by_role("button", name="Enable").click()
    expect(page.get_by_text("may sign in again")).to_be_visible()
    sign_in(theirs, user.username, PASSWORD)
    expect(theirs.get_by_role("heading", name="SSH keys")).to_be_visible()


def test_a_new_password_ends_the_old_one(house: House, windows: Windows, open_as: Open) -> None:
    user, operator = house.new_customer(), make_user("operator")
    page = open_as(operator, f"/customers/{user.id}")
    press(page, "New password")
    expect(page.get_by_role("heading", name=f"One-time password for {user.username}")).to_be_visible()
    page.get_by_role("button", name="中文").click()  # what was posted is not opened again
    expect(page.get_by_role("heading", level=1)).to_have_text("机器")
    new = windows.new()
    new.goto("/sign-in")
    sign_in(new, user.username, PASSWORD)
    expect(new.get_by_role("alert")).to_have_text("User name or password is wrong.")


def test_a_profile_is_corrected_and_a_fault_stands_at_its_field(house: House, open_as: Open) -> None:
    user = house.new_customer()
    page = open_as(house.admin, f"/customers/{user.id}")
    page.get_by_label("Mail").evaluate("field => { field.type = 'text'; field.value = 'not a mail'; }")
    page.get_by_label("Full name").fill("李伟")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-email")).to_have_text("Write a mail address such as li.wei@example.org.")
    expect(page.get_by_label("Full name")).to_have_value("李伟")
    page.get_by_label("Mail").fill("li.wei@quark.example")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("The profile is saved.")).to_be_visible()
    expect(page.get_by_label("Mail")).to_have_value("li.wei@quark.example")


def test_people_are_put_into_a_tenant_given_a_role_and_taken_out(house: House, open_as: Open) -> None:
    user, tenant = house.new_customer(), make_tenant()
    host = house.leased_host(tenant)
    theirs = open_as(user, "/my/machines")
    expect(theirs.get_by_role("heading", name=host.machine.name, exact=True)).to_have_count(0)
    page = open_as(house.admin, f"/customers/tenants/{tenant.id}")
    page.get_by_label("User name").fill("nobody-of-this-name")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#fault-username")).to_have_text("There is no customer with this name.")
    page.get_by_label("User name").fill(user.username)
    page.locator("#field-role").select_option("viewer")
    page.get_by_role("button", name="Add", exact=True).click()
    row = page.get_by_role("row", name=re.compile(user.username))
    expect(row.get_by_label("Role")).to_have_value("viewer")
    theirs.reload()
    expect(theirs.get_by_role("button", name="Connect")).to_have_count(1)  # of the tenant that was there before
    row.get_by_label("Role").select_option("member")
    row.get_by_role("button", name="Change").click()
    expect(page.get_by_text("The role is changed")).to_be_visible()
    theirs.reload()
    expect(theirs.get_by_role("heading", name=host.machine.name, exact=True)).to_be_visible()
    press(page, "Take out")
    expect(page.get_by_text(f"The keys leave the machines of {tenant.name} now.")).to_be_visible()
    theirs.reload()
    expect(theirs.get_by_role("heading", name=host.machine.name, exact=True)).to_have_count(0)


def test_a_tenant_is_renamed_and_a_name_is_given_once(house: House, open_as: Open) -> None:
    tenant = make_tenant()
    page = open_as(house.admin, f"/customers/tenants/{tenant.id}")
    page.get_by_label("Company").fill("Quark Labs")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_contain_text("There is a tenant called Quark Labs already.")
    page.get_by_label("Company").fill("星海科技（上海）有限公司")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("星海科技（上海）有限公司")
