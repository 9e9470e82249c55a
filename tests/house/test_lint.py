"""Ansible's files keep its linter's rules: no line asks to be passed over, and no rule is left out.

The rules themselves are `make check`'s. What Python asks ruff to pass over has its reason on the line.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.house.test_documents import tracked

ROOT = Path(__file__).parents[2]


def test_no_line_of_ansibles_asks_to_be_passed_over() -> None:
    asking = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in tracked("*.yml", "*.yaml", "*.j2")
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if "noqa" in line
    ]
    assert asking == []


def test_no_rule_of_ansibles_is_left_out() -> None:
    said = yaml.safe_load((ROOT / ".ansible-lint").read_text())
    assert said["profile"] == "production"
    assert {"skip_list", "warn_list"}.isdisjoint(said)
    assert {"roles/", "playbooks/", "molecule/", "inventory/"}.isdisjoint(said["exclude_paths"])
    assert tracked(".ansible-lint-ignore", ".config/ansible-lint*") == []


def test_no_fast_test_is_passed_over_or_needs_what_python_does_not_bring() -> None:
    """`make test-fast` needs nothing more: what wants root, a compiler or the kernel's help is among the services."""
    wanting = re.compile(r"pytest\.(?:mark\.)?skip|importorskip|geteuid\(\) != 0|\blibraries: Path|\bgcc\b")
    asking = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in tracked("tests/unit/*.py", "tests/api/*.py")
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if wanting.search(line)
    ]
    assert asking == []
