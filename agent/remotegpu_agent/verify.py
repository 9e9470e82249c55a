"""Verifying that a host is what its baseline says, and that nothing of a lease is left: only looking, with other eyes.

Cleaning reads /proc, system calls and Docker's socket in Python; here the host's own programs are asked (find, ps, ss,
getent, nft, docker, loginctl, dpkg) and the GPUs' driver, so that one blind spot does not hide the same thing twice. It
shares nothing with `cleaning/` but the baseline. What can only be seen from outside (open ports, a real login) is the
playbook's.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import glob
import ipaddress
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from remotegpu_agent import baseline, openings
from remotegpu_agent.evidence import REASON_CHARS, Told
from remotegpu_agent.observe import (
    accounts,
    authorities,
    files,
    firewall,
    gpus,
    modules,
    mounts,
    packages,
    ports,
    processes,
    special,
)
from remotegpu_agent.observe.tools import ToolFailed, find_tool, printable, read_text, run

_LOCAL_TYPES = "ext2,ext3,ext4,xfs,btrfs,f2fs,bcachefs,zfs,jfs,reiserfs,vfat,exfat,ntfs3,overlay,tmpfs,ramfs,devtmpfs"
_KINDS = {"f": stat.S_IFREG, "d": stat.S_IFDIR, "b": stat.S_IFBLK, "c": stat.S_IFCHR}
_LEASE_UIDS = (20000, 59999)
# Beside its reserve an idle driver shows some MiB as used; the smallest CUDA context there is takes about 100.
_IDLE_GPU_BYTES = 64 * 1024**2
_WALK_S = 6 * 3600  # of all disks; who asked ends it earlier (verify_host_timeout)
_GPU_SETTLES_S = 5.0  # how long the driver may take to free the memory of a process that was killed


class NotApplicable(Exception):
    """There is nothing to check here; the message says why."""


@dataclass(frozen=True)
class Asked:
    """What the portal asks: is this host as in the baseline, and is nothing of this lease left (if there was one)?"""

    lease_id: int | None
    login: str | None
    uid: int | None
    sections: dict[str, Any]

    @property
    def account(self) -> tuple[str, int]:
        """Login and uid of the lease; NotApplicable where the question names none."""
        if self.login is None or self.uid is None:
            raise NotApplicable("no lease is named")
        return self.login, self.uid


Check = Callable[[Asked], Iterable[str]]


def verify(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a `verify_request` with a `verify_response`. Changes nothing; seconds, or an hour for large disks."""
    started_at = _now()
    asked = Asked(request["lease_id"], request["login"], request["uid"], request["baseline"]["sections"])
    checks = [_checked(name, check, asked) for name, check in CHECKS.items()]
    return {
        "schema": 1,
        "passed": all(check["result"] in ("passed", "not_applicable") for check in checks),
        "checks": checks,
        "boot_id": (read_text("/proc/sys/kernel/random/boot_id") or "").strip(),
        "agent_version": baseline.agent_version(),
        "started_at": started_at,
        "ended_at": _now(),
    }


def _checked(name: str, check: Check, asked: Asked) -> dict[str, Any]:
    began = time.monotonic()
    result, reason, evidence = "unknown", None, None
    try:
        told = Told()
        for each in check(asked):
            told.add(each)
        result = "failed" if told.count else "passed"
        reason = "; ".join(told.lines) or None
        evidence = {"count": told.count, "found": told.lines}
    except NotApplicable as why:
        result, reason = "not_applicable", str(why)
    except Exception as error:  # what could not be looked at is not clean, and the other checks still run
        reason = printable(f"could not look: {type(error).__name__}: {error}")
    if reason and len(reason) > REASON_CHARS:
        reason = reason[: REASON_CHARS - 2] + " …"
    duration_s = round(time.monotonic() - began, 3)
    return {"id": name, "result": result, "reason": reason, "evidence": evidence, "duration_s": duration_s}


# --- the lease's login, and what it left


def _account(asked: Asked) -> Iterator[str]:
    login, uid = asked.account
    for database, key in (("passwd", login), ("passwd", str(uid)), ("group", login), ("shadow", login)):
        for line in _getent(database, key):
            yield f"{database} still has {line.split(':')[0]}"
    for line in _getent("group"):
        if login in line.split(":")[3].split(","):
            yield f"{login} is still a member of {line.split(':')[0]}"


def _access(asked: Asked) -> Iterator[str]:
    login, _ = asked.account
    for path in _find(["/etc/remotegpu/authorized_keys"], "-name", login):
        yield f"{path} exists"
    for line in _getent("shadow", login):
        expires_on = line.split(":")[7]
        if not expires_on.isdigit() or int(expires_on) > time.time() // 86400:
            yield f"the account {login} has not expired"


def _connections(asked: Asked) -> Iterator[str]:
    login, uid = asked.account
    for process in _processes():
        if re.match(rf"sshd(-session)?: {re.escape(login)}([@ ]|$)", process.command):
            yield f"process {process.pid} ({process.command}) serves a connection"
    for line in run(["ss", "-Htne", "state", "established"]).splitlines():
        if re.search(rf"\buid:{uid}\b", line):
            yield f"open connection: {' '.join(line.split()[2:4])}"
    for line in run(["loginctl", "list-sessions", "--no-legend"]).splitlines():
        if line.split()[1:2] == [str(uid)]:
            yield f"session {line.split()[0]} of {login} is open"


@dataclass(frozen=True)
class _Process:
    pid: int
    state: str
    uids: frozenset[int]
    gid: int
    cgroup: str
    command: str


def _processes() -> Iterator[_Process]:
    for line in run(["ps", "-ewwo", "pid=,stat=,euid=,ruid=,suid=,fuid=,egid=,cgroup=,args="]).splitlines():
        pid, state, *ids, gid, cgroup, command = line.split(None, 8)
        yield _Process(int(pid), state, frozenset(map(int, ids)), int(gid), cgroup, command)


def _lease_processes(asked: Asked) -> Iterator[str]:
    login, uid = asked.account
    lent = [range(int(first), int(first) + int(count)) for first, count in _subordinate(login, uid)]
    for process in _processes():
        its_own = uid in process.uids or process.gid == uid or f"/user-{uid}.slice" in process.cgroup
        if (its_own or any(each in ids for ids in lent for each in process.uids)) and process.state[0] not in "ZX":
            yield f"process {process.pid} ({process.command[:200]}) is the tenant's"


def _subordinate(login: str, uid: int) -> Iterator[list[str]]:
    for line in (read_text("/etc/subuid") or "").splitlines():
        if line.split(":")[0] in (login, str(uid)) and line.count(":") == 2:
            yield line.split(":")[1:]


def _gpu_holders(asked: Asked) -> Iterator[str]:
    folders = glob.glob("/proc/[0-9]*/fd")  # some are gone by the time find comes to them: 1
    links = run(["find", *folders, "-maxdepth", "1", "-lname", "/dev/nvidia*", "-printf", "%h %l\n"], ok=(0, 1))
    for folder, device in sorted({tuple(line.split(" ", 1)) for line in links.splitlines()}):
        pid = folder.split("/")[2]
        unit, command = _unit_and_command(pid)
        if command and not _may_hold_gpus(unit, asked):
            yield f"process {pid} ({command}) holds {device}"


def _unit_and_command(pid: str) -> tuple[str, str]:
    """The system's service of a process, and what it runs: nothing, of one that has gone."""
    unit, _, command = run(["ps", "-o", "unit=,args=", "-p", pid], ok=(0, 1)).strip().partition(" ")
    return unit, command.strip()[:200]


def _may_hold_gpus(unit: str, asked: Asked) -> bool:
    return unit in (*asked.sections["gpu_holders"], "remotegpu-agent.service")


def _gpu_memory(asked: Asked) -> list[str]:
    """As the driver tells it: memory can stay behind without anybody who holds a device."""
    settled_at = time.monotonic() + _GPU_SETTLES_S
    while (found := list(_in_use_of_gpus(gpus.ask(), asked))) and time.monotonic() < settled_at:
        time.sleep(0.5)
    return found


def _in_use_of_gpus(report: dict[str, Any], asked: Asked) -> Iterator[str]:
    if report["state"] != "ok" or not report["gpus"]:
        if not gpus.are_there() and not asked.sections["gpu_holders"]:
            raise NotApplicable("this host has no GPU")
        yield f"the driver tells of no GPU ({report['state']}): {report['message'] or 'it counts none'}"
        return
    if report["message"]:
        yield report["message"]
    for gpu in report["gpus"]:
        yield from _in_use_of(gpu, asked)


def _in_use_of(gpu: dict[str, Any], asked: Asked) -> Iterator[str]:
    name = f"GPU {gpu['index']} ({gpu['uuid']})"
    used, listed = gpu["memory_used_bytes"], gpu["processes"]
    if used is None or listed is None:
        why = "; ".join(error["message"] for error in gpu["errors"]) or "no reason is given"
        yield f"{name} does not tell what it is used for: {why}"
    for process in listed or ():
        unit, command = _unit_and_command(str(process["pid"]))
        if _may_hold_gpus(unit, asked):
            used = None if used is None else used - (process["memory_bytes"] or 0)
        elif command:
            yield f"process {process['pid']} ({command}) runs on {name}"
    if used is not None and used > _IDLE_GPU_BYTES:
        yield f"{used // 1024**2} MiB of {name} are in use"


def _tasks(asked: Asked) -> Iterator[str]:
    patterns = ["remotegpu-task-*"] + ([f"remotegpu-lease-end-{asked.lease_id}.*"] if asked.lease_id else [])
    for unit, _load, active in _units(*patterns):
        yield f"{unit} is {active}"
    for path in _find(["/var/lib/remotegpu-tasks"], "-mindepth", "1", "-maxdepth", "1", "!", "-regex", ".*/[0-9]+"):
        yield f"{path} is of no task"
    if asked.uid is not None:
        for path in _find(["/var/lib/remotegpu-tasks"], "-mindepth", "1", "-maxdepth", "1", "-gid", str(asked.uid)):
            yield f"{path} is left of a task"


def _units(*patterns: str) -> Iterator[tuple[str, str, str]]:
    for line in run(["systemctl", "list-units", "--all", "--full", "--plain", "--no-legend", *patterns]).splitlines():
        unit, load, active = line.split()[:3]
        yield unit, load, active


def _linger(asked: Asked) -> Iterator[str]:
    for path in _find(["/var/lib/systemd/linger"], "-mindepth", "1"):
        if os.path.basename(path) not in asked.sections["linger"]:
            yield f"{path}: services run without a login"


def _user_units(asked: Asked) -> Iterator[str]:
    login, uid = asked.account
    yield from _find([f"/home/{login}/.config/systemd", f"/home/{login}/.local/share/systemd"], "!", "-type", "d")
    for unit, _load, active in _units(f"user@{uid}.service"):
        if active not in ("inactive", "failed"):
            yield f"{unit} is {active}"


def _home(asked: Asked) -> Iterator[str]:
    login, _ = asked.account
    yield from (f"{path} exists" for path in _find(["/home"], "-maxdepth", "1", "-name", login))
    yield from (f"{line.split(':')[5]} is the home of {login}" for line in _getent("passwd", login))


def _temporary_files(asked: Asked) -> Iterator[str]:
    return _find(list(baseline.TEMPORARY_FOLDERS), "-mindepth", "1", "(", *_of_tenants(asked), ")")


def _of_tenants(asked: Asked) -> list[str]:
    """find's words for: owned by the lease, by its group, or by an earlier lease."""
    _, uid = asked.account
    first, last = _LEASE_UIDS
    return ["-uid", str(uid), "-o", "-gid", str(uid), "-o", "(", "-uid", f"+{first - 1}", "-uid", f"-{last + 1}", ")"]


def _runtime_folder(asked: Asked) -> Iterator[str]:
    _, uid = asked.account
    return (f"{path} exists" for path in _find(["/run/user"], "-maxdepth", "1", "-name", str(uid)))


def _records(asked: Asked) -> Iterator[str]:
    login, uid = asked.account
    named = ["/var/mail", "/run/sudo", "/var/lib/sudo", "/run/faillock", "/var/lib/AccountsService/users"]
    yield from _find(named, "-name", login)
    yield from _find(["/var/log/journal", "/run/log/journal"], "-name", f"user-{uid}[.@]*")
    yield from _find(["/var/lib/systemd/coredump"], "-name", f"core.*.{uid}.*")


def _sysv_ipc(asked: Asked) -> Iterator[str]:
    _, uid = asked.account
    for option, words in (("-m", "shared memory"), ("-s", "semaphores"), ("-q", "message queue")):
        for line in run(["lsipc", option, "--raw", "--noheadings", "--output", "ID,KEY,UID,CUID"]).splitlines():
            number, key, *owners = line.split()
            if str(uid) in owners:
                yield f"{words} {number} (key {key}) of uid {uid}"


def _posix_queues(asked: Asked) -> Iterator[str]:
    if run(["findmnt", "-rn", "-o", "FSTYPE", "/dev/mqueue"], ok=(0, 1)).split()[-1:] != ["mqueue"]:
        raise ToolFailed("/dev/mqueue is not mounted: POSIX queues cannot be seen")
    return (f"POSIX queue {path}" for path in _find(["/dev/mqueue"], "-mindepth", "1", "(", *_of_tenants(asked), ")"))


def _kernel_keys(asked: Asked) -> Iterator[str]:
    """As the next tenant would be shown them."""
    if not os.path.exists("/proc/keys"):
        raise NotApplicable("this kernel keeps no keys")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for line in run([*as_nobody, "cat", "/proc/keys"]).splitlines():
        key = re.match(r"(\w+) ([^RDi ]+) +\d+ +\S+ \w{8} +(\d+) +\S+ (?!keyring +_(uid|uid_ses|persistent)\.)", line)
        uid = int(key[3]) if key else 0
        if uid and (uid == asked.uid or _LEASE_UIDS[0] <= uid <= _LEASE_UIDS[1]):
            yield f"kernel key {line.split()[0]} of uid {uid} is shown to others"


def _owned_files(asked: Asked) -> Iterator[str]:
    return _find_everywhere("(", *_of_tenants(asked), ")")


# --- containers


def _containers(asked: Asked) -> Iterator[str]:
    return _docker(asked, "containers", "ps", "--all", '{{.ID}}\t{{.Names}}\t{{.Label "remotegpu.lease"}}')


def _volumes(asked: Asked) -> Iterator[str]:
    return _docker(asked, "volumes", "volume", "ls", '{{.Name}}\t{{.Name}}\t{{.Label "remotegpu.lease"}}')


def _images(asked: Asked) -> Iterator[str]:
    return _docker(asked, "images", "image", "ls", "{{.ID}}\t{{.Repository}}:{{.Tag}}\t")


def _networks(asked: Asked) -> Iterator[str]:
    return _docker(asked, "networks", "network", "ls", '{{.ID}}\t{{.Name}}\t{{.Label "remotegpu.lease"}}')


def _docker(asked: Asked, kind: str, command: str, action: str, columns: str) -> Iterator[str]:
    known = asked.sections["docker"]
    if known is None and find_tool("docker") is None:
        raise NotApplicable("no container engine on this host")
    no_trunc = [] if command == "volume" else ["--no-trunc"]
    for line in run(["docker", command, action, *no_trunc, "--format", columns], timeout_s=60).splitlines():
        thing, name, lease = line.split("\t")
        is_dockers_own = command == "network" and name in ("bridge", "host", "none")
        if lease and lease == str(asked.lease_id):
            yield f"{kind[:-1]} {name} of lease {lease}"
        elif thing not in (known or {}).get(kind, []) and not is_dockers_own:
            yield f"{kind[:-1]} {name} ({thing[:19]}) is not in the baseline"


# --- the host against its baseline


def _files(section: str) -> Check:
    def check(asked: Asked) -> Iterator[str]:
        before = baseline.without_revoked(asked.sections[section])
        now = _listed(section, asked.sections)
        gone = set() if section == "at_jobs" else {*before} - {*now}  # a job that has run is gone
        brought = _upgraded(asked, before, now)
        yield from _changes(before, {path: each for path, each in now.items() if path not in brought}, gone)

    return check


def _upgraded(asked: Asked, before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """What upgrades have made of settings since the baseline, by the word of dpkg."""
    changed = [
        path for path, each in now.items() if baseline.may_be_brought(asked.sections, path, before.get(path), each)
    ]
    if not changed:
        return set()
    conffiles = packages.conffiles(run(["dpkg-query", "-W", "-f", "Conffiles:\n${Conffiles}\n"]))
    content = dict(_md5_digests([path for path in changed if now[path]["type"] == "file" and path in conffiles]))
    packaged = {path for _, path in _who_brought(path for path in changed if now[path]["type"] == "directory")}
    return packaged.intersection(changed) | {path for path, digest in content.items() if digest == conffiles[path]}


def _changes(before: dict[str, Any], now: dict[str, Any], gone: set[str]) -> Iterator[str]:
    for path in sorted({*gone, *now}):
        if path in gone:
            yield f"{path} is missing"
        elif path not in before:
            yield f"{path} is not in the baseline"
        elif changed := sorted(key for key in now[path] if now[path][key] != before[path].get(key)):
            yield f"{path} has another {' and '.join(changed)} than in the baseline"


def _listed(section: str, sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a section as find and sha256sum see them, in the baseline's words."""
    named = baseline.roots_of(section, baseline.homes_of(sections), baseline.profiles_of(sections))
    globbed = [path for root in named for path in glob.glob(root) or [root]]
    roots = [path for path in globbed if os.path.lexists(path)]
    found = {
        path: entry
        for path, entry in _entries(roots).items()
        if not any(baseline.is_left_out(section, each) for each in _with_parents(path, roots))
    }
    _add_digests(found)
    return found


def _entries(roots: list[str]) -> dict[str, dict[str, Any]]:
    said = list(_find(roots, tell=r"%p\0%y\0%m\0%U\0%G\0%l\0"))
    found: dict[str, dict[str, Any]] = {}
    for path, kind, mode, uid, gid, target in zip(*(said[column::6] for column in range(6)), strict=True):
        word = {"f": "file", "d": "directory", "l": "link"}.get(kind, "special")
        entry: dict[str, Any] = {"type": word, "uid": int(uid), "gid": int(gid)}
        found[path] = entry | ({"target": target} if word == "link" else {"mode": int(mode, 8)})
    return found


def _unpackaged(asked: Asked) -> Iterator[str]:
    """What no package put where it is loaded by itself; a baseline that is older does not tell which was there."""
    if "unpackaged" not in asked.sections:
        return
    roots = [path for root in baseline.loaded_by_itself(asked.sections) for path in glob.glob(root) or [root]]
    found = {path: each for path, each in _entries(roots).items() if each["type"] != "directory"}
    packaged = {path for _, path in _who_brought(found)}
    now = {path: entry for path, entry in found.items() if packages.merged(path) not in packaged}
    _add_digests(now)
    before = asked.sections["unpackaged"]
    yield from _changes(before, now, {*before} - {*found})


def _with_parents(path: str, roots: list[str]) -> Iterator[str]:
    while any(f"{path}/".startswith(f"{root}/") for root in roots):
        yield path
        path = os.path.dirname(path)


def _add_digests(found: dict[str, dict[str, Any]]) -> None:
    for path, digest in _digests([path for path, entry in found.items() if entry["type"] == "file"]):
        found[path]["sha256"] = digest


def _digests(paths: list[str]) -> Iterator[tuple[str, str]]:
    for first in range(0, len(paths), 500):
        for line in run(["sha256sum", "-z", "--", *paths[first : first + 500]]).split("\0")[:-1]:
            yield line[66:], line[:64]


def _settings(asked: Asked) -> Iterator[str]:
    yield from _files("etc")(asked)
    yield from _own_settings(asked)
    yield from _authorities(asked)


def _own_settings(asked: Asked) -> Iterator[str]:
    yield from (f"{path} would enrol the agent anew" for path in _find([baseline.ENROLL_TOKEN], "-prune"))
    before = baseline.own_settings_of(asked.sections)
    if before is None:
        return  # an older baseline does not tell of our own
    entries = _entries([path for path in [baseline.OWN_SETTINGS] if os.path.isdir(path)])
    now = {
        path: entry
        for path, entry in entries.items()
        if not any(map(baseline.is_own_that_changes, _with_parents(path, [baseline.OWN_SETTINGS])))
    }
    _add_digests(now)
    yield from _changes(before, now, {*before} - {*now})


def _authorities(asked: Asked) -> Iterator[str]:
    known = asked.sections.get("authorities")
    if known is None:
        return  # an older baseline does not tell whom the host trusted
    yield from _authority_files(asked.sections["authority_files"])
    found = _certificates(list(_find([authorities.STORE], "-mindepth", "1", "-maxdepth", "1")))
    for path, certificates in authorities.strange(known, found, _offered).items():
        yield authorities.in_words(path, "trusts", certificates)
    for path, certificates in authorities.missing(known, found, _selected).items():
        yield authorities.in_words(path, "lacks", certificates)


def _authority_files(before: files.Snapshot) -> Iterator[str]:
    listed = _entries([authorities.STORE, authorities.LOCAL, *authorities.OPENSSL])
    now = {
        path: entry
        for path, entry in listed.items()
        if not authorities.is_left_out(path, entry["type"], entry.get("target"))
    }
    _add_digests(now)
    for path in authorities.to_compare(before, now):
        its = [{path: side[path]} if path in side else {} for side in (before, now)]
        yield from _changes(its[0], its[1], {*its[0]} - {*its[1]})


def _certificates(paths: list[str]) -> dict[str, frozenset[str]]:
    """What these hold, as far as they are files or lead to one; each file is read once, whatever leads to it."""
    limit = str(authorities.LARGEST_BYTES + 1)
    leads_to = {path: os.path.realpath(path) for path in _regular(paths)}
    read = {path: os.fsencode(run(["head", "-c", limit, "--", path])) for path in {*leads_to.values()}}
    held = {path: authorities.fingerprints(text) for path, text in read.items()}
    return {path: held[file] for path, file in leads_to.items()}


def _regular(paths: Iterable[str]) -> list[str]:
    """Those that are files, or links that lead to one: of a pipe we should wait for the end."""
    found: list[str] = []
    asked = sorted(paths)
    for first in range(0, len(asked), 500):
        said = run(["stat", "-L", "--printf", r"%F\t%n\0", "--", *asked[first : first + 500]], ok=(0, 1))
        kinds = (each.partition("\t") for each in said.split("\0")[:-1])
        found += [path for kind, _, path in kinds if kind.startswith("regular ")]
    return found


def _offered() -> frozenset[str]:
    """The certificates that packages have brought to be trusted, without those that somebody has changed."""
    wanted = authorities.digests_of_offered(_brought_by(_who_has([f"{authorities.OFFERED}/*"])))
    intact = [path for path, digest in _md5_digests(_regular(wanted)) if digest == wanted[path]]
    return frozenset().union(*_certificates(intact).values())


def _selected() -> frozenset[str]:
    """The certificates that the host would trust if its list were made anew."""
    selection = run(["cat", "--", authorities.SELECTION]) if _regular([authorities.SELECTION]) else ""
    packaged = [f"{authorities.OFFERED}/{name}" for name in authorities.chosen(os.fsencode(selection))]
    local = _find([authorities.LOCAL], "-name", "*.crt")
    return frozenset().union(*_certificates([*packaged, *local]).values())


def _running_units(asked: Asked) -> Iterator[str]:
    yield from _files("system_units")(asked)
    yield from _unpackaged(asked)
    transient = {os.path.basename(path) for path in _find(["/run/systemd/transient"], "-type", "f")}
    for unit, load, active in _units("*.service", "*.socket", "*.timer", "*.path"):
        if active not in ("active", "activating", "reloading"):
            continue
        if load == "not-found" or (unit in transient and not baseline.is_own_transient(unit)):
            yield f"unit {unit} is {active} and not in the baseline"
    for line in run(["systemctl", "show-environment"]).splitlines():
        if line.startswith("LD_"):
            yield f"systemd gives {line} to every service"


def _users(asked: Asked) -> Iterator[str]:
    yield from _database(asked, "passwd", secret=False)
    yield from _database(asked, "shadow", secret=True)
    for path in ("/etc/subuid", "/etc/subgid"):
        lines = (read_text(path) or "").splitlines()
        known = [line for lines in asked.sections["accounts"][path].values() for line in lines]
        yield from (f"{path}: {line.split(':')[0]} is not in the baseline" for line in lines if line not in known)
    yield from _rights(asked, "/etc/passwd", "/etc/shadow", "/etc/subuid", "/etc/subgid")


def _groups(asked: Asked) -> Iterator[str]:
    yield from _database(asked, "group", secret=False)
    yield from _database(asked, "gshadow", secret=True)
    yield from _rights(asked, "/etc/group", "/etc/gshadow")


def _rights(asked: Asked, *paths: str) -> Iterator[str]:
    """Who may read and write the files themselves, and the copies before their last change."""
    for path in _find([each for name in paths for each in (name, f"{name}-")], "-prune"):
        now = _rights_of(path)
        if now != baseline.good_rights(asked.sections, path, now):
            yield f"{path} has another owner or mode than in the baseline"


def _database(asked: Asked, database: str, *, secret: bool) -> Iterator[str]:
    known = asked.sections["accounts"][f"/etc/{database}"]
    now: dict[str, list[str]] = {}
    for line in _getent(database):
        now.setdefault(line.split(":")[0], []).append(accounts.masked(line) if secret else line)
    for name in sorted({*known, *now}):
        if known.get(name) != now.get(name):
            how = "is not in the baseline" if name not in known else "is missing" if name not in now else "has changed"
            yield f"{database}: the entry of {name} {how}"


def _rights_of(path: str) -> files.Rights:
    mode, uid, gid, kind = run(["stat", "-c", "%a %u %g %F", "--", path]).strip().split(" ", 3)
    has_acl = "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False)
    is_file = kind.startswith("regular")
    return {"is_file": is_file, "mode": int(mode, 8), "uid": int(uid), "gid": int(gid), "has_acl": has_acl}


def _special_files(asked: Asked) -> Iterator[str]:
    """The content is read of those of the baseline alone: a tenant's own may be terabytes, and are named anyway."""
    for path in _find(list(special.STORES), "-prune"):
        now = _rights_of(path)
        if now != baseline.good_store(asked.sections, path, now):
            yield f"{path} is open to others than in the baseline"
    lending, capable = set(), set()
    open_folder = ["-type", "d", "-perm", "/022"]
    kinds = ["(", "-type", "f", "-o", *open_folder, "-o", "-type", "b", "-o", "-type", "c", ")"]
    for line in _find_everywhere(*kinds, tell=r"%y %m %G %p\0"):
        kind, mode, gid, path = line.split(" ", 3)
        if int(mode, 8) & 0o022 or kind in "bc":
            yield from _opened(asked, path, _KINDS[kind] | int(mode, 8), int(gid))
        if kind == "f" and int(mode, 8) & 0o6000:
            lending.add(path)
        elif kind == "f" and _capabilities(path):
            capable.add(path)
    yield from _programs_that_lend(asked, lending, capable)


def _opened(asked: Asked, path: str, mode: int, gid: int) -> Iterator[str]:
    device = 0
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(FileNotFoundError):
            device = os.lstat(path).st_rdev
    words = baseline.opened(asked.sections, path, mode, gid, device)
    if words is not None:
        yield f"{path} {words}"


def _programs_that_lend(asked: Asked, lending: set[str], capable: set[str]) -> Iterator[str]:
    known = asked.sections["special_files"]
    digests = dict(_digests(sorted(path for path in lending | capable if known.get(path, {}).get("sha256"))))
    changed = []
    for path in sorted(lending | capable):
        if path not in known:
            yield f"{path} lends power and is not in the baseline"
            continue
        mode, uid, gid, size = run(["stat", "-c", "%a %u %g %s", "--", path]).split()
        now = {"mode": int(mode, 8), "uid": int(uid), "gid": int(gid), "capabilities": _capabilities(path)}
        content = {"sha256": digests[path]} if path in digests else {"size": int(size)}  # of a large one that is known
        if not now.items() <= known[path].items():
            yield f"{path} lends other power than in the baseline"
        if not content.items() <= known[path].items():
            changed.append(path)
    yield from (f"{path} has another content than in the baseline" for path in _not_as_packaged(changed))


def _not_as_packaged(paths: list[str]) -> list[str]:
    """Those whose content is not what a package has brought: an upgrade since the baseline is no tenant's."""
    if not paths or find_tool("dpkg") is None:
        return paths
    brought = {(packages.merged(path), digest) for path, digest in _brought_by(_who_brought(paths))}
    now = dict(_md5_digests(paths))
    return [path for path in paths if (packages.merged(path), now.get(path)) not in brought]


# --- by dpkg's word


def _who_brought(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Package and path of those that a package has brought."""
    return _who_has(
        _literally(each) for path in paths for each in sorted({packages.merged(path), path.removeprefix("/usr")})
    )


def _who_has(patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Package and path, in the merged spelling, of all that fits."""
    asked = list(patterns)
    said = run(["dpkg", "-S", *asked], ok=(0, 1), timeout_s=120).splitlines() if asked else []
    for line in said:
        names, _, path = line.partition(": ")
        if not line.startswith("diversion "):
            yield from ((name, packages.merged(path)) for name in names.split(", "))


def _literally(path: str) -> str:
    """For dpkg, which takes a name for a pattern."""
    return re.sub(r"[\\*?\[]", r"\\\g<0>", path)


def _brought_by(owned: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Of all files of these packages, each path as they spell it, and the digest of its content."""
    for package in sorted({package for package, _ in owned}):
        yield from packages.digests(run(["dpkg-query", "--control-show", package, "md5sums"], ok=(0, 1)))


def _md5_digests(paths: list[str]) -> Iterator[tuple[str, str]]:
    said = run(["md5sum", "-z", "--", *paths], timeout_s=60).split("\0")[:-1] if paths else []
    return ((line[34:], line[:32]) for line in said)


def _capabilities(path: str) -> str | None:
    try:
        return os.getxattr(path, "security.capability", follow_symlinks=False).hex()
    except OSError:
        return None


def _sshd_effective(asked: Asked) -> Iterator[str]:
    if asked.sections["sshd_effective"] is None and find_tool("sshd") is None:
        raise NotApplicable("no sshd on this host")
    known, now = set(asked.sections["sshd_effective"] or []), set(baseline.read_sshd_effective() or [])
    yield from (f"sshd uses `{line}`, which is not in the baseline" for line in sorted(now - known))
    yield from (f"sshd does not use `{line}` any more" for line in sorted(known - now))


def _packages(asked: Asked) -> Iterator[str]:
    now = baseline.read_packages(baseline.packages_of(asked.sections))
    return (f"dpkg: {line}" for line in now if line not in asked.sections["packages"])


def _temporary_folders(asked: Asked) -> Iterator[str]:
    for path, entry in asked.sections["temporary_folders"].items():
        expected = f"{entry['mode']:o} {entry['uid']} {entry['gid']}"
        if run(["stat", "-c", "%a %u %g", path], ok=(0, 1)).strip() != expected:
            yield f"{path} has another owner or mode than in the baseline"


def _mounts(asked: Asked) -> Iterator[str]:
    known = collections.Counter((each["target"], each["fstype"]) for each in asked.sections["mounts"])
    listed = run(["findmnt", "-rn", "-o", "TARGET,FSTYPE"]).splitlines()
    now = collections.Counter((_unescaped(line.split(" ")[0]), line.split(" ")[1]) for line in listed)
    for target, fstype in sorted((now - known).elements()):
        if not mounts.comes_and_goes(target, fstype) and baseline.is_told_of(asked.sections, target, fstype):
            yield f"{fstype} is mounted on {target}"


def _unescaped(word: str) -> str:
    return re.sub(r"\\x([0-9a-f]{2})", lambda m: chr(int(m.group(1), 16)), word)


def _swap(asked: Asked) -> Iterator[str]:
    for device in run(["swapon", "--show=NAME", "--noheadings"]).splitlines():
        if device not in asked.sections["swaps"]:
            yield f"{device} is used for swapping"


def _kernel_modules(asked: Asked) -> Iterator[str]:
    yield from _kernel_programs(asked)
    if not os.path.exists(modules.LOADED):
        if "kernel_programs" in asked.sections:
            return
        raise NotApplicable("this kernel loads no modules")
    loaded = [line.split()[0] for line in run(["cat", "--", modules.LOADED]).splitlines()]
    known = baseline.module_files(asked.sections)
    origins = {name: _module_files(name, known) for name in loaded if name not in asked.sections["modules"]}
    unpackaged = set(_not_as_packaged(sorted({path for paths in origins.values() for path in paths})))
    digests = dict(_digests(sorted(unpackaged.intersection(known))))
    for name, paths in origins.items():
        if not paths:
            yield baseline.strange_module(asked.sections, name, None)
        for path in paths:
            if path in unpackaged and (path not in digests or digests[path] != known[path]):
                yield baseline.strange_module(asked.sections, name, path)
            elif _name_in_module(path) != name:
                yield f"kernel module {name} comes from no file that is known: {path} is another's"


def _module_files(name: str, known: Iterable[str]) -> list[str]:
    """Where it really lies, by the name of the file; else of those of the baseline, by the name that is in them."""
    said = run(["modinfo", "-n", "--", name], ok=(0, 1)).splitlines()
    found = _regular(_really(path) for path in said if path.startswith("/"))
    if found:
        return found
    here = _really(os.path.join(modules.ROOT, run(["uname", "-r"]).strip()))
    among = _regular(path for path in known if path.startswith(f"{here}/") and _really(path) == path)
    return [path for path in among if _name_in_module(path) == name]


def _name_in_module(path: str) -> str:
    return run(["modinfo", "-F", "name", "--", path], ok=(0, 1)).strip()


def _really(path: str) -> str:
    return run(["readlink", "-f", "--", path], ok=(0, 1)).removesuffix("\n")


def _kernel_programs(asked: Asked) -> Iterator[str]:
    """What the kernel starts by itself; an older baseline tells of none."""
    known: dict[str, str] | None = asked.sections.get("kernel_programs")
    if known is None:
        return
    for path in sorted(known):
        if os.path.exists(path) and run(["cat", "--", path]) != known[path]:
            yield f"{path} is not as in the baseline"
    if run(["findmnt", "-rn", "-o", "FSTYPE", baseline.BINARY_FORMATS], ok=(0, 1)).split()[-1:] == ["binfmt_misc"]:
        for path in _find([baseline.BINARY_FORMATS], "-type", "f", "!", "-name", "register", "!", "-name", "status"):
            if path not in known:
                yield f"{path} is not in the baseline"


def _firewall(asked: Asked) -> Iterator[str]:
    if find_tool("nft") is None and asked.sections["firewall"] is None:
        raise NotApplicable("nft is not installed on this host")
    known = (asked.sections["firewall"] or {"tables": {}})["tables"]
    now = {line.removeprefix("table ") for line in run(["nft", "list", "tables"]).splitlines()}
    for key in sorted({*known, *now}):
        text = run(["nft", "-s", "-t", "list", "table", *key.split(" ", 1)]) if key in now else ""
        before = collections.Counter(known.get(key, {}).get("rules", []))
        after = collections.Counter(firewall.plain_rules(text))
        yield from (f"table {key} has `{line}`, which is not in the baseline" for line in (after - before).elements())
        yield from (f"table {key} lacks `{line}`" for line in (before - after).elements())
        if key in firewall.OWN_TABLES:
            yield from _openings(run(["nft", "-s", "list", "table", *key.split(" ", 1)]) if key in now else "")
        if key not in known and not re.fullmatch(r"ip6? (filter|nat|mangle|raw|security)", key):
            yield f"table {key} is not in the baseline"  # those of iptables come empty with the first question

    if "inet firewalld" in now:
        yield from _opened_by_firewalld(run(["nft", "-s", "list", "table", "inet", "firewalld"]))


def _openings(table: str) -> Iterator[str]:
    """Members of our sets that have an end and are not the machine's own: no lease is left to have opened them."""
    own = openings.machines_own()
    for name, body in re.findall(r"\bset (\S+) \{(.*?)\n\t\}", table, re.DOTALL):
        found = re.search(r"elements = \{(.*)\}", body, re.DOTALL)
        if found is None or not re.search(r"flags .*\btimeout\b", body):
            continue
        for member in found[1].split(","):
            key = re.split(r"\s(?:timeout|expires|comment)\b", member.strip())[0]
            if openings.canonical(tuple(key.split(" . "))) not in own:
                yield f"set {name} still lets in {key}"


def _opened_by_firewalld(table: str) -> Iterator[str]:
    """What firewalld lets in behind all other rules of our zone, and is not the machine's own."""
    own = openings.machines_own()
    body = re.search(rf"\n\tchain {firewall.OPENED_BY_FIREWALLD} \{{\n(.*?)\t\}}\n", table, re.DOTALL)
    for line in (each.strip() for each in body[1].splitlines()) if body else ():
        rule = re.match(r"(?:meta nfproto ipv([46]) )?(?:ip6? saddr (\S+) )?(tcp|udp) dport (\S+) ", line)
        source = (rule[2] or {"6": "::/0"}.get(rule[1], "0.0.0.0/0")) if rule else ""
        if rule is None or openings.canonical((rule[3], rule[4], source)) not in own:
            yield f"firewalld still lets in by `{line}`"


def _listening_ports(asked: Asked) -> Iterator[str]:
    known = {_port_key(each) for each in ports.known(asked.sections["listening_ports"])}
    now = list(_listeners())
    deleted = {
        port["program"].removesuffix(processes.DELETED) for port in now if port["program"].endswith(processes.DELETED)
    }
    upgraded = {path + processes.DELETED: path for _, path in _who_brought(deleted)}  # and not started again yet
    for port in now:
        program = port["program"]
        if _port_key(port | {"program": upgraded.get(program, program)}) not in known:
            program = "no process that can be seen" if program == "?" else program
            yield f"{port['protocol']} port {port['port']} on {port['address']} is open: {program} listens"


def _listeners() -> Iterator[dict[str, Any]]:
    for line in run(["ss", "-Hlntup"]).splitlines():
        protocol, _state, _received, _sent, local, _peer, *users = line.split()
        address, _, number = local.rpartition(":")
        pid = re.search(r"pid=(\d+)", " ".join(users))
        plain = re.sub(r"%.*|[\[\]]", "", address).replace("*", "::")
        yield {"protocol": protocol, "address": plain, "port": int(number), "program": _program(pid)}


def _program(pid: re.Match[str] | None) -> str:
    return run(["readlink", f"/proc/{pid.group(1)}/exe"], ok=(0, 1)).strip() or "?" if pid else "?"


def _port_key(port: dict[str, Any]) -> tuple[Any, ...]:
    first_ephemeral = int((read_text("/proc/sys/net/ipv4/ip_local_port_range") or "32768").split()[0])
    number = None if (port["port"] or 0) >= first_ephemeral and port["program"] != "?" else port["port"]
    address = ipaddress.ip_address(port["address"])
    where = str(address) if address.is_loopback or address.is_unspecified else "the host's own"
    return port["protocol"], where, number, port["program"]


# --- asking the host


def _getent(database: str, *keys: str) -> list[str]:
    """The lines of the host's own files; 2 is getent's way to say that there is no such entry."""
    return run(["getent", "--service=files", database, *keys], ok=(0, 2)).splitlines()


def _find(roots: list[str], *words: str, tell: str = r"%p\0") -> Iterator[str]:
    there = [root for root in roots if os.path.lexists(root)]
    if there:
        said = run(["find", *there, "-ignore_readdir_race", *words, "-printf", tell], timeout_s=_WALK_S)
        yield from said.split("\0")[:-1]


def _find_everywhere(*words: str, tell: str = r"%p\0") -> Iterator[str]:
    """On every file system of this machine's own; each is entered from its own mount point only."""
    places = {_unescaped(place) for place in run(["findmnt", "-rn", "-t", _LOCAL_TYPES, "-o", "TARGET"]).splitlines()}
    first, last = str(_LEASE_UIDS[0] - 1), str(_LEASE_UIDS[1] + 1)
    a_leases = [f"( -{kind} +{first} -{kind} -{last} )".split() for kind in ("uid", "gid")]
    closed = ["-type", "d", "!", "-perm", "/007", "!", *a_leases[0], "!", *a_leases[1]]
    ways = {place: special.folders_of_store(place) for place in places}
    shut = set(_find(sorted({folder for way in ways.values() for folder in way}), "-prune", *closed))
    open_places = sorted(place for place, way in ways.items() if not shut.intersection(way))
    in_stores = [word for store in special.STORES for word in ("-o", "-path", store, "-o", "-path", f"{store}/*")][1:]
    return _find(open_places, "-xdev", "(", *in_stores, ")", *closed, "-prune", "-o", *words, tell=tell)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


CHECKS: dict[str, Check] = {
    "account": _account,
    "access": _access,
    "connections": _connections,
    "processes": _lease_processes,
    "gpu_holders": _gpu_holders,
    "gpu_memory": _gpu_memory,
    "tasks": _tasks,
    "linger": _linger,
    "user_units": _user_units,
    "containers": _containers,
    "volumes": _volumes,
    "images": _images,
    "networks": _networks,
    "home": _home,
    "temporary_files": _temporary_files,
    "runtime_folder": _runtime_folder,
    "records": _records,
    "sysv_ipc": _sysv_ipc,
    "posix_queues": _posix_queues,
    "kernel_keys": _kernel_keys,
    "owned_files": _owned_files,
    "users": _users,
    "groups": _groups,
    "system_units": _running_units,
    **{s: _files(s) for s in baseline.FILE_SECTIONS if s not in ("system_units", "etc")},
    "etc": _settings,
    "sshd_effective": _sshd_effective,
    "special_files": _special_files,
    "packages": _packages,
    "temporary_folders": _temporary_folders,
    "mounts": _mounts,
    "swap": _swap,
    "kernel_modules": _kernel_modules,
    "firewall": _firewall,
    "listening_ports": _listening_ports,
}
