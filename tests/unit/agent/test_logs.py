"""Logs: every byte once and in order, in bounded memory, on a disk that is given back."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from remotegpu_agent import logs
from remotegpu_agent.logs import LogMark, acknowledge, next_window, notice, punch, settle, size

QUOTA = 10_000_000


def noise(length: int) -> bytes:
    return random.Random(length).randbytes(length)  # noqa: S311 - the same bytes in every run


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def deliver(path: Path, mark: LogMark, *, has_ended: bool, quota: int = QUOTA) -> tuple[bytes, LogMark]:
    """Send all there is, as the reporter does."""
    got = b""
    while True:
        mark = settle(path, mark, quota_bytes=quota)
        window = next_window(path, mark, has_ended=has_ended)
        if window is None:
            return got, mark
        assert window.offset == mark.acked
        assert len(window.data) <= logs.WINDOW_BYTES
        got += window.data
        before, mark = mark, acknowledge(path, mark, offset=window.offset + len(window.data), is_complete=window.is_end)
        punch(path, before, mark)


def test_a_log_arrives_byte_for_byte_while_it_grows(tmp_path: Path) -> None:
    path, mark, whole, got = tmp_path / "log", LogMark(), b"", b""
    for length in (1, 4095, 200_000, 0, 3_000_000, 17):
        piece = noise(length)
        append(path, piece)
        whole += piece
        sent, mark = deliver(path, mark, has_ended=False)
        got += sent
        assert got == whole
    sent, mark = deliver(path, mark, has_ended=True)
    assert sent == b""
    assert mark.is_complete
    assert next_window(path, mark, has_ended=True) is None


def test_an_empty_log_has_an_end_too(tmp_path: Path) -> None:
    window = next_window(tmp_path / "log", LogMark(), has_ended=True)
    assert window == logs.Window(0, b"", True)
    assert next_window(tmp_path / "log", LogMark(), has_ended=False) is None


def test_what_the_portal_holds_is_punched_out_and_the_file_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"x" * 5_000_000)
    _, mark = deliver(path, LogMark(), has_ended=False)
    found = path.stat()
    assert found.st_size == 5_000_000
    assert found.st_blocks * 512 < logs.PUNCH_AT_BYTES + 8192
    append(path, b"the end")
    assert deliver(path, mark, has_ended=True)[0] == b"the end"
    assert path.stat().st_blocks * 512 <= 8192


def test_nothing_unacknowledged_is_ever_punched(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = noise(3_000_000)
    append(path, whole)
    for offset in itertools.chain((1, 4095, 4096, 4097), range(100_000, 3_000_000, 333_333)):
        punch(path, LogMark(), LogMark(acked=offset))
        assert path.read_bytes()[offset:] == whole[offset:]


def test_over_the_quota_the_reader_sees_why_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"y" * 5000)
    got, mark = deliver(path, LogMark(), has_ended=False, quota=1000)
    assert got == b"y" * 1000 + notice(1000)
    append(path, b"y" * 5000)
    got, mark = deliver(path, mark, has_ended=True, quota=1000)
    assert got == b""
    assert mark.is_complete
    assert size(path, mark) == 1000 + len(notice(1000))


def test_a_quota_that_changes_later_does_not_change_what_was_said(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"y" * 5000)
    first, mark = deliver(path, LogMark(), has_ended=False, quota=1000)
    more, mark = deliver(path, mark, has_ended=True, quota=100_000)
    assert (first + more).count(b"the log quota") == 1
    lowered = tmp_path / "other"
    append(lowered, b"y" * 5000)
    first, mark = deliver(lowered, LogMark(), has_ended=False, quota=100_000)
    append(lowered, b"z")
    assert first + deliver(lowered, mark, has_ended=True, quota=1000)[0] == b"y" * 5000 + notice(5000)


def test_a_task_that_empties_its_own_output_loses_nothing_that_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"before")
    got, mark = deliver(path, LogMark(), has_ended=False)
    path.write_bytes(b"")
    append(path, b"after")
    more, mark = deliver(path, mark, has_ended=True)
    assert got + more == b"beforeafter"
    assert mark.base == len(b"before")


def restored(path: Path, mark: LogMark, offset: int) -> tuple[LogMark, int]:
    """The mark once a portal that was restored has answered that it holds no more than this, and what is lost."""
    after = acknowledge(path, mark, offset=offset, is_complete=False)
    punch(path, mark, after)
    assert after.acked == offset
    return after, logs.lost(mark, after)


def test_what_a_restored_portal_has_lost_is_sent_again_while_it_is_here(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"epoch 1\nepoch 2\n")
    _, mark = deliver(path, LogMark(), has_ended=False)
    mark, lost = restored(path, mark, len(b"epoch 1\n"))
    assert lost == 0
    append(path, b"epoch 3\n")
    got, mark = deliver(path, mark, has_ended=True)
    assert got == b"epoch 2\nepoch 3\n"
    assert mark.is_complete


def test_what_neither_the_portal_nor_the_host_has_any_more_costs_nothing_that_comes_later(tmp_path: Path) -> None:
    path, whole = tmp_path / "log", noise(3_000_000)
    append(path, whole)
    _, mark = deliver(path, LogMark(), has_ended=False)
    mark, lost = restored(path, mark, 1000)
    assert lost % 4096 == 4096 - 1000  # whole blocks went
    assert 2_000_000 < lost < 3_000_000
    append(path, b"the end")
    got, mark = deliver(path, mark, has_ended=True)
    assert got == whole[1000 + lost :] + b"the end"
    assert mark.is_complete
    assert mark.acked == size(path, mark) == 3_000_000 - lost + len(b"the end")


def test_a_portal_may_be_restored_twice(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"x" * 3_000_000)
    _, mark = deliver(path, LogMark(), has_ended=False)
    mark, _ = restored(path, mark, 1000)
    append(path, b"y" * 3_000_000)
    _, mark = deliver(path, mark, has_ended=False)
    mark, _ = restored(path, mark, 0)
    append(path, b"the end")
    got, mark = deliver(path, mark, has_ended=True)
    assert got.strip(b"y") == b"the end"
    assert mark.acked == len(got)


@pytest.mark.parametrize("offset", [0, 10, 1000, 1010])
def test_over_the_quota_a_restored_portal_gets_the_notice_again(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "log"
    append(path, b"y" * 50_000)
    sent, mark = deliver(path, LogMark(), has_ended=False, quota=1000)
    punch(path, LogMark(), mark)
    mark, lost = restored(path, mark, offset)
    assert lost == max(0, 1000 - offset)
    got, mark = deliver(path, mark, has_ended=True, quota=1000)
    assert sent[:offset] + got == sent[: min(offset, 1000)] + notice(min(offset, 1000))
    assert mark.is_complete


def test_output_that_a_task_has_emptied_is_lost_to_a_restored_portal(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"before")
    _, mark = deliver(path, LogMark(), has_ended=False)
    path.write_bytes(b"")
    mark, lost = restored(path, mark, 2)
    assert lost == len(b"fore")
    append(path, b"after")
    got, mark = deliver(path, mark, has_ended=False)
    assert got == b"after"
    mark, lost = restored(path, mark, 1)
    assert lost == len(b"e")
    assert deliver(path, mark, has_ended=True)[0] == b"after"


def test_a_file_that_shrinks_before_its_acknowledgement_comes_is_no_restored_portal(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"before")
    _, mark = deliver(path, LogMark(), has_ended=False)
    path.write_bytes(b"")
    assert acknowledge(path, mark, offset=6, is_complete=False) == mark


def test_a_complete_log_stays_complete(tmp_path: Path) -> None:
    mark = LogMark(acked=100, is_complete=True)
    assert acknowledge(tmp_path / "log", mark, offset=50, is_complete=False) == mark


@pytest.mark.parametrize("start_end", [(0, 0), (5, 4000), (4096, 4096), (1, 4097)])
def test_parts_of_a_block_stay(tmp_path: Path, start_end: tuple[int, int]) -> None:
    path = tmp_path / "log"
    append(path, b"z" * 8192)
    logs.punch_hole(path, *start_end)
    assert path.read_bytes() == b"z" * 8192


def test_what_is_written_after_the_portal_takes_no_more_is_dropped_here(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, noise(300_000))
    complete = LogMark(acked=300_000, is_complete=True)
    assert settle(path, complete, quota_bytes=QUOTA) == complete, "nothing came after it"
    append(path, noise(100_000))
    mark = settle(path, complete, quota_bytes=QUOTA)
    assert mark == LogMark(acked=300_000, is_complete=True, cut_at=300_000)
    before = size(path, mark)
    append(path, noise(100_000))
    assert size(path, settle(path, mark, quota_bytes=QUOTA)) == before, "what comes then is no news"
    assert next_window(path, mark, has_ended=True) is None
