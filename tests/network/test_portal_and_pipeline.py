"""A real portal and the pipeline's script: a lease begins, the pipeline is called, applies and tells, the name is open.

`pulumi` is a stand-in that "applies" by writing down what the stack's own code says of the export: which resources it
wants, and the outputs. Portal, webhook, script, guard, plan and steps are the real ones.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from portal import start
from portal.db import utcnow
from portal.models import DnsRecord, DnsZone, Lease, NetworkState, Tenant
from portal.services import leases, network, network_names, network_views
from portal.services.actors import SYSTEM
from portal.services.config import use
from portal.settings import load
from tests.network.test_ci import ENGINE, Pipeline
from tests.support.network import state_of, zone
from tests.support.portal import Portal, free_port, running
from tests.support.rental import Host, allocate, ready_host
from tests.support.waiting import until

SECRET = "0123456789abcdef" * 4
APPLY = """
import json, sys
from pathlib import Path
from remotegpu_network import desired, document, settings, stack

told = settings.from_stack_file(Path("Pulumi.prod.yaml"))
wanted = document.read(Path(sys.argv[1]).read_bytes())
found = desired.resources(wanted, told)
Path(sys.argv[2], "cloud.json").write_text(json.dumps([each.label for each in found.resources]))
Path(sys.argv[2], "outputs.json").write_text(json.dumps({"network": stack.told_of(wanted, found, told), "groups": {}}))
"""


class Called(BaseHTTPRequestHandler):
    """What starts the pipeline in CI: it believes nothing that is not signed with the secret, just now."""

    heard: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        stamp = self.headers["X-RemoteGPU-Timestamp"]
        right = hmac.new(SECRET.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
        is_right = hmac.compare_digest(self.headers["X-RemoteGPU-Signature"], f"sha256={right}")
        if is_right and abs(time.time() - int(stamp)) < 300:
            self.heard.append(json.loads(body))
        self.send_response(202 if is_right else 403)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def calls() -> Iterator[Any]:
    kind = type("CalledOnce", (Called,), {"heard": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind.url = f"http://127.0.0.1:{server.server_port}/hook"  # type: ignore[attr-defined]
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def bound(tmp_path: Path, calls: Any) -> Iterator[Portal]:
    """A portal that does not run yet; this process speaks to its services as another worker would."""
    environ = {"NETWORK_WEBHOOK_URL": calls.url, "NETWORK_WEBHOOK_SECRET": SECRET, "SWEEP_INTERVAL_S": "0.2"}
    portal = Portal(tmp_path / "instance", environ=environ, port=free_port("127.0.0.1"))
    with running(portal):
        portal.command("init")
        portal.command("migrate")
        settings = load(portal.environment())
        start.bind(settings)
        use(settings)
        yield portal


@pytest.fixture
def host(bound: Portal) -> Host:
    """A ready machine, seen a moment ago and for a while to come; made before a worker would take its runs."""
    host = ready_host("gpu-17", address="192.0.2.17")
    host.report(received_at=utcnow() + timedelta(minutes=10))
    return host


@pytest.fixture
def fleet(bound: Portal) -> list[Host]:
    """Five machines, made like the one; ask for them before the portal."""
    hosts = [ready_host(f"gpu-{i}", address=f"192.0.2.{i}") for i in range(1, 6)]
    for host in hosts:
        host.report(received_at=utcnow() + timedelta(minutes=10))
    return hosts


@pytest.fixture
def portal(bound: Portal, host: Host) -> Portal:
    """Web and worker."""
    bound.start("web", "worker")
    return bound


@pytest.fixture
def pipeline(tmp_path: Path, portal: Portal) -> Pipeline:
    folder = tmp_path / "ci"
    folder.mkdir()
    pipeline = Pipeline(folder, portal.url)
    (folder / "apply.py").write_text(APPLY)
    applies = """up*)
      export=$(cat "$ANSWERS/export"); [ "$export" != "${BREAKS:-}" ] || exit 255
      python3 "$ANSWERS/apply.py" "$export" "$ANSWERS" ;;"""
    engine = folder / "bin" / "pulumi"
    lines = [applies if line.lstrip().startswith("up*)") else line for line in ENGINE.splitlines()]
    engine.write_text("\n".join(lines) + "\n")
    return pipeline


@pytest.fixture
def run(portal: Portal, pipeline: Pipeline) -> Any:
    """A run of the script with the token of a pipeline: exit status, and what it said."""
    token = portal.command("create-token", "pipeline", "--scope", "network").strip()
    given = {"PORTAL_TOKEN": token, "CURL_CA_BUNDLE": str(portal.ca_file), "PYTHONPATH": "."}

    def run(word: str, **environment: str) -> tuple[int, str]:
        status, said, _ = pipeline.run(word, **given, **environment)
        assert token not in said
        return status, said

    return run


def in_the_cloud(pipeline: Pipeline) -> list[str]:
    found: list[str] = json.loads((pipeline.folder / "cloud.json").read_text())
    return found


def record(at: str, kind: str, value: str) -> DnsRecord:
    zone = DnsZone.get()
    return network_names.create(zone, by=SYSTEM, name=f"{at}.{zone.name}", type=kind, values=[value])


def test_a_pipeline_that_asks_applies_once_what_has_changed(pipeline: Pipeline, run: Any) -> None:
    zone("gpu.example.org")
    record("www", "A", "192.0.2.1")
    assert run("waiting") == (0, "yes\n")
    status, said = run("apply")
    assert status == 0, said
    assert run("waiting") == (0, "no\n")
    record("mail", "A", "192.0.2.2")
    assert run("waiting") == (0, "yes\n")
    status, said = run("drift")
    assert (status, "waits for its apply: that is no drift" in said) == (0, True), said
    assert in_the_cloud(pipeline) == ["A www.gpu.example.org → 192.0.2.1"]


def test_an_apply_that_failed_is_shown_until_one_succeeds(run: Any) -> None:
    zone("gpu.example.org")
    record("www", "A", "192.0.2.1")
    for _ in range(2):
        assert run("apply", BREAKS="export.json", CI_JOB_URL="https://ci.example.org/jobs/7")[0] == 255
        (stack,) = network_views.standing().stacks
        assert stack.failed is not None
        assert stack.failed.reason == "The engine's apply failed. https://ci.example.org/jobs/7"
        assert stack.failed.generation == network.state().generation
        assert network.state().behind_since is not None
        status, said = run("apply")
        assert status == 0, said
        (stack,) = network_views.standing().stacks
        assert (stack.failed, network.state().behind_since) == (None, None)
        record(f"more{DnsRecord.select().count()}", "A", "192.0.2.2")
    NetworkState.update(frozen_reason="restored").execute()
    assert run("apply")[0] != 0
    (stack,) = network_views.standing().stacks
    assert stack.failed is not None, "also where the portal gave it no export"
    assert stack.failed.reason == "The portal gave no export. "


def test_an_apply_that_broke_between_two_steps_is_not_taken_for_done_and_is_taken_up(
    pipeline: Pipeline, run: Any
) -> None:
    """An A that another record replaces by a CNAME takes two applies."""
    zone("gpu.example.org")
    address = record("www", "A", "192.0.2.1")
    record("mail", "A", "192.0.2.2")
    assert run("apply")[0] == 0
    network_names.remove(address, by=SYSTEM)
    record("www", "CNAME", "edge.example.org")
    assert run("apply", BREAKS="export.json")[0] == 255
    assert in_the_cloud(pipeline) == ["A mail.gpu.example.org → 192.0.2.2"], "the first step was done"
    assert network.state().behind_since is not None, "and it still waits"
    assert run("waiting") == (0, "yes\n")
    status, said = run("apply")
    assert status == 0, said
    assert sorted(in_the_cloud(pipeline)) == [
        "A mail.gpu.example.org → 192.0.2.2", "CNAME www.gpu.example.org → edge.example.org.",
    ]  # fmt: skip
    assert network.state().behind_since is None


def test_leases_of_a_small_fleet_that_end_at_one_hour_are_no_fault(
    fleet: list[Host], portal: Portal, pipeline: Pipeline, run: Any
) -> None:
    """Three names of five are gone: of machines that would be too many."""
    zone("gpu.example.org", serves_leases=True)
    tenant = Tenant.create(name="Acme")
    rented = [(host, allocate(host, tenant)) for host in fleet]
    status, said = run("apply")
    assert status == 0, said
    for host, lease in rented[:3]:
        leases.end(lease, by=SYSTEM, reason="its hour")
        host.sees(lease, "closed")
    status, said = run("apply")
    assert status == 0, said
    assert sorted(in_the_cloud(pipeline)) == [
        f"A lease{lease.id}.gpu.example.org → {host.machine.address}" for host, lease in rented[3:]
    ]
    assert [Lease.get_by_id(lease.id).state for _, lease in rented] == ["ended"] * 3 + ["active"] * 2


def test_a_lease_opens_its_name_by_the_pipeline_and_closes_it_the_same_way(
    portal: Portal, host: Host, pipeline: Pipeline, run: Any, calls: Any
) -> None:
    def apply_when_called() -> None:
        """As CI does: a run for each call, until the portal has nothing new to say."""
        wanted = network.state().generation
        until(lambda: calls.heard and calls.heard[-1]["generation"] >= wanted, "the call", also=portal.tail)
        status, said = run("apply")
        assert status == 0, said

    zone("gpu.example.org", serves_leases=True)
    lease = allocate(host, Tenant.create(name="Acme"))
    assert state_of(lease, "name") == ("open", "closed")
    apply_when_called()
    label = f"A lease{lease.id}.gpu.example.org → 192.0.2.17"
    assert in_the_cloud(pipeline) == [label]
    assert state_of(lease, "name") == ("open", "open")

    count = len(calls.heard)
    leases.end(lease, by=SYSTEM, reason="done")
    host.sees(lease, "closed")
    assert Lease.get_by_id(lease.id).state == "ending", "its name is still there"
    apply_when_called()
    assert in_the_cloud(pipeline) == []
    assert Lease.get_by_id(lease.id).state == "ended"
    assert len(calls.heard) == count + 1, "one call for the end, none for what the pipeline itself has told"
    status, said = run("apply")
    assert status == 0, f"asking without being called works as well: {said}"
