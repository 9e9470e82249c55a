"""The network on pages: what staff write down and see, what a lease has open, and what customers open themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from playwright.sync_api import Page, expect

from portal.db import atomic, utcnow
from portal.models import DnsRecord, DnsZone, Forward, Grant, Lease, Machine, NetworkState, Opening
from portal.services import leases, network, network_openings, network_posts, network_requests, tenants
from portal.services.actors import SYSTEM
from tests.browser.conftest import House
from tests.browser.people import is_marked, mark, press
from tests.factories import actor_of, make_tenant
from tests.support import network as ground
from tests.support import rental
from tests.support.rental import Host

Open = Callable[..., Page]
LATE = timedelta(hours=3)


@pytest.fixture
def zone(house: House) -> DnsZone:
    """The one that holds the names of leases, for all tests of this house."""
    found: DnsZone | None = DnsZone.get_or_none(DnsZone.serves_leases)
    return found or ground.zone("rent.example.org", serves_leases=True)


def new_gateway(name: str) -> Host:
    """A gateway of its own for a test."""
    host = rental.ready_host(name, public_address="198.51.100.1")
    ground.place(host, forward_ports="20000-20099")
    return host


def held(host: Host) -> Lease:
    lease = leases.find_open(host.machine)
    assert lease is not None
    return lease


# Staff


def test_a_zone_is_written_down_refused_by_its_field_and_forgotten(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/network/zones/new")
    page.get_by_label("Zone", exact=False).first.fill("no..such.example.org")
    page.locator("#field-cloud").select_option("aws")
    page.locator("#field-external_id").fill("Z 0")
    page.get_by_label("It holds the names of machines").check()
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-name")).to_contain_text("has an empty label between two dots")
    expect(page.locator("#fault-external_id")).to_contain_text("Use the provider's id of the zone")
    expect(page.get_by_label("It holds the names of machines")).to_be_checked()
    page.locator("#field-name").fill("例子.example.org")
    page.locator("#field-external_id").fill("Z0123")
    page.get_by_label("It holds the names of machines").uncheck()
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status")).to_contain_text("is written down")
    page.get_by_role("link", name="例子.example.org").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("例子.example.org")
    press(page, "Forget")
    expect(page.get_by_role("status")).to_contain_text("in the cloud it stays")
    assert not DnsZone.select().where(DnsZone.cloud == "aws").exists()


def test_a_group_is_written_down_and_stands_before_a_machine(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, "/network/groups/new")
    page.locator("#field-name").fill("rack-9")
    page.locator("#field-cloud").select_option("aws")
    page.locator("#field-region").fill("Frankfurt")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-region")).to_contain_text("Write the region as the cloud does")
    page.locator("#field-region").fill("eu-central-1")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-vpc")).to_contain_text("a security group of AWS needs its VPC")
    page.locator("#field-vpc").fill("vpc-0a1b2c")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status")).to_contain_text("is written down")
    page.goto(f"/machines/{host.id}")
    page.get_by_role("link", name="Gateway and group").click()
    page.locator("#field-security_group_id").select_option("rack-9 · AWS eu-central-1")
    page.locator("#field-forward_ports").fill("22-99")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-forward_ports")).to_contain_text("Write the first and the last port")
    page.locator("#field-forward_ports").fill("")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#network").get_by_role("link", name="rack-9")).to_be_visible()
    page.locator("#network").get_by_role("link", name="rack-9").click()
    press(page, "Forget")
    expect(page.get_by_text("1 machines stand behind rack-9")).to_be_visible()


def test_a_record_names_its_faulty_line_and_is_found_changed_and_removed(
    house: House, open_as: Open, zone: DnsZone
) -> None:
    page = open_as(house.admin, "/network/records/new")
    page.locator("#field-zone_id").select_option(str(zone.id))
    page.locator("#field-name").fill(f"mail.{zone.name}")
    page.locator("#field-type").select_option("MX")
    page.locator("#field-values").fill("10 a.example.org\nb.example.org")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-values")).to_have_text("Line 2: write it as in “10 mail.example.org”.")
    page.locator("#field-values").fill("10 a.example.org\n20 b_c.example.org")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-values")).to_contain_text("Line 2: 'b_c.example.org': a mail server's name has no")
    page.locator("#field-values").fill("10 a.example.org\n20 b.example.org")
    page.locator("#field-ttl_s").fill("300")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status")).to_contain_text("The record is wanted")
    page.goto("/network/names?keyword=mail.")
    row = page.get_by_role("row", name=re.compile(f"mail.{zone.name}"))
    expect(row).to_contain_text("10 a.example.org")
    expect(row).to_contain_text("to be made")
    expect(row).to_contain_text("admin")
    row.get_by_role("link").click()
    expect(page.locator("#field-values")).to_have_value("10 a.example.org\n20 b.example.org")
    page.locator("#field-values").fill("5 a.example.org")
    page.get_by_role("button", name="Save").click()
    (record,) = DnsRecord.select().where(DnsRecord.name == f"mail.{zone.name}")
    assert (record.values, record.ttl_s) == ([{"priority": 5, "target": "a.example.org"}], 300)
    page.goto(f"/network/records/{record.id}")
    press(page, "Remove")
    expect(page.get_by_role("status")).to_contain_text("wanted no longer")
    page.goto("/network/names?keyword=mail.")
    expect(page.get_by_text("No name fits.")).to_be_visible()


def test_the_world_is_let_in_with_a_reason_alone_and_shut_out_again(house: House, open_as: Open) -> None:
    host = house.ready_host()
    page = open_as(house.admin, f"/machines/{host.id}")
    page.locator("#network").get_by_role("link", name="Opening").click()
    expect(page.locator("#field-machine")).to_have_value(host.machine.name)
    page.locator("#field-first_port").fill("9100")
    page.locator("#field-source").fill("0.0.0.0/0")
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#fault-reason")).to_have_text("0.0.0.0/0 opens to the world, and that needs a reason.")
    expect(page.locator("#field-source")).to_have_value("0.0.0.0/0")
    assert not Opening.select().where(Opening.machine == host.id).exists()
    page.locator("#field-reason").fill("a public demo")
    page.get_by_role("button", name="Open").click()
    row = page.locator("#network").get_by_role("row", name=re.compile("tcp 9100"))
    for text in ("the whole world", "a public demo", "on its way", "until somebody closes it", "admin"):
        expect(row).to_contain_text(text)
    mark(page)
    ground.reports(host, openings=ground.seen(Opening.get(Opening.machine == host.id)))
    expect(row.get_by_text("open", exact=True)).to_be_visible()
    assert is_marked(page), "what the host says comes without a reload"
    page.goto(f"/network/openings?keyword={host.machine.name}")
    press(page, "Close it")
    expect(page.get_by_text("The opening is wanted no longer")).to_be_visible()
    page.goto("/network/openings?show=waiting")
    expect(page.get_by_role("row", name=re.compile(host.machine.name))).to_contain_text("still open")
    page.goto(f"/network/openings?machine={host.id}")
    expect(page.get_by_text("No opening fits.")).to_be_visible()


def test_a_source_with_host_bits_says_what_was_meant(house: House, open_as: Open) -> None:
    page = open_as(house.admin, f"/network/openings/new?machine={house.leased.id}", locale="zh-CN")
    page.locator("#field-first_port").fill("9100")
    page.locator("#field-source").fill("203.0.113.7/24")
    page.locator("main form button.btn-primary").click()
    expect(page.locator("#fault-source")).to_contain_text(
        "整个网段请写 203.0.113.0/24，只要这个地址请写 203.0.113.7/32"
    )


def test_what_the_stacks_have_applied_what_differs_and_who_asked(house: House, open_as: Open, zone: DnsZone) -> None:
    record = network_requests.want_record(zone, name=f"old.{zone.name}", type="A", values=["198.51.100.7"], by=SYSTEM)
    ground.applied()
    page = open_as(house.admin, "/network")
    standing = page.locator("#standing")
    expect(standing).to_contain_text("nothing: every stack has the newest generation")
    expect(standing.get_by_role("row", name=re.compile("production"))).to_contain_text("Cloudflare")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    content = json.loads(download.value.path().read_bytes())
    assert content["generation"] == network.state().generation
    assert download.value.suggested_filename == f"network-production-{content['generation']}.json"
    network_requests.remove_record(record, by=SYSTEM)
    network_requests.want_record(
        zone, name=f"new.{zone.name}", type="A", values=["198.51.100.8"], by=actor_of(house.admin)
    )
    expect(standing).to_contain_text("for ")  # by itself
    expect(standing).not_to_contain_text("nothing: every stack")
    page.get_by_role("link", name="What differs").click()
    expect(page.get_by_role("row", name=re.compile(f"A old.{zone.name}"))).to_contain_text("to be removed")
    wanted = page.get_by_role("row", name=re.compile(f"A new.{zone.name}"))
    expect(wanted).to_contain_text("to be made")
    expect(wanted).to_contain_text("admin")
    page.get_by_role("link", name="to be removed", exact=True).click()
    expect(page.get_by_role("row", name=re.compile(f"new.{zone.name}"))).to_have_count(0)


def test_an_apply_that_failed_and_calls_that_nobody_took_say_why(house: House, open_as: Open, zone: DnsZone) -> None:
    ground.applied()
    page = open_as(house.admin, "/network")
    production = page.locator("#standing").get_by_role("row", name=re.compile("production"))
    expect(production).not_to_contain_text("failed")
    why = "The engine's apply failed. https://ci.example.org/jobs/7"
    network_posts.take("production", ground.outputs(), outcome="failed", reason=why, by=SYSTEM)
    with atomic():
        network.hold()
        NetworkState.update(failures=2, last_error="The pipeline answered 502.").execute()
    page.reload()
    expect(production).to_contain_text(f"The last apply failed: {why}")
    expect(page.locator("#standing")).to_contain_text("2 calls in a row were not taken")
    expect(page.locator("#standing")).to_contain_text("The pipeline answered 502.")
    ground.applied()
    expect(production).not_to_contain_text("failed")  # by itself


def test_a_stack_that_was_taken_down_is_shown_no_longer(house: House, open_as: Open, zone: DnsZone) -> None:
    record = network_requests.want_record(zone, name=f"last.{zone.name}", type="A", values=["198.51.100.9"], by=SYSTEM)
    ground.applied()
    ground.applied(stack="tried")
    page = open_as(house.admin, "/network")
    form = page.locator("#stack-gone")
    form.get_by_label("Stack", exact=True).select_option("production")
    form.get_by_label("How you know").fill("pulumi destroy")
    ground.applied()  # the newest word about Cloudflare
    press(page, "It is gone")
    expect(page.get_by_text("Nobody waits for this stack any more.")).to_be_visible()
    expect(page.locator("#standing").get_by_role("row", name=re.compile("production"))).to_have_count(0)
    form.get_by_label("Stack", exact=True).select_option("tried")
    form.get_by_label("How you know").fill("pulumi destroy")
    press(page, "It is gone")
    expect(form.get_by_role("alert")).to_contain_text("No other stack has cloudflare")
    expect(form.get_by_label("How you know")).to_have_value("pulumi destroy")
    network_requests.remove_record(record, by=SYSTEM)
    ground.applied()


def test_a_frozen_network_gives_no_export_and_is_thawed_with_a_reason(house: House, open_as: Open) -> None:
    frozen = {"frozen_reason": "It was restored from a backup.", "frozen_at": utcnow()}
    with atomic():
        network.hold()
        NetworkState.update(frozen).execute()
    page = open_as(house.admin, "/network")
    expect(page.get_by_text("The network is frozen: no stack is given an export")).to_be_visible()
    expect(page.get_by_role("link", name="Export")).to_have_count(0)
    page.get_by_label("What was compared").fill("  ")
    page.get_by_role("button", name="Thaw").click()
    expect(page.locator("#fault-reason")).to_have_text("Say what was compared; the trail keeps it.")
    page.get_by_label("What was compared").fill("the list of names, with the zone")
    page.get_by_role("button", name="Thaw").click()
    expect(page.get_by_text("The stacks are given exports again.")).to_be_visible()
    assert network.state().frozen_reason is None


# A lease


def test_a_lease_shows_what_is_still_open_its_way_out_and_is_written_off(
    house: House, open_as: Open, zone: DnsZone
) -> None:
    host = house.ready_host()
    lease = rental.allocate(host, make_tenant(), openings=[ground.wish(7000)])
    host.sees(lease)
    (opening,) = Opening.select().where(Opening.lease == lease)
    ground.reports(host, openings=ground.seen(opening))
    leases.end(lease, by=SYSTEM, reason="done")
    host.sees(lease, "closed")
    with atomic():
        Grant.update(desired_at=utcnow() - LATE).where(Grant.lease == lease).execute()
    page = open_as(house.admin, f"/leases/{lease.id}")
    row = page.get_by_role("row", name=re.compile("openings on the host"))
    expect(row).to_contain_text("still open for 3 hours")
    expect(row).to_contain_text("Look at its agent there, or write it off.")
    expect(page.locator("#openings")).to_contain_text("tcp 7000")
    page.locator("#field-kind").select_option("openings on the host")
    page.get_by_label("How you know").fill("the mainboard is on its way to the vendor")
    press(page, "Write this off")
    expect(row).to_contain_text("the mainboard is on its way to the vendor")
    expect(row).not_to_contain_text("still open")
    expect(page.locator("#lease-state").get_by_text("ended", exact=True)).to_be_visible()


def test_a_lease_waits_for_the_apply_that_makes_its_name(house: House, open_as: Open, zone: DnsZone) -> None:
    host = house.ready_host()
    lease = rental.allocate(host, make_tenant())
    with atomic():
        Grant.update(desired_at=utcnow() - LATE).where(Grant.lease == lease).execute()
    page = open_as(house.admin, f"/leases/{lease.id}")
    names = page.get_by_role("row", name=re.compile("DNS names"))
    expect(names).to_contain_text("waiting for 3 hours")
    expect(names).to_contain_text("Waits for an apply of generation")
    expect(page.locator("#lease-state")).to_contain_text(f"{lease.login}.{zone.name}")
    mark(page)
    ground.applied()
    expect(names).not_to_contain_text("Waits for an apply")
    expect(names.get_by_text("open", exact=True)).to_have_count(2)
    assert is_marked(page)


def test_an_opening_of_a_lease_is_closed_from_its_page(house: House, open_as: Open) -> None:
    host = house.ready_host()
    lease = rental.allocate(host, make_tenant(), openings=[ground.wish(7000), ground.wish(7100)])
    page = open_as(house.admin, f"/leases/{lease.id}")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("row", name=re.compile("tcp 7000")).get_by_role("button", name="Close it").click()
    expect(page.get_by_text("The opening is wanted no longer")).to_be_visible()
    assert page.url.endswith(f"/leases/{lease.id}")
    assert [each.first_port for each in network_openings.wanted_of(host.machine, lease)] == [7100]


# Customers


def test_a_customer_opens_a_port_for_the_own_address_and_closes_it(house: House, open_as: Open) -> None:
    host = house.leased_host()
    page = open_as(house.customer, "/my/machines")
    card = page.locator(".card", has=page.get_by_role("heading", name=host.machine.name, exact=True)).last
    card.get_by_role("link", name="Ports").click()
    expect(page.get_by_text("No port is open besides SSH.")).to_be_visible()
    page.locator("#field-first_port").fill("8888")
    page.locator("#field-source").fill("0.0.0.0/0")
    page.locator("#field-reason").fill("everybody")
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#fault-source")).to_contain_text("You may not open to the whole world")
    expect(page.locator("#field-first_port")).to_have_value("8888")
    page.get_by_role("button", name="My address").click()
    expect(page.locator("#field-source")).to_have_value("127.0.0.1/32")
    page.locator("#field-ends_at").fill("2099-01-01T00:00")
    page.get_by_role("button", name="Open").click()
    row = page.get_by_role("row", name=re.compile("tcp 8888"))
    expect(row).to_contain_text("127.0.0.1/32")
    expect(row).to_contain_text("on its way")
    expect(row).to_contain_text(f"{held(host).ends_at:%Y-%m-%d %H:%M:%S} UTC")  # never after the lease
    mark(page)
    (opening,) = Opening.select().where(Opening.machine == host.id)
    ground.reports(host, openings=ground.seen(opening))
    expect(row.get_by_text("open", exact=True)).to_be_visible()
    assert is_marked(page)
    page.goto("/my/machines")
    expect(card).to_contain_text("tcp 8888 from 127.0.0.1/32")
    page.goto(f"/my/machines/{host.id}/openings")
    press(page, "Close it")
    expect(page.get_by_text("The port is being closed")).to_be_visible()
    expect(row).to_contain_text("still open")
    ground.reports(host)
    expect(row).to_have_count(0)


def test_who_only_looks_sees_the_ports_and_opens_none(house: House, open_as: Open) -> None:
    tenant = make_tenant()
    host = house.leased_host(tenant, openings=[ground.wish(8888)])
    viewer = house.new_customer(tenant=tenant)
    tenants.set_member_role(tenant, viewer.id, "viewer", by=SYSTEM)
    page = open_as(viewer, f"/my/machines/{host.id}/openings")
    expect(page.get_by_role("row", name=re.compile("tcp 8888"))).to_be_visible()
    expect(page.get_by_text("You may look at the ports, but not open any.")).to_be_visible()
    for name in ("Open it", "Close it"):
        expect(page.get_by_role("button", name=name, exact=True)).to_have_count(0)


def test_a_stranger_finds_no_ports_of_somebody_else(house: House, open_as: Open) -> None:
    page = open_as(house.new_customer(tenant=make_tenant()))
    answer = page.goto(f"/my/machines/{house.leased.id}/openings")
    assert answer is not None
    assert answer.status == 404


def test_the_connection_dialog_shows_the_gateways_address_and_port(house: House, open_as: Open, zone: DnsZone) -> None:
    gateway = new_gateway("way-in-dialog")
    host = rental.ready_host("behind-dialog", address="10.0.9.17", ssh_port=22)
    ground.place(host, gateway_id=gateway.id)
    tenant = make_tenant()
    host.sees(rental.allocate(host, tenant))
    lease = held(host)
    page = open_as(house.new_customer(tenant=tenant), "/my/machines")
    page.get_by_role("button", name="Connect").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("#way-host")).to_have_text("198.51.100.1")
    expect(dialog.locator("#way-port")).to_have_text("20000")
    expect(dialog.locator("#way-command")).to_have_text(f"ssh -p 20000 {lease.login}@198.51.100.1")
    expect(dialog.get_by_text("The way in is not open yet")).to_be_visible()
    expect(dialog.locator("#way-name")).to_have_count(0)  # no stack has made it
    ground.reports(gateway, forwards=ground.seen(Forward.get(Forward.lease == lease)))
    ground.applied()
    page.reload()
    page.get_by_role("button", name="Connect").click()
    expect(dialog.locator("#way-name")).to_have_text(f"{lease.login}.{zone.name}")
    expect(dialog.get_by_text("The way in is not open yet")).to_have_count(0)
    assert "10.0.9.17" not in dialog.inner_text()


def test_a_port_that_is_opened_behind_a_gateway_shows_where_it_is_reached(house: House, open_as: Open) -> None:
    gateway = new_gateway("way-in-port")
    host = rental.ready_host("behind-port", address="10.0.9.19", ssh_port=22)
    ground.place(host, gateway_id=gateway.id)
    tenant = make_tenant()
    host.sees(rental.allocate(host, tenant, openings=[ground.wish(8888)]))
    (way,) = Forward.select().where(Forward.machine == host.id, Forward.target_port == 8888)
    page = open_as(house.new_customer(tenant=tenant), f"/my/machines/{host.id}/openings")
    row = page.get_by_role("row", name=re.compile("tcp 8888"))
    expect(row).to_contain_text(f"198.51.100.1:{way.public_port} on its way")
    mark(page)
    ground.reports(gateway, forwards=ground.seen(*Forward.select().where(Forward.gateway == gateway.id)))
    expect(row).not_to_contain_text(f"{way.public_port} on its way")
    assert is_marked(page)
    page.goto("/my/machines")
    expect(page.locator("main")).to_contain_text(f"198.51.100.1:{way.public_port}")
    page.get_by_role("button", name="Connect").click()
    expect(page.get_by_role("dialog").locator("#way-ports")).to_contain_text(f"198.51.100.1:{way.public_port}")


def test_a_gateway_shows_its_pool_and_what_it_forwards(house: House, open_as: Open) -> None:
    gateway = new_gateway("way-in-pool")
    host = rental.ready_host("behind-pool", address="10.0.9.18", ssh_port=22)
    page = open_as(house.admin, f"/machines/{host.id}/place")
    page.locator("#field-gateway_id").select_option("way-in-pool · 198.51.100.1")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#network").get_by_role("link", name="way-in-pool")).to_be_visible()
    lease = rental.allocate(host, make_tenant())
    page.goto("/network/forwards?keyword=way-in-pool")
    expect(page.get_by_role("row", name=re.compile("way-in-pool 198"))).to_contain_text("1 of 100")
    row = page.get_by_role("row", name=re.compile("tcp 20000"))
    for text in ("behind-pool 22", f"Lease {lease.id}", "on its way"):
        expect(row).to_contain_text(text)
    assert not Machine.get_by_id(gateway.id).gateway_id


@pytest.fixture
def as_before() -> Iterator[None]:
    """What customers may open is after the test as it was."""
    before = vars(network_openings.limits())
    yield
    network_openings.set_limits(by=SYSTEM, **before)


def test_what_customers_may_open_is_set_by_staff(house: House, as_before: None, open_as: Open) -> None:
    page = open_as(house.admin, "/network/limits")
    page.locator("#field-first_port").fill("9000")
    page.locator("#field-last_port").fill("8000")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#fault-first_port")).to_have_text("Use ports from 1 to 65535, the lower one first.")
    page.locator("#field-last_port").fill("9999")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("The limits are saved")).to_be_visible()
    customer = open_as(house.customer, f"/my/machines/{house.leased.id}/openings")
    expect(customer.get_by_text("from port 9000 to 9999")).to_be_visible()
