"""The desktops' roles where no test host runs, and the parts of `remotegpu-desktop` that need no desktop."""

from __future__ import annotations

import configparser
import json
import os
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.roles.rendering import load_file
from tests.support.rendering import DISTRIBUTIONS, ROLES, evaluate, render

every_suite = pytest.mark.parametrize("suite", DISTRIBUTIONS)
NO_SOCKET = {"bookworm", "jammy", "noble"}  # xrdp 0.9


@pytest.fixture(scope="module")
def command() -> ModuleType:
    return load_file(ROLES / "desktop" / "files" / "remotegpu_desktop.py", "remotegpu_desktop")


def ini(template: str, suite: str, **given: Any) -> configparser.ConfigParser:
    said = {"__desktop_xrdp_backend": "Xorg", "desktop_group": "remotegpu-leases", "desktop_locale": "C.UTF-8", **given}
    parsed = configparser.ConfigParser(strict=False, interpolation=None, inline_comment_prefixes=None)
    parsed.read_string(render("desktop_xrdp", template, suite, ansible_managed="managed", **said))
    return parsed


# --- xrdp


@every_suite
def test_xrdp_listens_on_loopback_until_somebody_may_come(suite: str) -> None:
    assert ini("xrdp.ini.j2", suite)["Globals"]["port"] == "tcp://127.0.0.1:3389"
    assert ini("xrdp.ini.j2", suite, desktop_xrdp_sources=["192.0.2.0/24"])["Globals"]["port"] == "3389"


@every_suite
@pytest.mark.parametrize(("backend", "module"), [("Xorg", "libxup.so"), ("Xvnc", "libvnc.so")])
def test_xrdp_speaks_tls_and_offers_one_kind_of_session(suite: str, backend: str, module: str) -> None:
    said = ini("xrdp.ini.j2", suite, __desktop_xrdp_backend=backend)
    assert (said["Globals"]["security_layer"], said["Globals"]["ssl_protocols"]) == ("tls", "TLSv1.2, TLSv1.3")
    assert said["Globals"]["autorun"] == backend
    assert [name for name in said.sections() if "lib" in said[name]] == [backend]
    assert said[backend]["lib"] == module
    assert {name for name, value in said["Channels"].items() if value == "true"} == {"cliprdr", "drdynvc"}


@every_suite
def test_the_session_manager_lets_in_the_group_alone_and_is_reached_where_its_release_listens(suite: str) -> None:
    said = ini("sesman.ini.j2", suite)
    security = said["Security"]
    assert (security["AllowRootLogin"], security["AlwaysGroupCheck"]) == ("false", "true")
    assert security["TerminalServerUsers"] == "remotegpu-leases"
    assert said["Globals"].get("ListenAddress") == ("127.0.0.1" if suite in NO_SOCKET else None)
    assert ("SessionSockdirGroup" in security) is (suite not in NO_SOCKET)


@every_suite
@pytest.mark.parametrize(
    ("wanted", "found", "drawn_by"),
    [
        ("auto", [], "Xorg"),
        ("auto", ["/proc/driver/nvidia/version"], "Xvnc"),
        ("xorg", ["/proc/driver/nvidia/version"], "Xorg"),
        ("xvnc", [], "Xvnc"),
    ],
)
def test_xvnc_draws_where_nvidias_driver_is(suite: str, wanted: str, found: list[str], drawn_by: str) -> None:
    tasks = yaml.safe_load((ROLES / "desktop_xrdp/tasks/ask.yml").read_text())
    (rule,) = [task["ansible.builtin.set_fact"] for task in tasks if "ansible.builtin.set_fact" in task]
    said = {"desktop_xrdp_backend": wanted, "__desktop_xrdp_nvidia_found": {"stdout_lines": found}}
    assert evaluate(rule["__desktop_xrdp_backend"], "desktop_xrdp", suite, **said) == drawn_by


@every_suite
def test_no_password_of_a_login_is_asked_for_rdp(suite: str) -> None:
    text = render("desktop_xrdp", "pam.j2", suite, ansible_managed="managed", desktop_group="remotegpu-leases")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert [line[2] for line in lines if line[0] == "auth"] == [
        "pam_env.so",
        "pam_faildelay.so",
        "pam_succeed_if.so",
        "pam_exec.so",
        "pam_permit.so",
    ]
    assert ["@include", "common-auth"] not in lines
    assert ["@include", "common-account"] in lines, "a lease that has ended is an account that has expired"


@pytest.mark.parametrize(
    ("allow", "agrees"),
    [
        ([{"port": 3389, "sources": ["2001:db8::/64", "192.0.2.0/24"], "comment": "RDP"}], True),
        ([{"port": 9100, "sources": ["192.0.2.10"]}], False),
        ([{"port": 3389}], False),
        ([], False),
    ],
)
def test_firewall_and_xrdp_open_to_the_same(allow: list[dict[str, Any]], agrees: bool) -> None:
    (task,) = [
        task
        for task in yaml.safe_load((ROLES / "desktop_xrdp/tasks/assert.yml").read_text())
        if "__desktop_xrdp_opened" in task.get("vars", {})
    ]
    said = {"firewall_allow": allow, "desktop_xrdp_sources": ["192.0.2.0/24", "2001:db8::/64"]}
    opened = evaluate(task["vars"]["__desktop_xrdp_opened"], "desktop_xrdp", "trixie", **said)
    rule = "{{ " + task["ansible.builtin.assert"]["that"] + " }}"
    assert evaluate(rule, "desktop_xrdp", "trixie", __desktop_xrdp_opened=opened, **said) is agrees


@pytest.mark.parametrize(
    ("sources", "port", "opened", "scanned"),
    [
        ([], 3389, [], [22]),
        (["192.0.2.7"], 3389, [(3389, ["192.0.2.7"])], [22, 3389]),
        (["192.0.2.7"], 3390, [(3390, ["192.0.2.7"])], [22, 3390]),
    ],
)
def test_the_sites_own_file_opens_rdp_to_whom_it_names_and_to_nobody_else(
    sources: list[str], port: int, opened: list[tuple[int, list[str]]], scanned: list[int]
) -> None:
    site = yaml.safe_load((ROLES.parent / "inventory/group_vars/gpu_hosts.yml").read_text())
    assert site["desktop_kinds"] == []
    assert site["desktop_xrdp_sources"] == []
    said = {"desktop_xrdp_sources": sources, "desktop_xrdp_port": port}
    allowed = evaluate(site["firewall_allow"], "firewall", "trixie", **said)
    assert [(each["port"], each["sources"]) for each in allowed] == opened
    assert evaluate("{{ verify_allowed_ports }}", "verify", "trixie", firewall_allow=allowed) == scanned


# --- what both kinds stand on


@every_suite
def test_polkit_is_told_no_in_the_words_of_its_release(suite: str) -> None:
    place = evaluate("{{ __desktop_polkit }}", "desktop", suite)
    text = render("desktop", place["src"], suite, ansible_managed="managed")
    if suite == "jammy":
        assert place["dest"].endswith(".pkla")
        rule = configparser.ConfigParser()
        rule.read_string(text)
        (section,) = rule.sections()
        assert rule[section]["identity"] == "unix-group:remotegpu-leases"
        assert {rule[section][name] for name in ("resultany", "resultinactive", "resultactive")} == {"no"}
    else:
        assert place["dest"].startswith("/etc/polkit-1/rules.d/")
        assert 'subject.isInGroup("remotegpu-leases")' in text
        assert "polkit.Result.NO" in text


@every_suite
def test_no_session_comes_with_a_lock_that_nobody_can_open(suite: str) -> None:
    packages = set(evaluate("{{ __desktop_packages }}", "desktop", suite))
    assert packages & set(evaluate("{{ __desktop_lockers }}", "desktop", suite)) == set()


# --- the command


def test_the_settings_of_the_roles_are_what_the_command_reads() -> None:
    vnc = json.loads(render("desktop_vnc", "vnc.json.j2", "trixie"))
    assert vnc == {"first_display": 20, "last_display": 59, "size": "1600x900"}
    rdp = json.loads(render("desktop_xrdp", "rdp.json.j2", "trixie", __desktop_xrdp_fingerprint="ab:cd"))
    assert rdp == {"address": "127.0.0.1", "certificate_sha256": "ab:cd", "port": 3389}


def test_a_password_is_long_enough_and_can_be_read_aloud(command: ModuleType) -> None:
    made = {command.new_password(command.RDP_LETTERS) for _ in range(50)}
    assert {len(each) for each in made} == {16}
    assert len(made) == 50
    assert set("".join(made)) & set("0O1lI") == set()


def test_only_a_small_file_of_ones_own_counts_as_a_password(command: ModuleType, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"x" * 10_000)
    assert len(command.read_own(mine)) == command.MAX_BYTES
    (tmp_path / "link").symlink_to(mine)
    os.mkfifo(tmp_path / "pipe")
    for other in ("link", "pipe", "nothing", "."):
        assert command.read_own(tmp_path / other) == b""
    if os.geteuid() == 0:
        os.chown(mine, 12345, 12345)
        assert command.read_own(mine) == b""


def test_a_display_is_taken_while_somebody_listens_on_it(command: ModuleType) -> None:
    display = 4242
    with socket.socket(socket.AF_UNIX) as server:
        assert not command.is_taken(display)
        server.bind(f"\0/tmp/.X11-unix/X{display}")
        server.listen()
        assert command.is_taken(display)


def test_root_gets_no_desktop(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert command.main(["vnc"]) == 1
    assert "sign in as the user" in capsys.readouterr().err
