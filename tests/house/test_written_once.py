"""What many modules need to know is written in one of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from portal.services.transitions import TABLES

PORTAL = Path(__file__).parents[2] / "portal"
FROZEN = PORTAL / "migrations"


def test_which_roles_are_staff_is_written_once() -> None:
    pair = '"admin", "operator"'
    modules = [path for path in sorted(PORTAL.rglob("*.py")) if FROZEN not in path.parents and pair in path.read_text()]
    assert [str(path.relative_to(PORTAL)) for path in modules] == [
        "models/states.py",
        "services/actors.py",
    ]  # all roles; staff


def test_a_state_is_moved_in_one_module() -> None:
    """Anywhere else it would be set without a look at the state that is left, and past the arrows."""
    side_paths = [
        f"{path.relative_to(PORTAL)}:{line}"
        for path in sorted(PORTAL.rglob("*.py"))
        if FROZEN not in path.parents
        for line in lines_that_set_a_state(path.read_text())
    ]
    assert side_paths == []
    written = "Lease.update(state='ended').execute()\nlease.state = 'ended'\nAgentCredential.update(state='ended')"
    assert sorted(lines_that_set_a_state(written)) == [1, 2]


def lines_that_set_a_state(code: str) -> list[int]:
    """`Machine.update(state=…)`, and `machine.state = …`, which a later `save()` would write."""
    if not re.search(r"\.update\([^)]*\bstate\b|\.state\s*=[^=]", code):
        return []  # most modules: to read them as a tree takes a while
    nouns = {table.__name__ for table in TABLES}
    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if (isinstance(node, ast.Call) and updates_the_state_of(node, nouns))
        or (isinstance(node, ast.Assign) and any(is_a_state(target) for target in node.targets))
    ]


def updates_the_state_of(call: ast.Call, nouns: set[str]) -> bool:
    match call.func:
        case ast.Attribute(value=ast.Name(id=noun), attr="update") if noun in nouns:
            return any(keyword.arg == "state" for keyword in call.keywords)
    return False


def is_a_state(target: ast.expr) -> bool:
    return isinstance(target, ast.Attribute) and target.attr == "state"
