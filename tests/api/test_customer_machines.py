"""A customer's machines: what the own tenants have leased now, how to get in, and nothing of anybody else's."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from portal.db import utcnow
from portal.models import Alert, Lease, Machine, Tenant, User
from portal.services import alerts_tenants, leases, machines
from portal.services.actors import SYSTEM
from portal.web.my_machines import ALERT_WORDS
from tests.support import rental
from tests.support.rental import HOST_KEY, Host, allocate, ready_host, tomorrow

SignIn = Callable[[User], Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def host(database: Any) -> Host:
    return ready_host(
        "gpu-1", address="10.1.2.3", ssh_port=2222, remark="behind on payments", public_address="203.0.113.7"
    )


@pytest.fixture
def lease(host: Host, tenant: Tenant) -> Lease:
    lease = allocate(host, tenant, retain_s=3600)
    host.sees(lease, "open")
    return leases.get(lease.id)


def test_a_customer_sees_the_machines_of_the_own_tenant(
    host: Host, lease: Lease, other_tenant: Tenant, customer: User, sign_in: SignIn
) -> None:
    allocate(ready_host("gpu-2"), other_tenant)
    host.report(gpu=rental.gpu_report([rental.gpu(host.gpu_uuids[0], utilization_percent=93)]))
    page = sign_in(customer).get("/customer/machines").json
    assert page["total"] == 1
    (told,) = page["items"]
    assert (told["id"], told["name"], told["lease_id"], told["lease_state"]) == (host.id, "gpu-1", lease.id, "active")
    assert (told["login"], told["tenant_name"], told["reachability"]) == (lease.login, "Acme", "online")
    assert [gpu["live"] and gpu["live"]["utilization_percent"] for gpu in told["gpus"]] == [93, None]
    assert {grant["kind"]: grant["observed"] for grant in told["grants"]} == {"keys": "open", "tasks": "open"}


def test_both_ends_are_shown_until_the_host_has_acknowledged(
    host: Host, lease: Lease, customer: User, sign_in: SignIn
) -> None:
    person = sign_in(customer)
    assert person.get(f"/customer/machines/{host.id}").json["is_end_acknowledged"] is True
    leases.extend(lease, until=lease.ends_at + timedelta(days=1), by=SYSTEM)
    told = person.get(f"/customer/machines/{host.id}").json
    assert told["is_end_acknowledged"] is False
    assert told["ends_at"] != told["acknowledged_ends_at"]
    host.sees(lease, "open")
    assert person.get(f"/customer/machines/{host.id}").json["is_end_acknowledged"] is True


def test_nothing_that_is_the_houses_own_is_told(host: Host, lease: Lease, customer: User, sign_in: SignIn) -> None:
    person = sign_in(customer)
    text = person.get(f"/customer/machines/{host.id}").get_data(as_text=True)
    text += person.get(f"/customer/machines/{host.id}/connection").get_data(as_text=True)
    for secret in ("10.1.2.3", "behind on payments", "probe", "PRIVATE KEY", "password", str(lease.probe_key)):
        assert secret not in text


def test_the_connection_has_all_that_ssh_needs(host: Host, lease: Lease, customer: User, sign_in: SignIn) -> None:
    answer = sign_in(customer).get(f"/customer/machines/{host.id}/connection")
    assert answer.json == {
        "login": lease.login,
        "host": "203.0.113.7",
        "port": 2222,
        "command": f"ssh -p 2222 {lease.login}@203.0.113.7",
        "ssh_config": "\n".join(
            [
                "Host gpu-1",
                "    HostName 203.0.113.7",
                "    Port 2222",
                f"    User {lease.login}",
                "    StrictHostKeyChecking yes",
                "",
            ]
        ),
        "host_key_type": "ssh-ed25519",
        "host_key_fingerprint": machines.fingerprint(HOST_KEY),
        "known_hosts_line": f"[203.0.113.7]:2222 {HOST_KEY}",
    }


def test_the_usual_port_is_left_out_of_the_command(tenant: Tenant, customer: User, sign_in: SignIn) -> None:
    host = ready_host("gpu-6", address="2001:db8::7", ssh_port=22)
    lease = allocate(host, tenant)
    told = sign_in(customer).get(f"/customer/machines/{host.id}/connection").json
    assert told["command"] == f"ssh {lease.login}@2001:db8::7"
    assert told["known_hosts_line"] == f"2001:db8::7 {HOST_KEY}"


def test_a_viewer_looks_and_does_not_connect(
    host: Host, lease: Lease, viewer: User, member: User, sign_in: SignIn
) -> None:
    watcher = sign_in(viewer)
    assert watcher.get(f"/customer/machines/{host.id}").json["may_connect"] is False
    refused = watcher.get(f"/customer/machines/{host.id}/connection")
    assert (refused.status_code, refused.json["code"]) == (403, "right_missing")
    assert sign_in(member).get(f"/customer/machines/{host.id}").json["may_connect"] is True
    assert sign_in(member).get(f"/customer/machines/{host.id}/connection").status_code == 200


def test_a_stranger_learns_not_even_that_the_machine_exists(
    host: Host, lease: Lease, stranger: User, sign_in: SignIn
) -> None:
    person = sign_in(stranger)
    assert person.get("/customer/machines").json["total"] == 0
    for path in (f"/customer/machines/{host.id}", f"/customer/machines/{host.id}/connection"):
        foreign, unknown = person.get(path), person.get(path.replace(str(host.id), "999999", 1))
        assert (foreign.status_code, foreign.json) == (404, unknown.json)


def test_staff_are_no_customers(host: Host, lease: Lease, operator: User, sign_in: SignIn) -> None:
    assert sign_in(operator).get("/customer/machines").status_code == 403


def test_a_machine_is_gone_from_the_list_when_its_lease_has_ended(
    host: Host, lease: Lease, customer: User, sign_in: SignIn
) -> None:
    person = sign_in(customer)
    leases.end(lease, by=SYSTEM, reason="done")
    told = person.get(f"/customer/machines/{host.id}").json
    assert (told["lease_state"], told["may_connect"]) == ("ending", False)
    refused = person.get(f"/customer/machines/{host.id}/connection")
    assert (refused.status_code, refused.json["code"]) == (409, "lease_not_active")
    host.sees(lease, "closed")
    assert person.get("/customer/machines").json["total"] == 0
    assert person.get(f"/customer/machines/{host.id}").status_code == 404


def test_the_tenant_before_sees_nothing_of_the_one_after(
    host: Host, lease: Lease, other_tenant: Tenant, customer: User, stranger: User, sign_in: SignIn
) -> None:
    rental.end(host, lease)
    leases.reclaim(host.machine, by=SYSTEM, reason="needed", force=True, confirm="gpu-1")
    rental.reclaim(host, lease)
    host.report()
    allocate(host, other_tenant, until=tomorrow())
    assert sign_in(customer).get(f"/customer/machines/{host.id}").status_code == 404
    assert sign_in(stranger).get(f"/customer/machines/{host.id}").status_code == 200


# What its GPUs say


def page_of(person: Any) -> str:
    """The customer's own page of machines."""
    text: str = person.client.get("/my/machines", headers=person.headers).get_data(as_text=True)
    return text


def has_told(host: Host, *xids: tuple[int, datetime], foreign: tuple[int, datetime]) -> None:
    """Its driver has told these of the first GPU, and one of a GPU that nobody expected."""
    told = [{"xid": xid, "last_at": rental.told(at)} for xid, at in xids]
    of_another = [{"xid": foreign[0], "last_at": rental.told(foreign[1])}]
    seen = [rental.gpu(host.gpu_uuids[0], xids=told), rental.gpu(host.gpu_uuids[1], 1)]
    host.report(gpu=rental.gpu_report([*seen, rental.gpu("GPU-new", 2, xids=of_another)]))


def xids_in(told: dict[str, Any]) -> list[list[int] | None]:
    """Those of each GPU; an agent of before tells none at all."""
    lives = [gpu["live"] for gpu in told["gpus"]]
    return [[each["xid"] for each in live["xids"]] if "xids" in live else None for live in lives]


def test_no_xid_of_the_tenant_before_is_told(
    host: Host, lease: Lease, customer: User, operator: User, sign_in: SignIn
) -> None:
    """The driver tells them until it is loaded again, and cleaning does not do that."""
    assert lease.activated_at is not None
    before = lease.activated_at - timedelta(seconds=1)
    has_told(host, (13, before), (43, lease.activated_at), foreign=(31, before))
    person, staff = sign_in(customer), sign_in(operator)
    assert xids_in(person.get("/customer/machines").json["items"][0]) == [[43], None]
    assert xids_in(person.get(f"/customer/machines/{host.id}").json) == [[43], None]
    page = page_of(person)
    assert re.findall(r"XID \d+|GPU-new", page) == ["XID 43", "GPU-new"]
    assert xids_in(staff.get(f"/admin/machines/{host.id}").json) == [[13, 43], None], "for staff they are all there"


def test_the_xids_of_a_lease_are_told_to_the_one_that_continues_it(
    host: Host, lease: Lease, customer: User, sign_in: SignIn
) -> None:
    assert lease.activated_at is not None
    before = lease.activated_at - timedelta(seconds=1)
    has_told(host, (13, before), (43, utcnow()), foreign=(31, before))
    rental.end(host, lease)
    following = leases.extend(leases.get(lease.id), until=tomorrow() + timedelta(days=1), by=SYSTEM)
    told = sign_in(customer).get(f"/customer/machines/{host.id}").json
    assert told["lease_id"] == following.id != lease.id
    assert xids_in(told) == [[43], None]


def test_what_a_silent_host_said_last_is_no_value_of_now(
    host: Host, lease: Lease, customer: User, sign_in: SignIn
) -> None:
    hot = rental.gpu(host.gpu_uuids[0], utilization_percent=97, temperature_c=88)
    seen = rental.gpu_report([hot, rental.gpu("GPU-new", 1)])
    person = sign_in(customer)
    host.report(gpu=seen)
    assert {"97 %", "88 °C", "GPU-new", "missing"} <= words_of(page_of(person))
    last_seen_at = utcnow() - timedelta(days=3)
    host.report(gpu=seen, received_at=last_seen_at)
    assert not {"97 %", "88 °C", "GPU-new", "missing"} & words_of(page_of(person))
    for told in (*person.get("/customer/machines").json["items"], person.get(f"/customer/machines/{host.id}").json):
        assert (told["reachability"], told["last_seen_at"]) == ("offline", last_seen_at.isoformat())
        assert ([gpu["live"] for gpu in told["gpus"]], told["metrics"]) == ([None, None], None)


def words_of(page: str) -> set[str]:
    return {text.strip() for text in re.split(r"<[^>]*>", page)}


# What was wrong with it


def raised(machine: Machine, name: str, *, from_h: float, until_h: float | None = None, **fields: Any) -> Alert:
    """An alert that began so many hours after now, and ended, if it did."""
    begin = utcnow() + timedelta(hours=from_h)
    end = None if until_h is None else utcnow() + timedelta(hours=until_h)
    ended = {"state": "firing"} if end is None else {"state": "resolved", "ends_at": end, "resolved_at": end}
    secret = {"annotations": {"summary": "rack 12 burns"}, "labels": {"host": "x", "rack": "12"}, "remark": "again him"}
    given = {"severity": "critical", "source": "portal", "fingerprint": f"{name}{from_h}", **secret, **ended, **fields}
    return Alert.create(machine=machine, name=name, starts_at=begin, **given)


@pytest.fixture
def begun(lease: Lease) -> Lease:
    """It began ten hours ago, and was planned for five hours earlier: the machine was not ready then."""
    times = {"starts_at": utcnow() - timedelta(hours=15), "activated_at": utcnow() - timedelta(hours=10)}
    Lease.update(times).where(Lease.id == lease.id).execute()
    return leases.get(lease.id)


def told_to(person: User, sign_in: SignIn) -> list[tuple[str, str, str | None]]:
    [machine] = sign_in(person).get("/customer/machines").json["items"]
    return [(told["name"], told["since"], told["until"]) for told in machine["alerts"]]


def test_a_customer_is_told_what_was_wrong_with_the_machine_during_the_lease_and_no_more(
    host: Host, begun: Lease, customer: User, viewer: User, sign_in: SignIn
) -> None:
    raised(host.machine, "GpuLost", from_h=-20, until_h=-11)  # of the one before
    since_before = raised(host.machine, "GpuFailing", from_h=-12, until_h=-9)
    lost = raised(host.machine, "GpuLost", from_h=-2)
    raised(host.machine, "CertificateExpiring", from_h=-1)
    raised(host.machine, "RunFailed", from_h=-1)
    raised(ready_host("gpu-2").machine, "GpuLost", from_h=-1, fingerprint="another")
    assert told_to(customer, sign_in) == [
        ("GpuLost", lost.starts_at.isoformat(), None),
        ("GpuFailing", begun.activated_at.isoformat(), since_before.ends_at.isoformat()),
    ]
    assert told_to(viewer, sign_in) == told_to(customer, sign_in)
    whole = sign_in(customer).get("/customer/machines").get_data(as_text=True)
    page = page_of(sign_in(customer))
    assert "A GPU is lost: fewer answer than you have leased." in page
    for of_staff in ("rack 12", "again him", "RunFailed"):
        assert of_staff not in whole + page


def test_an_alert_that_comes_often_is_told_of_its_newest_times(
    host: Host, begun: Lease, customer: User, sign_in: SignIn
) -> None:
    for number in range(15):
        raised(host.machine, "GpuHot", from_h=number / 10 - 5, until_h=number / 10 - 4.95, severity="warning")
    told = told_to(customer, sign_in)
    assert len(told) == alerts_tenants.MOST
    assert [since for _, since, _ in told] == sorted((since for _, since, _ in told), reverse=True)


def test_every_alert_that_customers_are_told_of_is_one_that_is_raised_and_has_words() -> None:
    rules = yaml.safe_load((ROOT / "roles/prometheus/files/remotegpu.alerting.rules.yml").read_text())
    raised_by_rules = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    assert set(alerts_tenants.TOLD) <= raised_by_rules
    assert set(ALERT_WORDS) == set(alerts_tenants.TOLD)
