"""Imports point one way; who breaks it is named with file and line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A room may import what is listed beside it (and the portal's common files: db, errors, settings).
PORTAL_ROOMS = {
    "models": set(),
    "integrations": {"models", "integrations"},
    "services": {"models", "integrations", "services"},
    "api": {"models", "services", "integrations", "api"},
    "web": {"models", "services", "integrations", "api", "web"},
    "worker": {"models", "services", "integrations", "worker"},
    "cli": {"models", "services", "integrations", "worker", "cli"},
    "migrations": set(),
}
HTTP_LIBRARIES = {
    "flask",
    "flask_smorest",
    "flask_jwt_extended",
    "flask_limiter",
    "flask_babel",
    "werkzeug",
    "marshmallow",
}


@cache
def imports_of(file: Path) -> tuple[tuple[str, int], ...]:
    """What a file imports, each with its line."""
    return tuple(_imports_of(file))


def _imports_of(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for name in node.names:
                yield f"{node.module}.{name.name}", node.lineno


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(PORTAL_ROOMS))
def test_a_room_of_the_portal_imports_only_what_lies_below_it(room: str) -> None:
    allowed = PORTAL_ROOMS[room] | {room}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in python_files(f"portal/{room}")
        for name, line in imports_of(file)
        if name.startswith("portal.") and name.split(".")[1] in PORTAL_ROOMS and name.split(".")[1] not in allowed
    ]
    assert wrong == []


def test_every_room_of_the_portal_is_among_these() -> None:
    assert {file.parent.name for file in (ROOT / "portal").glob("*/*.py")} == set(PORTAL_ROOMS)


def test_the_rules_know_no_http() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for room in ("models", "services")
        for file in python_files(f"portal/{room}")
        for name, line in imports_of(file)
        if name.split(".")[0] in HTTP_LIBRARIES
    ]
    assert wrong == []


def test_portal_and_agent_share_nothing_but_the_protocol() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for folder, stranger in (("portal", "remotegpu_agent"), ("agent", "portal"))
        for file in python_files(folder)
        for name, line in imports_of(file)
        if name.split(".")[0] == stranger
    ]
    assert wrong == []


def test_one_module_of_the_portal_knows_the_stacks_rules_and_they_know_neither_portal_nor_engine() -> None:
    """One meaning of valid: the portal reads names, records and openings by the code of the stacks."""
    users = {
        file.relative_to(ROOT).as_posix()
        for file in python_files("portal")
        for name, _ in imports_of(file)
        if name.split(".")[0] == "remotegpu_network"
    }
    assert users == {"portal/integrations/network_format.py"}
    package = ROOT / "pulumi" / "remotegpu_network"
    strangers = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in (
            package / f"{name}.py" for name in ("desired", "document", "names", "openings", "records", "settings")
        )
        for name, line in imports_of(file)
        if name.split(".")[0] in ("portal", "pulumi") or name.startswith("remotegpu_network.clouds")
    ]
    assert strangers == []


def test_the_product_imports_no_test() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for folder in ("portal", "agent", "playbooks", "roles", "inventory")
        for file in python_files(folder)
        for name, line in imports_of(file)
        if name.split(".")[0] in ("tests", "bench", "pytest")
    ]
    assert wrong == []


def test_no_service_needs_itself() -> None:
    """A circle among the rules means that none of them can be read, or changed, without all the others.

    An import inside a function counts as well: it hides a circle and unties none.
    """
    names = {file.stem for file in python_files("portal/services")}
    needs = {
        file.stem: {
            parts[2]
            for name, _ in imports_of(file)
            if (parts := name.split("."))[:2] == ["portal", "services"] and len(parts) > 2 and parts[2] in names
        }
        for file in python_files("portal/services")
    }
    assert circles(needs) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]], "a circle would be seen"


def circles(needs: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that need each other, directly or through one another."""
    reach = {name: set(direct) for name, direct in needs.items()}
    for middle in reach:
        for name in reach:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in reach}
    return [list(group) for group in sorted(groups) if group]


@pytest.mark.parametrize("process", ["app", "worker.main"])
def test_a_process_that_ends_runs_or_commands_knows_who_waits_for_them(process: str) -> None:
    program = (
        f"import json, portal.{process}; from portal.services import commands, runs;"
        " registries = (runs.when_ended, runs.when_played, commands.when_ended);"
        " print(json.dumps([sorted(each.by_kind) for each in registries]))"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    ended, played, answered = json.loads(told.stdout)
    assert ended == ["provision", "verify"]
    assert played == ["drift", "gpu_hosts", "rotate_credentials", "site"]
    if process == "app":  # agents answer to the web processes alone
        assert answered == ["baseline", "clean", "rotate_credential", "thaw"]
