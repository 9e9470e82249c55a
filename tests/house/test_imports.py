"""Imports point one way; who breaks it is named with file and line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
    "gateway": {"models", "services", "integrations", "gateway"},
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


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
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


def test_the_product_imports_no_test() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for folder in ("portal", "agent", "playbooks", "roles", "inventory")
        for file in python_files(folder)
        for name, line in imports_of(file)
        if name.split(".")[0] in ("tests", "bench", "pytest")
    ]
    assert wrong == []
