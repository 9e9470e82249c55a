"""What people do on the pages, in their words."""

from __future__ import annotations

from playwright.sync_api import Dialog, Page


def sign_in(page: Page, username: str, password: str) -> None:
    page.locator("#field-username").fill(username)
    page.locator("#field-password").fill(password)
    page.locator("form.card button.btn-primary").click()


def mark(page: Page) -> None:
    """Leave a mark in the window that a reload would wipe off."""
    page.evaluate("window.mark = true")


def is_marked(page: Page) -> bool:
    """Whether the page is still the one that was marked."""
    return bool(page.evaluate("window.mark === true"))


def clipboard(page: Page) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


def press(page: Page, name: str) -> None:
    """The button with this name, and yes to what it asks. It must ask."""
    asked = []

    def accept(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.accept()

    page.once("dialog", accept)
    page.get_by_role("button", name=name, exact=True).click()
    assert asked, f"{name!r} did not ask first"
