"""`make demo` and `make demo-down`, word for word: the small world is there, and afterwards nothing of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.hosts import demo
from tests.hosts.docker import list_hosts
from tests.support.portal import OWN_PASSWORD, ROOT, Client, Portal

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(1800)]

UP_S = 1500.0


def make(word: str, *, timeout_s: float) -> str:
    """Type it; what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", word], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"make {word}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def printed() -> Iterator[str]:
    """What `make demo` told. There is one demo in a checkout: somebody's own is not taken for ours, nor removed."""
    assert not demo.RECORD.exists(), "this checkout has a demo already: make demo-down"
    try:
        yield make("demo", timeout_s=UP_S)
    finally:
        make("demo-down", timeout_s=120)


def test_the_demo_is_a_world_to_click_through_and_leaves_nothing(printed: str) -> None:
    url, ca_file = re.search(r"answers at (https://(?:\S+):\d+) .*CA: (\S+)\)", printed).groups()  # type: ignore[union-attr]  # a failure says what was printed
    address, _, port = url.removeprefix("https://").rpartition(":")
    portal = Portal(demo.FOLDER / "instance", address=address, port=int(port))
    assert Path(ca_file) == portal.ca_file
    admin, alice, carol = Client(portal), Client(portal), Client(portal)
    for client, name in ((admin, "admin"), (alice, "alice"), (carol, "carol")):
        client.sign_in(name, OWN_PASSWORD)
    machines = {machine["name"]: machine for machine in admin.get("admin/machines")["items"]}
    assert machines.keys() == {host.name for host in list_hosts(demo.LABEL)}
    assert sorted((each["state"], each["reachability"]) for each in machines.values()) == [
        ("leased", "online"),
        ("ready", "online"),
    ]
    assert [lease["state"] for lease in admin.get("admin/leases")["items"]] == ["active"]
    assert sorted(task["state"] for task in alice.get("customer/tasks")["items"]) == ["running", "succeeded"]
    assert carol.get("customer/machines")["items"] == []
    command = re.search(r"^  (ssh -i .*)$", printed, re.MULTILINE)
    assert command is not None, printed
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    typed = command[1].replace("ssh ", f"ssh {options} ", 1) + " id -un"
    signed_in = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"lease\d+\n", signed_in.stdout), signed_in.stderr

    again = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (again.returncode != 0, "there already" in again.stdout) == (True, True)

    assert "The demo is removed." in make("demo-down", timeout_s=120)
    assert list_hosts(demo.LABEL) == []
    assert not demo.FOLDER.exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/healthz", verify=False, timeout=5)  # noqa: S501 - its authority is gone, as it should be
    assert "There is no demo." in make("demo-down", timeout_s=120)
