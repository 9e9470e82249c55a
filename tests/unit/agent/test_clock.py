"""When the host's clock is believed: by the portal's word, by its own before, and by how long the machine has run."""

from __future__ import annotations

import errno
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from remotegpu_agent import clock as clock_module
from remotegpu_agent.clock import KEPT_EVERY_S, TOLERANCE_S, Clock
from tests.support.clocks import HostTime

HOUR, SECOND = timedelta(hours=1), timedelta(seconds=1)
BEYOND = (TOLERANCE_S + 1) * SECOND


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> HostTime:
    return HostTime(datetime(2026, 5, 1, 10, tzinfo=timezone.utc)).in_place_of(monkeypatch)


@pytest.fixture
def heard(time: HostTime, tmp_path: Path) -> Clock:
    """The portal has agreed once, and is silent from then on."""
    clock = Clock(tmp_path)
    clock.heard(time.wall)
    assert (clock.doubt(), clock.offset_s) == (None, 0)
    return clock


def is_doubted(clock: Clock) -> bool:
    said = clock.doubt()
    assert said is None or said.endswith("mend its time")
    return said is not None


@pytest.mark.parametrize("step", [-2 * HOUR, 2 * HOUR, -BEYOND, BEYOND])
def test_a_step_long_after_the_portals_last_word_is_doubted_until_it_speaks_or_the_step_is_undone(
    heard: Clock, time: HostTime, step: timedelta
) -> None:
    time.passes(5 * HOUR)
    assert not is_doubted(heard)
    time.is_set(step)
    assert is_doubted(heard)
    time.passes(5 * HOUR)
    assert is_doubted(heard), "though it is later by now than it ever was before the step"
    time.is_set(-step)
    assert not is_doubted(heard)
    time.is_set(step)
    heard.heard(time.wall)
    assert not is_doubted(heard)


@pytest.mark.parametrize("step", [-2 * HOUR, 2 * HOUR])
def test_the_doubt_is_that_of_every_process_of_this_boot(
    heard: Clock, time: HostTime, tmp_path: Path, step: timedelta
) -> None:
    """The agent is started anew, or a lease's end comes by its timer, while nobody was there to see the step."""
    time.passes(5 * HOUR)
    time.is_set(step)
    assert is_doubted(Clock(tmp_path))


def test_a_clock_that_the_portal_contradicts_is_doubted_in_the_same_words_each_time(
    time: HostTime, tmp_path: Path
) -> None:
    clock = Clock(tmp_path)
    clock.heard(time.wall + 90.4 * SECOND)
    said = clock.doubt()
    assert said == "nothing is opened: this host's clock is 2 min off the portal's: mend its time"
    time.passes(10 * SECOND)
    clock.heard(time.wall + 90.6 * SECOND)
    assert (clock.doubt(), clock.offset_s) == (said, 90.6)
    assert Clock(tmp_path).doubt() == said


def test_after_a_boot_the_clock_is_doubted_if_it_is_behind_what_was_known_before(
    heard: Clock, time: HostTime, tmp_path: Path
) -> None:
    """Without a battery; the portal has been silent for long, which was counted."""
    for _ in range(5):
        time.passes(HOUR)
        assert not is_doubted(heard)
    time.boots_anew(after=-HOUR)
    clock = Clock(tmp_path)
    assert is_doubted(clock)
    time.passes(2 * HOUR)
    assert is_doubted(clock), "it is as far behind as it was"
    clock.heard(time.wall + 3 * HOUR)
    time.is_set(3 * HOUR)
    assert not is_doubted(clock)


def test_after_a_boot_a_clock_that_went_on_is_believed_and_a_step_back_is_doubted(
    heard: Clock, time: HostTime, tmp_path: Path
) -> None:
    time.boots_anew(after=3 * HOUR)
    clock = Clock(tmp_path)
    assert not is_doubted(clock), "how long it was off nobody knows"
    time.is_set(HOUR)
    assert not is_doubted(clock), "the time service has come up"
    time.is_set(-BEYOND)
    assert is_doubted(clock)


def test_a_clock_that_the_portal_says_was_ahead_leaves_no_doubt_behind(time: HostTime, tmp_path: Path) -> None:
    time.is_set(24 * HOUR)
    clock = Clock(tmp_path)
    assert not is_doubted(clock)
    time.is_set(-24 * HOUR)
    assert is_doubted(clock)
    clock.heard(time.wall)
    assert not is_doubted(clock)
    time.boots_anew(after=HOUR)
    assert not is_doubted(Clock(tmp_path))


def test_steps_within_the_tolerance_add_up(heard: Clock, time: HostTime) -> None:
    time.is_set(-40 * SECOND)
    assert not is_doubted(heard)
    time.is_set(-40 * SECOND)
    assert is_doubted(heard)


def test_the_disk_is_written_once_a_minute_and_after_a_step(
    heard: Clock, time: HostTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    monkeypatch.setattr(clock_module, "write_json", lambda _path, value: written.append(value))
    for _ in range(12):
        time.passes(10 * SECOND)
        heard.heard(time.wall)
        heard.doubt()
    assert len(written) == 120 / KEPT_EVERY_S
    heard.heard(time.wall - HOUR)
    assert len(written) == 3


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"at": "x", "run_s": 1, "boot_id": "b", "is_portals": true}'])
def test_a_file_that_cannot_be_read_stops_nothing_and_is_written_anew(
    time: HostTime, tmp_path: Path, text: str
) -> None:
    (tmp_path / "clock.json").write_text(text)
    assert not is_doubted(Clock(tmp_path))
    time.is_set(-HOUR)
    assert is_doubted(Clock(tmp_path))


def test_a_full_disk_stops_nothing(heard: Clock, time: HostTime, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_anything: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clock_module, "write_json", full)
    time.passes(HOUR)
    assert not is_doubted(heard)
    time.is_set(-HOUR)
    assert is_doubted(heard)
