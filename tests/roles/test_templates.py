"""Every template of every role, rendered for each Ubuntu that the role takes: no test host runs one.

Here each of them can be written at all, and is what its reader takes: a unit, JSON, YAML, a shell's. What a line has to
say is in the role's own test; on Debian the scenarios write them all.
"""

from __future__ import annotations

import configparser
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.support.rendering import DISTRIBUTIONS, FACTS, ROLES, render, variables_of

# What a role's tasks have found, or a site has to say, before a template is written.
GIVEN: dict[str, dict[str, Any]] = {
    "base": {"__base_keyed": [{"name": "ops", "keys": ["ssh-ed25519 AAAA ops"]}], "__base_sudoers": ["ops"]},
    "desktop_xrdp": {
        "__desktop_xrdp_backend": "Xorg",
        "__desktop_xrdp_fingerprint": "ab:cd",
        "desktop_group": "remotegpu-leases",  # of the role desktop, on which it stands
        "desktop_locale": "C.UTF-8",
    },
    "firewall": {"__firewall_ssh": [22], "item": {"family": 4}},
    "gateway": {"__gateway_seen": ["ipv6", "outside eth0", "router eth0", "network 192.0.2.0/24"]},
    "gpu_agent": {"__gpu_agent_settings": {"portal_url": "https://portal.example.org"}},
    "harbor": {"__harbor_version": "2.14.0"},
    "nvidia_driver": {"nvidia_driver_repository_url": "https://repository.example.org/"},
    "portal": {"__portal_certificate": {"certificate": "/c.pem", "key": "/k.pem"}, "__portal_slot": "green"},
}
SECTIONS = {"Unit", "Service", "Timer", "Path", "Install"}


def facts(suite: str) -> dict[str, Any]:
    distribution, major = DISTRIBUTIONS[suite]
    of_suite = {"distribution": distribution, "distribution_major_version": major, "distribution_release": suite}
    return {**FACTS, **of_suite, "architecture": "x86_64"}


def takes(role: str, suite: str) -> bool:
    supported = variables_of(role, suite).get(f"__{role}_supported")
    return supported is None or "_".join(DISTRIBUTIONS[suite]) in supported


def templates() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(ROLES.glob("*/templates/*")):
        found.setdefault(path.parts[-3], []).append(path)
    return found


ON_UBUNTU = [
    pytest.param(role, paths, suite, id=f"{role}-{suite}")
    for role, paths in templates().items()
    for suite, (distribution, _major) in DISTRIBUTIONS.items()
    if distribution == "Ubuntu" and takes(role, suite)
]


@pytest.mark.parametrize(("role", "paths", "suite"), ON_UBUNTU)
def test_what_a_role_writes_on_ubuntu_can_be_written_and_read(role: str, paths: list[Path], suite: str) -> None:
    given = {"ansible_managed": "managed", "ansible_facts": facts(suite), **GIVEN.get(role, {})}
    for path in paths:
        text = render(role, path.name, suite, **given)
        assert text.strip(), path.name
        reader_of(path.name.removesuffix(".j2"), text)(text)


def reader_of(name: str, text: str) -> Callable[[str], object]:
    readers: dict[str, Callable[[str], object]] = {
        ".json": json.loads,
        ".yml": yaml.safe_load,
        ".xml": ElementTree.fromstring,
        ".ini": an_ini,
        ".sh": a_shells,
        ".sources": of_fields,
    }
    if text.startswith("#!/bin/"):
        return a_shells  # also one that writes a unit
    if re.search(r"(?m)^\[(Unit|Service|Timer)\]$", text):
        return a_unit
    return readers.get(Path(name).suffix, str)


def an_ini(text: str) -> None:
    configparser.ConfigParser(strict=False, interpolation=None).read_string(text)


def a_shells(text: str) -> None:
    shell = "bash" if "bash" in text.partition("\n")[0] else "sh"
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def of_fields(text: str) -> None:
    odd = [line for line in text.splitlines() if not re.match(r"#|[A-Z][\w-]+: \S|$", line)]
    assert odd == []


def a_unit(text: str) -> None:
    """Sections that systemd knows, and in them a setting a line."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith(("#", ";"))]
    assert {line.strip("[]") for line in lines if line.startswith("[")} <= SECTIONS
    assert lines[0].startswith("[")
    assert [line for line in lines if not re.match(r"\[|[A-Z][A-Za-z0-9]+=", line)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.service", "[Service]\nExecStart\n"),
        ("a.conf", "[Service]\nUser=a\n[Services]\n"),
        ("a.service", "ExecStart=/bin/true\n[Service]\n"),
        ("a.json", "{'a': 1}"),
        ("a.yml", "a: [1"),
        ("a.sh", "#!/bin/sh\nif true; then\n"),
        ("a.sources", "Types: deb\nURIs:\n"),
    ],
)
def test_what_cannot_be_read_is_found(name: str, text: str) -> None:
    with pytest.raises((AssertionError, ValueError, yaml.YAMLError)):
        reader_of(name, text)(text)
