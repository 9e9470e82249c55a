"""The output of one attempt: which bytes go to the portal next, and which may be dropped here.

The file is written by systemd (`append:`), never by us. Offsets are those of the output, for ever: what the portal
holds is punched out of the file, which keeps its size. Beyond the quota output is dropped as it comes, behind a
notice that the reader of the log sees. At most one window is in memory.
"""

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW_BYTES = 192 * 1024
PUNCH_AT_BYTES = 1024 * 1024
_BLOCK = 4096
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02


@dataclass(frozen=True)
class LogMark:
    """How far the log of an attempt is: kept on disk by its owner."""

    acked: int = 0  # the portal holds every byte below
    is_complete: bool = False  # ... and knows that this is the end
    base: int = 0  # offset of the file's first byte: moved by a task that truncates its own output, and by lost bytes
    cut_at: int | None = None  # the quota at which output was dropped

    @classmethod
    def read(cls, value: dict[str, Any]) -> "LogMark":
        return cls(**value)


@dataclass(frozen=True)
class Window:
    offset: int
    data: bytes
    is_end: bool


def notice(quota_bytes: int) -> bytes:
    return f"\n[RemoteGPU: the log quota of {quota_bytes} bytes is used up; further output is not kept.]\n".encode()


def size(path: Path, mark: LogMark) -> int:
    """Bytes of output so far, dropped ones not counted but the notice."""
    written = size_on_disk(path) + mark.base
    if mark.cut_at is None:
        return written
    return mark.cut_at + len(notice(mark.cut_at))


def settle(path: Path, mark: LogMark, *, quota_bytes: int) -> LogMark:
    """Notice what happened to the file: over the quota, or truncated by the task itself. The caller keeps the answer
    on disk.
    """
    file_size = size_on_disk(path)
    base = mark.base
    if mark.cut_at is None and file_size + base < mark.acked:
        base = mark.acked  # the task emptied its own output: what comes now follows what the portal holds
    cut_at = mark.cut_at
    if cut_at is None and mark.is_complete and file_size + base > mark.acked:
        cut_at = mark.acked  # the portal takes no more of it, and it would fill the disk here
    if cut_at is None and file_size + base > quota_bytes:
        cut_at = max(quota_bytes, mark.acked)
    return LogMark(mark.acked, mark.is_complete, base, cut_at)


def next_window(path: Path, mark: LogMark, *, has_ended: bool) -> Window | None:
    """What to send now; None when the portal holds everything there is."""
    if mark.is_complete:
        return None
    total = size(path, mark)
    data = _read(path, mark, mark.acked, WINDOW_BYTES)
    is_end = has_ended and mark.acked + len(data) == total
    return Window(mark.acked, data, is_end) if data or is_end else None


def _read(path: Path, mark: LogMark, offset: int, limit: int) -> bytes:
    if mark.cut_at is not None and offset >= mark.cut_at:
        return notice(mark.cut_at)[offset - mark.cut_at :]
    if mark.cut_at is not None:
        limit = min(limit, mark.cut_at - offset)
    try:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), limit, offset - mark.base)
    except FileNotFoundError:
        return b""


def acknowledge(path: Path, mark: LogMark, *, offset: int, is_complete: bool) -> LogMark:
    """The portal holds everything below `offset`, and nothing above.

    Acknowledgements come one after the other, so one that moves back is never late: the portal was restored and has
    lost what it held. What the file still has of that is sent again. What it has not is lost, and the numbers of all
    that follows go down by as much, since the portal leaves no gap: `lost` tells how many bytes that were.
    """
    is_complete = is_complete or mark.is_complete
    if offset < mark.acked and not is_complete:
        return _go_back(path, mark, offset)
    return LogMark(max(mark.acked, min(offset, size(path, mark))), is_complete, mark.base, mark.cut_at)


def lost(before: LogMark, after: LogMark) -> int:
    """How many bytes neither the portal nor the file has any more, as an acknowledgement has found."""
    return max(0, before.base - after.base)


def _go_back(path: Path, mark: LogMark, offset: int) -> LogMark:
    # From the cut on there is only the notice, which is not in the file.
    end = mark.acked if mark.cut_at is None else min(mark.acked, mark.cut_at)
    if offset >= end:
        return LogMark(offset, False, mark.base, mark.cut_at)
    kept = mark.base + _start_of_data(path, max(0, offset - mark.base), end - mark.base)
    gap = kept - offset
    return LogMark(offset, False, mark.base - gap, None if mark.cut_at is None else mark.cut_at - gap)


def _start_of_data(path: Path, start: int, end: int) -> int:
    """From where on all of the file is there up to `end`, looked for from `start` on; `end` when nothing is."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < end:
                return end  # the task has emptied it since
            while start < end and (hole := os.lseek(file.fileno(), start, os.SEEK_HOLE)) < end:
                start = os.lseek(file.fileno(), hole, os.SEEK_DATA)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENXIO):  # ENXIO: no data from there on
            raise
        return end
    return min(start, end)


def punch(path: Path, before: LogMark, after: LogMark) -> None:
    """Give back the disk space of what the portal holds and of what is over the quota. The file keeps its size."""
    start, end = before.acked - before.base, after.acked - after.base
    if after.is_complete or (after.cut_at is not None and after.acked >= after.cut_at):
        end = size_on_disk(path)
    if after.is_complete or end // PUNCH_AT_BYTES > max(0, start) // PUNCH_AT_BYTES or after.cut_at is not None:
        punch_hole(path, 0, end)


def punch_hole(path: Path, start: int, end: int) -> None:
    """Drop whole blocks between two offsets. Does nothing where the file system cannot."""
    start, end = -(-start // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
    if end <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE)
        if libc.fallocate64(descriptor, flags, ctypes.c_int64(start), ctypes.c_int64(end - start)):
            code = ctypes.get_errno()
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(descriptor)


def size_on_disk(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
