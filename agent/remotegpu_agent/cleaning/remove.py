"""Taking files away, and putting them back, where a tenant may have prepared the ground.

Every path is entered one folder at a time without following a link; what is mounted on is left alone (the step for
mounts tells of it); a tree that is deeper than any path can say is folded up and removed all the same. Errors are told,
not raised: whether a thing is gone is for the second look to say.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator

from remotegpu_agent.observe import files, mounts
from remotegpu_agent.observe.files import Entry
from remotegpu_agent.progress import tick

_DEEPEST = 64
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE_OR_APPEND = 0x80086601, 0x40086602, 0x30


def remove(path: str) -> Iterator[str]:
    """Remove whatever is at the path, with all below it. Yields what was done or why it could not be."""
    yield from remove_each([path])


def remove_each(paths: Iterable[str]) -> Iterator[str]:
    """The same for each path, as they come."""
    points = mounts.points()
    for path in paths:
        yield from _remove(path, points)


def _remove(path: str, points: frozenset[str]) -> Iterator[str]:
    try:
        parent = files.enter(os.path.dirname(path))
    except FileNotFoundError:
        return
    except OSError as error:
        yield f"could not reach {path}: {error.strerror}"
        return
    try:
        yield from _Removal(parent, points).of(os.path.basename(path), path)
    finally:
        os.close(parent)


def take_from_group(path: str) -> Iterator[str]:
    """Give the file to root's group; its owner and content stay."""
    try:
        parent = files.enter(os.path.dirname(path))
    except FileNotFoundError:
        return  # it lay in a folder that has been removed
    try:
        os.chown(os.path.basename(path), -1, 0, dir_fd=parent, follow_symlinks=False)
        yield f"took {path} from the group"
    except FileNotFoundError:
        return
    finally:
        os.close(parent)


class _Removal:
    def __init__(self, top: int, points: frozenset[str]) -> None:
        self._top, self._points, self._failures = top, points, 0

    def of(self, name: str, path: str) -> Iterator[str]:
        folded: list[str] = []
        yield from self._at(self._top, name, path, 0, folded)
        while folded:
            each = folded.pop()
            yield from self._at(self._top, each, f"{os.path.dirname(path)}/{each}", 0, folded)
        if not self._failures:
            yield f"removed {path}"

    def _at(self, folder: int, name: str, path: str, depth: int, folded: list[str]) -> Iterator[str]:
        if path in self._points:
            self._failures += 1
            yield f"left {path}: something is mounted on it"
            return
        try:
            is_folder = stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
            if is_folder and depth == _DEEPEST:
                folded.append(f".remotegpu-{secrets.token_hex(8)}")
                os.rename(name, folded[-1], src_dir_fd=folder, dst_dir_fd=self._top)
                return
            if is_folder:
                yield from self._inside(folder, name, path, depth, folded)
            self._unlink(folder, name, is_folder)
        except FileNotFoundError:
            return
        except OSError as error:
            self._failures += 1
            yield f"could not remove {path}: {error.strerror}"

    def _inside(self, folder: int, name: str, path: str, depth: int, folded: list[str]) -> Iterator[str]:
        inner = os.open(name, files.FOLDER, dir_fd=folder)
        try:
            with os.scandir(inner) as children:  # no list of them: there may be a million
                for child in children:
                    yield from self._at(inner, child.name, f"{path}/{child.name}", depth + 1, folded)
        finally:
            os.close(inner)

    @staticmethod
    def _unlink(folder: int, name: str, is_folder: bool) -> None:
        take_away = os.rmdir if is_folder else os.unlink
        try:
            take_away(name, dir_fd=folder)
        except PermissionError:  # root may remove anything, but not what is marked immutable
            _clear_flags(folder, name)
            take_away(name, dir_fd=folder)
        tick()


def _clear_flags(folder: int, name: str) -> None:
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        for each in (handle, folder):
            flags = struct.unpack("l", fcntl.ioctl(each, _GET_FLAGS, struct.pack("l", 0)))[0]
            if flags & _IMMUTABLE_OR_APPEND:
                fcntl.ioctl(each, _SET_FLAGS, struct.pack("l", flags & ~_IMMUTABLE_OR_APPEND))
    finally:
        os.close(handle)


def put_back(path: str, entry: Entry) -> Iterator[str]:
    """Make the path what the entry says. Yields what was done or why it could not be."""
    now = files.look_at(path)
    if now is not None and now["type"] != entry["type"]:
        yield from remove(path)
        now = None
    try:
        folder = files.enter(os.path.dirname(path))
    except OSError as error:
        yield f"could not reach {path}: {error.strerror}"
        return
    try:
        yield _put_back(folder, os.path.basename(path), path, entry, now)
    except OSError as error:
        yield f"could not put back {path}: {error.strerror}"
    finally:
        os.close(folder)


def _put_back(folder: int, name: str, path: str, entry: Entry, now: Entry | None) -> str:
    if entry["type"] == "directory":
        if now is None:
            os.mkdir(name, 0o700, dir_fd=folder)
        _own(folder, name, entry)
        return f"put back the folder {path}"
    if entry["type"] == "file" and now is not None and now.get("sha256") == entry["sha256"]:
        _own(folder, name, entry)
        return f"put back owner and mode of {path}"
    content = files.content_of(entry)
    if entry["type"] == "special" or (entry["type"] == "file" and content is None):
        return f"cannot put back {path}: the baseline has no content of it"
    temporary = f".remotegpu-{secrets.token_hex(8)}"
    if entry["type"] == "link":
        os.symlink(entry["target"], temporary, dir_fd=folder)
        os.chown(temporary, entry["uid"], entry["gid"], dir_fd=folder, follow_symlinks=False)
    else:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content or b"")
            file.flush()
            os.fsync(file.fileno())
        _own(folder, temporary, entry)
    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    return f"put back {path}"


def _own(folder: int, name: str, entry: Entry) -> None:
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fchown(handle, entry["uid"], entry["gid"])
        os.fchmod(handle, entry["mode"])  # after the owner: a change of owner drops the set-uid bit
    finally:
        os.close(handle)
