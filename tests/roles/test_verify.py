"""What may answer from outside, and which addresses are asked: what `verify` decides before it sends a packet.

What counts as a yes is in tests/unit/test_roles_verify.py; a reclaim of a host with its exporters open in tests/site.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.roles.rendering import Role, load_module
from tests.roles.test_dry_runs import dry_run
from tests.support.rendering import ROLES, evaluate

port_scan = load_module("verify", "port_scan")

CARD: dict[str, Any] = {"ifname": "eth0", "addr_info": [{"family": "inet6", "local": "2001:db8::7", "scope": "global"}]}


def interface(name: str, **flags: bool) -> dict[str, Any]:
    return {"ifname": name, "addr_info": [{"family": "inet6", "local": "2001:db8::8", **flags}]}


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        ({}, [22]),
        ({"ansible_port": 2222}, [2222]),
        ({"firewall_ssh_ports": [2222]}, [22, 2222]),
        ({"firewall_allow": [{"port": 9100, "sources": ["192.0.2.10"]}, {"port": 9835}]}, [22, 9100, 9835]),
        ({"firewall_allow": [{"port": 53, "protocol": "udp"}, {"port": "53", "protocol": "tcp"}]}, [22, 53]),
        ({"firewall_allow": [{"port": 161, "protocol": "udp"}]}, [22]),
        ({"remotegpu_open_ports": [7000, 7001], "firewall_allow": [{"port": 7000}]}, [22, 7000, 7001]),
    ],
)
def test_what_is_opened_for_good_may_answer_and_nothing_else(said: dict[str, Any], allowed: list[int]) -> None:
    """Said once, to the firewall: a monitored host is none that fails its reclaim."""
    assert evaluate("{{ verify_allowed_ports }}", "verify", "trixie", **said) == allowed


@pytest.mark.parametrize(
    ("interfaces", "addresses"),
    [
        ([CARD], ["2001:db8::7"]),
        ([{}, {**CARD, "addr_info": [*CARD["addr_info"], {}]}, {}], ["2001:db8::7"]),  # what iproute2 6.1 and 6.15 say
        ([CARD, interface("br0")], ["2001:db8::7", "2001:db8::8"]),
        ([CARD, interface("docker0"), interface("br-0123456789ab")], ["2001:db8::7"]),
        ([CARD, interface("eth1", deprecated=True), interface("eth2", tentative=True)], ["2001:db8::7"]),
        ([], []),
    ],
)
def test_a_host_is_asked_at_every_address_by_which_others_may_reach_it(
    interfaces: list[dict[str, Any]], addresses: list[str]
) -> None:
    assert port_scan.own_addresses(json.dumps(interfaces)) == addresses


@pytest.mark.parametrize("said", ["", "null", 'Object "address" is unknown', '[{"ifname": "eth0"}]', "[7]"])
def test_a_host_that_does_not_name_its_addresses_is_not_asked_at_fewer(said: str) -> None:
    with pytest.raises(ValueError, match="does not say which addresses it has"):
        port_scan.own_addresses(said)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        yield server.getsockname()[1]


class Told(Exception):
    """What the module answers."""

    def __init__(self, **answer: Any) -> None:
        self.answer = answer


def ask(monkeypatch: pytest.MonkeyPatch, port: int, own: list[str]) -> dict[str, Any]:
    """The module's answer about 127.0.0.1 and what the host says it has, for one port."""
    said = json.dumps([{"ifname": "eth0", "addr_info": [{"local": each} for each in own]}])
    params = {"addresses": ["127.0.0.1"], "own": said, "first": port, "last": port, "timeout": 0.5}

    class Module:
        def __init__(self, **_: Any) -> None:
            self.params = params

        def exit_json(self, **answer: Any) -> None:
            raise Told(**answer)

        fail_json = exit_json

    monkeypatch.setattr(port_scan, "AnsibleModule", Module)
    with pytest.raises(Told) as told:
        port_scan.main()
    return told.value.answer


def test_a_port_that_is_open_on_ipv6_only_is_found(monkeypatch: pytest.MonkeyPatch, listener: int) -> None:
    answer = ask(monkeypatch, listener, ["::1"])
    assert {each["address"]: each["open"] for each in answer["scans"]} == {"127.0.0.1": [], "::1": [listener]}
    assert answer["no_way"] == []


def test_an_own_address_to_which_nothing_leads_is_named_and_proves_nothing_against_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A controller without IPv6 is no fault of the host."""
    real = socket.socket.connect_ex

    def without_ipv6(self: socket.socket, address: Any) -> int:
        return port_scan.errno.ENETUNREACH if self.family == socket.AF_INET6 else real(self, address)

    monkeypatch.setattr(socket.socket, "connect_ex", without_ipv6)
    answer = ask(monkeypatch, 9, ["2001:db8::7"])
    assert [each["address"] for each in answer["scans"]] == ["127.0.0.1"]
    assert answer["no_way"] == ["2001:db8::7"]


PORTALS = "-----BEGIN CERTIFICATE-----\nthe portal's\n-----END CERTIFICATE-----\n"
SERVED: dict[str, Any] = {
    "gpu_agent_portal_url": "https://portal.example.org",
    "gpu_agent_ca_pem": PORTALS,
    "gpu_agent_config": {"proxy_url": "http://192.0.2.1:3128"},
}


def told(folder: Path, name: str) -> dict[str, Any]:
    """The check of whom the agent serves, on a host whose settings lie in `folder/etc`."""
    roles = folder / name / "roles"
    roles.mkdir(parents=True)
    (roles / "gpu_agent").symlink_to(ROLES / "gpu_agent")
    asked: dict[str, Any] = {"baseline": {"sections": {"agent_settings": {}}}}
    here = {"__gpu_agent_etc": str(folder / "etc"), "verify_request": asked, "ansible_become": False}
    played = dry_run("verify", "settings", folder / name, {}, __verify_checks=[], **here, **SERVED)
    (check,) = played["Judge whom it serves"]["ansible_facts"]["__verify_checks"]
    return dict(check)


@pytest.mark.skipif(os.geteuid() != 0, reason="on a host the settings are root's, and who runs this cannot make such")
def test_whom_the_agent_serves_is_compared_with_what_provisioning_would_write(tmp_path: Path) -> None:
    """The very template: what passes here is what `gpu_agent` has written, with all that a site sets beside."""
    settings, trusted = tmp_path / "etc" / "agent.json", tmp_path / "etc" / "ca.pem"
    settings.parent.mkdir()
    role = Role("gpu_agent", __gpu_agent_etc=str(tmp_path / "etc"), **SERVED)
    for path, text, mode in ((settings, role.template("agent.json.j2"), 0o600), (trusted, PORTALS, 0o644)):
        path.write_text(text)
        path.chmod(mode)
    assert told(tmp_path, "as it would be written")["result"] == "passed"
    settings.write_text(settings.read_text().replace("portal.example.org", "left.example.org"))
    trusted.write_text(PORTALS + PORTALS.replace("the portal's", "left"))
    left = told(tmp_path, "another")
    assert (left["result"], left["evidence"]["strange"]) == (
        "failed",
        ["/etc/remotegpu/agent.json", "/etc/remotegpu/ca.pem"],
    )
