"""Machines, as staff see them: from an address that somebody typed to a lease, and back."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Page, Route, expect

from portal.models import Machine
from portal.services import leases, machines, provisioning, runs
from portal.services.actors import SYSTEM
from portal.services.runs import Line, Outcome
from tests.browser.conftest import House
from tests.browser.people import is_marked, mark, press
from tests.support import rental
from tests.support.rental import Host

Open = Callable[..., Page]
REFUSAL = "Use 1 to 63 of a-z, 0-9, '.' and '-', with a letter or digit at both ends."


def test_a_machine_is_added_confirmed_and_provisioned_before_our_eyes(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/machines")
    page.get_by_role("link", name="Add machine").click()
    page.locator("#field-name").fill("bare-01")
    page.locator("#field-address").fill("192.0.2.200")
    page.locator("#field-password").fill("first contact")
    page.get_by_role("button", name="Add machine").click()
    expect(page.get_by_text(machines.fingerprint(rental.HOST_KEY))).to_be_visible()
    expect(page.get_by_role("button", name="Provision")).to_be_disabled()
    page.get_by_role("button", name="It is: pin this key").click()
    expect(page.get_by_text("The host key is pinned.")).to_be_visible()
    page.get_by_role("button", name="Provision").click()
    expect(page.get_by_text("Provisioning is queued")).to_be_visible()
    watch_it_become_ready(page, Machine.get(Machine.name == "bare-01"))


def watch_it_become_ready(page: Page, machine: Machine) -> None:
    host = Host(machine)
    token = "token-of-a-worker"
    run = runs.claim(token, lock_s=60)
    assert run is not None
    expect(page.locator(".output")).to_be_visible()  # the page has seen that the run began
    expect(page.get_by_text("running").first).to_be_visible()
    mark(page)
    for number in (1, 2, 3):
        runs.record(run, token, [Line("runner_on_ok", f"TASK [base : Step {number}]\nok: [bare-01]")], lock_s=60)
        expect(page.locator(".output")).to_contain_text(f"Step {number}")
    assert is_marked(page), "its output came without a reload"
    host.enrol()
    runs.finish(run, token, Outcome("succeeded", exit_code=0))
    host.answers("baseline", rental.baseline())
    host.report()
    expect(page.get_by_role("link", name="Allocate")).to_be_visible()
    expect(page.locator("#live").get_by_text("ready", exact=True)).to_be_visible()
    expect(page.get_by_text("NVIDIA H100")).to_have_count(2)
    expect(page.get_by_text("Debian GNU/Linux 12")).to_be_visible()


def test_a_refused_machine_names_the_field_and_keeps_what_was_typed(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/machines/add")
    page.locator("#field-name").fill("No Such Name")
    page.locator("#field-address").fill("192.0.2.7")
    page.locator("#field-password").fill("a secret")
    page.get_by_role("button", name="Add machine").click()
    expect(page.locator("#fault-name")).to_have_text(REFUSAL)
    expect(page.locator("#field-name")).to_have_value("No Such Name")
    expect(page.locator("#field-address")).to_have_value("192.0.2.7")
    expect(page.locator("#field-password")).to_have_value("")
    assert "a secret" not in page.content()


def test_a_host_that_does_not_answer_is_said_and_asked_again(house: House, open_as: Open) -> None:
    machine = rental.register("silent-01")
    page = open_as(house.admin, f"/machines/{machine.id}")
    page.get_by_role("button", name="Ask again").click()
    expect(page.get_by_text("No SSH server answered at")).to_be_visible()


def test_allocate_names_the_faulty_field_and_keeps_what_was_typed(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, f"/machines/{host.id}")
    page.get_by_role("link", name="Allocate").click()
    expect(page.locator("#field-tenant_id")).to_have_value("")  # nobody is chosen by itself
    page.locator("#field-tenant_id").select_option("Quark Labs")
    page.locator("#field-until").fill("2020-01-01T00:00")
    page.locator("#field-retain_h").fill("3")
    page.locator("#field-remark").fill("training of the spring")
    page.get_by_role("button", name="Allocate").click()
    expect(page.locator("#fault-until")).to_have_text("Lies in the past.")
    expect(page.locator("#field-remark")).to_have_value("training of the spring")
    expect(page.locator("#field-retain_h")).to_have_value("3")
    assert host.state == "ready"
    page.locator("#field-until").fill("2099-01-01T00:00")
    expect(page.locator("#field-tenant_id option:checked")).to_have_text("Quark Labs")
    page.get_by_role("button", name="Allocate").click()
    expect(page.locator("#live").get_by_text("leased", exact=True)).to_be_visible()
    expect(page.get_by_text("The host has not acknowledged it yet.")).to_be_visible()
    lease = leases.find_open(host.machine)
    assert lease is not None
    assert lease.retain_s == 3 * 3600, "typed in hours"


def test_extending_shows_both_ends_until_the_host_has_acknowledged(house: House, open_as: Open) -> None:
    host = house.leased_host()
    lease = leases.find_open(host.machine)
    assert lease is not None
    page = open_as(house.admin, f"/leases/{lease.id}")
    page.locator("#field-until").fill("2020-01-01T00:00")
    page.get_by_role("button", name="Extend").click()
    expect(page.locator("#fault-until")).to_contain_text("Must be later than")
    page.locator("#field-until").fill("2098-01-01T00:00")
    page.get_by_role("button", name="Extend").click()
    expect(page.get_by_text("2098-01-01 00:00:00 UTC")).to_be_visible()
    expect(page.get_by_text("The host still ends it at")).to_contain_text(f"{lease.ends_at:%Y-%m-%d %H:%M:%S} UTC")
    mark(page)
    host.sees(lease)
    expect(page.get_by_text("The host still ends it at")).to_have_count(0)
    assert is_marked(page)


def test_reclaim_asks_why_and_ends_the_lease(house: House, open_as: Open) -> None:
    host = house.leased_host()
    page = open_as(house.admin, f"/machines/{host.id}")
    page.get_by_role("button", name="Reclaim", exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("The lease ends now")
    dialog.get_by_label("Wipe at once, without keeping the data").check()
    dialog.get_by_label("Reason").fill("the contract is over")
    dialog.get_by_role("button", name="Reclaim").click()
    expect(dialog.locator("#fault-reclaim-confirm")).to_contain_text("Type the machine's name")
    expect(dialog.get_by_label("Reason")).to_have_value("the contract is over")
    expect(dialog.get_by_label("Wipe at once, without keeping the data")).to_be_checked()
    assert leases.find_open(host.machine).state == "active"  # type: ignore[union-attr]  # it is leased
    dialog.get_by_label("To wipe at once, type the machine's name").fill(host.machine.name)
    dialog.get_by_role("button", name="Reclaim").click()
    expect(page.get_by_text("The machine is being taken back.")).to_be_visible()
    expect(page.get_by_text("Still open").first).to_be_visible()


def test_a_report_tells_each_step_with_its_evidence(house: House, open_as: Open) -> None:
    host = house.ready_host()
    lease = rental.allocate(host, house.tenant)
    host.sees(lease)
    rental.end(host, lease)
    rental.reclaim(host, lease, said=rental.verdict(ports_from_outside="failed", accounts="passed"))
    page = open_as(house.admin, f"/machines/{host.id}")
    expect(page.locator("#live").get_by_text("quarantined")).to_be_visible()
    page.get_by_role("link", name="Report").click()
    expect(page.get_by_role("row", name=re.compile("ports_from_outside"))).to_contain_text("failed")
    expect(page.get_by_role("row", name=re.compile("accounts"))).to_contain_text("passed")
    with page.expect_download() as download:
        page.get_by_role("link", name="Signed file").click()
    assert b"signature" in download.value.path().read_bytes()


def test_maintenance_begins_and_ends_and_the_lease_goes_on(house: House, open_as: Open) -> None:
    host = house.leased_host()
    page = open_as(house.admin, f"/machines/{host.id}")
    page.get_by_role("button", name="Maintenance").click()
    page.get_by_role("dialog").get_by_label("Reason").fill("a fan is changed")
    page.get_by_role("button", name="Start maintenance").click()
    expect(page.locator("#live")).to_contain_text("a fan is changed")
    assert host.state == "leased"
    page.get_by_role("button", name="Maintenance").click()
    page.get_by_role("button", name="End maintenance").click()
    expect(page.get_by_text("Maintenance has ended.")).to_be_visible()
    expect(page.locator("#live")).not_to_contain_text("a fan is changed")


def test_a_new_baseline_is_taken_of_a_free_machine_with_a_reason(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, f"/machines/{host.id}")
    page.get_by_role("button", name="Take baseline").click()
    sheet = page.get_by_role("dialog")
    sheet.get_by_label("Reason").fill("a port is closed")
    sheet.get_by_role("button", name="Take baseline").click()
    expect(page.get_by_text("A new baseline is being taken")).to_be_visible()
    assert host.state == "provisioning"
    host.answers("baseline", rental.baseline())
    assert host.state == "ready"


def test_a_machine_is_edited_retired_or_deleted(house: House, open_as: Open) -> None:
    host, unused = house.ready_host(), rental.register("typed-by-mistake")
    page = open_as(house.admin, f"/machines/{host.id}")
    page.get_by_role("link", name="Edit").click()
    page.locator("#field-region").fill("Shanghai")
    page.locator("#field-address").fill("not an address")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-address")).to_contain_text("is neither an IP address nor a host name")
    page.locator("#field-address").fill("192.0.2.199")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Shanghai")).to_be_visible()
    retire = page.get_by_role("dialog")
    page.get_by_role("button", name="Retire", exact=True).click()
    retire.get_by_label("Reason").fill("sold")
    retire.get_by_label("Type the machine's name").fill("another")
    retire.get_by_role("button", name="Retire").click()
    expect(retire.locator("#fault-retire-confirm")).to_have_text("Type the machine's name to retire it.")
    expect(retire.get_by_label("Reason")).to_have_value("sold")
    assert host.state == "ready"
    retire.get_by_label("Type the machine's name").fill(host.machine.name)
    retire.get_by_role("button", name="Retire").click()
    expect(page.get_by_role("status").filter(has_text="its history stays")).to_be_visible()
    assert host.state == "retired"
    expect(page.get_by_role("button", name="Maintenance")).to_have_count(0)
    page.goto(f"/machines/{unused.id}")
    press(page, "Delete")
    expect(page.get_by_text("The machine typed-by-mistake is deleted.")).to_be_visible()


def test_a_run_is_cancelled_from_its_page(house: House, open_as: Open) -> None:
    run = provisioning.provision(rental.confirm(rental.register()), by=SYSTEM)
    page = open_as(house.admin, f"/runs/{run.id}")
    press(page, "Cancel")
    expect(page.get_by_text("cancelled").first).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_the_list_shows_a_new_state_by_itself(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, f"/machines?keyword={host.machine.name}")
    row = page.get_by_role("row", name=re.compile(host.machine.name))
    expect(row).to_contain_text("ready")
    mark(page)
    rental.allocate(host, house.tenant)
    expect(row).to_contain_text("Quark Labs")
    assert is_marked(page)


def test_labels_are_written_corrected_and_cleared(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, f"/machines/{host.id}/edit")
    labels = page.get_by_label("Labels")
    for typed, said in (("pool", "Line 1: write NAME=value."), ("Pool=training", "a label's name is 1 to 63")):
        labels.fill(typed)
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#fault-labels")).to_contain_text(said)
        expect(labels).to_have_value(typed)
    labels.fill("pool=training\nib=yes")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("pool=training")).to_be_visible()
    assert host.machine.labels == {"pool": "training", "ib": "yes"}
    page.get_by_role("link", name="Edit").click()
    expect(labels).to_have_value("ib=yes\npool=training")
    labels.fill("")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("pool=training")).to_have_count(0)
    assert host.machine.labels == {}


def test_another_host_key_is_pinned_only_with_a_reason(house: House, open_as: Open) -> None:
    host = house.ready_host()
    pinned, other = ({"type": "ssh-ed25519", "line": line} for line in (rental.HOST_KEY, rental.OTHER_HOST_KEY))
    machines.offer_host_keys(host.machine, [other, pinned], by=SYSTEM)  # a host has a key of each type
    page = open_as(house.admin, f"/machines/{host.id}")
    card = page.locator("#host-key")
    expect(card).to_have_count(0)
    machines.offer_host_keys(host.machine, [other], by=SYSTEM)
    page.reload()
    expect(card).to_contain_text("The host has shown another key than the pinned one")
    expect(card).to_contain_text(machines.fingerprint(rental.OTHER_HOST_KEY))
    card.get_by_role("button", name="It is: pin this key").click()
    assert card.get_by_label("Why it changed").evaluate("field => field.validity.valueMissing")
    assert host.machine.host_key == rental.HOST_KEY
    card.get_by_label("Why it changed").fill("the mainboard was replaced, ticket 4711")
    press(page, "It is: pin this key")
    expect(page.get_by_text("The host key is pinned.")).to_be_visible()
    expect(page.locator("#host-key")).to_have_count(0)
    assert host.machine.host_key == rental.OTHER_HOST_KEY


def test_a_gpu_that_was_taken_out_is_forgotten_and_the_machine_is_healthy(house: House, open_as: Open) -> None:
    host = house.ready_host()
    host.report(gpu=rental.gpu_report([rental.gpu(host.gpu_uuids[0])]))
    page = open_as(house.admin, f"/machines/{host.id}")
    row = page.get_by_role("row", name=re.compile(host.gpu_uuids[1]))
    expect(row).to_contain_text("missing")
    row.get_by_role("link", name="It was taken out…").click()
    page.get_by_label("Reason").fill("returned to the vendor")
    page.get_by_role("button", name="It was taken out").click()
    expect(page.get_by_text("The GPU is not expected any more.")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile(host.gpu_uuids[1]))).to_have_count(0)
    expect(page.locator("#live").get_by_text("healthy", exact=True)).to_be_visible()


def test_a_lease_is_planned_ahead_and_called_off(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, f"/machines/{host.id}/allocate")
    page.locator("#field-tenant_id").select_option("Quark Labs")
    page.locator("#field-starts_at").fill("2097-01-01T00:00")
    page.locator("#field-until").fill("2098-01-01T00:00")
    page.get_by_role("button", name="Allocate").click()
    expect(page.locator("#live").get_by_text("ready", exact=True)).to_be_visible()
    page.get_by_role("row", name=re.compile("scheduled")).get_by_role("link").click()
    page.get_by_label("Reason").fill("the project was cancelled")
    press(page, "Call off")
    expect(page.get_by_text("The lease is called off.")).to_be_visible()
    expect(page.locator("#lease-state").get_by_text("ended", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Call off")).to_have_count(0)


def test_what_was_done_to_a_machine_is_found_in_the_audit(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, f"/machines/{host.id}")
    page.get_by_role("link", name="What was done to it, and by whom").click()
    expect(page.get_by_text("machine.registered")).to_be_visible()
    about = page.get_by_role("row").filter(has_text="machine #").all_inner_texts()
    assert about
    assert all(f"machine #{host.id}" in row for row in about)


def test_what_can_be_seen_works_however_late_its_script_comes(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, "/machines")
    held: list[Route] = []
    page.route("**/portal.js*", lambda route: held.append(route))
    page.goto(f"{house.url}/machines/{host.id}", wait_until="commit")
    page.locator(".modal-sheet").last.wait_for(state="attached")  # the end of the page is there
    assert page.evaluate("performance.getEntriesByName('first-paint').length") == 0
    held[0].continue_()
    page.get_by_role("button", name="Retire", exact=True).click()
    expect(page.get_by_role("dialog")).to_be_visible()
