"""Whose key opened a session, by what the journal says; the ending itself is tried on a host."""

from __future__ import annotations

import json
from typing import Any

import pytest

from remotegpu_agent.sessions import read_openers

SESSIONS = {700: 100.0, 701: 100.0}
CAME_IN = "Accepted publickey for lease17 from 192.0.2.4 port 40512 ssh2: ED25519 SHA256:mine"


def record(message: Any = CAME_IN, *, pid: int = 700, at_s: float = 100.5) -> str:
    return json.dumps({"_PID": str(pid), "MESSAGE": message, "__MONOTONIC_TIMESTAMP": str(int(at_s * 1e6))})


def test_a_session_is_its_keys_by_the_line_that_let_it_in() -> None:
    other = record(CAME_IN.replace("ED25519 SHA256:mine", "RSA SHA256:theirs"), pid=701)
    lines = [record("Connection from 192.0.2.4 port 40512"), record(), other, record("Starting session: shell")]
    assert read_openers(lines, "lease17", SESSIONS) == {700: "SHA256:mine", 701: "SHA256:theirs"}


@pytest.mark.parametrize(
    "line",
    [
        record(at_s=99.9),  # of a process that had this number before
        record(pid=702),
        record(CAME_IN.replace("lease17", "lease18")),
        record(f"Invalid user {CAME_IN} from 192.0.2.4 port 40512"),
        record([65, 255]),  # what is no text
        record(None),
    ],
)
def test_nothing_else_says_whose_a_session_is(line: str) -> None:
    assert read_openers([line], "lease17", SESSIONS) == {}
