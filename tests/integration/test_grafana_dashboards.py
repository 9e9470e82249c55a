"""Every query of every panel of every dashboard, asked of a real Prometheus that holds an hour of a small site.

What the portal says is its own /metrics, with a machine that reports two GPUs; what the exporters and Prometheus itself
say are series by the names and labels that they really have. A panel that shows nothing here would show nothing there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from portal.db import utcnow
from portal.models import User
from portal.services import tokens
from roles.grafana.filter_plugins.dashboard import grafana_dashboard
from tests.factories import actor_of
from tests.support import prometheus, rental
from tests.support.prometheus import Sample

FOLDER = Path(__file__).parents[2] / "roles" / "grafana" / "files" / "dashboards"
HOUR_S, STEP_S = 3600, 60
GPU = "2c6e3a3b-0000-4000-8000-000000000001"
BLANK_GPU = "2c6e3a3b-0000-4000-8000-000000000002"
ON_HOST = {"host": "gpu-1", "instance": "gpu-1", "machine_id": "1"}
NODE = {**ON_HOST, "job": "node"}
NVIDIA = {**ON_HOST, "job": "nvidia_gpu"}
ROOT_FS = {"device": "/dev/nvme0n1p2", "fstype": "ext4", "mountpoint": "/"}

# name, labels of its own, value, and how much it grows a second
NODE_SERIES: list[tuple[str, dict[str, str], float, float]] = [
    ("up", {}, 1, 0),
    ("node_time_seconds", {}, 1.8e9, 1),
    ("node_boot_time_seconds", {}, 1.7e9, 0),
    ("node_cpu_seconds_total", {"cpu": "0", "mode": "idle"}, 1000, 0.5),
    ("node_load1", {}, 3.5, 0),
    ("node_memory_MemAvailable_bytes", {}, 2e11, 0),
    ("node_memory_MemTotal_bytes", {}, 5e11, 0),
    ("node_filesystem_avail_bytes", ROOT_FS, 4e11, 0),
    ("node_filesystem_size_bytes", ROOT_FS, 1e12, 0),
    ("node_network_receive_bytes_total", {"device": "eth0"}, 1e9, 1e6),
    ("node_network_transmit_bytes_total", {"device": "eth0"}, 1e9, 1e6),
    ("node_disk_read_bytes_total", {"device": "nvme0n1"}, 1e9, 1e6),
    ("node_disk_written_bytes_total", {"device": "nvme0n1"}, 1e9, 1e6),
    ("node_vmstat_oom_kill", {}, 0, 0),
]
NVIDIA_SERIES: list[tuple[str, dict[str, str], float, float]] = [
    ("up", {}, 1, 0),
    ("nvidia_smi_command_exit_code", {}, 0, 0),
    ("nvidia_smi_gpu_info", {"uuid": GPU, "name": "NVIDIA H100"}, 1, 0),
    *(
        (f"nvidia_smi_{name}", {"uuid": GPU}, number, 0.0)
        for name, number in {
            "remapped_rows_pending": 0,
            "mig_mode_current": 0,
            "utilization_gpu_ratio": 0.4,
            "memory_used_bytes": 4e10,
            "memory_total_bytes": 8e10,
            "temperature_gpu": 55,
            "power_draw_watts": 340,
            "enforced_power_limit_watts": 700,
            "clocks_current_sm_clock_hz": 1.7e9,
            "fan_speed_ratio": 0.3,
            "ecc_errors_uncorrected_volatile_total": 0,
        }.items()
    ),
    # What drivers were seen to say of a card that has no such number.
    ("nvidia_smi_utilization_gpu_ratio", {"uuid": BLANK_GPU}, 0xFFFFFFFF / 100, 0),
    ("nvidia_smi_ecc_errors_uncorrected_volatile_total", {"uuid": BLANK_GPU}, 2.0**64, 0),
]
OWN_SERIES: list[tuple[str, dict[str, str], float, float]] = [
    ("up", {"job": "portal", "instance": "127.0.0.1:8081"}, 1, 0),
    ("scrape_duration_seconds", {"job": "portal", "instance": "127.0.0.1:8081"}, 0.01, 0),
    ("prometheus_tsdb_head_series", {"job": "prometheus", "instance": "127.0.0.1:9090"}, 5000, 0),
    ("alertmanager_notifications_failed_total", {"job": "alertmanager", "integration": "webhook"}, 0, 0),
    ("ALERTS", {"alertname": "DiskFull", "alertstate": "firing", "host": "gpu-1", "severity": "warning"}, 1, 0),
]


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(grafana_dashboard(yaml.safe_load(path.read_text()))) for path in FOLDER.glob("*.yml")}


def queries() -> list[Any]:
    return [
        pytest.param(target["expr"], target["range"], id=f"{name}: {panel['title']} {target['refId']}")
        for name, dashboard in sorted(dashboards().items())
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


class Asking:
    """A Prometheus with the hour of that site, and the end of the hour."""

    def __init__(self, url: str, until: float) -> None:
        self.url, self.until = url, until

    def get(self, path: str, **parameters: Any) -> Any:
        told = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert told["status"] == "success", f"{parameters}: {told}"
        return told["data"]


@pytest.fixture
def portal_says(client: FlaskClient, operator: User) -> str:
    """/metrics of a portal that knows a machine whose agent reports, and one that has a problem."""
    host = rental.ready_host("gpu-1", region="eu")
    used = [
        rental.gpu(uuid, index, utilization_percent=42, memory_bandwidth_percent=10, processes=[])
        for index, uuid in enumerate(host.gpu_uuids)
    ]
    network = [{"interface": "eth0", "received_bytes": 10**9, "sent_bytes": 10**8}]
    host.report(gpu=rental.gpu_report(used), metrics={**rental.metrics(), "network": network})
    broken = rental.ready_host("gpu-2")
    broken.report(gpu=rental.gpu_report([]))
    mute = rental.ready_host("gpu-3")
    mute.report(gpu=rental.gpu_report([], state="timeout", message="no answer"))
    expires_at = utcnow() + timedelta(days=1)
    secret = tokens.create(operator, name="p", scopes=["prometheus"], expires_at=expires_at, by=actor_of(operator))[1]
    client.get("/healthz")
    answer = client.get("/metrics", headers={"Authorization": f"Bearer {secret}"})
    assert answer.status_code == 200
    return answer.text


@pytest.fixture
def asking(portal_says: str) -> Iterator[Asking]:
    until = time.time() - 60
    with prometheus.server() as server:
        server.load(hour(portal_says, until))
        server.start()
        yield Asking(server.url, until)


def hour(portal_says: str, until: float) -> Iterator[Sample]:
    own = {"job": "portal", "instance": "127.0.0.1:8081"}
    said = [
        (sample.name, {**sample.labels, **own}, sample.value, 0.1 if family.type in ("counter", "histogram") else 0.0)
        for family in text_string_to_metric_families(portal_says)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    requests_well = [each for each in said if each[0] == "remotegpu_http_requests_total" and each[1]["status"] == "200"]
    said += [
        (name, {**labels, "status": "500"}, first, grows) for name, labels, first, grows in requests_well[:1]
    ]  # it makes no error
    of_node = [(name, {**NODE, **labels}, first, grows) for name, labels, first, grows in NODE_SERIES]
    of_nvidia = [(name, {**NVIDIA, **labels}, first, grows) for name, labels, first, grows in NVIDIA_SERIES]
    for name, labels, first, grows in [*said, *of_node, *of_nvidia, *OWN_SERIES]:
        for back_s in range(HOUR_S, -STEP_S, -STEP_S):
            yield Sample(name, labels, until - back_s, first + grows * (HOUR_S - back_s))


SERIES = re.compile(r"\b(?!(?:by|on|without|ignoring)\b)[a-zA-Z_:][\w:]*(?:\{[^}]*\}|(?=[ )\[/]|$)(?! *\())")
WORDS = {"or", "and", "unless", "on", "by", "bool", "group_left"}


def series_of(query: str) -> list[str]:
    """The series that a query rests on, with their labels: `count(x{y="z"} == 0) or vector(0)` → `x{y="z"}`."""
    without_groups = re.sub(r"\b(?:by|on|without|ignoring|group_left|group_right) *\([^)]*\)", "", query)
    return [found for found in SERIES.findall(without_groups) if found not in WORDS]


def test_the_series_of_a_query_are_found() -> None:
    assert series_of('count(x{y="z"} == 0) or vector(0)') == ['x{y="z"}']
    assert series_of("sum by (a, b) (rate(x_total[5m])) / on (a) group_left (c) max(y)") == ["x_total", "y"]


def test_every_series_that_a_query_rests_on_is_there_also_where_none_counts_as_zero(asking: Asking) -> None:
    """`or vector(0)` always answers, also over a misspelt name."""
    absent = set()
    for parameter in queries():
        for series in series_of(parameter.values[0].replace("$host", ".*")):
            if not asking.get("query", query=series, time=asking.until)["result"]:
                absent.add(f"{parameter.id}: {series}")
    assert sorted(absent) == []


def test_every_query_of_every_panel_answers_with_series(asking: Asking) -> None:
    silent = []
    for parameter in queries():
        expr, is_range = parameter.values
        query = expr.replace("$host", ".*")
        now = asking.get("query", query=query, time=asking.until)["result"]
        span = {"start": asking.until - 1800, "end": asking.until, "step": 60}
        over_time = asking.get("query_range", query=query, **span)["result"] if is_range else now
        if not now or not over_time:
            silent.append(f"{parameter.id}: {query}")
    assert silent == []
    for dashboard in dashboards().values():
        for choice in dashboard["templating"]["list"]:
            series, label = choice["definition"].removeprefix("label_values(").rstrip(")").rsplit(", ", 1)
            match = {"match[]": series, "start": asking.until - 1800, "end": asking.until}
            assert "gpu-1" in asking.get(f"label/{label}/values", **match), choice["definition"]


def test_a_drivers_blank_is_drawn_nowhere(asking: Asking) -> None:
    drawn = set()
    for parameter in queries():
        query = parameter.values[0].replace("$host", ".*")
        for series in asking.get("query", query=query, time=asking.until)["result"]:
            drawn.add((series["metric"].get("uuid"), parameter.id.split(": ")[1]))
    of_card, of_blank = ({panel for uuid, panel in drawn if uuid == each} for each in (GPU, BLANK_GPU))
    assert {"Utilisation A", "Uncorrected ECC errors A"} <= of_card
    assert of_blank == set()
