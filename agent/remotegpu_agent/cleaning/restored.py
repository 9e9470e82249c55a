"""What is put back as it was: settings in files, accounts, and programs that lend power.

A tenant without root cannot change any of it; what differs from the baseline is a way in, and it goes, whoever put it
there. What the baseline holds only as a digest cannot be put back: the step fails and names it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from remotegpu_agent import baseline
from remotegpu_agent.cleaning import remove
from remotegpu_agent.cleaning.processes import stop_unit
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Act, Finding, Look
from remotegpu_agent.observe import accounts, files, operators, packages, special
from remotegpu_agent.observe.accounts import FIRST_PERSON
from remotegpu_agent.observe.files import Entry, Snapshot
from remotegpu_agent.observe.tools import ToolFailed, run
from remotegpu_agent.protocol import UIDS

# --- settings in files


def look_for_changes(section: str) -> Look:
    """What differs from the baseline in one section of files, and no upgrade of a package has brought."""

    def look(scope: Scope) -> Iterator[Finding]:
        is_a_packages = _as_dpkg_says()
        before: Snapshot = baseline.without_revoked(scope.sections[section])
        profiles = baseline.profiles_of(scope.sections)
        now = baseline.read_files(section, scope.homes, profiles=profiles, keep=_names_keys)
        for path in sorted({*before, *now}):
            if section == "ssh_keys" and path == scope.keys_file:
                continue  # the lease's own door is another step
            if section == "at_jobs" and path not in now:
                continue  # it has run; putting it back would run it twice
            its = before.get(path), now.get(path)
            if not (baseline.may_be_brought(scope.sections, path, *its) and is_a_packages(path)):
                yield from difference(path, before, now)

    return look


def _as_dpkg_says() -> Callable[[str], bool]:
    """Whether a setting is now as its package has brought it, or a folder is one of a package's."""
    conffiles, packaged = functools.cache(packages.conffiles), functools.cache(special.packaged_paths)

    def is_a_packages(path: str) -> bool:
        if os.path.isdir(path):
            return path in packaged()
        return path in conffiles() and special.md5(path) == conffiles()[path]

    return is_a_packages


def difference(path: str, before: Snapshot, now: Snapshot) -> Iterator[Finding]:
    """What `put_back` takes, where the path is not as it was."""
    if not files.same(before.get(path), now.get(path)):
        yield Finding((path, before.get(path)), _in_words(path, before.get(path), now.get(path)))


def _names_keys(path: str) -> bool:
    return "/authorized_keys" in path


def _in_words(path: str, before: Entry | None, now: Entry | None) -> str:
    text = f"{path} {files.difference(before, now)}"
    if _names_keys(path) and now is not None:
        added = sorted(_fingerprints(now) - _fingerprints(before))
        text += f" (keys added: {', '.join(added)})" if added else ""
    return text


def _fingerprints(entry: Entry | None) -> set[str]:
    content = files.content_of(entry) if entry else None
    found = set()
    for word in (content or b"").split():
        if word.startswith(b"AAAA"):
            with contextlib.suppress(ValueError):
                digest = hashlib.sha256(base64.b64decode(word, validate=True)).digest()
                found.add("SHA256:" + base64.b64encode(digest).decode().rstrip("="))
    return found


def put_back(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Remove what was added (innermost first), then put back what was changed or removed (outermost first)."""
    those = sorted((finding.subject for finding in found), key=lambda each: str(each[0]))
    for path, before in reversed(those):
        if before is None:
            yield from remove.remove(path)
    for path, before in those:
        if before is not None:
            yield from remove.put_back(path, before)


def put_back_and(then: Callable[[], Iterator[str]]) -> Act:
    """Put back, and tell the service that reads the files."""

    def act(scope: Scope, found: list[Finding]) -> Iterator[str]:
        yield from put_back(scope, found)
        yield from then()

    return act


def reload_sshd() -> Iterator[str]:
    """Let sshd read its settings again, if they are good; a running one keeps the old ones otherwise."""
    run(["sshd", "-t"])
    run(["systemctl", "try-reload-or-restart", "ssh.service"])
    yield "reloaded ssh.service"


def rebuild_loader_cache() -> Iterator[str]:
    """The loader reads a cache of the folders that were named in its settings."""
    run(["ldconfig"], timeout_s=60)
    yield "rebuilt the loader's cache"


# --- systemd units

_UNIT = re.compile(r"\.(service|socket|timer|path|mount|automount|swap|target)$")
_TRANSIENT = "/run/systemd/transient/"


def look_for_units(scope: Scope) -> Iterator[Finding]:
    """Changed unit files, units that run without being in the baseline, and LD_* handed to every service."""
    yield from look_for_changes("system_units")(scope)
    yield from _unpackaged(scope)
    known: Snapshot = scope.sections["system_units"]
    for unit in _loaded_units():
        path = unit["FragmentPath"]
        foreign = path.startswith(("/etc/", "/run/systemd/system/", "/usr/local/")) and path not in known
        transient = path.startswith(_TRANSIENT) and not baseline.is_own_transient(unit["Id"])
        orphan = unit["LoadState"] == "not-found"
        if unit["ActiveState"] in ("active", "activating", "reloading") and (foreign or transient or orphan):
            yield Finding(unit["Id"], f"unit {unit['Id']} is {unit['ActiveState']} and not in the baseline")
    for line in run(["systemctl", "show-environment"]).splitlines():
        if line.startswith("LD_"):
            yield Finding(f"environment:{line.partition('=')[0]}", f"systemd gives {line} to every service")


def _unpackaged(scope: Scope) -> Iterator[Finding]:
    """What no package put where it is loaded by itself; a baseline that is older does not tell which was there."""
    before: Snapshot | None = scope.sections.get("unpackaged")
    if before is None:
        return
    now = baseline.read_unpackaged(baseline.loaded_by_itself(scope.sections))
    for path in sorted({*before, *now}):
        is_a_packages_now = path not in now and os.path.lexists(path)
        if not is_a_packages_now:
            yield from difference(path, before, now)


def _loaded_units() -> list[dict[str, str]]:
    shown = run(["systemctl", "show", "--property=Id,ActiveState,LoadState,FragmentPath",
                 "*.service", "*.socket", "*.timer", "*.path"])  # fmt: skip
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in shown.split("\n\n")]
    return [block for block in blocks if block.get("Id")]


def put_back_units(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Stop what must not run, put the files back, and let systemd read them."""
    changed = [finding for finding in found if isinstance(finding.subject, tuple)]
    named = {finding.subject for finding in found if isinstance(finding.subject, str)}
    added = {os.path.basename(f.subject[0]) for f in changed if f.subject[1] is None and _UNIT.search(f.subject[0])}
    for name in sorted(added | {each for each in named if not each.startswith("environment:")}):
        yield from stop_unit(name)
    for name in sorted(each.partition(":")[2] for each in named if each.startswith("environment:")):
        run(["systemctl", "unset-environment", name])
        yield f"unset {name} for every service"
    yield from put_back(scope, changed)
    if changed:  # only then: a reload takes the GPUs from containers that run
        run(["systemctl", "daemon-reload"], timeout_s=60)
        yield "systemd has read its units again"
    for name in sorted(added):
        with contextlib.suppress(ToolFailed):
            run(["systemctl", "reset-failed", name])


# --- users and groups

_USER_FILES = ("/etc/passwd", "/etc/shadow", "/etc/subuid", "/etc/subgid")
_GROUP_FILES = ("/etc/group", "/etc/gshadow")
_RIGHTS = ""  # in a finding's place for a name: it is about the file
OPERATORS = ": an operator's by the list of their keys; remove the login, and let it in again when the machine is ready"


def look_for_users(scope: Scope) -> Iterator[Finding]:
    """Users that were added, changed or removed; the lease's own account is another step."""
    for path in _USER_FILES:
        yield from _changed_lines(scope, path)
        yield from _changed_rights(scope, path)


def look_for_groups(scope: Scope) -> Iterator[Finding]:
    """Groups and memberships that were added, changed or removed."""
    for path in _GROUP_FILES:
        yield from _changed_lines(scope, path)
        yield from _changed_rights(scope, path)


def _changed_lines(scope: Scope, path: str) -> Iterator[Finding]:
    known: dict[str, list[str]] = scope.sections["accounts"][path]
    now = {name: [_without_lease(line, scope) for line in lines] for name, lines in accounts.lines(path).items()}
    if path in accounts.SECRET:
        now = {name: [accounts.masked(line) for line in lines] for name, lines in now.items()}
    for name in sorted({*known, *now} - {scope.login}):
        if known.get(name) != now.get(name):
            how = "is not in the baseline" if name not in known else "is missing" if name not in now else "has changed"
            whose = OPERATORS if name not in known and name in operators.names() else ""
            yield Finding((path, name), f"{path}: the entry of {name} {how}{whose}")


def _changed_rights(scope: Scope, path: str) -> Iterator[Finding]:
    """Who may read and write the file, and the copy of it before its last change: the hashes are in both."""
    for each in (path, f"{path}-"):
        now = files.rights(each)
        if now is not None and now != baseline.good_rights(scope.sections, each, now):
            yield Finding((each, _RIGHTS), f"{each} has another owner or mode than in the baseline")


def _without_lease(line: str, scope: Scope) -> str:
    """Membership in the group of all leases comes and goes with the lease's account."""
    if not line.startswith(f"{baseline.LEASE_GROUP}:"):
        return line
    head, _, members = line.rpartition(":")
    return f"{head}:{','.join(name for name in members.split(',') if name != scope.login)}"


def put_back_accounts(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Remove the lines that were added, put back those that were changed; a lost password cannot be put back.

    Each file is written anew, with the owner and mode that it should have.
    """
    for path in sorted({finding.subject[0] for finding in found}):
        wanted = {finding.subject[1] for finding in found if finding.subject[0] == path} - {_RIGHTS}
        known: dict[str, list[str]] = scope.sections["accounts"].get(path, {})
        with _accounts_locked():
            now = _lines(path)
            better = {name: _good_lines(path, name, known, now) for name in wanted}
            _write(scope, path, _replaced(now, {name: lines for name, lines in better.items() if lines is not None}))
        names = sorted(name for name in wanted if better[name] is not None)
        yield f"put back {', '.join(names)} in {path}" if names else f"put back owner and mode of {path}"


def _good_lines(path: str, name: str, known: dict[str, list[str]], now: list[str]) -> list[str] | None:
    """The lines that the file should have for one name; None where that is not ours to say, or a password is lost."""
    if name not in known:
        return None if _may_be_a_packages(name) or name in operators.names() else []
    if path not in accounts.SECRET:
        return known[name]
    lines = [accounts.unmasked(line, now) for line in known[name]]
    return None if None in lines else [line for line in lines if line is not None]


def _may_be_a_packages(name: str) -> bool:
    """A package that was installed meanwhile brings its user along: one of the system's range is named and left."""
    user, gid = accounts.find_user(name), accounts.find_gid(name)
    return 0 < (user.uid if user else gid or 0) < FIRST_PERSON


def _replaced(now: list[str], better: dict[str, list[str]]) -> list[str]:
    """The lines with those of some names replaced, each in its place; what has no place yet comes last."""
    left, lines = dict(better), []
    for line in now:
        name = line.partition(":")[0]
        lines += left.pop(name, []) if name in better else [line]
    return lines + [line for its_lines in left.values() for line in its_lines]


def _without(lines: list[str], names: set[str]) -> list[str]:
    return [line for line in lines if line.partition(":")[0] not in names]


def look_for_account(scope: Scope) -> Iterator[Finding]:
    """The lease's own login and group, in every file that lists accounts."""
    for path in (*_USER_FILES, *_GROUP_FILES):
        for line in _lines(path):
            if line.partition(":")[0] == scope.login:
                yield Finding(path, f"{path} has an entry of {scope.login}")
            elif path in _GROUP_FILES and scope.login in re.split("[:,]", line)[1:]:
                yield Finding(path, f"{path}: {scope.login} is a member of {line.partition(':')[0]}")


def remove_account(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Take the login out of every file that lists accounts."""
    for path in sorted({finding.subject for finding in found}):
        with _accounts_locked():
            lines = _without(_lines(path), {scope.login})
            without = [_without_member(line, scope.login) for line in lines] if path in _GROUP_FILES else lines
            _write(scope, path, without)
        yield f"removed {scope.login} from {path}"


def _without_member(line: str, login: str) -> str:
    head, _, members = line.rpartition(":")
    return f"{head}:{','.join(name for name in members.split(',') if name != login)}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return []


def _write(scope: Scope, path: str, lines: list[str]) -> None:
    rights = baseline.good_rights(scope.sections, path, files.rights(path))
    temporary = Path(f"{path}.remotegpu")
    temporary.unlink(missing_ok=True)
    with temporary.open("x", errors="surrogateescape") as file:
        os.fchown(file.fileno(), rights["uid"], rights["gid"])
        os.fchmod(file.fileno(), rights["mode"])
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def _accounts_locked() -> Iterator[None]:
    """The lock that useradd and passwd take as well."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.lckpwdf() != 0:
        raise OSError(ctypes.get_errno(), "the accounts are locked by another program")
    try:
        yield
    finally:
        libc.ulckpwdf()


# --- programs that lend power


def look_for_special_files(scope: Scope) -> Iterator[Finding]:
    """Set-uid, set-gid and capability files that were added or changed; one that is gone lends nothing. Beside them
    what everybody may write now, and devices that everybody may open.

    The content counts for those of the baseline alone: a tenant could have us read terabytes of the others. What an
    upgrade has brought since is no tenant's: else every machine would be quarantined after one of sudo's. Stores come
    first: once they are shut again, nobody looks into them.
    """
    for path in special.STORES:
        rights = files.rights(path)
        if rights is not None and rights != (best := baseline.good_store(scope.sections, path, rights)):
            yield Finding(functools.partial(_shut, path, best), f"{path} is open to others than in the baseline")
    known: Snapshot = scope.sections["special_files"]
    packaged = functools.cache(special.packaged_paths)
    for each in itertools.chain([special.root()], special.walk()):
        if (each.mode & 0o022 or each.device) and not scope.owns(each.uid):  # what the tenant owns goes by another step
            words = baseline.opened(scope.sections, each.path, each.mode, each.gid, each.device)
            if words is not None:
                text = f"{each.path} (mode {stat.S_IMODE(each.mode):o}) {words}"
                yield Finding(functools.partial(_close, each, scope), text)
        if not each.is_special:
            continue
        before = known.get(each.path)
        now = {"mode": stat.S_IMODE(each.mode)} if before is None else baseline.special_entry(each)
        if not files.same(before, now) and not _is_upgraded(each.path, before, now):
            text = f"{each.path} (mode {now['mode']:o}) {files.difference(before, now)}"
            yield Finding(functools.partial(_disarm, each.path, before, now, packaged), text)


def _is_upgraded(path: str, before: Entry | None, now: Entry) -> bool:
    """Whether nothing but the content differs, and that is what a package has brought: a security upgrade's."""
    content = ("sha256", "size")
    powers = [{key: value for key, value in (each or {}).items() if key not in content} for each in (before, now)]
    return powers[0] == powers[1] and bool(special.as_packaged([path]))


def disarm_special_files(_scope: Scope, found: Iterable[Finding]) -> Iterator[str]:
    """Each finding knows its way back."""
    for finding in found:
        yield from finding.subject()


def _shut(path: str, best: files.Rights) -> Iterator[str]:
    handle = os.open(path, files.FOLDER)
    try:
        with contextlib.suppress(OSError):  # it has none
            os.removexattr(handle, "system.posix_acl_access")
        os.fchown(handle, best["uid"], best["gid"])
        os.fchmod(handle, best["mode"])
        yield f"put back owner and mode of {path}"
    finally:
        os.close(handle)


def _close(each: special.Found, scope: Scope) -> Iterator[str]:
    """A device outside of /dev goes; of anything else everybody loses what he was given."""
    is_device = stat.S_ISBLK(each.mode) or stat.S_ISCHR(each.mode)
    if is_device and not each.path.startswith("/dev/"):
        yield from remove.remove(each.path)
        return
    try:
        parent = files.enter(os.path.dirname(each.path))
        try:
            handle = os.open(os.path.basename(each.path) or ".", os.O_PATH | os.O_NOFOLLOW, dir_fd=parent)
        finally:
            os.close(parent)
        try:  # by way of the descriptor: a device is not opened, and a link in its place not followed
            if each.gid in UIDS or each.gid == baseline.leases_gid(scope.sections):
                os.chown(f"/proc/self/fd/{handle}", -1, 0)
            os.chmod(f"/proc/self/fd/{handle}", baseline.good_mode(scope.sections, each.path, each.mode))
        finally:
            os.close(handle)
        yield f"put back the mode of {each.path}"
    except OSError as error:
        yield f"could not put back the mode of {each.path}: {error.strerror}"


def _disarm(path: str, before: Entry | None, now: Entry, packaged: Callable[[], frozenset[str]]) -> Iterator[str]:
    """A packaged program loses the power it was given; anything else is removed. A changed one is named and left."""
    if before is None and path not in packaged():
        yield from remove.remove(path)
    elif before is None or before.get("sha256") == now.get("sha256"):
        mode = now["mode"] & ~(stat.S_ISUID | stat.S_ISGID) if before is None else before["mode"]
        yield from _set_power(path, mode, None if before is None else before.get("capabilities"))


def _set_power(path: str, mode: int, capabilities: str | None) -> Iterator[str]:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if capabilities is None:
            with contextlib.suppress(OSError):
                os.removexattr(handle, "security.capability")
        else:
            os.setxattr(handle, "security.capability", bytes.fromhex(capabilities))
        os.fchmod(handle, mode)
        yield f"put back the mode of {path}"
    finally:
        os.close(handle)
