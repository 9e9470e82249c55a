"""The docker role where no test host runs: which repository and packages each distribution gets."""

from __future__ import annotations

import re

import pytest

from tests.support.rendering import FACTS, evaluate, render

SUITES = {
    "bookworm": ("Debian", "12", "debian"),
    "trixie": ("Debian", "13", "debian"),
    "jammy": ("Ubuntu", "22", "ubuntu"),
    "noble": ("Ubuntu", "24", "ubuntu"),
}


def facts(suite: str, architecture: str = "x86_64") -> dict[str, object]:
    distribution, major, _ = SUITES[suite]
    return {
        **FACTS,
        "distribution": distribution,
        "distribution_major_version": major,
        "distribution_release": suite,
        "architecture": architecture,
    }


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("architecture", "debian"), [("x86_64", "amd64"), ("aarch64", "arm64")])
def test_dockers_repository_is_the_distributions_own_and_names_its_key(
    suite: str, architecture: str, debian: str
) -> None:
    text = render("docker", "docker.sources.j2", suite, ansible_facts=facts(suite, architecture), ansible_managed="x")
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert fields == {
        "Types": "deb",
        "URIs": f"https://download.docker.com/linux/{SUITES[suite][2]}",
        "Suites": suite,
        "Components": "stable",
        "Architectures": debian,
        "Signed-By": "/etc/apt/keyrings/docker.asc",
    }


@pytest.mark.parametrize(
    ("suite", "has_client"), [("bookworm", False), ("trixie", True), ("jammy", False), ("noble", False)]
)
def test_the_distributions_engine_comes_with_its_client(suite: str, has_client: bool) -> None:
    packages = evaluate("{{ __docker_packages }}", "docker", suite)
    assert "docker.io" in packages
    assert ("docker-cli" in packages) is has_client


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("deb [arch=amd64] https://download.docker.com/linux/debian bookworm stable", True),
        ("URIs: https://download.docker.com/linux/ubuntu", True),
        ("deb https://mirror.example.org/docker/debian bookworm stable", True),
        ("# deb https://download.docker.com/linux/debian bookworm stable", False),
        ("deb https://download-docker-com.example.org/linux/debian bookworm stable", False),
    ],
)
def test_files_of_others_that_name_the_repository_are_found(line: str, found: bool) -> None:
    pattern = evaluate(
        "{{ __docker_names_repository }}", "docker", "noble", docker_repository_url="https://mirror.example.org/docker"
    )
    assert bool(re.match(pattern, line)) is found


def test_the_key_is_pinned() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", evaluate("{{ docker_repository_key_sha256 }}", "docker", "noble"))
