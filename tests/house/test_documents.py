"""What the documents say exists: links lead somewhere, commands are targets, settings are in the guide."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from portal.models import states
from portal.settings import Settings

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def tracked(*patterns: str) -> list[Path]:
    # A checkout may belong to another user than the one who tests it; git wants to be told that this is meant.
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def anchors(document: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in HEADING.findall(document.read_text())
    }


def test_every_link_in_a_document_leads_somewhere() -> None:
    dead = []
    for document in tracked("*.md"):
        for target in LINK.findall(document.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (document.parent / path) if path else document
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
                dead.append(f"{document.relative_to(ROOT)} → {target}")
    assert dead == []


def test_every_make_command_in_a_document_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (document.relative_to(ROOT).as_posix(), word)
        for document in tracked("*.md")
        for word in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE)
    }
    assert {entry for entry in named if entry[1] not in targets} == set()


@pytest.mark.parametrize("name", [field.name.upper() for field in fields(Settings)])
def test_every_setting_is_in_the_operators_guide(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "operator.md").read_text()


@pytest.mark.parametrize("noun", ["machine", "lease", "reclaim", "run", "attempt", "command", "alert", "alert silence"])
def test_the_developers_guide_draws_every_arrow_and_no_other(noun: str) -> None:
    table = (ROOT / "docs" / "developer.md").read_text()
    (line,) = re.findall(rf"^\| {noun}(?:, \w+)? \| ([^.|]+).* \|$", table, re.MULTILINE)
    drawn = {
        (start, end)
        for part in line.strip().split("; ")
        for start, _, ends in [part.partition(" → ")]
        for end in ends.split(", ")
    }
    arrows: states.Transitions = getattr(states, noun.upper().replace(" ", "_"))
    assert drawn == {(start, end) for start, ends in arrows.items() for end in ends}


def test_the_readme_starts_with_its_two_commands() -> None:
    start = (ROOT / "README.md").read_text()[:600]
    assert "apt-get install make git python3-venv npm" in start
    assert start.index("make run") < start.index("make test")


def test_every_pin_is_exact() -> None:
    loose = [
        line
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith(("#", "-r")) and not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][^ ]*", line)
    ]
    assert loose == []


# Debian 12, Ubuntu 24.04, Debian 13.
PYTHONS = [
    {"python_full_version": full, "python_version": full.rpartition(".")[0]} for full in ("3.11.2", "3.12.3", "3.13.5")
]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_what_the_pinned_stand_on_is_pinned_too(name: str) -> None:
    """What pip would choose by itself is of the day it is asked; pip and setuptools are the environment's own.

    Asked for the Python of every release that the portal runs on, not for that of this environment alone.
    """
    pinned = {canonicalize_name(pin.name): pin for pin in pins(ROOT / name)}
    open_ends = {
        canonicalize_name(needed.name)
        for pin in pinned.values()
        for needed in map(Requirement, metadata.requires(pin.name) or [])
        for extra in ("", *pin.extras)
        for python in PYTHONS
        if needed.marker is None or needed.marker.evaluate({**python, "extra": extra})
    }
    assert open_ends - set(pinned) <= {"pip", "setuptools"}


def pins(path: Path) -> list[Requirement]:
    """Of a file of requirements and those that it takes in."""
    found = []
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            found += pins(path.with_name(line.removeprefix("-r ")))
        elif line and not line.startswith("#"):
            found.append(Requirement(line))
    return found


def test_no_usable_secret_is_in_the_repository() -> None:
    private_key = "-----BEGIN " + "(?:OPENSSH |RSA |EC )?" + r"PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40,}"
    found = [
        file.relative_to(ROOT).as_posix()
        for file in tracked()
        if file.suffix not in (".png", ".mo") and re.search(private_key, file.read_text(errors="replace"))
    ]
    assert found == []
