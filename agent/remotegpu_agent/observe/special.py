"""What lends power: set-uid, set-gid and capability programs, what everybody may write, devices; and files by owner.

One walk over this machine's own file systems answers all of it. Where only root can enter a folder of a store, it is
left out: Docker's layers are full of set-uid programs of other systems.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remotegpu_agent.observe import docker, files, mounts, packages
from remotegpu_agent.progress import tick
from remotegpu_agent.protocol import UIDS

STORES = (docker.ROOT, "/var/lib/containerd", "/var/lib/remotegpu-agent")
_PATH_MAX = 4096
_PIECE_BYTES = 1024 * 1024
_MEMORY = {os.makedev(1, minor) for minor in (1, 2, 4)}  # mem, kmem, port
_HARMLESS = {os.makedev(1, minor) for minor in (3, 5, 7, 8, 9)} | {os.makedev(5, 0), os.makedev(5, 2), 0}


@dataclass(frozen=True)
class Found:
    """One entry of a file system that a walk came across."""

    path: str
    mode: int
    uid: int
    gid: int
    capabilities: str | None
    is_too_deep: bool = False  # a folder that no path leads into: what is in it was not looked at
    is_open: bool = False  # a folder that is looked into
    device: int = 0

    @property
    def is_special(self) -> bool:
        """Whether running it gives more power than its caller has."""
        lends = self.mode & (stat.S_ISUID | stat.S_ISGID)
        return self.capabilities is not None or (stat.S_ISREG(self.mode) and bool(lends))


def walk() -> Iterator[Found]:
    """Everything on this machine's own file systems, without following a link or entering another mount."""
    points = mounts.points()
    for place in mounts.local():
        if not _is_shut_off(place):
            yield from _below(place, points)


def _is_shut_off(place: str) -> bool:
    try:
        return any(_is_closed(each, os.lstat(each)) for each in folders_of_store(place))
    except FileNotFoundError:
        return True  # a container's, which has ended


def folders_of_store(path: str) -> list[str]:
    """The folders of a store that lead to the path, and itself; none where it lies in no store."""
    for store in STORES:
        if f"{path}/".startswith(f"{store}/"):
            inner = path[len(store) :].split("/")[1:]
            return [store, *("/".join([store, *inner[: n + 1]]) for n in range(len(inner)))]
    return []


def _is_closed(path: str, facts: os.stat_result) -> bool:
    """Whether the folder is one of a store that nobody can enter but root and the store's own users."""
    is_a_leases = facts.st_uid in UIDS or facts.st_gid in UIDS
    return not facts.st_mode & 0o007 and not is_a_leases and bool(folders_of_store(path))


def root() -> Found:
    """The folder that no walk comes across."""
    facts = os.lstat("/")
    return Found("/", facts.st_mode, facts.st_uid, facts.st_gid, None)


def opened(path: str, mode: int, gid: int, device: int, leases_gid: int | None) -> str | None:
    """What any lease may do with it and should not, in words; None where that is nothing. A group of leases counts too.

    Where others cannot go nothing is open, and in a folder where each may remove only his own neither.
    """
    bits = mode | (mode >> 3 if gid in UIDS or gid == leases_gid else 0)
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        is_open, words = bits & 0o006 and _is_mighty(path, mode, device), "is a device that any lease may open"
    else:
        is_place = stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not mode & stat.S_ISVTX)
        is_open, words = bits & 0o002 and is_place and not path.startswith("/dev/"), "may be written by any lease"
    return words if is_open and _others_reach(path) else None


def _is_mighty(path: str, mode: int, device: int) -> bool:
    """In /dev many may be opened by everybody; elsewhere nobody needs one but what a chroot has."""
    if path.startswith("/dev/"):
        return stat.S_ISBLK(mode) or device in _MEMORY
    return stat.S_ISBLK(mode) or device not in _HARMLESS


def _others_reach(path: str) -> bool:
    try:
        facts = [os.lstat(folder) for folder in parents(path)]
    except OSError:
        return False
    return all(each.st_mode & 0o001 or each.st_uid in UIDS or each.st_gid in UIDS for each in facts)


def parents(path: str) -> Iterator[str]:
    """The folders that lead to the path, the innermost first."""
    while path != "/":
        path = os.path.dirname(path)
        yield path


def _below(top: str, points: frozenset[str]) -> Iterator[Found]:
    """One name at a time: of a million in one folder no list is made, and what the caller removes is not entered."""
    pending = [top]
    while pending:
        folder = pending.pop()
        try:
            handle = os.open(folder, files.FOLDER)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            with os.scandir(handle) as entries:
                for entry in entries:
                    tick()
                    found = _look_at(os.path.join(folder, entry.name), entry, handle, points)
                    if found is None:
                        continue
                    if found.path not in STORES:  # a store stays, whosesoever it has become
                        yield found
                    if found.is_open and found.path not in points:
                        pending.append(found.path)
        except FileNotFoundError:
            continue  # the folder went while it was read
        finally:
            os.close(handle)


def _look_at(path: str, entry: os.DirEntry[str], folder: int, points: frozenset[str]) -> Found | None:
    try:
        facts = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError:
        if path not in points:
            raise
        return None  # a file system of a tenant's that answers nobody; it is told of among the mounts
    capabilities = _capabilities(folder, entry.name, facts.st_mode)
    is_folder = stat.S_ISDIR(facts.st_mode)
    is_too_deep = is_folder and len(os.fsencode(path)) >= _PATH_MAX
    is_open = is_folder and not is_too_deep and not _is_closed(path, facts)
    device = facts.st_rdev
    return Found(path, facts.st_mode, facts.st_uid, facts.st_gid, capabilities, is_too_deep, is_open, device)


def _capabilities(folder: int, name: str, mode: int) -> str | None:
    if not stat.S_ISREG(mode):
        return None
    try:  # by way of the descriptor: the whole path may be longer than the kernel takes
        return os.getxattr(f"/proc/self/fd/{folder}/{name}", "security.capability", follow_symlinks=False).hex()
    except OSError:
        return None  # ENODATA almost always; a file system without such attributes lends nothing either


def packaged_paths() -> frozenset[str]:
    """Every path that a package of the distribution has installed, in the merged-/usr spelling."""
    return frozenset(
        packages.merged(path) for listing in packages.listings("list") for path in listing.split("\n") if path
    )


def answered_for(paths: Iterable[str]) -> frozenset[str]:
    """Those of the paths that an installed package tells the content of, whichever way it spells them."""
    wanted = {path: packages.merged(path) for path in paths}
    brought = frozenset(wanted.values()).intersection(path for path, _ in _brought())
    return frozenset(path for path, spelt in wanted.items() if spelt in brought)


def as_packaged(paths: Iterable[str]) -> frozenset[str]:
    """Those of the files that have the content which an installed package says it has brought."""
    wanted = {path: packages.merged(path) for path in paths}
    among = frozenset(wanted.values())
    brought = {each for each in _brought() if each[0] in among}
    return frozenset(path for path, spelt in wanted.items() if (spelt, md5(path)) in brought)


def _brought() -> Iterator[tuple[str, str]]:
    listed = (each for listing in packages.listings("md5sums") for each in packages.digests(listing))
    return ((packages.merged(path), digest) for path, digest in listed)


def md5(path: str) -> str | None:
    """The digest of a file as dpkg writes it; None where there is no file."""
    return _digest(path, "md5")


def sha256(path: str) -> str | None:
    """The digest of a file of any size; None where there is no file."""
    return _digest(path, "sha256")


def _digest(path: str, algorithm: str) -> str | None:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()
