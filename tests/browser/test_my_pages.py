"""What a customer does: connect, keep keys, run tasks."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Page, expect

from portal.db import atomic
from portal.models import Task
from portal.services import leases, logs, tasks, tenants
from portal.services.actors import SYSTEM
from tests.api.fake_agent import attempt_report
from tests.browser.conftest import House
from tests.browser.people import clipboard, is_marked, mark, press
from tests.factories import make_tenant, ssh_key_pair

Open = Callable[..., Page]


def test_the_connection_dialog_gives_what_ssh_needs(house: House, open_as: Open) -> None:
    host = house.leased
    lease = leases.find_open(host.machine)
    assert lease is not None
    page = open_as(house.customer, "/my/machines")
    card = page.locator(".card", has=page.get_by_role("heading", name=host.machine.name, exact=True)).last
    card.get_by_role("button", name="Connect").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading", name=f"Connect to {host.machine.name}")).to_be_visible()
    buttons = dialog.locator("[data-copy]")
    copied = []
    for number in range(4):
        buttons.nth(number).click()
        expect(buttons.nth(number)).to_have_text("Copied")
        copied.append(clipboard(page))
    command, block, fingerprint, known = copied
    assert command == f"ssh -p {host.machine.ssh_port} {lease.login}@{host.machine.address}"
    assert f"User {lease.login}" in block
    assert fingerprint.startswith("SHA256:")
    assert known.startswith(f"[{host.machine.address}]:{host.machine.ssh_port} ssh-ed25519 AAAA")
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)


def test_a_key_is_added_refused_twice_and_removed(house: House, open_as: Open) -> None:
    line, private = ssh_key_pair()
    page = open_as(house.new_customer(), "/my/keys")
    expect(page.get_by_text("No key yet.")).to_be_visible()
    add_key(page, "Laptop", private)
    expect(page.get_by_text("This is a private key.")).to_be_visible()
    add_key(page, "Laptop", line)
    expect(page.get_by_role("row", name=re.compile("Laptop"))).to_contain_text("on its way")
    add_key(page, "Again", line)
    expect(page.get_by_role("alert")).to_contain_text("You have this key already")
    expect(page.locator("#field-name")).to_have_value("Again")
    press(page, "Remove")
    expect(page.get_by_text("The key Laptop is removed")).to_be_visible()
    expect(page.get_by_text("No key yet.")).to_be_visible()


def add_key(page: Page, name: str, text: str) -> None:
    page.locator("#field-name").fill(name)
    page.locator("#field-key").fill(text)
    page.get_by_role("button", name="Add key").click()


def test_a_task_is_started_followed_live_and_stopped(house: House, open_as: Open) -> None:
    page = open_as(house.customer, f"/tasks/new?machine={house.leased.id}")
    page.locator("#field-name").fill("epochs")
    page.locator("#field-command").fill("python3 train.py\n")
    page.locator("#field-env").fill("SEED")
    page.get_by_role("button", name="Start task").click()
    expect(page.get_by_text("Line 1: write NAME=value.")).to_be_visible()
    expect(page.locator("#field-command")).to_have_value("python3 train.py\n")
    page.locator("#field-env").fill("SEED=7")
    page.get_by_role("button", name="Start task").click()
    expect(page.get_by_role("heading", name="epochs")).to_be_visible()
    expect(page.get_by_text("queued", exact=True)).to_be_visible()
    follow(page, house, Task.get(Task.name == "epochs"))


def follow(page: Page, house: House, task: Task) -> None:
    attempt = tasks.newest_attempt(task)
    assert task.env == {"SEED": "7"}
    mark(page)
    tasks.attempt_reported(house.leased.machine, attempt_report(attempt.id, "running"))
    expect(page.get_by_text("running", exact=True)).to_be_visible()
    write(house, task, attempt.id, b"epoch 1 \x1b[32mloss\x1b[0m 2.31\n")
    expect(page.locator("#output")).to_have_text("epoch 1 loss 2.31\n")
    write(house, task, attempt.id, "第二轮\n".encode())
    expect(page.locator("#output")).to_contain_text("第二轮")
    assert is_marked(page), "all of it came without a reload"
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("stopping…")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    mark(page)
    tasks.attempt_reported(house.leased.machine, attempt_report(attempt.id, "stopped", signal=15))
    write(house, task, attempt.id, b"", end=True)
    expect(page.get_by_text("stopped", exact=True)).to_be_visible()
    expect(page.get_by_text("signal 15")).to_be_visible()
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    assert is_marked(page)


def write(house: House, task: Task, attempt_id: int, data: bytes, *, end: bool = False) -> None:
    """The host sends the next bytes of the output."""
    with atomic():
        logs.append(attempt_id, offset=logs.of(attempt_id).offset, data=data, end=end)
        logs.announce(attempt_id, task_id=task.id, tenant_id=house.tenant.id)


def test_without_a_lease_no_task_is_offered(house: House, open_as: Open) -> None:
    page = open_as(house.new_customer(tenant=make_tenant()), "/tasks/new")
    expect(page.get_by_text("A task needs a machine that is leased to you now.")).to_be_visible()


def test_somebody_who_only_looks_is_offered_no_way_in(house: House, open_as: Open) -> None:
    tenant = make_tenant()
    house.leased_host(tenant)
    viewer = house.new_customer(tenant=tenant)
    page = open_as(viewer, "/my/machines")
    expect(page.get_by_role("button", name="Connect")).to_be_visible()
    tenants.set_member_role(tenant, viewer.id, "viewer", by=SYSTEM)
    page.reload()
    expect(page.get_by_text("active", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Connect")).to_have_count(0)
