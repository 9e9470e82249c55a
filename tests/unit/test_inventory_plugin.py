"""The inventory plugin: what may come in, what it pins, and that strings from the portal stay strings."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.errors import AnsibleParserError
from ansible.inventory.data import InventoryData
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import inventory_loader
from ansible.utils.display import Display

ROOT = Path(__file__).parents[2]
TOKEN = "an-operators-token"


def _load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("portal_inventory", ROOT / "inventory/plugins/portal.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["portal_inventory"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


plugin = _load()


def key(kind: str = "ssh-ed25519") -> str:
    blob = struct.pack(">I", len(kind)) + kind.encode() + struct.pack(">I", 32) + bytes(32)
    return f"{kind} {base64.b64encode(blob).decode()}"


def host(**changes: Any) -> dict[str, Any]:
    return {
        "name": "gpu-1",
        "address": "192.0.2.11",
        "port": 22,
        "user": "ops",
        "host_keys": [key()],
        "groups": ["gpu_hosts"],
        "vars": {"remotegpu_machine_id": 7},
        "password": None,
        "become_password": None,
        "private_key_file": None,
        **changes,
    }


def document(*hosts: Any, **changes: Any) -> dict[str, Any]:
    return {"schema": 1, "generated_at": "2026-11-25T12:00:00Z", "hosts": list(hosts), **changes}


def run(program: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The real program, as from a shell in the repository."""
    return subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        cwd=ROOT,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(home), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REMOTEGPU_URL", "REMOTEGPU_TOKEN", "REMOTEGPU_CA_FILE", "REMOTEGPU_INVENTORY_DOCUMENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANSIBLE_INVENTORY_CACHE_PLUGIN", "jsonfile")
    monkeypatch.setenv("ANSIBLE_INVENTORY_CACHE_CONNECTION", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An inventory file that reads the document beside it."""
    file = tmp_path / "run.remotegpu.yml"
    file.write_text("plugin: portal\ndocument: document.json\n")
    return file


def parsed(file: Path) -> InventoryData:
    """What Ansible's inventory manager does with a source."""
    inventory_loader.add_directory(str(ROOT / "inventory/plugins"))
    reader = inventory_loader.get("portal")
    data = InventoryData()
    assert reader.verify_file(str(file))
    reader.parse(data, DataLoader(), str(file), cache=True)
    with contextlib.suppress(AttributeError):  # as the manager does: no cache was asked for
        reader.update_cache_if_changed()
    return data


def listed(source: Path, *hosts: Any) -> dict[str, dict[str, Any]]:
    """The variables of every host by name, for a document with these hosts."""
    (source.parent / "document.json").write_text(json.dumps(document(*hosts)))
    return variables_of(parsed(source))


def variables_of(data: InventoryData) -> dict[str, dict[str, Any]]:
    return {name: each.get_vars() for name, each in data.hosts.items()}


# -- what may come in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "{{ lookup('pipe', 'id') }}"}, "is not made of letters"),
        ({"name": "-oProxyCommand=id"}, "is not made of letters"),
        ({"name": "gpu_1"}, "is not made of letters"),
        ({"name": "gpu-1\n"}, "is not made of letters"),
        ({"name": "localhost"}, "a meaning of its own"),
        ({"name": None}, "is not made of letters"),
        ({"address": "-oProxyCommand=id"}, "neither an IP address nor a host name"),
        ({"address": "192.0.2.1 x"}, "neither an IP address nor a host name"),
        ({"address": "fe80::1%eth0"}, "neither an IP address nor a host name"),
        ({"port": 0}, "not a number from 1 to 65535"),
        ({"port": True}, "not a number from 1 to 65535"),
        ({"port": "22"}, "not a number from 1 to 65535"),
        ({"user": "ops -o x"}, "not a login name"),
        ({"user": "{{ x }}"}, "not a login name"),
        ({"host_keys": []}, "no host key is pinned"),
        ({"host_keys": None}, "no host key is pinned"),
        ({"host_keys": [key() + "\n* " + key()]}, "is not like"),
        ({"host_keys": ["ssh-dss AAAA"]}, "is not like"),
        ({"host_keys": ["ssh-ed25519 not-base64!"]}, "no base64"),
        ({"host_keys": [key().replace("ssh-ed25519", "ssh-rsa", 1)]}, "of another type than it says"),
        ({"groups": ["gpu hosts"]}, "not names of letters"),
        ({"vars": {"ansible_connection": "local"}}, "may set remotegpu_… only"),
        ({"vars": {"ansible_python_interpreter": "/bin/sh"}}, "may set remotegpu_… only"),
        ({"vars": []}, "vars is no object"),
        ({"password": 7}, "password is no text"),
    ],
)
def test_a_host_that_could_mean_something_else_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(plugin.DocumentError, match=reason):
        plugin.machine(host(**changes))


@pytest.mark.parametrize("value", [None, [], {}, {"schema": 2, "hosts": []}, {"schema": 1}, {"schema": 1, "hosts": {}}])
def test_a_document_of_another_shape_is_refused(value: Any) -> None:
    with pytest.raises(plugin.DocumentError):
        plugin.hosts_of(value)


def test_another_port_is_pinned_with_the_port_and_ipv6_is_understood() -> None:
    assert plugin.machine(host(port=2222)).known_hosts_lines == [f"[192.0.2.11]:2222 {key()}"]
    assert plugin.machine(host(address="2001:DB8::0:1")).known_hosts_lines == [f"2001:db8::1 {key()}"]


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_a_host_is_told_to_accept_its_pinned_key_alone(source: Path) -> None:
    variables = listed(source, host())["gpu-1"]
    pinned = source.parent / "known_hosts"
    assert pinned.read_text() == f"192.0.2.11 {key()}\n"
    assert pinned.stat().st_mode & 0o777 == 0o600
    assert f"UserKnownHostsFile={pinned}" in variables["ansible_ssh_common_args"]
    assert "StrictHostKeyChecking=yes" in variables["ansible_ssh_common_args"]
    assert variables["ansible_host_key_checking"] is True, "ansible-runner switches it off by environment"
    assert variables["remotegpu_machine_id"] == 7
    assert "ansible_password" not in variables


@pytest.mark.parametrize(("password", "shared"), [("correct horse", sys.version_info < (3, 13)), (None, False)])
def test_the_tasks_of_a_run_by_password_share_one_tracker_of_its_memory(
    source: Path, monkeypatch: pytest.MonkeyPatch, password: str | None, shared: bool
) -> None:
    """Else each of 150 tasks starts a Python for the block that it hands the password to ssh in."""
    tracker = resource_tracker.ResourceTracker()
    monkeypatch.setattr(resource_tracker, "ensure_running", tracker.ensure_running)
    try:
        listed(source, host(password=password))
        assert (tracker._fd is not None) is shared
    finally:
        tracker._stop()


def test_one_odd_host_is_left_out_and_the_others_stay(source: Path) -> None:
    found = listed(source, host(name="b"), host(name="unpinned", host_keys=[]), host(name="a", address="a.example.org"))
    assert list(found) == ["a", "b"], "sorted: two runs say the same"
    assert "unpinned" not in (source.parent / "known_hosts").read_text()


def test_a_name_that_is_there_twice_means_the_first(source: Path) -> None:
    found = listed(source, host(), host(address="192.0.2.66"))
    assert found["gpu-1"]["ansible_host"] == "192.0.2.11"


def test_a_string_that_looks_like_a_template_is_never_executed(source: Path) -> None:
    planted = source.parent / "planted"
    evil = f"{{{{ lookup('pipe', 'touch {planted}') }}}}"
    variables = {"remotegpu_label": evil, "remotegpu_list": [evil], "remotegpu_deep": {"x": {"y": evil}}}
    (source.parent / "document.json").write_text(json.dumps(document(host(vars=variables, password=evil))))
    playbook = source.parent / "play.yml"
    playbook.write_text(
        """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact:
        copied: "{{ remotegpu_label }} {{ remotegpu_list }} {{ remotegpu_deep }} {{ ansible_password }}"
    - ansible.builtin.copy:
        content: "{{ remotegpu_label }}"
        dest: "{{ playbook_dir }}/literal"
        mode: "0600"
      delegate_to: localhost
    - ansible.builtin.debug:
        msg: "{{ copied }} {{ hostvars[inventory_hostname].remotegpu_deep.x.y }}"
"""
    )
    answer = run("ansible-playbook", "-i", str(source), str(playbook), home=source.parent)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (source.parent / "literal").read_text() == evil
    assert not planted.exists()


# -- the portal --------------------------------------------------------------------------------------------------------


class FakePortal(ThreadingHTTPServer):
    """Answers what the test says."""

    status = 200
    body: Any = None
    asked: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: FakePortal

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.path} {self.headers['Authorization']}")
        self.send_response(self.server.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        self.wfile.write(json.dumps(self.server.body).encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def portal() -> Iterator[FakePortal]:
    server = FakePortal(("127.0.0.1", 0), _Handler)
    server.asked = []
    server.body = document(host(password="first-contact", vars={"remotegpu_enroll_token": "once"}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def asking(portal: FakePortal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An inventory file that asks the fake portal, as an operator's shell is set."""
    monkeypatch.setenv("REMOTEGPU_URL", f"http://127.0.0.1:{portal.server_port}")
    monkeypatch.setenv("REMOTEGPU_TOKEN", TOKEN)
    file = tmp_path / "portal.remotegpu.yml"
    file.write_text("plugin: portal\ncache: true\nknown_hosts: known_hosts\n")
    return file


def test_the_portal_is_asked_with_the_token(portal: FakePortal, asking: Path) -> None:
    assert variables_of(parsed(asking))["gpu-1"]["ansible_password"] == "first-contact"
    assert portal.asked == [f"/api/v1/admin/inventory Bearer {TOKEN}"]


def test_the_last_good_copy_serves_while_the_portal_is_away_and_holds_no_secret(
    portal: FakePortal, asking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    parsed(asking)
    portal.status = 503
    monkeypatch.setattr(Display, "warning", lambda _, text, **__: warnings.append(text))
    assert variables_of(parsed(asking))["gpu-1"]["ansible_host"] == "192.0.2.11"
    assert "2026-11-25T12:00:00Z" in warnings[0]
    kept = "".join(path.read_text() for path in (asking.parent / "cache").iterdir())
    assert "192.0.2.11" in kept
    assert not [secret for secret in ("first-contact", "once", TOKEN) if secret in kept]


def test_a_leased_machine_does_not_look_free_from_a_cache(portal: FakePortal, asking: Path) -> None:
    parsed(asking)
    portal.body = document(host(vars={"remotegpu_lease_active": True}))
    assert variables_of(parsed(asking))["gpu-1"]["remotegpu_lease_active"] is True


@pytest.mark.parametrize("status", [401, 403, 302])
def test_a_portal_that_says_no_is_no_portal_that_is_away(portal: FakePortal, asking: Path, status: int) -> None:
    parsed(asking)
    portal.status = status
    with pytest.raises(AnsibleParserError, match=f"answered {status}"):
        parsed(asking)


def test_without_portal_and_copy_there_are_no_hosts(portal: FakePortal, asking: Path) -> None:
    portal.status = 503
    with pytest.raises(AnsibleParserError, match="there is no earlier copy"):
        parsed(asking)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("REMOTEGPU_URL", "http://portal.example.org", "must be https"),
        ("REMOTEGPU_URL", "", "REMOTEGPU_URL=https"),
        ("REMOTEGPU_TOKEN", "", "set REMOTEGPU_TOKEN"),
    ],
)
def test_what_is_missing_is_named(
    portal: FakePortal, asking: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(AnsibleParserError, match=reason):
        parsed(asking)
    assert portal.asked == []


def test_a_private_file_is_whole_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "known_hosts"
    plugin.write_private(target, "old\n")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        plugin.write_private(target, "new\n")
    assert target.read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["known_hosts"]
