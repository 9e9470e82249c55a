"""The baseline on real hosts: what it holds, what it never holds, and that it stays the same when nothing changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from tests.hosts.fixtures import EACH_SUITE
from tests.support.cleaned_host import CleanedHost, findings, leased_host

pytestmark = pytest.mark.hosts

SCHEMA = json.loads((Path(__file__).parents[3] / "agent" / "protocol" / "protocol.schema.json").read_text())


@pytest.fixture(scope="module", params=EACH_SUITE)
def leased(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanedHost]:
    with leased_host(request.param, tmp_path_factory.mktemp(request.param)) as leased:
        assert leased.clean()["passed"]
        yield leased


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one["sections"] if one["sections"][name] != other["sections"][name]]


def test_two_takes_with_nothing_changed_are_equal(leased: CleanedHost) -> None:
    assert differing(leased.take_baseline(), leased.take_baseline()) == []


def test_a_take_after_a_lease_and_its_cleaning_equals_the_one_before(leased: CleanedHost) -> None:
    leased.let_in()
    assert findings(leased.clean()["steps"]) == []
    assert differing(leased.baseline, leased.take_baseline()) == []


def test_it_is_what_the_protocol_says_and_small(leased: CleanedHost) -> None:
    taken = leased.take_baseline()
    Draft7Validator({**SCHEMA, "$ref": "#/definitions/baseline"}).validate(taken)
    assert len(json.dumps(taken)) < 1_000_000


def test_it_carries_no_private_key_and_no_password(leased: CleanedHost) -> None:
    leased.host.set_password("installer", "correct horse battery")
    sections = leased.take_baseline()["sections"]
    assert [path for path, entry in sections["sshd"].items() if path.endswith("_key") and "content" in entry] == []
    shadow = [line for lines in sections["accounts"]["/etc/shadow"].values() for line in lines]
    assert [line for line in shadow if "$y$" in line or "$6$" in line] == []
    assert any(line.startswith("installer:sha256-") for line in shadow)
    leased.host.run(["usermod", "--password", "!", "installer"])


def test_it_survives_a_reboot(leased: CleanedHost) -> None:
    before = leased.take_baseline()
    leased.host.reboot()
    leased.host.run("nft list table inet remotegpu >/dev/null 2>&1 || nft -f -", stdin=leased.rules)
    leased.host.run("systemctl start docker")
    after = leased.take_baseline()
    assert before["boot_id"] != after["boot_id"]
    assert differing(before, after) == []
