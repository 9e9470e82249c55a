"""Files that must survive a crash, and one owner at a time for those that two processes change.

The agent is not alone: the timer at a lease's end and the guard at boot run beside it. What they share is written
here, by temporary file, fsync and rename, under a lock. Here is no knowledge of what the files mean.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600, gid: int = 0) -> None:
    """Replace the file: after a crash it holds the old bytes or the new ones. The owner is whoever runs this."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if gid:
                os.fchown(file.fileno(), -1, gid)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename, a new name or a removal in this directory last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object, *, mode: int = 0o600) -> None:
    write_atomic(path, json.dumps(value, separators=(",", ":")).encode() + b"\n", mode=mode)


def find_json(path: Path) -> Any:
    """The content, or None when there is no such file. Raises ValueError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); move it away and restart the agent") from error


def is_full(error: OSError) -> bool:
    """Whether the disk has no room, or no number for one more file."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """Room on the disk that is given up once a tenant has taken all the rest, so that its end can be noted.

    Of files as well as of bytes: ten million empty files leave no number for another one.
    """

    def __init__(self, directory: Path, *, count: int = 8, each_bytes: int = 256 * 1024) -> None:
        self._directory, self._count, self._each_bytes = directory, count, each_bytes

    def keep(self) -> None:
        """Take what is missing of it, as far as there is room."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=0o700, exist_ok=True)
            for number in range(self._count):
                path = self._directory / str(number)
                if not path.exists():
                    with path.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, self._each_bytes)

    def give_up(self) -> None:
        """Let go of all of it."""
        for path in self._directory.glob("*"):
            path.unlink(missing_ok=True)


def find_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold this lock file against every other thread and process; the kernel lets go when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Table:
    """A JSON object on disk that several processes read and change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._value: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """The content now; reads the file only when it changed. Do not change what you get."""
        stamp = self._stat()
        if stamp != self._stamp:
            self._value, self._stamp = find_json(self.path) or {}, stamp
        return self._value

    @contextlib.contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """Read, let the caller change, write: all under the lock. Nothing is written if the caller fails."""
        with locked(self.path.with_suffix(".lock")):
            value = find_json(self.path) or {}
            before = json.dumps(value, sort_keys=True)
            yield value
            if json.dumps(value, sort_keys=True) != before:
                write_json(self.path, value)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
