"""The three hosts as the roles make them, with an agent on the gateway and one on the GPU host: once a module.

Each agent has a portal of its own, the double that speaks the protocol (tests/integration/agent): what a gateway does
when nobody orders it to any more is easier to ask of one that can be stopped. The portal itself is in test_rental.py.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.place import ROOT, Place, three_hosts
from tests.hosts import gateway_address
from tests.hosts.fixtures import EACH_SUITE
from tests.integration.agent.conftest import Lease, Site, install_agent
from tests.integration.agent.portal_double import Portal, in_seconds
from tests.support.waiting import until

SET_UP_S = 300.0
GREETING, SSH = 8888, 22  # what listens on the GPU host


@dataclass
class Behind:
    """The place with its two agents, and the words that the tests speak."""

    place: Place
    gateway: Site
    gpu: Site
    _ports: Iterator[int] = field(default_factory=lambda: itertools.count(20000))
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def forward(
        self, family: int, to: int, source: str, *, seconds: float = 600, port: int | None = None, wait: bool = True
    ) -> dict[str, Any]:
        """Have the gateway lead a port of its own to this one of the GPU host."""
        wanted = {
            "id": next(self._ids),
            "lease": 7,
            "protocol": "tcp",
            "public_port": port or next(self._ports),
            "source": source,
            "target_address": self.place.inside(self.place.gpu)[family],
            "target_port": to,
            "ends_at": in_seconds(seconds),
        }
        self.want(*self.gateway.portal.forwards, wanted)
        if wait:
            self.wait_for(wanted, "open")
        return wanted

    def want(self, *forwards: dict[str, Any]) -> int:
        """These and no others; answers the generation of that."""
        return self.gateway.portal.change(forwards=list(forwards))

    def end_soon(self, *forwards: dict[str, Any], seconds: float = 6) -> None:
        """Move the ends close, and wait until the gateway knows. What the test needs was set up at its own pace."""
        generation = self.want(*({**forward, "ends_at": in_seconds(seconds)} for forward in forwards))
        self.gateway.applied(generation, timeout_s=60)

    def seen(self, forward: dict[str, Any]) -> dict[str, Any] | None:
        """The forward as the newest report has it."""
        reports = self.gateway.portal.reports
        listed = reports[-1].get("forwards", []) if reports else []
        return next((each for each in listed if each["id"] == forward["id"]), None)

    def wait_for(self, forward: dict[str, Any], state: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            seen = self.seen(forward)
            return seen if seen is not None and seen["state"] == state else None

        return until(reached, f"forward {forward['id']} to be {state}", also=self.gateway.agent_log)

    def sign_in(
        self, family: int, forward: dict[str, Any], lease: Lease, *command: str, source: str | None = None
    ) -> str:
        """What the customer is answered; how ssh failed, if it did."""
        said = self.place.ssh(family, forward["public_port"], lease.login, lease.key, *command, source=source)
        return said.stdout.strip() if said.ok else f"refused: {said.stderr.strip()}"


@pytest.fixture(scope="module", params=EACH_SUITE)
def converged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    with ExitStack() as stack:
        place = stack.enter_context(three_hosts(request.param))
        sites = []
        for name, host in (("gateway", place.gateway), ("gpu", place.gpu)):
            folder = tmp_path_factory.mktemp(name)
            portal = Portal(gateway_address(), folder).start()
            stack.callback(portal.stop)
            sites.append(Site(host, portal, folder))
        behind = Behind(place, sites[0], sites[1])
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(by_the_playbook, sites, ("gateways", "gpu_hosts")))
        for site in sites:
            install_agent(site.host, site.portal)
        for site in sites:
            until(lambda site=site: site.portal.reports, "the first report", timeout_s=SET_UP_S, also=site.agent_log)
        yield behind


@pytest.fixture
def behind(converged: Behind) -> Iterator[Behind]:
    """At rest before and after: nothing forwarded, both portals up, and nothing said that breaks the protocol."""
    yield converged
    for site in (converged.gateway, converged.gpu):
        if site.portal._server is None:
            site.portal.start()
        site.host.run("systemctl start remotegpu-agent")
    converged.gpu.portal.change(leases=[])
    generation = converged.gateway.portal.change(forwards=[])
    converged.gateway.applied(generation, timeout_s=60)
    for site in (converged.gateway, converged.gpu):
        complaints, site.portal.complaints = site.portal.complaints, []
        assert complaints == []


def by_the_playbook(site: Site, name: str) -> None:
    """The firewall and what passes through, as a site makes them; the rest of the playbook is others' to test."""
    host = site.host
    key, public = site.new_key()
    host.authorize("ops", public["line"])
    known_hosts = site.directory / "known_hosts"
    known_hosts.write_text(host.known_hosts)
    told = {
        "ansible_host": host.address,
        "ansible_user": "ops",
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_common_args": f"-oUserKnownHostsFile={known_hosts} -oGlobalKnownHostsFile=/dev/null",
        "firewall_allow": [{"port": GREETING}] if name == "gpu_hosts" else [],
    }
    inventory = site.directory / "hosts.yml"
    inventory.write_text(json.dumps({name: {"hosts": {host.name: told}}}))
    program = Path(sys.executable).parent / "ansible-playbook"
    argv = [str(program), "-i", str(inventory), f"playbooks/{name}.yml", "--tags=firewall,gateway"]
    # A busy machine needs more than 10 s for a sign-in.
    environ = {**os.environ, "ANSIBLE_HOME": str(ROOT / ".ansible"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_TIMEOUT": "60"}
    done = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SET_UP_S)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
