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
from portal.models import Lease, Tenant
from portal.services import leases, network
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
def portal(tmp_path: Path, calls: Any) -> Iterator[Portal]:
    """Web and worker; this process speaks to its services as another worker would."""
    environ = {"NETWORK_WEBHOOK_URL": calls.url, "NETWORK_WEBHOOK_SECRET": SECRET, "SWEEP_INTERVAL_S": "0.2"}
    portal = Portal(tmp_path / "instance", environ=environ, port=free_port("127.0.0.1"))
    with running(portal):
        portal.command("init")
        portal.command("migrate")
        settings = load(portal.environment())
        start.bind(settings)
        use(settings)
        portal.start("web", "worker")
        yield portal


@pytest.fixture
def pipeline(tmp_path: Path, portal: Portal) -> Pipeline:
    folder = tmp_path / "ci"
    folder.mkdir()
    pipeline = Pipeline(folder, portal.url)
    (folder / "apply.py").write_text(APPLY)
    applies = 'up*) python3 "$ANSWERS/apply.py" "$(cat "$ANSWERS/export")" "$ANSWERS" ;;'
    engine = folder / "bin" / "pulumi"
    lines = [applies if line.lstrip().startswith("up*)") else line for line in ENGINE.splitlines()]
    engine.write_text("\n".join(lines) + "\n")
    return pipeline


def test_a_lease_opens_its_name_by_the_pipeline_and_closes_it_the_same_way(
    portal: Portal, pipeline: Pipeline, calls: Any
) -> None:
    token = portal.command("create-token", "pipeline", "--scope", "network").strip()
    environment = {"PORTAL_TOKEN": token, "CURL_CA_BUNDLE": str(portal.ca_file), "PYTHONPATH": "."}

    def in_the_cloud() -> list[str]:
        found: list[str] = json.loads((pipeline.folder / "cloud.json").read_text())
        return found

    def apply_when_called() -> None:
        """As CI does: a run for each call, until the portal has nothing new to say."""
        wanted = network.state().generation
        until(lambda: calls.heard and calls.heard[-1]["generation"] >= wanted, "the call", also=portal.tail)
        status, said, _ = pipeline.run("apply", **environment)
        assert status == 0, said

    host = seen_host()
    zone("gpu.example.org", serves_leases=True)
    lease = allocate(host, Tenant.create(name="Acme"))
    assert state_of(lease, "name") == ("open", "closed")
    apply_when_called()
    label = f"A lease{lease.id}.gpu.example.org → 192.0.2.17"
    assert in_the_cloud() == [label]
    assert state_of(lease, "name") == ("open", "open")

    count = len(calls.heard)
    leases.end(lease, by=SYSTEM, reason="done")
    host.sees(lease, "closed")
    assert Lease.get_by_id(lease.id).state == "ending", "its name is still there"
    apply_when_called()
    assert in_the_cloud() == []
    assert Lease.get_by_id(lease.id).state == "ended"
    assert len(calls.heard) == count + 1, "one call for the end, none for what the pipeline itself has told"
    status, said, _ = pipeline.run("apply", **environment)
    assert status == 0, f"asking without being called works as well: {said}"


def seen_host() -> Host:
    """A ready machine, seen a moment ago and for a while to come."""
    host = ready_host("gpu-17", address="192.0.2.17")
    host.report(received_at=utcnow() + timedelta(minutes=5))
    return host
