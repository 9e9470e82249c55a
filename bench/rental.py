"""A portal with one host, as the benches drive it: through the front doors, by the hands of the end-to-end test."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.world import INSTALLER_PASSWORD, PROVISION_TIMEOUT_S, Person, World, new_key
from tests.hosts import Host
from tests.hosts.docker import boot, gateway_address, unique
from tests.support.portal import Portal, running

SUITE = "trixie"
GPUS = 8
TENANT = "Bench"


@dataclass
class Rental:
    """A world, its one host that is ready to be leased, and somebody who uses it."""

    world: World
    host: Host
    tenant_id: int
    person: Person

    def tell(self) -> str:
        """What host and portal said last: both are gone once the block is over."""
        journal = self.host.run(
            "journalctl --no-pager --output=short-precise --lines=60; systemctl list-jobs", check=False
        )
        return f"--- the host:\n{journal.stdout}\n--- the portal:\n{self.world.portal.tail()}"


@contextmanager
def rental() -> Iterator[Rental]:
    """A prepared Debian 13 with eight GPUs, onboarded; portal and host end with the block."""
    with portal() as world, booted("host", prepared=True) as host:
        host.authorize("ops", new_key(world.folder / "operator").with_suffix(".pub").read_text())
        world.add(host)
        world.confirm(host)
        world.provision(host)
        world.wait_for_state(host, "ready", timeout_s=PROVISION_TIMEOUT_S)
        world.wait_until_healthy(host)
        tenant_id = world.tenant(TENANT)
        yield Rental(world, host, tenant_id, world.person("bench", tenant_id, "owner"))


@contextmanager
def portal() -> Iterator[World]:
    """Web and worker as processes with the settings of an operator who chose none: SQLite, a report each 15 s."""
    with tempfile.TemporaryDirectory(prefix="rgpu-bench-") as folder:
        held = Portal(Path(folder) / "instance", address=gateway_address())
        with running(held):
            admin = held.set_up()
            held.start("worker")
            try:
                yield World(held, admin, Path(folder))
            except BaseException:
                print(held.tail(), file=sys.stderr)  # its log goes with the folder
                raise


@contextmanager
def booted(what_for: str, *, prepared: bool) -> Iterator[Host]:
    host = boot(unique(f"bench-{what_for}"), SUITE, prepared=prepared, password=INSTALLER_PASSWORD, gpus=GPUS)
    try:
        yield host
    finally:
        host.destroy()
