"""What many modules need to know is written in one of them."""

from __future__ import annotations

from pathlib import Path

PORTAL = Path(__file__).parents[2] / "portal"
FROZEN = PORTAL / "migrations"


def test_which_roles_are_staff_is_written_once() -> None:
    pair = '"admin", "operator"'
    modules = [path for path in sorted(PORTAL.rglob("*.py")) if FROZEN not in path.parents and pair in path.read_text()]
    assert [str(path.relative_to(PORTAL)) for path in modules] == [
        "models/states.py",
        "services/actors.py",
    ]  # all roles; staff
