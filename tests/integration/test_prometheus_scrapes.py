"""A real Prometheus in front of a portal with two web processes: it finds the hosts, and counts add up."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from portal import start
from portal.db import db, utcnow
from portal.integrations.prometheus import Prometheus
from portal.models import User
from portal.services import heartbeats, tokens
from portal.settings import load
from tests.conftest import close_database
from tests.factories import actor_of, make_user
from tests.support import prometheus, rental
from tests.support.portal import Portal, running
from tests.support.rendering import render
from tests.support.rental import Host
from tests.support.waiting import until


@dataclass
class Site:
    """A portal, its one host (whose exporters nobody can reach), and a token for Prometheus."""

    portal: Portal
    host: Host
    token: str

    def metrics(self) -> dict[str, str]:
        """The lines of /metrics by what stands before the value, over a connection of its own."""
        headers = {"Authorization": f"Bearer {self.token}", "Connection": "close"}
        answer = requests.get(
            f"{self.portal.url}/metrics", headers=headers, verify=str(self.portal.ca_file), timeout=10
        )
        assert answer.status_code == 200, answer.text
        return dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))

    def config(self, folder: Path) -> dict[str, Any]:
        """As the role writes it: the portal by its token, the hosts without it.

        The type must be written out: for http_sd, Prometheus 2.42 sends a token from a file without the word Bearer.
        """
        (folder / "token").write_text(self.token)
        with_token = {
            "authorization": {"type": "Bearer", "credentials_file": str(folder / "token")},
            "tls_config": {"ca_file": str(self.portal.ca_file)},
        }
        sd = {"url": f"{self.portal.url}/api/v1/prometheus/targets", "refresh_interval": "1s", **with_token}
        of_portal = {"targets": [self.portal.url.removeprefix("https://")]}
        return {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [
                {"job_name": "portal", "scheme": "https", "static_configs": [of_portal], **with_token},
                {"job_name": "hosts", "http_sd_configs": [sd]},
            ],
        }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    portal = Portal(tmp_path_factory.mktemp("site") / "instance", environ={"WORKERS": "2"})
    portal.command("init")
    portal.command("migrate")
    start.bind(load({"INSTANCE_DIR": str(portal.instance), "PUBLIC_URL": portal.url}))
    host = rental.ready_host("gpu-1", address="127.0.0.77", region="eu")
    seen = [rental.gpu(each, index, utilization_percent=42) for index, each in enumerate(host.gpu_uuids)]
    host.report(gpu=rental.gpu_report(seen), received_at=utcnow() + timedelta(minutes=10))  # for as long as this takes
    owner: User = make_user("operator")
    expires_at = utcnow() + timedelta(days=1)
    token = tokens.create(owner, name="p", scopes=["prometheus"], expires_at=expires_at, by=actor_of(owner))[1]
    heartbeats.buffer.stop()
    close_database(db.obj)
    with running(portal):
        portal.start("web")
        yield Site(portal, host, token)


def test_what_several_processes_counted_adds_up_whoever_is_asked(site: Site) -> None:
    healthy = 'remotegpu_http_requests_total{area="page",method="GET",status="200"}'
    before = float(site.metrics()[healthy])
    for _ in range(30):
        answer = requests.get(f"{site.portal.url}/healthz", verify=str(site.portal.ca_file), timeout=10)
        assert answer.status_code == 200
    assert [float(site.metrics()[healthy]) - before for _ in range(12)] == [30.0] * 12
    folders = list((site.portal.instance / "metrics").iterdir())
    counting = {file.name for file in folders[0].glob("counter_*.db")}
    assert len(folders) == 1
    assert len(counting) == 2, "both processes have answered"


def test_prometheus_reads_the_portal_and_finds_its_hosts(site: Site, tmp_path: Path) -> None:
    with prometheus.server(site.config(tmp_path)) as server:
        server.start()
        targets = until(lambda: found_targets(server.url), "both exporters and the portal", also=server.tail)
        assert targets["portal"]["health"] == "up", targets["portal"]
        assert targets["portal"]["lastError"] == ""
        assert (targets["node"]["scrapeUrl"], targets["nvidia_gpu"]["scrapeUrl"]) == (
            "http://127.0.0.77:9100/metrics",
            "http://127.0.0.77:9835/metrics",
        )
        own = {"host": "gpu-1", "instance": "gpu-1", "machine_id": str(site.host.id), "region": "eu"}
        assert targets["node"]["labels"] == own | {"job": "node", "gpu_model": "NVIDIA H100"}
        asking = Prometheus(server.url)
        use = until(lambda: asking.query("remotegpu_gpu_utilization_ratio"), "the agents' values")
        assert {(series.labels["host"], series.value) for series in use} == {("gpu-1", 0.42)}
        assert len(use) == 2
        (down,) = until(lambda: asking.query('up{job="node",host="gpu-1"}'), "the exporter to be asked")
        assert down.value == 0


def found_targets(url: str) -> dict[str, Any] | None:
    """The targets by job, once each of them was asked."""
    with urllib.request.urlopen(f"{url}/api/v1/targets", timeout=5) as answer:  # noqa: S310 - our own address
        active = json.load(answer)["data"]["activeTargets"]
    by_job = {target["labels"]["job"]: target for target in active if target["health"] != "unknown"}
    return by_job if len(by_job) == 3 else None


def test_prometheus_own_checkers_take_both_answers(site: Site, tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(json.dumps(site.config(tmp_path)))
    argv = ["promtool", "check", "service-discovery", "--timeout=5s", str(tmp_path / "prometheus.yml"), "hosts"]
    checked = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert {entry["labels"]["job"] for entry in json.loads(checked.stdout)} == {"node", "nvidia_gpu"}
    headers = {"Authorization": f"Bearer {site.token}"}
    text = requests.get(f"{site.portal.url}/metrics", headers=headers, verify=str(site.portal.ca_file), timeout=10).text
    linted = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (linted.returncode, linted.stderr) == (0, "")


SAID = """\
node_load1 3
remotegpu_redis_up 1
remotegpu_machine_maintenance{host="gpu-2"} 1
host:cpu_percent:avg5m{host="gpu-2"} 1
ALERTS{alertname="RedisDown",alertstate="firing"} 1
up{job="portal"} 1
"""


def test_whoever_is_root_on_a_host_speaks_for_that_host_alone(tmp_path: Path) -> None:
    """His exporter says what he likes; what another alert rests on is not taken, nor without end."""
    with exporter(SAID) as liar, exporter("".join(f"made_up_{each} 1\n" for each in range(201))) as babbler:
        given = {"prometheus_portal_url": "http://127.0.0.1:9", "prometheus_host_sample_limit": 200}
        told = yaml.safe_load(render("prometheus", "prometheus.yml.j2", "bookworm", **given))
        (hosts,) = [each for each in told["scrape_configs"] if each["job_name"] == "hosts"]
        del hosts["http_sd_configs"]
        hosts["static_configs"] = [
            {"targets": [address], "labels": {"job": "node", "instance": name, "host": name}}
            for name, address in (("liar", liar), ("babbler", babbler))
        ]
        quick = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        with prometheus.server({"global": quick, "scrape_configs": [hosts]}) as server:
            server.start()
            asking = Prometheus(server.url)
            until(lambda: asking.query('node_load1{host="liar"}'), "the host's own value", also=server.tail)
            assert named(asking, '{instance="liar",__name__!~"scrape_.*"}') == {"node_load1", "up"}
            (up,) = until(lambda: asking.query('up{host="babbler"}'), "the other to be asked", also=server.tail)
            assert up.value == 0, "too much is as good as nothing"
            assert named(asking, '{__name__=~"remotegpu.*|made_up.*|.*:.*|ALERTS"}') == set()


def named(asking: Prometheus, selector: str) -> set[str]:
    return {series.labels["__name__"] for series in asking.query(selector)}


@contextmanager
def exporter(text: str) -> Iterator[str]:
    """Where something answers with this, whatever is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
