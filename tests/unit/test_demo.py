"""The demo ends the process that it started, and no other that has its number by now."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.hosts.demo import end_process
from tests.hosts.owner import started_at


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as started:
        yield started
        started.kill()


def test_the_process_that_was_written_down_is_ended(process: subprocess.Popen[bytes]) -> None:
    end_process(process.pid, started_at(process.pid))
    assert process.wait(5) == -15


@pytest.mark.parametrize("since", ["1", None])
def test_another_process_with_its_number_is_left_alone(process: subprocess.Popen[bytes], since: str | None) -> None:
    end_process(process.pid, since)
    assert process.poll() is None


def test_a_process_that_is_gone_has_no_start(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert started_at(process.pid) is None
    end_process(process.pid, "1")
