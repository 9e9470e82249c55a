"""The gateway role as written: what it shares with the role firewall, and what it makes of what it has seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.rendering import DISTRIBUTIONS, Role
from tests.support.rendering import ROLES

SEEN = ["outside eth0", "router eth0", "network 10.0.0.0/24", "network fd00:5::/64", "ipv6"]


def gateway(distribution: str = "Debian 13", **said: Any) -> Role:
    return Role("gateway", distribution, **{"__gateway_seen": SEEN, **said})


def test_gateway_and_firewall_speak_of_the_same_mark() -> None:
    """The one sets it, the other lets nothing through without."""
    mark = Role("firewall").value("__firewall_gateway_mark")
    assert gateway().value("__gateway_mark") == mark
    firewall = Role("firewall", firewall_gateway=True, __firewall_ssh=[22]).lines("firewall.nft.j2")
    assert f"meta mark & {mark} == {mark} accept" in firewall


def test_a_firewall_that_knows_of_no_gateway_asks_for_no_mark() -> None:
    lines = Role("firewall", __firewall_ssh=[22]).lines("firewall.nft.j2")
    assert not [line for line in lines if Role("firewall").value("__firewall_gateway_mark") in line]


def test_the_way_back_knows_every_file_of_the_gateway() -> None:
    words = [word.strip(";") for word in (ROLES / "firewall/files/way_back.sh").read_text().split()]
    for each in gateway().value("__gateway_files"):
        assert [word for word in words if word.startswith("/") and Path(each["dest"]).match(word)], each["dest"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_nftables_comes_by_the_distributions_own_name(distribution: str) -> None:
    assert gateway(distribution).value("__gateway_packages") == ["nftables"]


def test_without_a_word_hosts_are_where_no_default_route_leads() -> None:
    assert gateway().value("__gateway_networks") == ["10.0.0.0/24", "fd00:5::/64"]
    named = gateway(gateway_networks=["192.0.2.0/24"])
    assert named.value("__gateway_networks") == ["192.0.2.0/24"]
    assert json.loads(named.template("gateway.json.j2")) == {"schema": 1, "networks": ["192.0.2.0/24"]}


def test_hosts_get_out_only_where_it_is_said_and_customers_keep_their_address() -> None:
    out = "ip saddr { 10.0.0.0/24 } ip daddr != { 10.0.0.0/24 }"
    nothing, routed, masqueraded = (gateway(gateway_way_out=way).lines("gateway.nft.j2") for way in WAYS)
    assert [line for line in nothing if line.startswith(out)] == []
    assert [line for line in routed if line.startswith(out)] == [f"{out} goto pass"]
    assert [line for line in masqueraded if line.startswith(out)] == [f"{out} goto pass", f"{out} masquerade"]
    every = [line for line in masqueraded if "masquerade" in line]
    assert all("saddr { " in line for line in every), "of the hosts' networks alone"
    assert [line for line in every if "ip6" in line] == [
        "ip6 saddr fc00::/7 ip6 saddr { fd00:5::/64 } ip6 daddr != { fd00:5::/64 } masquerade"
    ]


WAYS = ("none", "routed", "masquerade")


def test_a_gateway_keeps_the_routes_that_it_is_told_of() -> None:
    """A kernel that passes IPv6 on no longer listens to routers, and whoever signed in over that is locked out."""
    lines = gateway().lines("sysctl.conf.j2")
    assert lines.index("net/ipv6/conf/eth0/accept_ra = 2") < lines.index("net/ipv6/conf/all/forwarding = 1")
    static = gateway(__gateway_seen=["outside eth0", "network 10.0.0.0/24"]).lines("sysctl.conf.j2")
    assert not [line for line in static if "ipv6" in line], "where the kernel knows no IPv6"


def test_its_unit_never_takes_the_rules_away() -> None:
    lines = gateway().lines("remotegpu-gateway.service.j2")
    assert not [line for line in lines if line.startswith("ExecStop")]
    assert {"After=nftables.service", "Before=network-pre.target shutdown.target"} <= set(lines)


def test_the_playbook_tells_the_firewall_of_the_gateway_before_it_is_one() -> None:
    (play,) = yaml.safe_load((ROLES.parent / "playbooks/gateways.yml").read_text())
    roles = {each["role"]: each for each in play["roles"]}
    assert roles["firewall"]["vars"] == {"firewall_gateway": True}
    assert list(roles).index("firewall") < list(roles).index("gateway") < list(roles).index("gpu_agent")
    assert play["hosts"] == "gateways"
