"""What a sweep does for many rows: the row that fails is named, and no other waits for it."""

from __future__ import annotations

from typing import Any

import peewee
import pytest

from portal.errors import Conflict
from portal.models import Machine
from portal.services import batch
from tests.factories import make_machine


@pytest.fixture
def three(database: Any) -> list[Machine]:
    return [make_machine(name) for name in ("gpu-1", "gpu-2", "gpu-3")]


def test_every_row_is_done_and_those_where_something_came_of_it_are_counted(three: list[Machine]) -> None:
    seen: list[str] = []

    def act(machine: Machine) -> bool:
        seen.append(machine.name)
        return machine.name != "gpu-2"

    assert batch.each(Machine.select().order_by(Machine.id), act) == 2
    assert seen == ["gpu-1", "gpu-2", "gpu-3"]


def test_a_row_that_fails_keeps_no_other_waiting_and_is_named(
    three: list[Machine], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def act(machine: Machine) -> bool:
        if machine.name == "gpu-1":
            raise ZeroDivisionError("no")
        seen.append(machine.name)
        return True

    with pytest.raises(RuntimeError, match=f"^failed: machine {three[0].id}$"):
        batch.each(three, act)
    assert seen == ["gpu-2", "gpu-3"]
    assert "ZeroDivisionError" in caplog.text


def test_that_somebody_was_first_is_no_failure(three: list[Machine]) -> None:
    def act(machine: Machine) -> bool:
        if machine.name == "gpu-1":
            raise Conflict("It is leased by now.")
        return True

    assert batch.each(three, act) == 2


def test_a_database_that_is_away_is_not_asked_for_the_next_row(three: list[Machine]) -> None:
    asked: list[str] = []

    def act(machine: Machine) -> bool:
        asked.append(machine.name)
        raise peewee.OperationalError("the server is gone")

    with pytest.raises(peewee.OperationalError, match="gone"):
        batch.each(three, act)
    assert asked == ["gpu-1"]
