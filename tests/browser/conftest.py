"""A portal as an operator runs it, and people with a browser in front of it.

`house` is one web process over HTTPS with its own CA, for all tests. The tests write what hosts and the worker would
say through the services, into the database of that process (tests/support/rental.py). `open_as` is a person who signed
in; each page is watched, and a test fails when one of its pages reports an error or breaks the content policy.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from portal import start
from portal.db import db as database
from portal.integrations.wake import wake
from portal.migrate import migrate
from portal.models import Tenant, User
from portal.services import heartbeats
from portal.settings import Settings, load
from tests.browser.network import own_network
from tests.browser.people import sign_in
from tests.conftest import close_database
from tests.factories import PASSWORD, make_tenant, make_user
from tests.support import rental
from tests.support.portal import Portal, running
from tests.support.rental import Host

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (  # chromium's sandbox needs what root in a container lacks; the rest keeps it from calling home
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 15_000
SIGN_IN_LASTS_S = (
    300.0  # for other windows: after two thirds of its life a page renews it, and the others' copies are void
)
_numbers = itertools.count(1)

# What `ssh-keyscan` prints of a host: the border of this house. It answers for one address and no other.
KEYSCAN = f"""#!/bin/sh
for last; do :; done
[ "$last" = 192.0.2.200 ] && echo "$last {rental.HOST_KEY}"
exit 0
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass
class House:
    """The running portal, and the rows that tests share: an admin, a tenant with its customer, one of its machines."""

    portal: Portal
    settings: Settings
    admin: User = field(init=False)
    tenant: Tenant = field(init=False)
    customer: User = field(init=False)
    leased: Host = field(init=False)

    @property
    def url(self) -> str:
        return self.portal.url

    def fill(self) -> None:
        self.admin = make_user("admin", username="admin")
        self.tenant = make_tenant("Quark Labs")
        self.customer = self.new_customer()
        self.leased = self.leased_host()

    def new_customer(self, **fields: Any) -> User:
        name = fields.pop("username", f"person{next(_numbers)}")
        return make_user(username=name, tenant=fields.pop("tenant", self.tenant), member_role="owner", **fields)

    def ready_host(self) -> Host:
        return rental.ready_host(f"node-{next(_numbers):02d}")  # a name that no other maker of machines gives

    def leased_host(self, tenant: Tenant | None = None, **given: Any) -> Host:
        """A machine that has been leased to the tenant, and whose host has opened the lease."""
        host = self.ready_host()
        host.sees(rental.allocate(host, tenant or self.tenant, **given))
        return host


@pytest.fixture(scope="package")
def quiet() -> Iterator[None]:
    with own_network():
        yield


@pytest.fixture(scope="package")
def served(quiet: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    tools = folder / "bin"
    tools.mkdir()
    (tools / "ssh-keyscan").write_text(KEYSCAN)
    (tools / "ssh-keyscan").chmod(0o755)
    pipeline = {"NETWORK_WEBHOOK_URL": "http://127.0.0.1:1/", "NETWORK_WEBHOOK_SECRET": "s" * 64}  # no worker calls it
    portal = Portal(folder / "instance", environ={"PATH": f"{tools}:{os.environ['PATH']}", **pipeline})
    portal.command("init")
    house = House(
        portal, load({"INSTANCE_DIR": str(portal.instance), "PUBLIC_URL": portal.url, "BIND": portal.url[8:]})
    )
    start.bind(house.settings)
    migrate()
    house.fill()
    with running(portal):
        portal.start("web")
        yield house


@pytest.fixture
def house(served: House) -> Iterator[House]:
    """The portal, with the services of this process bound to its database."""
    start.bind(served.settings)
    yield served
    wake.stop()
    heartbeats.buffer.stop()
    close_database(database.obj)


@pytest.fixture(scope="package")
def browser(quiet: None) -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Windows:
    """Every browser window that a test opens, and what went wrong in them."""

    browser: Browser
    url: str
    faults: list[str] = field(default_factory=list)
    _contexts: list[BrowserContext] = field(default_factory=list)

    def new(self, *, url: str | None = None, locale: str = "en-US", width: int = 1280, kept: Any = None) -> Page:
        """A window of somebody who is not signed in, or whose sign-in the browser has `kept`."""
        context = self.browser.new_context(
            base_url=url or self.url,
            ignore_https_errors=True,  # the CA is the portal's own; tests of trust are elsewhere
            locale=locale,
            viewport={"width": width, "height": 900},
            permissions=["clipboard-read", "clipboard-write"],
            storage_state=kept,
        )
        context.set_default_timeout(PATIENCE_MS)
        self._contexts.append(context)
        context.on("page", self._watch)
        return context.new_page()

    def close(self) -> None:
        for context in self._contexts:
            context.close()

    def _watch(self, page: Page) -> None:
        page.on("pageerror", lambda error: self.faults.append(f"{page.url}: {error}"))
        page.on("console", lambda message: self._note(page, message.type, message.text))

    def _note(self, page: Page, kind: str, text: str) -> None:
        # A refusal that a test asks for is a failed resource to the browser; a 500 never is what was asked for.
        is_refusal = "Failed to load resource" in text and "status of 4" in text
        if kind in ("error", "warning") and not is_refusal:
            self.faults.append(f"{page.url}: {text}")


@pytest.fixture
def windows(browser: Browser, house: House) -> Iterator[Windows]:
    opened = Windows(browser, house.url)
    yield opened
    opened.close()
    assert opened.faults == []


@pytest.fixture(scope="package")
def sign_ins() -> dict[str, Any]:
    """User name → when it was made, and the sign-in that browsers of this person share."""
    return {}


@pytest.fixture
def open_as(windows: Windows, sign_ins: dict[str, Any]) -> Callable[..., Page]:
    """A window of somebody who has signed in: `open_as(user, "/path", locale=…, width=…)`.

    `fresh` is a sign-in of this window's own, for tests that end or renew it.
    """

    def opened(user: User, path: str = "/", *, fresh: bool = False, **window: Any) -> Page:
        at, kept = (0.0, None) if fresh else sign_ins.get(user.username, (0.0, None))
        if time.monotonic() - at > SIGN_IN_LASTS_S:
            kept = None
        page = windows.new(kept=kept, **window)
        page.goto(path)
        if kept is None:
            sign_in(page, user.username, PASSWORD)
            page.wait_for_url(lambda url: "/sign-in" not in url)
            if not fresh:
                sign_ins[user.username] = time.monotonic(), page.context.storage_state()
        return page

    return opened
