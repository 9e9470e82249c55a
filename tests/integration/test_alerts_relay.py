"""From a fault to the portal with real parts: exporter, Prometheus with the delivered rules, Alertmanager, portal.

The rules are those of the role, with a hundredth of every `for:`; the real times are tested by promtool
(test_alerts_rules.py).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from portal.db import utcnow
from portal.integrations.alertmanager import Alertmanager, Refused, Unreachable
from portal.services.alerts import fingerprint_of
from tests.support import alertmanager, prometheus
from tests.support.portal import Client, Portal, free_port, running
from tests.support.rendering import render
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
RULES = ROOT / "roles" / "prometheus" / "files" / "remotegpu.alerting.rules.yml"
PATIENCE_S = 90.0


@dataclass
class Exporter:
    """node_exporter, as far as Prometheus sees: a port that answers, until it does not."""

    port: int = field(default_factory=lambda: free_port("127.0.0.1"))
    server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Metrics)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"node_time_seconds {datetime.now(UTC).timestamp()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing is said of it."""


@dataclass
class World:
    portal: Portal
    admin: Client
    alertmanager: alertmanager.Server
    exporter: Exporter

    def alerts(self, **filters: Any) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.admin.get("admin/alerts", name="MachineOffline", **filters)["items"]
        return items

    def told(self) -> str:
        return self.portal.tail() + self.alertmanager.tail()


@pytest.fixture
def world(whole: World) -> World:
    """All is well: the host answers, and no alert of it is open."""
    if whole.exporter.server is None:
        whole.exporter.start()
    until(lambda: not whole.alerts(is_open=True), "all to be well", timeout_s=PATIENCE_S, also=whole.told)
    return whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, exporter = tmp_path_factory.mktemp("alerts"), Exporter()
    portal = Portal(folder / "instance")
    manager_port = free_port("127.0.0.1")
    portal.environ = {"ALERTMANAGER_URL": f"http://127.0.0.1:{manager_port}"}
    with running(portal), alertmanager.server({}) as manager, prometheus.server() as watcher:
        admin = portal.set_up()
        manager.port, manager.config = manager_port, manager_config(portal, token_of(admin))
        manager.start()
        exporter.start()
        (watcher.folder / "delivered.rules.yml").write_text(scaled_rules())
        watcher.config = prometheus_config(manager, exporter)
        watcher.start()
        admin.post("admin/machines", name="gpu-1", address="192.0.2.7", ssh_user="root", credential={"password": "pw"})
        yield World(portal, admin, manager, exporter)
    exporter.stop()


def token_of(admin: Client) -> str:
    ends_at = (utcnow() + timedelta(days=30)).isoformat()
    return str(admin.post("auth/tokens", name="alertmanager", scopes=["alerts"], expires_at=ends_at)["token"])


def manager_config(portal: Portal, token: str) -> dict[str, Any]:
    door = {"authorization": {"credentials": token}, "tls_config": {"ca_file": str(portal.ca_file)}}
    webhook = {"url": f"{portal.url}/api/v1/alerts/webhook", "http_config": door}
    return {
        "route": {
            "receiver": "portal", "group_by": ["alertname"],
            "group_wait": "0s", "group_interval": "1s", "repeat_interval": "2s",
            "routes": [{"matchers": ["alertname = NeverDelivered"], "receiver": "nobody"}],
        },
        "receivers": [{"name": "portal", "webhook_configs": [webhook]}, {"name": "nobody"}],
    }  # fmt: skip


def scaled_rules() -> str:
    """Two minutes are 1.2 s."""
    return re.sub(r"\bfor: (\d+)m", lambda found: f"for: {int(found[1]) * 600}ms", RULES.read_text())


def by_role(manager: alertmanager.Server) -> dict[str, Any]:
    """How the role has a Prometheus with a label of its own send alerts."""
    given = {"prometheus_external_labels": {"site": "here"}, "prometheus_alertmanagers": [manager.address]}
    rendered: dict[str, Any] = yaml.safe_load(render("prometheus", "prometheus.yml.j2", "trixie", **given))
    return rendered


def prometheus_config(manager: alertmanager.Server, exporter: Exporter) -> dict[str, Any]:
    target = {"targets": [f"127.0.0.1:{exporter.port}"], "labels": {"host": "gpu-1", "instance": "gpu-1"}}
    rendered = by_role(manager)
    fast = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    return {
        "global": {**rendered["global"], **fast},
        "rule_files": ["*.rules.yml"],
        "alerting": rendered["alerting"],
        "scrape_configs": [{"job_name": "node", "static_configs": [target]}],
    }


def test_a_host_that_goes_down_and_comes_back_is_told_acknowledged_and_over(world: World) -> None:
    before = world.alerts()
    world.exporter.stop()
    (alert,) = until(lambda: world.alerts(is_open=True), "the alert to arrive", timeout_s=PATIENCE_S, also=world.told)
    assert (alert["severity"], alert["machine_name"], alert["source"]) == ("critical", "gpu-1", "alertmanager")
    assert alert["summary"].startswith("gpu-1 does not answer")
    assert alert["way_out"]
    assert alert["labels"] == {"alertname": "MachineOffline", "severity": "critical", "host": "gpu-1"}, (
        "as the portal's"
    )
    assert alert["fingerprint"] == fingerprint_of(alert["labels"]), "computed as Alertmanager does"
    done = world.admin.post(f"admin/alerts/{alert['id']}/acknowledge", remark="somebody is on the way")
    assert done["state"] == "acknowledged"
    repeated = until(
        lambda: [each for each in world.alerts(is_open=True) if each["last_heard_at"] > alert["last_heard_at"]],
        "a repeated delivery", timeout_s=PATIENCE_S, also=world.told,
    )  # fmt: skip
    assert [each["id"] for each in repeated] == [alert["id"]], "once, however often it is delivered"
    world.exporter.start()
    until(lambda: not world.alerts(is_open=True), "the alert to end", timeout_s=PATIENCE_S, also=world.told)
    over, *earlier = world.alerts()
    assert earlier == before
    assert (over["state"], over["remark"], over["resolved_by"]) == ("resolved", "somebody is on the way", None)
    assert over["ends_at"] >= over["starts_at"]


def test_down_again_it_is_another_episode_and_a_silence_is_made_in_alertmanager_too(world: World) -> None:
    before = len(world.alerts())
    world.exporter.stop()
    (alert,) = until(lambda: world.alerts(is_open=True), "the alert to arrive", timeout_s=PATIENCE_S, also=world.told)
    assert len(world.alerts()) == before + 1
    ends_at = (utcnow() + timedelta(hours=1)).isoformat()
    silence = world.admin.post(f"admin/alerts/{alert['id']}/silence", until=ends_at, reason="the host is being moved")
    there = world.alertmanager.ask("GET", f"silence/{silence['external_id']}")
    assert (there["status"]["state"], there["createdBy"], there["comment"]) == (
        "active", "admin", "the host is being moved",
    )  # fmt: skip
    assert {(each["name"], each["value"]) for each in there["matchers"]} == set(alert["labels"].items())
    assert world.alerts(silenced="true", is_open="true")[0]["id"] == alert["id"]
    world.admin.post(f"admin/alerts/silences/{silence['id']}/end")
    there = world.alertmanager.ask("GET", f"silence/{silence['external_id']}")
    assert there["status"]["state"] == "expired"


def test_what_alertmanager_knows_is_read_and_a_second_end_of_a_silence_is_harmless(world: World) -> None:
    asked = Alertmanager(world.alertmanager.url)
    labels = {"alertname": "NeverDelivered", "host": "gpu-1", "text": 'ä " {} ÿ'}
    world.alertmanager.ask("POST", "alerts", [{"labels": labels, "annotations": {"summary": "x"}}])
    (known,) = [each for each in asked.alerts() if each.labels["alertname"] == "NeverDelivered"]
    assert (known.labels, known.annotations, known.is_suppressed) == (labels, {"summary": "x"}, False)
    assert known.fingerprint == fingerprint_of(labels)
    assert utcnow() - timedelta(minutes=5) < asked.started_at() < utcnow()
    silence_id = asked.silence(labels, until=utcnow() + timedelta(hours=1), by="olga", reason="known")
    until(
        lambda: [each for each in asked.alerts() if each.labels == labels and each.is_suppressed],
        "the alert to be silenced", timeout_s=PATIENCE_S,
    )  # fmt: skip
    for _ in range(2):
        asked.end_silence(silence_id)
    with pytest.raises(Refused):
        asked.silence({}, until=utcnow() + timedelta(hours=1), by="olga", reason="everything")


def test_an_alertmanager_that_is_not_there_is_unreachable(world: World) -> None:
    with pytest.raises(Unreachable):
        Alertmanager(f"http://127.0.0.1:{free_port('127.0.0.1')}").alerts()


def test_a_delivery_that_was_never_made_is_fetched_by_the_worker(world: World) -> None:
    """The receiver of this alert is nobody; the worker asks Alertmanager as soon as it starts."""
    labels = {"alertname": "NeverDelivered", "host": "gpu-1"}
    world.alertmanager.ask("POST", "alerts", [{"labels": labels, "annotations": {"summary": "It was lost."}}])
    world.portal.start("worker")
    found = until(
        lambda: [
            each for each in world.admin.get("admin/alerts", name="NeverDelivered")["items"] if each["labels"] == labels
        ],
        "the worker to fetch it", timeout_s=PATIENCE_S, also=world.told,
    )  # fmt: skip
    assert (found[0]["summary"], found[0]["machine_name"]) == ("It was lost.", "gpu-1")
    names = {each["name"] for each in world.admin.get("admin/alerts", is_open="true")["items"]}
    assert not names & {"Watchdog", "MonitoringSilent"}
    world.portal.stop("worker")
