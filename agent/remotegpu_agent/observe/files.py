"""Files as the baseline keeps them: what they are, whose they are, and what is in them.

An entry is a small dict, so that it travels as JSON: `{"type", "mode", "uid", "gid"}` and, for a link its `target`,
for a file its `sha256` and, where it may have to be put back, its `content` (zlib, base64). No link is ever followed.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from remotegpu_agent.progress import tick

Entry = dict[str, Any]
Snapshot = dict[str, Entry]
Rights = dict[str, Any]

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_LIMIT_BYTES = 256 * 1024
_DIGEST_LIMIT_BYTES = 64 * 1024 * 1024


def snapshot(
    roots: Iterable[str],
    *,
    skip: Callable[[str], bool] = lambda _path: False,
    keep: Callable[[str], bool] | None = None,
) -> Snapshot:
    """Every entry at and below the roots (glob patterns allowed), by path.

    `skip` leaves out a path and what is below it. `keep` says whose content is taken along; None keeps no content.
    """
    found: Snapshot = {}
    for root in roots:
        for path in glob.glob(root) if glob.has_magic(root) else [root]:
            for each in _walk(path, skip):
                entry = look_at(each, content=bool(keep and keep(each)))
                if entry is not None:
                    found[each] = entry
    return dict(sorted(found.items()))


def _walk(path: str, skip: Callable[[str], bool]) -> Iterator[str]:
    if skip(path):
        return
    yield path
    if os.path.islink(path):
        return
    try:
        names = sorted(os.listdir(path))
    except (NotADirectoryError, FileNotFoundError):
        return
    for name in names:
        yield from _walk(os.path.join(path, name), skip)


def enter(path: str) -> int:
    """A descriptor of a folder on ground that a tenant may have prepared: no name on the way to it may be a link."""
    folder = os.open("/", FOLDER)
    for name in [each for each in path.split("/") if each]:
        try:
            inner = os.open(name, FOLDER, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def below(top: str) -> Iterator[str]:
    """Every path at or below the top, as long as no link leads to it; nothing where it is not there.

    Of a folder that cannot be entered (a file system of the tenant's that answers nobody) the folder itself is told.
    """
    try:
        parent = enter(os.path.dirname(top))
    except OSError:  # not there, or a link: then what it leads to is not here
        return
    try:
        facts = os.stat(os.path.basename(top), dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    except OSError:
        yield top
        return
    finally:
        os.close(parent)
    if not stat.S_ISDIR(facts.st_mode):
        yield top
        return
    pending = [top]
    while pending:
        folder = pending.pop()
        with contextlib.suppress(OSError):  # it has been told already
            yield from _in(folder, pending)


def _in(folder: str, inner: list[str]) -> Iterator[str]:
    handle = enter(folder)
    try:
        with os.scandir(handle) as entries:
            for entry in entries:
                tick()
                yield f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    inner.append(f"{folder}/{entry.name}")
    finally:
        os.close(handle)


def look_at(path: str, *, content: bool = False) -> Entry | None:
    """The entry at this path, or None where there is nothing."""
    try:
        facts = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    entry: Entry = {"mode": stat.S_IMODE(facts.st_mode), "uid": facts.st_uid, "gid": facts.st_gid}
    if stat.S_ISLNK(facts.st_mode):
        return {"type": "link", "target": os.readlink(path), "uid": facts.st_uid, "gid": facts.st_gid}
    if stat.S_ISDIR(facts.st_mode):
        return {"type": "directory", **entry}
    if stat.S_ISREG(facts.st_mode):
        return {"type": "file", **entry, **_content(path, facts.st_size, content)}
    return {"type": "special", **entry}


def rights(path: str) -> Rights | None:
    """Who may do what with a file or folder; None where there is nothing."""
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return None
    has_acl = "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False)
    return {
        "is_file": stat.S_ISREG(facts.st_mode),
        "mode": stat.S_IMODE(facts.st_mode),
        "uid": facts.st_uid,
        "gid": facts.st_gid,
        "has_acl": has_acl,
    }


def _content(path: str, size: int, wanted: bool) -> Entry:
    if size > _DIGEST_LIMIT_BYTES:
        return {"sha256": None, "size": size}
    data = read_no_follow(path)
    if not wanted or len(data) > _READ_LIMIT_BYTES:
        return {"sha256": hashlib.sha256(data).hexdigest()}
    return holding(data)


def holding(data: bytes) -> Entry:
    """What an entry says of a file's content, with the content itself."""
    digest = hashlib.sha256(data).hexdigest()
    return {"sha256": digest, "content": base64.b64encode(zlib.compress(data, 9)).decode()}


def read_no_follow(path: str) -> bytes:
    """The bytes of a regular file; a link in its place is an error, and a pipe does not make us wait."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        return file.read()


def content_of(entry: Entry) -> bytes | None:
    """The bytes that the entry carries, or None where it carries only a digest."""
    packed = entry.get("content")
    return None if packed is None else zlib.decompress(base64.b64decode(packed))


def same(left: Entry | None, right: Entry | None) -> bool:
    """Whether two entries say the same about a path, with or without content taken along."""
    if left is None or right is None:
        return left is right
    return {k: v for k, v in left.items() if k != "content"} == {k: v for k, v in right.items() if k != "content"}


def difference(before: Entry | None, now: Entry | None) -> str:
    """What has changed, in words."""
    if before is None:
        return "is not in the baseline"
    if now is None:
        return "is missing"
    if before["type"] != now["type"]:
        return f"was a {before['type']} and is a {now['type']}"
    names = {"sha256": "content", "target": "target", "mode": "mode", "uid": "owner", "gid": "group", "size": "size"}
    changed = [word for key, word in names.items() if before.get(key) != now.get(key)]
    return f"has another {' and '.join(changed)} than in the baseline"
