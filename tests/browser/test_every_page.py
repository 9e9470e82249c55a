"""What holds on every page: it opens, in both languages, on a narrow screen, for those it is for and for nobody else.

Each page is opened once, in Chinese and on a narrow screen, and every promise looks at what was seen. That no page
reports an error or breaks the content policy is asked of every window (conftest.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from playwright.sync_api import Page, expect

from portal.models import Machine, Opening, Reclaim, Run, Task
from portal.services import keys, leases, network_requests, provisioning, runs, tasks
from portal.services.actors import SYSTEM
from portal.services.runs import Line
from tests.browser.conftest import House
from tests.factories import actor_of, make_user, ssh_key_pair
from tests.support import network as ground
from tests.support import rental

Open = Callable[..., Page]
NARROW = 390
ACCOUNT = ("/account", "/account/tokens", "/password")
STAFF = (
    *("/machines", "/machines/add", "/leases", "/tasks", "/customers", "/customers/tenants", "/runs", "/audit"),
    *("/monitoring", "/staff", *ACCOUNT),
    *("/network", "/network/changes", "/network/names", "/network/openings", "/network/forwards", "/network/limits"),
    *("/network/zones/new", "/network/groups/new", "/network/records/new", "/network/openings/new"),
    *("/alerts", "/alerts/history", "/alerts/rules", "/alerts/rules/new", "/alerts/offline"),
)
OWN = ("/my/machines", "/tasks", "/tasks/new", "/my/keys", *ACCOUNT)
MENU = {
    "admin": ["Machines", "Alerts", "Monitoring", "Leases", "Network", "Tasks", "Customers", "Runs", "Audit", "Staff"],
    "customer": ["My machines", "Tasks", "SSH keys"],
}

# What a person reads on the page, without what is data: names, texts that somebody typed, output, times and paths.
TEXTS = """() => {
  const DATA = "script, noscript, pre, code, time, .mono";
  const seen = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!parent.closest(DATA)) seen.push(walker.currentNode.data.trim());
  }
  for (const name of ["title", "placeholder", "aria-label"])
    for (const one of document.querySelectorAll(`[${name}]`))
      if (!one.closest(DATA)) seen.push(one.getAttribute(name));
  return seen.filter(Boolean);
}"""

# What keeps somebody out who sees little, or does not see: controls without a name, ids that are there twice, and text
# that does not stand out from its ground (WCAG 2.1 AA: 4.5 to 1, large text 3 to 1).
BARRIERS = """() => {
  const found = [];
  const named = (one) => one.ariaLabel || one.labels?.length || one.textContent.trim() || one.title;
  for (const one of document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a[href], summary"))
    if (!named(one)) found.push(`no name: ${one.outerHTML.slice(0, 90)}`);
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  for (const id of ids.filter((id, at) => ids.indexOf(id) < at)) found.push(`id twice: ${id}`);
  const dot = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const painted = (colours) => {
    dot.fillStyle = "#fff"; dot.fillRect(0, 0, 1, 1);
    for (const colour of colours) { dot.fillStyle = colour; dot.fillRect(0, 0, 1, 1); }
    return [...dot.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const grounds = (one) => (one ? [...grounds(one.parentElement), getComputedStyle(one).backgroundColor] : []);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), one = walker.currentNode.parentElement;
    if (!text || one.closest("script, noscript, option, [disabled], .visually-hidden, .skip-link")) continue;
    if (!one.checkVisibility({ visibilityProperty: true })) continue;
    const style = getComputedStyle(one), ground = grounds(one);
    const [a, b] = [light(painted([...ground, style.color])), light(painted(ground))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) found.push(`${ratio.toFixed(1)} to 1: ${text.slice(0, 40)} (${style.color})`);
  }
  return [...new Set(found)];
}"""
# Whether the heading has more lines than it needs, as a column of single characters has.
SQUEEZED = """() => {
  const heading = document.querySelector("h1"), text = document.createRange();
  text.selectNodeContents(heading);
  const lines = new Set([...text.getClientRects()].map((part) => Math.round(part.top))).size;
  heading.style.whiteSpace = "nowrap";
  const fits = text.getBoundingClientRect().width <= document.querySelector("main").clientWidth - 20;
  heading.style.whiteSpace = "";
  return lines > 1 && fits;
}"""
ENGLISH = re.compile(r"[A-Za-z']+(?: [a-z']+){1,}")
HOSTS_SAY = "ports was seen|ports failed|it went wrong"  # what hosts and workers say is shown as they said it
IS_DATA = re.compile(
    rf"Quark Labs|seen on its page|NVIDIA H100|Test CPU|Debian GNU/Linux|Linux 6|[\d.]+ (GiB|UTC)|{HOSTS_SAY}"
    r"|AWS eu-central-1|0 issue letsencrypt\.org|Mozilla/.*|Chrome \d+, Linux|Tenant \d+|Authorization: Bearer"
)


@dataclass(frozen=True)
class Visit:
    """What was seen of one page."""

    path: str
    status: int
    heading: str
    texts: tuple[str, ...]
    too_wide_px: int
    is_heading_squeezed: bool
    barriers: tuple[str, ...]


@pytest.fixture
def visits(house: House, open_as: Open, seen: list[Visit]) -> list[Visit]:
    if not seen:
        staff, own = details_of(house)
        for user, paths in ((house.admin, (*STAFF, *staff)), (house.customer, (*OWN, *own))):
            page = open_as(user, "/password", locale="zh-CN", width=NARROW)
            seen += [visit(page, path) for path in paths]
    return seen


@pytest.fixture(scope="module")
def seen() -> list[Visit]:
    return []


def visit(page: Page, path: str) -> Visit:
    answer = page.goto(path, wait_until="load")
    assert answer is not None
    too_wide_px = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    heading = page.locator("h1").first.inner_text()
    barriers = tuple(page.evaluate(BARRIERS))
    squeezed = bool(page.evaluate(SQUEEZED))
    return Visit(path, answer.status, heading, tuple(page.evaluate(TEXTS)), too_wide_px, squeezed, barriers)


def details_of(house: House) -> tuple[list[str], list[str]]:
    """One of each: machines in each state, a lease, runs, reports, tasks."""
    bare, failed = rental.register("bare"), rental.confirm(rental.register("no-gpu-host"))
    rental.finish_run(provisioning.provision(failed, by=SYSTEM), "failed")
    provisioning.provision(rental.confirm(rental.register()), by=SYSTEM)
    taken = runs.claim("a-worker", lock_s=60)
    assert taken is not None
    runs.record(taken, "a-worker", [Line("runner_on_ok", "TASK [base : Install]")], lock_s=60)
    host = house.ready_host()
    lease = rental.allocate(host, house.tenant)
    host.sees(lease)
    rental.end(host, lease)
    rental.reclaim(host, lease, said=rental.verdict(ports="failed"))
    holder = actor_of(house.customer)
    keys.add(house.customer, name="Laptop", line=ssh_key_pair()[0], by=holder)
    task = tasks.create(house.leased.id, name="seen on its page", command="true", env={}, time_limit_s=60, by=holder)
    open_lease = leases.find_open(house.leased.machine)
    assert open_lease is not None
    shown = [bare, failed, host.machine, house.leased.machine, house.ready_host().machine]
    staff = [f"/machines/{machine.id}" for machine in (*shown, runs.machines_of(taken)[0])]
    staff += [f"/machines/{shown[-1].id}/allocate", f"/machines/{bare.id}/edit"]
    staff += [f"/machines/{host.id}/gpus/{host.gpu_uuids[0]}/forget"]
    staff += [f"/customers/{house.customer.id}", f"/customers/tenants/{house.tenant.id}"]
    staff += [
        f"/leases/{lease.id}",
        f"/leases/{open_lease.id}",
        f"/runs/{taken.id}",
        f"/runs/{Run.select().first().id}",
    ]
    staff += [f"/reclaims/{Reclaim.get(Reclaim.lease == lease).id}/report"]
    staff += [f"/tasks/{task.id}", *network_pages(house)]
    own = [f"/tasks/{task.id}", f"/tasks/new?like={task.id}", f"/my/machines/{house.leased.id}/monitoring"]
    own += [f"/my/machines/{house.leased.id}/openings"]
    return staff, own


def network_pages(house: House) -> list[str]:
    """A zone, a group, a record, a gateway, and leases with openings and forwards in each state."""
    zone, group = ground.zone(serves_machines=True, serves_leases=True), ground.group()
    gateway = rental.ready_host("way-in-seen", public_address="198.51.100.1")
    behind = rental.ready_host("behind-seen", address="10.0.9.16", ssh_port=22)
    ground.place(gateway, forward_ports="20000-20099")
    ground.place(behind, gateway_id=gateway.id, security_group_id=group.id)
    wishes = [ground.wish(8888), ground.wish(9999, "0.0.0.0/0", reason="GPU"), ground.wish(7777)]
    lease = rental.allocate(behind, house.tenant, openings=wishes)
    record = network_requests.want_record(zone, name=f"a.{zone.name}", type="A", values=["192.0.2.7"], by=SYSTEM)
    first, second, third = Opening.select().where(Opening.lease == lease).order_by(Opening.id)
    ground.applied()
    ground.reports(behind, openings=[*ground.seen(first, third), *ground.seen(second, state="failed", error="nft")])
    network_requests.close_port(third, by=SYSTEM)
    network_requests.remove_record(record, by=SYSTEM)
    kept = network_requests.want_record(zone, name=f"b.{zone.name}", type="A", values=["192.0.2.8"], by=SYSTEM)
    held = leases.find_open(house.leased.machine)
    network_requests.open_port(house.leased.machine, ground.wish(), by=SYSTEM, lease=held)
    closing = rental.ready_host("closing-seen")
    left = rental.allocate(closing, house.tenant, openings=[ground.wish()])
    ground.reports(closing, openings=ground.seen(Opening.get(Opening.lease == left)))
    leases.end(left, by=SYSTEM, reason="Quark Labs")
    pages = [f"/network/zones/{zone.id}", f"/network/groups/{group.id}", f"/network/records/{kept.id}"]
    pages += [f"/machines/{machine.id}{part}" for machine in (gateway, behind) for part in ("", "/place")]
    pages += [f"/leases/{each.id}" for each in (lease, left)]
    return [*pages, "/network/openings?show=waiting", "/network/changes?state=to_remove"]


def test_every_page_opens(visits: list[Visit]) -> None:
    assert [(visit.path, visit.status) for visit in visits if visit.status != 200] == []
    assert len(visits) > 20


def test_no_page_is_wider_than_a_narrow_screen(visits: list[Visit]) -> None:
    assert [(visit.path, visit.too_wide_px) for visit in visits if visit.too_wide_px > 0] == []


def test_no_heading_is_squeezed_by_the_buttons_beside_it(visits: list[Visit]) -> None:
    assert [(visit.path, visit.heading) for visit in visits if visit.is_heading_squeezed] == []


def test_no_page_keeps_somebody_out_who_sees_little(visits: list[Visit]) -> None:
    assert [(visit.path, barrier) for visit in visits for barrier in visit.barriers] == []


def test_no_page_has_an_english_sentence_left_in_chinese(visits: list[Visit]) -> None:
    texts = [(visit.path, text) for visit in visits for text in visit.texts]
    assert [(path, text) for path, text in texts if ENGLISH.search(IS_DATA.sub("", text))] == []


@pytest.mark.parametrize("who", ["admin", "customer"])
def test_every_entry_of_the_menu_leads_to_a_page_that_says_so(house: House, open_as: Open, who: str) -> None:
    page = open_as(getattr(house, who))
    names = page.get_by_role("navigation").get_by_role("link").all_inner_texts()
    assert [name.strip() for name in names if name.strip() in MENU[who]] == MENU[who]
    for name in names:
        page.get_by_role("navigation").get_by_role("link", name=name.strip()).click()
        expect(page.get_by_role("heading", level=1)).to_have_text(name.strip())
        expect(page.locator("nav [aria-current=page]")).to_have_text(name.strip())


@pytest.mark.parametrize("width", [1200, 1400])
def test_the_whole_menu_fits_in_a_line_whatever_somebody_is_called(house: House, open_as: Open, width: int) -> None:
    long = make_user("admin", display_name="Maximilian Langenscheidt-Hohenlohe")
    page = open_as(long, "/network", width=width)
    first, last = page.get_by_role("link", name="RemoteGPU"), page.locator(".account > summary")
    boxes = [each.bounding_box() for each in (first, *page.locator("nav .nav-link").all(), last)]
    middles = {round(box["y"] + box["height"] / 2) for box in boxes if box is not None}
    assert max(middles) - min(middles) <= 2
    assert all(one["x"] + one["width"] <= other["x"] for one, other in pairwise(box for box in boxes if box))


def test_the_language_is_switched_and_kept(house: House, open_as: Open) -> None:
    page = open_as(make_user("operator"), "/leases?state=active")
    page.get_by_role("button", name="中文").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("租约")
    assert page.url.endswith("/leases?state=active")
    page.goto("/machines")
    expect(page.get_by_role("heading", level=1)).to_have_text("机器")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Machines")


def test_refusals_are_read_in_chinese(house: House, open_as: Open) -> None:
    page = open_as(house.customer, "/my/keys", locale="zh-CN")
    page.locator("#field-name").fill("x")
    page.locator("#field-key").fill("hello")
    page.locator("main form button.btn-primary").click()
    expect(page.locator(".invalid-feedback")).to_contain_text("请以密钥类型开头")
    page.goto("/machines")
    expect(page.locator("main")).to_contain_text("此处仅供 管理员、运维人员 使用；您是 客户。")


def test_what_is_not_there_and_what_is_not_for_you_say_so(house: House, open_as: Open) -> None:
    page = open_as(house.customer)
    for path, status, heading in (
        ("/nowhere", 404, "Not found"),
        ("/machines", 403, "Not for you"),
        (f"/my/machines/{Machine.select().first().id + 1000}/connection", 404, "Not found"),
        (f"/tasks/{10**9}", 404, "Not found"),
    ):
        answer = page.goto(path)
        assert answer is not None
        assert (path, answer.status) == (path, status)
        expect(page.get_by_role("heading", level=1)).to_have_text(heading)
    page.get_by_role("link", name="Back to the start").click()
    expect(page.get_by_role("heading", name="My machines")).to_be_visible()
    assert not Task.select().where(Task.id == 10**9).exists()
