"""A process has few database connections: while a request waits for somebody outside, the others have them all."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from portal import db
from portal.integrations.exchange import exchange
from portal.models import Alert, Lease, Tenant, User
from portal.settings import Settings
from tests.api.test_alerts_rules import RULE
from tests.support import rental
from tests.support.rental import Host
from tests.support.waiting import until

SignIn = Callable[[User], Any]
# What Prometheus says that has nothing, and Alertmanager that has taken a silence.
ANSWER = json.dumps({"status": "success", "data": {"result": []}, "silenceID": "1"}).encode()


class Outside(ThreadingHTTPServer):
    """Prometheus and Alertmanager: both answer at once, or only when they may."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked, self.may_answer = 0, threading.Event()
        self.may_answer.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Outside

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        self.server.may_answer.wait(20)
        self.send_response(200)
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture
def outside(settings: Settings, database: Any) -> Iterator[Outside]:
    with Outside() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        object.__setattr__(settings, "prometheus_url", server.url)
        object.__setattr__(settings, "alertmanager_url", server.url)
        yield server
        server.may_answer.set()
        server.shutdown()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether whoever began to wait for another program held a connection, each time."""
    seen: list[bool] = []
    connect, run = http.client.HTTPConnection.connect, subprocess.run

    def watched(connection: http.client.HTTPConnection) -> None:
        seen.append(not db.db.is_closed())
        connect(connection)

    def watched_run(*args: Any, **given: Any) -> Any:
        seen.append(not db.db.is_closed())
        return run(*args, **given)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", watched)
    monkeypatch.setattr(subprocess, "run", watched_run)
    return seen


@pytest.fixture
def host(database: Any, tenant: Tenant) -> Host:
    """Leased for an hour by now."""
    host = rental.ready_host("gpu-1", address="127.0.0.1", ssh_port=1)
    rental.allocate(host, tenant)
    Lease.update(activated_at=db.utcnow() - timedelta(hours=1)).execute()
    return host


@pytest.mark.parametrize("span", ["1h", "7d"])
@pytest.mark.parametrize("path", ["/admin/monitoring/charts", "/admin/monitoring/machines/{}/charts"])
def test_a_chart_holds_none_while_prometheus_is_asked(
    outside: Outside, held: list[bool], host: Host, operator: User, sign_in: SignIn, path: str, span: str
) -> None:
    answer = sign_in(operator).get(f"{path.format(host.id)}?measure=utilization&range={span}")
    assert (answer.status_code, set(held)) == (200, {False})


def test_nor_do_the_overview_a_customers_chart_and_the_trial_of_a_rule(
    outside: Outside, held: list[bool], host: Host, operator: User, customer: User, sign_in: SignIn
) -> None:
    staff, chart = sign_in(operator), f"/customer/machines/{host.id}/charts?measure=power&range=1h"
    for ask in (
        lambda: staff.get("/admin/monitoring/realtime"),
        lambda: sign_in(customer).get(chart),
        lambda: staff.post("/admin/alerts/rules/try", RULE),
    ):
        held.clear()
        assert (ask().status_code, set(held)) == (200, {False})


def test_nor_does_whoever_asks_alertmanager_or_a_host(
    outside: Outside, held: list[bool], host: Host, operator: User, sign_in: SignIn
) -> None:
    """That nobody answers at the host's port is told afterwards, with a connection again."""
    staff = sign_in(operator)
    given = {"name": "GpuHot", "severity": "warning", "source": "alertmanager", "fingerprint": "1", "state": "firing"}
    alert = Alert.create(starts_at=db.utcnow(), labels={}, annotations={}, **given)
    silence = {"until": rental.told(rental.tomorrow()), "reason": "known"}
    silenced = staff.post(f"/admin/alerts/{alert.id}/silence", silence)
    assert (silenced.status_code, held) == (201, [False])
    scanned = staff.post(f"/admin/machines/{host.id}/host-key")
    assert (scanned.status_code, scanned.json["code"], held) == (503, "host_unreachable", [False, False])


def test_while_prometheus_hangs_the_only_connection_is_for_the_others(
    outside: Outside, host: Host, operator: User, sign_in: SignIn, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One asks, and another waits for the same answer. Whoever looks at something else meanwhile is served."""
    staff = sign_in(operator)
    monkeypatch.setattr(db, "LOCK_WAIT_S", 1.0)
    if not db.is_sqlite():
        db.db.close_all()
        db.connect(database_url, max_connections=1)
    outside.may_answer.clear()
    with ThreadPoolExecutor(2) as people:
        waiting = [people.submit(staff.get, "/admin/monitoring/realtime") for _ in range(2)]
        until(lambda: outside.asked, "Prometheus to be asked")
        assert staff.get(f"/admin/machines/{host.id}").status_code == 200
        outside.may_answer.set()
        assert [each.result(20).status_code for each in waiting] == [200, 200]


def test_inside_a_transaction_the_connection_is_kept(outside: Outside, database: Any, tenant: Tenant) -> None:
    with db.atomic():
        Tenant.update(name="Acme & Sons").execute()
        assert exchange("POST", outside.url, body=b"", headers={}, deadline_s=5)[0] == 200
        assert db.db.in_transaction()
    assert Tenant.get().name == "Acme & Sons"
