"""Charts as people see them: drawn from a real Prometheus, holes named, ranges chosen; and what is said without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
from playwright.sync_api import Locator, Page, expect

from portal import start
from portal.db import atomic, utcnow
from portal.db import db as database
from portal.integrations.wake import wake
from portal.migrate import migrate
from portal.models import Lease, Tenant
from portal.services import heartbeats
from portal.services.monitoring_measures import MEASURES
from portal.services.monitoring_samples import normalised
from portal.settings import load
from tests.browser.conftest import House, Windows
from tests.browser.people import sign_in
from tests.conftest import close_database
from tests.factories import PASSWORD, make_tenant
from tests.support import prometheus
from tests.support.portal import Portal, running
from tests.support.prometheus import Sample
from tests.support.rental import Host

Open = Callable[..., Page]
STEP_S = 15


@dataclass
class Site:
    """A house with a Prometheus that remembers the last hour of its leased host."""

    house: House
    server: prometheus.Server


def hour_of(host: Host, now: float) -> list[Sample]:
    """Busy, but for ten minutes in which nvidia-smi fails, five divided and ten down; the second GPU is gone since. Of
    the first one's power a single sample is known, which is one step of a day's chart."""
    labels = {"host": host.machine.name, "uuid": normalised(host.gpu_uuids[0])}
    samples = [Sample("nvidia_smi_power_draw_watts", labels, (int(now) - 1800) // 120 * 120 + 40, 300)]
    for at in range(int(now) - 3600, int(now) + 1, STEP_S):
        minute = (at - int(now) + 3600) / 60
        is_up, is_failing, is_divided = not 30 <= minute < 40, 5 <= minute < 15, 20 <= minute < 25
        of_host = {"host": host.machine.name}
        samples += [Sample("up", {**of_host, "job": job}, at, is_up) for job in ("node", "nvidia_gpu")]
        if is_up:
            samples.append(Sample("nvidia_smi_command_exit_code", of_host, at, 9 * is_failing))
        for slot, uuid in enumerate(map(normalised, host.gpu_uuids)):
            if is_up and not is_failing and not (slot == 1 and minute >= 40):
                labels = {**of_host, "uuid": uuid}
                samples.append(Sample("nvidia_smi_gpu_info", labels, at, 1))
                samples.append(Sample("nvidia_smi_mig_mode_current", labels, at, is_divided))
                samples.append(Sample("nvidia_smi_utilization_gpu_ratio", labels, at, 0.6 + 0.2 * slot))
                samples.append(Sample("nvidia_smi_temperature_gpu", labels, at, 55 + minute / 4))
    return samples


@pytest.fixture(scope="module")
def site(quiet: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("watched")
    with prometheus.server() as server:
        server.port = prometheus.free_port("127.0.0.1")
        portal = Portal(folder / "instance", environ={"PROMETHEUS_URL": server.url})
        portal.command("init")
        given = {"INSTANCE_DIR": str(portal.instance), "PUBLIC_URL": portal.url, "BIND": portal.url[8:]}
        house = House(portal, load({**given, "PROMETHEUS_URL": server.url}))
        start.bind(house.settings)
        migrate()
        house.fill()
        with atomic():
            Lease.update(activated_at=utcnow()).execute()
        server.load(hour_of(house.leased, time.time()))
        server.start()
        with running(portal):
            portal.start("web")
            yield Site(house, server)


@pytest.fixture
def house(site: Site) -> Iterator[House]:
    """The services of this process on the database of this module's portal."""
    start.bind(site.house.settings)
    yield site.house
    wake.stop()
    heartbeats.buffer.stop()
    close_database(database.obj)


@pytest.fixture(scope="module")
def sign_ins() -> dict[str, object]:
    return {}


def chart(page: Page, measure: str) -> Locator:
    return page.locator(f"[data-chart={measure}]")


def drawn(page: Page, measure: str, what: str) -> Locator:
    """The card of this measure, once it is drawn with that range."""
    card = chart(page, measure)
    card.scroll_into_view_if_needed()
    expect(card).to_have_attribute("data-drawn", what)
    return card


def test_a_machine_has_its_charts_and_names_every_hole(house: House, open_as: Open) -> None:
    page = open_as(house.admin, f"/machines/{house.leased.id}")
    card = drawn(page, "utilization", "utilization 1h ")
    expect(card.locator("canvas")).to_be_visible()
    assert has_ink(card)
    holes = card.locator("[data-gaps] li")
    expect(holes.filter(has_text="host down (all)")).to_have_count(1)
    expect(holes.filter(has_text="exporter failing (all)")).to_have_count(1)
    expect(holes.filter(has_text="n/a (MIG) (all)")).to_have_count(1)
    expect(holes.filter(has_text="GPU gone (1 NVIDIA H100)")).to_have_count(1)
    empty = drawn(page, "ecc", "ecc 1h ")
    expect(empty.get_by_text("Nothing was measured in this time.")).to_be_visible()
    expect(page.locator("[data-chart]")).to_have_count(len(MEASURES))


def test_a_value_between_two_holes_is_seen(house: House, open_as: Open) -> None:
    page = open_as(house.admin, f"/machines/{house.leased.id}")
    drawn(page, "power", "power 1h ")
    page.get_by_role("button", name="1 day").click()
    assert has_ink(drawn(page, "power", "power 1d "))


def has_ink(card: Locator) -> bool:
    """Whether anything was painted, in the colour of the first line."""
    return bool(
        card.locator("canvas").evaluate(
            """canvas => {
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              for (let at = 0; at < data.length; at += 4)
                if (data[at] === 6 && data[at + 1] === 111 && data[at + 2] === 209) return true;
              return false;
            }"""
        )
    )


def test_a_range_and_a_gpu_are_chosen(house: House, open_as: Open) -> None:
    page = open_as(house.admin, f"/machines/{house.leased.id}")
    drawn(page, "utilization", "utilization 1h ")
    page.get_by_role("button", name="30 days").click()
    drawn(page, "utilization", "utilization 30d ")
    expect(page.get_by_role("button", name="30 days")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="1 hour").click()
    page.get_by_label("GPU", exact=True).select_option(label="1 NVIDIA H100")
    card = drawn(page, "utilization", f"utilization 1h {house.leased.gpu_uuids[1]}")
    expect(card.locator("[data-gaps] li").filter(has_text="GPU gone")).to_have_count(1)
    expect(chart(page, "network")).to_be_hidden()


def test_the_fleet_is_seen_with_its_numbers_and_when_they_were_computed(house: House, open_as: Open) -> None:
    page = open_as(house.admin, "/monitoring")
    expect(page.get_by_role("heading", level=1)).to_have_text("Monitoring")
    expect(page.get_by_text("Computed at")).to_contain_text("UTC")
    expect(page.get_by_text("Values come from Prometheus")).to_be_visible()
    row = page.get_by_role("row").filter(has_text=house.leased.machine.name).first
    expect(row).to_contain_text("60 %")
    drawn(page, "utilization", "utilization 1h ")
    page.get_by_label("Order").select_option(label="hottest first")
    page.wait_for_url("**order=temperature**")
    row.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(house.leased.machine.name)


def test_a_customer_sees_the_own_machine_from_the_beginning_of_the_lease(house: House, open_as: Open) -> None:
    page = open_as(house.customer, "/my/machines")
    page.get_by_role("link", name="Charts").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(house.leased.machine.name)
    expect(page.get_by_text("Your lease began at")).to_be_visible()
    card = drawn(page, "utilization", "utilization 1h ")
    expect(card.get_by_text("Nothing was measured in this time.")).to_be_visible()  # the hour before was not theirs
    with atomic():
        Lease.update(activated_at=utcnow() - timedelta(days=1)).execute()
    page.reload()
    expect(drawn(page, "utilization", "utilization 1h ").locator("canvas")).to_be_visible()


def test_prometheus_is_lost_and_the_page_says_so_and_goes_on(
    site: Site, house: House, open_as: Open, windows: Windows
) -> None:
    site.server.stop()
    try:
        stranger = house.new_customer(tenant=tenant_of_old(house))
        page = open_as(house.admin, f"/machines/{house.ready_host().id}")
        expect(page.locator("[data-trouble]")).to_contain_text("Prometheus does not answer")
        expect(page.get_by_text("NVIDIA H100").first).to_be_visible()
        page.goto("/monitoring")
        expect(page.get_by_role("heading", level=1)).to_have_text("Monitoring")
        chinese = windows.new(locale="zh-CN")
        chinese.goto("/my/machines")
        sign_in(chinese, stranger.username, PASSWORD)
        chinese.get_by_role("link", name="图表").click()
        expect(chinese.locator("[data-trouble]")).to_have_text("目前无法显示这台机器的历史数据。")
    finally:
        site.server.start()


def tenant_of_old(house: House) -> Tenant:
    """A tenant whose lease is long enough to have a history."""
    tenant = make_tenant()
    host = house.leased_host(tenant)
    with atomic():
        Lease.update(activated_at=utcnow() - timedelta(days=1)).where(Lease.machine == host.id).execute()
    return tenant
