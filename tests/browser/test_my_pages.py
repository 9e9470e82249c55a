"""What a customer does: connect, keep keys, run tasks."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from portal.db import atomic
from portal.models import Task
from portal.services import leases, logs, tasks, tenants
from portal.services.actors import SYSTEM
from tests.api.fake_agent import attempt_report
from tests.browser.conftest import House
from tests.browser.people import clipboard, is_marked, mark, press
from tests.factories import actor_of, make_tenant, ssh_key_pair
from tests.support import rental

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
    command, fingerprint, known, block = copied
    assert command == f"ssh -p {host.machine.ssh_port} {lease.login}@{host.machine.address}"
    assert f"User {lease.login}" in block
    assert fingerprint.startswith("SHA256:")
    assert known.startswith(f"[{host.machine.address}]:{host.machine.ssh_port} ssh-ed25519 AAAA")
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)


def test_what_the_dialog_says_is_what_ssh_understands(house: House, open_as: Open, tmp_path: Path) -> None:
    """OpenSSH itself reads command, block and known_hosts line: IPv6 and a port of its own, IPv6 at 22, a name."""
    tenant = make_tenant()
    user = house.new_customer(tenant=tenant)
    for number, (address, port) in enumerate(
        (("2001:db8::7", 2222), ("2001:db8::8", 22), ("gpu.rent.example.org", 22))
    ):
        host = rental.ready_host(
            f"way-{number}", address=f"192.0.2.{230 + number}", ssh_port=port, public_address=address
        )
        host.sees(rental.allocate(host, tenant))
        lease = leases.find_open(host.machine)
        assert lease is not None
        page = open_as(user, "/my/machines")
        page.locator(".card", has=page.get_by_role("heading", name=f"way-{number}", exact=True)).last.get_by_role(
            "button", name="Connect"
        ).click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_text("You have no SSH key here yet")).to_be_visible()
        texts = {
            name: dialog.locator(f"#way-{name}").inner_text() for name in ("command", "config", "fingerprint", "known")
        }
        wanted = {"hostname": address, "port": str(port), "user": lease.login}
        (tmp_path / "config").write_text(texts["config"])
        (tmp_path / "known_hosts").write_text(texts["known"] + "\n")
        assert wanted.items() <= understood(shlex.split(texts["command"])[1:], tmp_path).items()
        by_block = understood([f"way-{number}"], tmp_path, "config")
        assert (wanted | {"stricthostkeychecking": "true"}).items() <= by_block.items()
        known_as = address if port == 22 else f"[{address}]:{port}"
        found = subprocess.run(
            ["ssh-keygen", "-l", "-F", known_as, "-f", tmp_path / "known_hosts"], capture_output=True, text=True
        )
        assert texts["fingerprint"] in found.stdout, found


def understood(arguments: list[str], folder: Path, config: str = "none") -> dict[str, str]:
    """What ssh would do with these arguments."""
    file = config if config == "none" else str(folder / config)
    said = subprocess.run(["ssh", "-F", file, "-G", *arguments], capture_output=True, text=True, check=True).stdout
    return dict(line.split(" ", 1) for line in said.splitlines() if " " in line)


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
    press(page, "Stop")
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


def test_somebody_who_only_looks_is_offered_no_task(house: House, open_as: Open) -> None:
    tenant = make_tenant()
    host = house.leased_host(tenant)
    member, viewer = house.new_customer(tenant=tenant), house.new_customer(tenant=tenant)
    tenants.set_member_role(tenant, viewer.id, "viewer", by=SYSTEM)
    task = tasks.create(host.id, name="theirs", command="true", env={}, time_limit_s=60, by=actor_of(member))
    page = open_as(viewer, f"/tasks/{task.id}")
    expect(page.get_by_role("heading", name="theirs")).to_be_visible()
    for name in ("Stop", "Try again"):
        expect(page.get_by_role("button", name=name)).to_have_count(0)
    page.goto("/tasks")
    expect(page.get_by_role("link", name="New task")).to_have_count(0)
    page.goto("/tasks/new")
    expect(page.get_by_text("You may look at tasks, but not start any")).to_be_visible()
    theirs = open_as(member, f"/tasks/{task.id}")
    expect(theirs.get_by_role("button", name="Stop")).to_be_visible()


def test_a_task_is_started_again_with_changes(house: House, open_as: Open) -> None:
    holder = actor_of(house.customer)
    command, env = "python3 train.py\n", {"SEED": "7", "LR": "1e-5"}
    task = tasks.create(house.leased.id, name="first", command=command, env=env, time_limit_s=120, by=holder)
    page = open_as(house.customer, f"/tasks/{task.id}")
    page.get_by_role("link", name="New task like this").click()
    expect(page.locator("#field-command")).to_have_value(command)
    expect(page.locator("#field-env")).to_have_value("SEED=7\nLR=1e-5")
    page.locator("#field-name").fill("second")
    page.locator("#field-env").fill("SEED=8")
    page.get_by_role("button", name="Start task").click()
    expect(page.get_by_role("heading", name="second")).to_be_visible()
    again = Task.get(Task.name == "second")
    assert (again.command, again.env, again.time_limit_s) == (command, {"SEED": "8"}, 120)
