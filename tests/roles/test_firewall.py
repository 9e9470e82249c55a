"""The firewall role as written: who owns what on each distribution, and what ufw and firewalld are told."""

from __future__ import annotations

import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from remotegpu_agent.openings import PRIORITIES
from tests.roles.rendering import DISTRIBUTIONS, Role, load_module
from tests.support.rendering import ROLES

BACKENDS = ("nftables", "iptables", "firewalld", "ufw")
ALLOW: list[dict[str, Any]] = [
    {"port": 9100, "sources": ["192.0.2.10", "2001:DB8::/64"], "comment": "Prometheus"},
    {"port": 53, "protocol": "udp"},
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
ufw_rules = load_module("firewall", "ufw_rules")
firewalld_direct = load_module("firewall", "firewalld_direct")


def firewall(backend: str, distribution: str = "Debian 13", **said: Any) -> Role:
    return Role(
        "firewall", distribution, firewall_backend=backend, **{"__firewall_ssh": [22], "firewall_allow": ALLOW, **said}
    )


# --- one owner


@every_backend
@every_distribution
def test_each_backend_is_installed_by_the_distributions_own_names(backend: str, distribution: str) -> None:
    packages = firewall(backend, distribution).value("__firewall_packages")
    assert backend in packages[backend]
    assert set(packages) == set(BACKENDS)


@every_backend
def test_what_one_backend_leaves_the_next_takes_away(backend: str) -> None:
    role = firewall(backend)
    own = {each["dest"] for each in role.value("__firewall_files")[backend] + role.value("__firewall_units")}
    every = {each["dest"] for name in BACKENDS for each in role.value("__firewall_files")[name]}
    every |= {each["dest"] for files in role.value("__firewall_unit_files").values() for each in files}
    zone = "/etc/firewalld/zones/remotegpu.xml"  # stays, as the rules of ufw do
    assert set(role.value("__firewall_left_files")) == every - own - {zone}


@every_backend
def test_the_way_back_knows_every_file_of_every_backend(backend: str) -> None:
    text = (ROLES / "firewall/files/way_back.sh").read_text()
    for each in (role := firewall(backend)).value("__firewall_files")[backend] + role.value("__firewall_units"):
        covered = [word for word in text.split() if word.startswith("/") and Path(each["dest"]).match(word.strip(";"))]
        inside = each["dest"].startswith(("/etc/ufw/", "/etc/firewalld/")) or "program=" + each["dest"] in text
        assert covered or inside, each["dest"]


@pytest.mark.parametrize("backend", ["iptables", "firewalld", "ufw"])
def test_the_hosts_program_is_valid_shell(backend: str, tmp_path: Path) -> None:
    (tmp_path / "program").write_text(firewall(backend).template("remotegpu-firewall.sh.j2"))
    for shell in ("sh", "bash"):
        subprocess.run([shell, "-n", tmp_path / "program"], check=True)


def test_the_unit_of_nftables_is_the_one_that_leased_hosts_have() -> None:
    """Another unit file means a reload of systemd, which an active lease must not suffer."""
    lines = firewall("nftables").lines("remotegpu-firewall.service.j2")
    assert lines == [
        "[Unit]",
        "Description=RemoteGPU firewall: the table inet remotegpu, and no other",
        "Documentation=file:///etc/remotegpu/firewall.nft",
        "DefaultDependencies=no",
        "Wants=network-pre.target",
        "Before=network-pre.target shutdown.target",
        "Conflicts=shutdown.target",
        "After=nftables.service",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        "ExecStart=/usr/sbin/nft -f /etc/remotegpu/firewall.nft",
        "ExecReload=/usr/sbin/nft -f /etc/remotegpu/firewall.nft",
        "NoNewPrivileges=yes",
        "ProtectHome=yes",
        "ProtectSystem=strict",
        "PrivateTmp=yes",
        "CapabilityBoundingSet=CAP_NET_ADMIN",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "LockPersonality=yes",
        "MemoryDenyWriteExecute=yes",
        "SystemCallArchitectures=native",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    assert firewall("nftables").lines("nftables.conf.j2") == [
        "[Service]",
        "ExecStartPost=/usr/sbin/nft -f /etc/remotegpu/firewall.nft",
        "ExecReload=/usr/sbin/nft -f /etc/remotegpu/firewall.nft",
        "ExecStopPost=/usr/sbin/nft -f /etc/remotegpu/firewall.nft",
    ]


@pytest.mark.parametrize("backend", ["iptables", "ufw"])
def test_our_chains_come_behind_all_who_write_whole_tables_and_behind_docker(backend: str) -> None:
    role = firewall(backend)
    unit = role.lines("remotegpu-firewall.service.j2")
    assert "After=nftables.service netfilter-persistent.service ufw.service" in unit
    assert "Before=network-pre.target shutdown.target" in unit
    assert not [line for line in unit if line.startswith("ExecStop")], "a stopped unit leaves the rules"
    follower = role.lines("remotegpu-firewall-docker.service.j2")
    assert {"PartOf=docker.service", "WantedBy=docker.service"} <= set(follower)
    assert "After=docker.service remotegpu-firewall.service" in follower
    assert "ExecStart=/usr/local/sbin/remotegpu-firewall load" in follower


def test_nftables_service_takes_nothing_along_when_firewalld_stops_it() -> None:
    assert firewall("firewalld").lines("nftables.conf.j2") == ["[Service]", "ExecStop="]


# --- openings of leases


@every_backend
@every_distribution
def test_the_agent_is_told_where_its_sets_are_and_what_brings_them_back(backend: str, distribution: str) -> None:
    role = firewall(backend, distribution)
    table = {"nftables": "remotegpu"}.get(backend, "remotegpu_openings")
    told = json.loads(role.template("firewall.json.j2"))
    written = {each["dest"]: each["src"] for each in role.value("__firewall_files")[backend]}
    assert told == {"schema": 1, "backend": backend, "table": table, "rules": told["rules"]}
    text = role.template(written[told["rules"]])
    assert f"table inet {table} {{" in text
    assert [name for name in ("openings", "openings6") if f"  set {name} {{\n" in text] == ["openings", "openings6"]
    assert "nftables" in role.value("__firewall_packages")[backend]


@pytest.mark.parametrize("backend", ["iptables", "firewalld", "ufw"])
def test_what_is_open_for_good_is_no_openings_business(backend: str) -> None:
    """Neither marked, nor cut when an opening of the same port ends."""
    lines = firewall(backend).lines("openings.nft.j2")
    marking = [line for line in lines if "meta mark set" in line]
    assert len(marking) == 2
    for each in (
        'tcp dport 22 return comment "SSH"',
        'ip saddr { 192.0.2.10 } tcp dport 9100 return comment "Prometheus"',
        'ip6 saddr { 2001:DB8::/64 } tcp dport 9100 return comment "Prometheus"',
        "udp dport 53 return",
    ):
        assert lines.index(each) < lines.index(marking[0])


@pytest.mark.parametrize("backend", ["iptables", "firewalld", "ufw"])
def test_our_chains_let_in_what_is_marked_and_refuse_the_rest(backend: str) -> None:
    for family in (4, 6):
        lines = firewall(backend).lines("chains.j2", item={"family": family})
        marked = lines.index("-A REMOTEGPU-ALLOWED -m mark --mark 0x10000000/0x10000000 -j RETURN")
        assert lines[marked + 1] == "-A REMOTEGPU-ALLOWED -g REMOTEGPU-REFUSED"


def test_ufw_lets_in_what_is_marked_behind_the_rules_of_people() -> None:
    tasks = yaml.safe_load((ROLES / "firewall/tasks/write_ufw.yml").read_text())
    (task,) = [each for each in tasks if "ansible.builtin.blockinfile" in each]
    block = firewall("ufw").expression(task["ansible.builtin.blockinfile"]["block"], item=task["loop"][0])
    assert block == "-A ufw-after-input -m mark --mark 0x10000000/0x10000000 -j ACCEPT"
    assert [each["chain"] for each in task["loop"]] == ["ufw-after-input", "ufw6-after-input"]


def test_the_unit_beside_firewalld_brings_the_table_of_openings_alone() -> None:
    lines = firewall("firewalld").lines("remotegpu-firewall.service.j2")
    assert "ExecStart=/usr/sbin/nft -f /etc/remotegpu/openings.nft" in lines
    assert not [line for line in lines if line.startswith("ExecStop")]


# --- the chains


@pytest.mark.parametrize("backend", ["iptables", "firewalld", "ufw"])
def test_a_source_is_in_the_chains_of_its_own_family_and_ssh_in_both(backend: str) -> None:
    role = firewall(backend)
    v4, v6 = (role.lines("chains.j2", item={"family": family}) for family in (4, 6))
    opened = '-p tcp -m conntrack --ctorigdstport 9100 -m comment --comment "Prometheus" -j RETURN'
    assert [line for line in v4 if "9100" in line] == [f"-A REMOTEGPU-ALLOWED -s 192.0.2.10 {opened}"]
    assert [line for line in v6 if "9100" in line] == [f"-A REMOTEGPU-ALLOWED -s 2001:DB8::/64 {opened}"]
    for lines in (v4, v6):
        assert "-A REMOTEGPU-ALLOWED -p udp -m conntrack --ctorigdstport 53 -j RETURN" in lines
        ssh = '-A REMOTEGPU-ALLOWED -p tcp -m conntrack --ctorigdstport 22 -m comment --comment "SSH" -j RETURN'
        assert lines.index(ssh) < lines.index("-A REMOTEGPU-ALLOWED -g REMOTEGPU-REFUSED")


def test_ssh_is_let_in_before_anything_is_refused() -> None:
    for family in (4, 6):
        lines = firewall("iptables", __firewall_ssh=[22, 2222]).lines("chains.j2", item={"family": family})
        last = lines.index("-A REMOTEGPU-INPUT -g REMOTEGPU-ALLOWED")
        for port in (22, 2222):
            assert (
                lines.index(f"-A REMOTEGPU-INPUT -p tcp -m tcp --dport {port} -m comment --comment SSH -j RETURN")
                < last
            )
        assert lines[-2:] == ["-A REMOTEGPU-REFUSED -j DROP", "COMMIT"]


def test_what_is_refused_is_logged_only_when_asked_for() -> None:
    logged = firewall("iptables", firewall_log=True).lines("chains.j2", item={"family": 4})
    quiet = firewall("iptables").lines("chains.j2", item={"family": 4})
    line = '-A REMOTEGPU-REFUSED -m limit --limit 10/min -j LOG --log-prefix "remotegpu refused: "'
    assert line in logged
    assert [each for each in logged if each != line] == quiet


# --- ufw


def test_ufw_gets_what_is_open_and_ours_that_is_not_open_any_more_goes() -> None:
    shown = """\
Added user rules (see 'ufw status' for running firewall):
ufw allow 22/tcp comment 'remotegpu: SSH'
ufw allow 8443/tcp
ufw allow from 192.0.2.10 to any port 9100 proto tcp comment 'remotegpu: an older name'
ufw allow from 192.0.2.66 to any port 6666 proto tcp comment 'remotegpu: gone'
ufw deny from 203.0.113.9
"""
    wanted = ufw_rules.wanted_rules([{"port": 22, "comment": "SSH"}, *ALLOW])
    add, delete = ufw_rules.plan(wanted, ufw_rules.present_rules(shown))
    assert [" ".join(each) for each in add] == [
        "allow from 192.0.2.10 to any port 9100 proto tcp comment remotegpu: Prometheus",
        "allow from 2001:db8::/64 to any port 9100 proto tcp comment remotegpu: Prometheus",
        "allow 53/udp comment remotegpu",
    ]
    assert [" ".join(each) for each in delete] == ["--force delete allow from 192.0.2.66 to any port 6666 proto tcp"]


def test_ufw_is_left_alone_once_it_says_what_is_wanted() -> None:
    wanted = ufw_rules.wanted_rules(ALLOW)
    shown = "\n".join(f"ufw {rule} comment '{comment}'" for rule, comment in wanted.items())
    assert ufw_rules.plan(wanted, ufw_rules.present_rules(shown)) == ([], [])


def test_a_rule_that_somebody_else_gave_ufw_is_neither_doubled_nor_made_ours() -> None:
    present = ufw_rules.present_rules("ufw allow 22/tcp\nufw allow 80/tcp comment 'remotegpu-like'\n")
    wanted = ufw_rules.wanted_rules([{"port": 22, "comment": "SSH"}])
    assert ufw_rules.plan(wanted, present) == ([], [])
    assert ufw_rules.plan({}, present) == ([], [])


# --- firewalld


def direct(old: str = "", **said: Any) -> str:
    role = firewall("firewalld", **said)
    texts = {name: role.template("chains.j2", item={"family": int(name[-1])}) for name in ("ipv4", "ipv6")}
    ours = [each for name, text in texts.items() for each in firewalld_direct.our_elements(name, text)]
    return str(firewalld_direct.merged(old, ours))


def test_firewalld_judges_what_docker_publishes_before_docker_does() -> None:
    root = ElementTree.fromstring(direct())  # noqa: S314 - ours
    for family in ("ipv4", "ipv6"):
        chains = [each.get("chain") for each in root.iter("chain") if each.get("ipv") == family]
        assert chains == [
            "REMOTEGPU-ALLOWED",
            "REMOTEGPU-FORWARD",
            "REMOTEGPU-PUBLISHED",
            "REMOTEGPU-REFUSED",
        ]
        rules = [each for each in root.iter("rule") if each.get("ipv") == family]
        asked = [each for each in rules if each.get("chain") == "FORWARD"]
        assert [(each.get("priority"), each.text) for each in asked] == [("0", "-j REMOTEGPU-FORWARD")]
        assert {each.get("table") for each in root if each.get("ipv") == family} == {"mangle"}
        published = [each.text for each in rules if each.get("chain") == "REMOTEGPU-PUBLISHED"]
        assert published == [
            "-m conntrack --ctstate INVALID -j DROP",
            "-m conntrack '!' --ctstate DNAT -g REMOTEGPU-REFUSED",
            "-g REMOTEGPU-ALLOWED",
        ]


def test_what_others_have_told_firewalld_stays_and_ours_is_there_once() -> None:
    foreign = """<?xml version="1.0" encoding="utf-8"?>
<direct>
  <chain ipv="ipv4" table="filter" chain="DOCKER-USER"/>
  <rule ipv="ipv4" table="filter" chain="DOCKER-USER" priority="5">-s 203.0.113.9 -j DROP</rule>
  <passthrough ipv="ipv4">-t raw -A PREROUTING -j ACCEPT</passthrough>
</direct>
"""
    before = foreign.replace(
        "<passthrough",
        '<chain ipv="ipv4" table="filter" chain="REMOTEGPU-FORWARD"/>'
        '<rule ipv="ipv4" table="filter" chain="DOCKER-USER" priority="0">-j REMOTEGPU-FORWARD</rule><passthrough',
    )
    once = direct(before)
    assert firewalld_direct.said(direct(once)) == firewalld_direct.said(once)
    kept = [each for each in firewalld_direct.said(once) if "REMOTEGPU" not in str(each)]
    assert kept == firewalld_direct.said(foreign), "what we had in another table before is gone"
    less = direct(once, firewall_allow=[])
    assert "9100" in once
    assert "9100" not in less


def test_the_zone_drops_and_opens_for_whom_it_is_said() -> None:
    root = ElementTree.fromstring(firewall("firewalld").template("zone.xml.j2"))  # noqa: S314 - ours
    assert root.get("target") == "DROP"
    assert [(each.get("port"), each.get("protocol")) for each in root.findall("port")] == [("22", "tcp"), ("53", "udp")]
    rich = [
        (rule.get("family"), source.get("address"), port.get("port"))
        for rule in root.findall("rule")
        if (source := rule.find("source")) is not None and (port := rule.find("port")) is not None
    ]
    assert rich == [("ipv4", "192.0.2.10", "9100"), ("ipv6", "2001:DB8::/64", "9100")]
    icmp = {each.get("name") for each in root.iter("icmp-type")}
    assert {"neighbour-solicitation", "neighbour-advertisement", "packet-too-big", "echo-request"} <= icmp


@pytest.mark.parametrize("priority", PRIORITIES)
def test_what_the_agent_has_opened_is_no_change_of_firewalld(priority: int, tmp_path: Path) -> None:
    """Else the host's program would load all anew, which closes what is open."""
    port = 'family="ipv4" port port="8100" protocol="tcp" accept'
    told = f'remotegpu (default, active)\n  rich rules: \n\trule priority="{priority}" {port}\n\trule {port}\n'
    (tmp_path / "firewall-cmd").write_text(f"#!/bin/sh\ncat <<'EOF'\n{told}EOF\n")
    (tmp_path / "firewall-cmd").chmod(0o755)
    program = firewall("firewalld").template("remotegpu-firewall.sh.j2")
    zone = program[program.index("zone() {") : program.index("direct() {")]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    seen = subprocess.run(["sh", "-c", f"{zone}\nzone"], env=path, check=True, capture_output=True, text=True).stdout
    assert seen == f"\trule {port}\n  rich rules: \n"


def test_one_backend_is_chosen_from_a_closed_list() -> None:
    specified = yaml.safe_load((ROLES / "firewall/meta/argument_specs.yml").read_text())
    assert specified["argument_specs"]["main"]["options"]["firewall_backend"]["choices"] == list(BACKENDS)
