"""The tenant's data: mounts, home, temporary folders, the runtime folder, mail and records, and files anywhere else."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
from collections.abc import Iterable, Iterator

from remotegpu_agent.baseline import TEMPORARY_FOLDERS, is_told_of
from remotegpu_agent.cleaning import remove
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding
from remotegpu_agent.observe import files, mounts, special
from remotegpu_agent.observe.tools import ToolFailed, run

_DETACH, _NO_FOLLOW = 2, 8  # MNT_DETACH, UMOUNT_NOFOLLOW


def look_for_mounts(scope: Scope) -> Iterator[Finding]:
    """What was not mounted in the baseline, and whatever lies in the tenant's folders. The innermost come first."""
    known = collections.Counter((each["target"], each["fstype"]) for each in scope.sections["mounts"])
    now = collections.Counter((each["target"], each["fstype"]) for each in mounts.lasting())
    for target, fstype in sorted((now - known).elements(), reverse=True):
        if is_told_of(scope.sections, target, fstype):
            yield Finding(target, f"{fstype} is mounted on {target}")
    for mount in reversed(mounts.listed()):
        if f"{mount.target}/".startswith(tuple(f"/run/user/{uid}/" for uid in scope.uids)):
            yield Finding(mount.target, f"{mount.fstype} is mounted on {mount.target}")


def unmount(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Unmount each for good, not lazily: a busy mount is one that somebody still uses.

    But for FUSE: whoever served it is dead, and what is mounted in it cannot be reached by its name. It goes with it.
    """
    served = {mount.target for mount in mounts.listed() if mount.fstype.startswith("fuse")}
    for finding in found:
        yield _unmount(finding.subject, finding.subject, _NO_FOLLOW | (_DETACH if finding.subject in served else 0))


def detach_below(folder: str) -> Iterator[str]:
    """Let go what a tenant who still runs has mounted at the folder or below it, wherever he moves it meanwhile."""
    for mount in reversed(mounts.listed()):
        if f"{mount.target}/".startswith(f"{folder}/"):
            with contextlib.suppress(OSError):  # it lies in another one, and goes with that
                parent = files.enter(os.path.dirname(mount.target))
                try:
                    name = f"/proc/self/fd/{parent}/{os.path.basename(mount.target)}"
                    yield _unmount(name, mount.target, _NO_FOLLOW | _DETACH)
                finally:
                    os.close(parent)


def _unmount(path: str, target: str, flags: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), flags) == 0:
        return f"unmounted {target}"
    return f"could not unmount {target}: {os.strerror(ctypes.get_errno())}"


def look_for_swap(scope: Scope) -> Iterator[Finding]:
    """Swap that was not there before: it may hold a tenant's memory."""
    for device in mounts.swaps():
        if device not in scope.sections["swaps"]:
            yield Finding(device, f"{device} is used for swapping")


def end_swap(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Swap it in and let it go."""
    for finding in found:
        try:
            run(["swapoff", finding.subject], timeout_s=600)
            yield f"swapped off {finding.subject}"
        except ToolFailed as error:
            yield str(error)


def look_for_home(scope: Scope) -> Iterator[Finding]:
    """The home of the lease, and the one it would have by its name."""
    for home in sorted({scope.home, f"/home/{scope.login}"}):
        if os.path.lexists(home):
            yield Finding(home, f"{home} exists")


def look_for_temporary_files(scope: Scope) -> Iterator[Finding]:
    """What the tenant has put into folders that everybody may write to. Files of others there are left alone."""
    for folder in TEMPORARY_FOLDERS:
        if folder == "/dev/mqueue" or not os.path.isdir(folder):
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # services put their own there, and take it away
                    owner = entry.stat(follow_symlinks=False).st_uid
                    if scope.owns(owner):
                        yield Finding(entry.path, f"{entry.path} of uid {owner}")


def look_for_runtime_folder(scope: Scope) -> Iterator[Finding]:
    """The folder that logind makes for a user who is signed in."""
    for uid in sorted(scope.uids):
        if os.path.lexists(f"/run/user/{uid}"):
            yield Finding(f"/run/user/{uid}", f"/run/user/{uid} exists")


def look_for_records(scope: Scope) -> Iterator[Finding]:
    """Mail, the user's own journal, core dumps, and what PAM and sudo remember of the login."""
    single = [f"/var/mail/{scope.login}", f"/run/sudo/ts/{scope.login}", f"/var/lib/sudo/lectured/{scope.login}",
              f"/run/faillock/{scope.login}", f"/var/lib/AccountsService/users/{scope.login}"]  # fmt: skip
    for path in single:
        if os.path.lexists(path):
            yield Finding(path, path)
    for folder, wanted in (
        ("/var/log/journal", rf"user-{scope.uid}(@.*)?\.journal~?"),
        ("/run/log/journal", rf"user-{scope.uid}(@.*)?\.journal~?"),
        ("/var/lib/systemd/coredump", rf"core\..*\.{scope.uid}\.[0-9a-f]{{32}}\..*"),
    ):
        for above, _folders, names in os.walk(folder):
            for name in sorted(names):
                if re.fullmatch(wanted, name):
                    yield Finding(f"{above}/{name}", f"{above}/{name}")


def look_for_files(scope: Scope) -> Iterator[Finding]:
    """Anything of the tenant's or of its group anywhere on this machine's own file systems.

    Also whatever is too deep to be looked into: if it is the tenant's, it goes with the folders above it.
    """
    for each in special.walk():
        if scope.owns(each.uid) or scope.is_its_group(each.gid) or each.is_too_deep:
            deep = ", too deep to be looked into" if each.is_too_deep else ""
            yield Finding(each, f"{each.path} of uid {each.uid}, gid {each.gid}{deep}")


def remove_files(scope: Scope, found: Iterable[Finding]) -> Iterator[str]:
    """Remove what the tenant owns; what somebody else only shared with its group stays, without the group."""
    for each in (finding.subject for finding in found):
        if scope.owns(each.uid):
            yield from remove.remove(each.path)
        elif scope.is_its_group(each.gid):
            yield from remove.take_from_group(each.path)


def remove_paths(_scope: Scope, found: Iterable[Finding]) -> Iterator[str]:
    """Remove each, with all below it."""
    yield from remove.remove_each(finding.subject for finding in found)
