"""What the fleet does: every number once, null where nothing is known, and a customer sees the own lease alone."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from portal.api.monitoring import DeviceOut, RealtimeOut, StatsOut
from portal.api.paging import page_schema
from portal.db import atomic, utcnow
from portal.models import Lease, Machine, MachineReport, Tenant, User
from portal.models.states import MACHINE
from portal.services import monitoring_cache, monitoring_live
from portal.settings import Settings
from tests.factories import make_lease, make_machine
from tests.support import rental
from tests.support.rental import GIB, Host

SignIn = Callable[[User], Any]
CHART = "?measure=utilization&range=1h"


@pytest.fixture
def host(database: Any) -> Host:
    return rental.ready_host("gpu-1", region="eu")


@pytest.fixture
def staff(sign_in: SignIn, operator: User) -> Any:
    return sign_in(operator)


@pytest.fixture
def dead_port(settings: Settings) -> None:
    """A Prometheus that is down."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    object.__setattr__(settings, "prometheus_url", f"http://127.0.0.1:{port}")


def gpus(host: Host, *changes: dict[str, Any]) -> dict[str, Any]:
    return rental.gpu_report(
        [rental.gpu(each, n, **changes[n]) for n, each in enumerate(host.gpu_uuids[: len(changes)])]
    )


def test_the_overview_is_described_as_it_is_sent(host: Host, staff: Any) -> None:
    for path, schema in (
        ("/admin/monitoring/realtime", RealtimeOut),
        ("/admin/dashboard/stats", StatsOut),
        ("/admin/monitoring/devices", page_schema(DeviceOut)),
    ):
        answer = staff.get(path)
        assert answer.status_code == 200, path
        assert schema().validate(answer.json) == {}, path


def test_without_prometheus_the_agents_tell_and_the_answer_says_so(host: Host, staff: Any) -> None:
    busy = {"utilization_percent": 90, "memory_used_bytes": 40 * GIB, "temperature_c": 71, "power_w": 500.5}
    host.report(gpu=gpus(host, busy, {"utilization_percent": 0}))
    seen = staff.get("/admin/monitoring/realtime").json
    assert seen["prometheus"] == {"state": "none", "message": None}
    assert seen["gpus"] | {"distribution": None} == {
        "expected": 2, "answering": 2, "in_trouble": 0, "utilization_percent": 45.0, "memory_percent": 25.0,
        "temperature_max_c": 71, "power_w": 570.5, "distribution": None,
    }  # fmt: skip
    assert seen["gpus"]["distribution"] == {"tenths": [1, 0, 0, 0, 0, 0, 0, 0, 0, 1], "mig": 0, "not_known": 0}
    assert [(group["name"], group["machines"], group["expected"]) for group in seen["by_region"]] == [("eu", 1, 2)]
    assert [(group["name"], group["machines"]) for group in seen["by_model"]] == [("NVIDIA H100", 1)]


def test_null_is_never_zero(host: Host, staff: Any) -> None:
    """The first is divided, the second tells nothing: a mean of what is known is not a mean with zeros in it."""
    nothing = dict.fromkeys(("utilization_percent", "memory_used_bytes", "temperature_c", "power_w"))
    host.report(gpu=gpus(host, {"mig": True, "utilization_percent": 0, "temperature_c": 50, "power_w": 100}, nothing))
    seen = staff.get("/admin/monitoring/realtime").json["gpus"]
    assert (seen["utilization_percent"], seen["temperature_max_c"], seen["power_w"]) == (None, 50, 100)
    assert seen["distribution"] == {"tenths": [0] * 10, "mig": 1, "not_known": 1}
    divided, silent = staff.get("/admin/monitoring/devices").json["items"]
    assert (divided["utilization_percent"], divided["mig"], divided["temperature_c"]) == (None, True, 50)
    assert (silent["temperature_c"], silent["memory_percent"], silent["source"]) == (None, None, "agent")


def test_a_gpu_that_is_gone_lost_or_unknown_is_told_apart(host: Host, staff: Any) -> None:
    host.report(gpu=gpus(host, {}))
    offline = rental.ready_host("gpu-2")
    offline.report(received_at=utcnow() - timedelta(hours=1))
    stuck = rental.ready_host("gpu-3")
    stuck.report(gpu=rental.gpu_report([rental.gpu(stuck.gpu_uuids[0])], state="stale", message="it hangs"))
    lost = rental.ready_host("gpu-4")
    lost.report(gpu=gpus(lost, {"state": "lost"}, {}))
    devices = staff.get("/admin/monitoring/devices").json["items"]
    assert [(device["host"], device["state"]) for device in devices] == [
        ("gpu-1", "ok"), ("gpu-1", "missing"), ("gpu-2", "unknown"), ("gpu-2", "unknown"),
        ("gpu-3", "unknown"), ("gpu-3", "unknown"), ("gpu-4", "lost"), ("gpu-4", "ok"),
    ]  # fmt: skip
    assert {d["temperature_c"] for d in devices if d["host"] in ("gpu-2", "gpu-3")} == {None}
    seen = staff.get("/admin/monitoring/realtime").json
    assert (seen["gpus"]["expected"], seen["gpus"]["answering"], seen["gpus"]["in_trouble"]) == (8, 2, 2)


def test_the_cards_add_up_over_a_fleet_that_has_every_state(host: Host, tenant: Tenant, staff: Any) -> None:
    for state in MACHINE:
        make_machine(f"one-{state}", state=state)
    make_lease(Machine.get(Machine.name == "one-leased"), tenant)
    make_machine("mended", state="ready", maintenance_since=utcnow(), maintenance_reason="fan")
    seen = staff.get("/admin/dashboard/stats").json
    counts = seen["machines"]
    assert counts["total"] == sum(counts["by_state"].values()) == sum(counts["by_reachability"].values())
    assert counts["total"] + counts["retired"] == Machine.select().count()
    assert (counts["retired"], counts["in_maintenance"], counts["by_state"]["ready"]) == (1, 1, 3)
    assert counts["by_reachability"] == {"online": 1, "offline": 0, "never": len(MACHINE)}
    assert seen["customers"] == {"total": 1, "active": 1}
    assert seen["tasks"] == {"running": 0}
    assert seen["alerts"] == {"open": 0}


def test_an_empty_fleet_has_no_mean(staff: Any) -> None:
    seen = staff.get("/admin/monitoring/realtime").json
    assert seen["machines"]["total"] == 0
    assert (seen["gpus"]["expected"], seen["gpus"]["utilization_percent"], seen["gpus"]["power_w"]) == (0, None, None)
    assert seen["by_region"] == seen["by_model"] == []


def test_the_overview_says_when_it_was_computed_and_is_computed_once(
    host: Host, staff: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = staff.get("/admin/monitoring/realtime").json
    host.report(gpu=gpus(host, {"temperature_c": 99}, {}))
    assert staff.get("/admin/monitoring/realtime").json == first
    assert staff.get("/admin/dashboard/stats").json["computed_at"] == first["computed_at"]
    age_s = (utcnow() - datetime.fromisoformat(first["computed_at"])).total_seconds()
    assert 0 <= age_s < first["keep_s"] == 30
    monkeypatch.setattr(monitoring_cache.current(), "clock", lambda: 1e12)  # long after
    assert staff.get("/admin/monitoring/realtime").json["gpus"]["temperature_max_c"] == 99


def test_devices_are_ordered_by_value_and_the_unknown_come_last(host: Host, staff: Any) -> None:
    host.report(gpu=gpus(host, {"temperature_c": None}, {"temperature_c": 40}))
    rental.ready_host("gpu-2").report(gpu=gpus(Host(Machine.get(Machine.name == "gpu-2")), {"temperature_c": 90}, {}))
    page = staff.get("/admin/monitoring/devices?order=temperature&page_size=3").json
    assert [device["temperature_c"] for device in page["items"]] == [90, 40, 30]
    assert (page["total"], page["page"], page["page_size"]) == (4, 1, 3)
    rest = staff.get("/admin/monitoring/devices?order=temperature&page_size=3&page=2").json["items"]
    assert [device["temperature_c"] for device in rest] == [None]
    assert staff.get("/admin/monitoring/devices?order=colour").status_code == 422
    assert monitoring_live.ORDERS == ("host", "utilization", "memory", "temperature", "power")


def test_a_prometheus_that_is_down_is_named_and_the_agents_go_on(host: Host, staff: Any, dead_port: None) -> None:
    seen = staff.get("/admin/monitoring/realtime").json
    assert seen["prometheus"]["state"] == "down"
    assert "Prometheus does not answer" in seen["prometheus"]["message"]
    assert seen["gpus"]["answering"] == 2
    for path in ("/admin/monitoring/charts" + CHART, f"/admin/monitoring/machines/{host.id}/charts{CHART}",
                 "/admin/dashboard/gpu-trend"):  # fmt: skip
        answer = staff.get(path)
        assert (answer.status_code, answer.json["code"]) == (503, "prometheus_down"), path
        assert answer.json["detail"].startswith("Prometheus does not answer")


def test_without_prometheus_a_chart_says_so(host: Host, staff: Any) -> None:
    answer = staff.get(f"/admin/monitoring/machines/{host.id}/charts{CHART}")
    assert (answer.status_code, answer.json["code"]) == (503, "no_prometheus")
    assert "PROMETHEUS_URL" in answer.json["detail"]


@pytest.mark.parametrize("query", ["", "?measure=colour", "?measure=power&range=1y", "?measure=power&gpu="])
def test_what_cannot_be_drawn_is_refused(host: Host, staff: Any, query: str) -> None:
    assert staff.get(f"/admin/monitoring/machines/{host.id}/charts{query}").status_code == 422


# A customer


def test_a_customer_sees_charts_of_a_machine_during_the_own_lease_only(
    host: Host, tenant: Tenant, customer: User, viewer: User, stranger: User, sign_in: SignIn
) -> None:
    """Without Prometheus the answer to whoever may is 503; whoever may not is told that there is no such machine."""
    path = f"/customer/machines/{host.id}/charts{CHART}"
    assert sign_in(customer).get(path).status_code == 404, "before the lease"
    lease = rental.allocate(host, tenant)
    host.sees(lease)
    assert sign_in(customer).get(path).json["code"] == "history_unavailable"
    assert sign_in(viewer).get(path).json["code"] == "history_unavailable"
    assert sign_in(stranger).get(path).status_code == 404
    rental.end(host, lease)
    assert sign_in(customer).get(path).status_code == 404, "after it"


def test_a_lease_that_is_only_planned_shows_nothing(
    host: Host, tenant: Tenant, customer: User, sign_in: SignIn
) -> None:
    starts_at = utcnow() + timedelta(hours=1)
    rental.allocate(host, tenant, starts_at=starts_at, until=starts_at + timedelta(hours=1))
    assert sign_in(customer).get(f"/customer/machines/{host.id}/charts{CHART}").status_code == 404


def test_what_is_for_staff_is_not_for_customers(host: Host, customer: User, sign_in: SignIn) -> None:
    for path in ("/admin/monitoring/realtime", "/admin/monitoring/devices", "/admin/monitoring/charts" + CHART,
                 f"/admin/monitoring/machines/{host.id}/charts{CHART}", "/admin/dashboard/stats",
                 "/admin/dashboard/gpu-trend"):  # fmt: skip
        assert sign_in(customer).get(path).status_code == 403, path


def test_a_customer_is_told_nothing_about_the_portals_own_prometheus(
    host: Host, tenant: Tenant, customer: User, sign_in: SignIn, dead_port: None, settings: Settings
) -> None:
    host.sees(rental.allocate(host, tenant))
    with atomic():
        Lease.update(activated_at=utcnow() - timedelta(hours=1)).execute()
    answer = sign_in(customer).get(f"/customer/machines/{host.id}/charts{CHART}")
    assert (answer.status_code, answer.json["code"]) == (503, "history_unavailable")
    assert (settings.prometheus_url or "").removeprefix("http://") not in answer.text
    assert "refused" not in answer.text


def test_a_report_of_an_old_agent_does_not_break_the_overview(host: Host, staff: Any) -> None:
    with atomic():
        MachineReport.update(gpu=None, metrics=None).execute()
    devices = staff.get("/admin/monitoring/devices").json["items"]
    assert {device["state"] for device in devices} == {"unknown"}
