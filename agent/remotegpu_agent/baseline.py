"""The baseline: what this host is when no tenant has been on it.

Taken once provisioning has ended, kept by the portal, and handed back at every reclaim: cleaning restores what differs,
verification names what differs. So two takes with nothing changed in between are equal, also after a reboot.

The sections, and what each holds:

- `accounts`: lines of passwd, group, subuid, subgid, shadow and gshadow by name, with digests for passwords
- `account_files`: mode and owner of those files
- `loader`, `cron`, `at_jobs`, `system_units`, `sudoers`, `pam`, `sshd`, `shell_profiles`, `local_programs`, `hosts`,
  `ssh_keys`, `etc` (the rest of /etc): files with mode, owner and digest, and the content of what may have to be put
  back
- `home_profiles`: the names that `shell_profiles` looks for in homes · `unpackaged`: files of no package where they are
  loaded by themselves · `loaded_by_itself`: the places where it looks for them
- `kernel_programs`: what the kernel starts by itself
- `conffiles`: the settings that packages bring, and whether each is as it was brought
- `own_settings`: /etc/remotegpu without what the agent changes · `agent_settings`: whom the agent serves and trusts,
  which hosts are told anew while leases go on; `roles/verify` knows what they are told
- `authorities`: the certificates that this host trusts, and those that packages offer · `authority_files`: what lies
  beside the distribution's own where programs look for them
- `sshd_effective`: what `sshd -T` says · `linger`: users whose services run without a login
- `special_files`: set-uid, set-gid and capability files · `stores`: mode and owner of folders that are not entered
- `open_files`: what everybody may write to · `firewall`: the ruleset without its changing parts
- `listening_ports`, `docker` (ids), `mounts`, `swaps`, `modules`, `gpu_holders`, `temporary_folders`, `packages`
- `module_files`: kernel modules on disk, loaded or not, that no package answers for, with digests
- `critical_packages`: the names that `packages` looks at

Never in here: the content of a private key, or a password's hash. What is compared with it lies in `cleaning/` and
`verify.py`.
"""

from __future__ import annotations

import datetime
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable
from typing import Any

from remotegpu_agent.observe import (
    accounts,
    authorities,
    docker,
    files,
    firewall,
    modules,
    mounts,
    operators,
    packages,
    ports,
    processes,
    special,
)
from remotegpu_agent.observe.files import Snapshot
from remotegpu_agent.observe.tools import ToolFailed, find_tool, read_text, run
from remotegpu_agent.protocol import UIDS

# The whole baseline travels as JSON with every order to clean; content beyond this is kept as a digest only.
CONTENT_LIMIT_BYTES = 4 * 1024 * 1024

FILE_ROOTS: dict[str, tuple[str, ...]] = {
    "loader": ("/etc/ld.so.preload", "/etc/ld.so.conf", "/etc/ld.so.conf.d"),
    "cron": (
        "/etc/crontab", "/etc/anacrontab", "/etc/cron.allow", "/etc/cron.deny", "/etc/cron.d", "/etc/cron.hourly",
        "/etc/cron.daily", "/etc/cron.weekly", "/etc/cron.monthly", "/etc/cron.yearly", "/var/spool/cron/crontabs",
    ),
    "at_jobs": ("/etc/at.allow", "/etc/at.deny", "/var/spool/cron/atjobs", "/var/spool/cron/atspool"),
    "system_units": (
        "/etc/systemd", "/usr/local/lib/systemd", "/run/systemd/system", "/etc/init.d", "/etc/rc.local", "/etc/rc?.d",
    ),
    "sudoers": ("/etc/sudoers", "/etc/sudoers.d", "/etc/sudo.conf", "/etc/doas.conf", "/etc/polkit-1"),
    "pam": ("/etc/pam.d", "/etc/pam.conf", "/etc/security", "/etc/nsswitch.conf", "/etc/login.defs"),
    "sshd": ("/etc/ssh",),
    "shell_profiles": (
        "/etc/profile", "/etc/profile.d", "/etc/bash.bashrc", "/etc/bash.bash_logout", "/etc/environment",
        "/etc/environment.d", "/etc/skel", "/etc/zsh", "/etc/inputrc", "/etc/shells",
    ),
    "local_programs": ("/usr/local/bin", "/usr/local/sbin", "/usr/local/lib", "/usr/local/etc"),
    "hosts": ("/etc/hosts", "/etc/hosts.allow", "/etc/hosts.deny", "/etc/hostname"),
}  # fmt: skip
FILE_SECTIONS = (*FILE_ROOTS, "ssh_keys", "etc")

# What runs when somebody else signs in, in each home of the baseline.
HOME_PROFILES = (
    ".profile", ".bash_profile", ".bash_login", ".bash_logout", ".bashrc", ".zshrc", ".zshenv", ".zprofile",
    ".pam_environment", ".config/environment.d", ".config/systemd/user", ".config/autostart",
)  # fmt: skip
# Those that a baseline without `home_profiles` did not look for: to it they are an operator's own.
_LATER_HOME_PROFILES = (".bash_aliases", ".bash_completion", ".zlogin", ".zlogout", ".local/share/systemd/user")

# Where systemd, udev and D-Bus look by themselves, and packages put what is theirs: anything else there is somebody's.
LOADED_BY_ITSELF = (
    "/usr/lib/systemd", "/usr/lib/udev/rules.d", "/usr/lib/tmpfiles.d", "/usr/lib/sysusers.d", "/usr/lib/modprobe.d",
    "/usr/lib/modules-load.d", "/usr/lib/environment.d", "/usr/share/dbus-1/system-services",
)  # fmt: skip

# The same of programs that read them by themselves; a baseline without `loaded_by_itself` did not look there.
_LATER_LOADED = (
    "/usr/lib/sysctl.d", "/usr/lib/binfmt.d", "/usr/lib/python3*/dist-packages/*.pth",
    "/usr/lib/python3*/dist-packages/*customize.py", "/usr/lib/python3.*/*customize.py",
    "/root/.local/lib/python3*/site-packages/*.pth", "/root/.local/lib/python3*/site-packages/*customize.py",
)  # fmt: skip
# What the kernel starts by itself, as root: for a core, a module or a device, and for a program of another machine.
_STARTED_BY_THE_KERNEL = ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/sys/kernel/uevent_helper")
BINARY_FORMATS = "/proc/sys/fs/binfmt_misc"

# Units that only the agent and our roles make: tasks, ends of leases, and the way back of what a playbook changes.
_OWN_TRANSIENT = re.compile(
    r"remotegpu-(task-\d+\.service|(lease-end-\d+|(ssh|keys|firewall)-rollback)\.(timer|service))"
)

# The rest of /etc without what the system rewrites by itself, what other sections hold, and what belongs to the agent.
_NOT_COMPARED = re.compile(
    r"^/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$"
    r"|^/etc/(mtab|adjtime|resolv\.conf|ld\.so\.cache|machine-id|\.pwd\.lock|\.updated|\.testhost-booted)$"
    r"|^/etc/(remotegpu|ssl/certs|cni|NetworkManager/system-connections)(/|$)"
)
# What of our own settings leases, an upgrade of the agent and a rotation of keys change; provisioning writes the rest.
_OWN_THAT_CHANGE = re.compile(r"^/etc/remotegpu/(authorized_keys|operator_keys|enroll-token|agent\.json|ca\.pem)(/|$)")
# Never carried along, not even to be put back.
_SECRET = re.compile(r"ssh_host_.*_key$|/ssl/private/|/\.ssh/(?!authorized_keys2?$|rc$|environment$|config$)")
_CHANGES_BY_ITSELF = re.compile(r"/\.ssh/(known_hosts(\.old)?|agent/?.*|cm-.*|control-.*)$|/atjobs/\.SEQ$")

TEMPORARY_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/var/crash", "/dev/mqueue")  # noqa: S108 - looked at, not written to
OWN_SETTINGS = "/etc/remotegpu"
ENROLL_TOKEN = "/etc/remotegpu/enroll-token"  # noqa: S105 - the path of one
AGENT_SETTINGS = ("/etc/remotegpu/agent.json", "/etc/remotegpu/ca.pem")
LEASE_GROUP = "remotegpu-leases"
_FOR_OTHERS = 0o7022  # what no package gives by a setting that is new
_MOST_OPEN = 300  # in one tree
_OF_THE_SYSTEM = ("/boot/", "/etc/", "/opt/", "/root/", "/usr/", "/var/", "/dev/")
_PYTHON = (f"python3.{sys.version_info.minor}", f"libpython3.{sys.version_info.minor}")
_CRITICAL_PACKAGES = (
    "bash", "coreutils", "cron", "libc6", "libpam0g", "libpam-modules", "libpam-modules-bin", "libpam-systemd", "login",
    "openssh-server", "passwd", "sudo", "systemd", "util-linux",
)  # fmt: skip
# What cleaning and verification themselves run by; a baseline without `critical_packages` tells nothing of these.
_TRUSTED_PACKAGES = (
    "ca-certificates", "docker-cli", "docker.io", "dpkg", "findutils", "iproute2", "iptables", "kmod", "libc-bin",
    "mount", "nftables", "openssl", "procps", "python3-minimal", *(f"{name}-minimal" for name in _PYTHON),
    f"{_PYTHON[1]}-stdlib",
)  # fmt: skip


def take() -> dict[str, Any]:
    """The host as it is now. Raises when a part of it cannot be read: half a baseline would hide the other half."""
    return {
        "schema": 1,
        "taken_at": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "boot_id": (read_text("/proc/sys/kernel/random/boot_id") or "").strip(),
        "agent_version": agent_version(),
        "sections": _within_limit({name: read() for name, read in _READERS.items()}),
    }


def agent_version() -> str:
    """The version of this program."""
    import remotegpu_agent

    return str(getattr(remotegpu_agent, "__version__", "0"))


def read_files(
    section: str, homes: list[str], *, profiles: Iterable[str] = (), keep: Callable[[str], bool] | None = None
) -> Snapshot:
    """A section of files as it is now; `homes` are those of the baseline's users, not of whoever came later.

    `keep` says whose content is taken along; None is whatever may have to be put back.
    """
    keeps_content = keep or {"etc": _is_public, "local_programs": None}.get(section, _is_no_secret)
    return files.snapshot(
        roots_of(section, homes, profiles), skip=lambda path: is_left_out(section, path), keep=keeps_content
    )


def roots_of(section: str, homes: list[str], profiles: Iterable[str]) -> list[str]:
    """Where the files of a section lie; glob patterns among them."""
    if section == "etc":
        return ["/etc"]
    if section == "ssh_keys":
        return [os.path.join(home, ".ssh") for home in homes] + ["/etc/remotegpu/authorized_keys"]
    in_homes = [os.path.join(home, name) for home in homes for name in profiles]
    return [*FILE_ROOTS[section], *(in_homes if section == "shell_profiles" else [])]


def is_left_out(section: str, path: str) -> bool:
    """Whether a path is not compared, with all below it: it changes by itself, or has a section of its own."""
    if section == "etc":
        return bool(_NOT_COMPARED.search(path)) or _has_its_own_section(path)
    if section == "local_programs":
        return path in FILE_ROOTS["system_units"]
    return bool(_CHANGES_BY_ITSELF.search(path))


def _has_its_own_section(path: str) -> bool:
    return any(
        re.fullmatch(re.escape(root).replace(r"\?", "."), path) for roots in FILE_ROOTS.values() for root in roots
    )


def _is_no_secret(path: str) -> bool:
    return not _SECRET.search(path)


def _is_public(path: str) -> bool:
    """What is not there (any more) is not."""
    try:
        return _is_no_secret(path) and bool(os.lstat(path).st_mode & 0o004)
    except FileNotFoundError:
        return False


def homes_of(sections: dict[str, Any]) -> list[str]:
    """The homes of the people and of root, as the baseline has them: where a key or a profile could be planted."""
    people = [user for user in accounts.users(sections["accounts"]["/etc/passwd"]) if user.uid == 0 or user.uid >= 1000]
    homes = {os.path.realpath(user.home) for user in people if user.home.count("/") >= 1 and user.uid != 65534}
    return sorted(homes - {"/", "/nonexistent", "/dev/null"})


def profiles_of(sections: dict[str, Any]) -> list[str]:
    """What the baseline looked for in homes."""
    names: list[str] = sections.get("home_profiles", list(HOME_PROFILES))
    return names


def without_revoked(before: Snapshot) -> Snapshot:
    """A section of the baseline without what an operator has taken away since: keys, and sudo.

    A key that is gone comes back only if the list of our own still names it, a line of operators' sudo not at all: who
    takes one away gives nobody anything. What was added is nobody's business here, and differs as before.
    """
    listed = operators.find_keys()
    if listed is None:
        return before
    today = {path: _without_revoked(path, entry, listed) for path, entry in before.items()}
    return {path: entry for path, entry in today.items() if entry is not None}


def _without_revoked(path: str, before: files.Entry, listed: dict[str, set[str]]) -> files.Entry | None:
    is_for_operators = path == operators.SUDO or path.endswith("/.ssh/authorized_keys")
    content = files.content_of(before) if is_for_operators else None
    if content is None:
        return before
    lines, keys = content.splitlines(), operators.keys_of_file(path, listed)
    now = files.look_at(path, content=True)
    there = (files.content_of(now) if now else None) or b""
    left = there.splitlines()
    kept = [line for line in lines if line in left or keys.intersection(line.decode(errors="replace").split())]
    if kept == lines:
        return before
    if now is None and not kept:
        return None
    return before | files.holding(there if left == kept else b"".join(line + b"\n" for line in kept))


def read_conffiles() -> dict[str, bool]:
    """The settings that packages bring, and whether each is as its package has brought it."""
    return {path: special.md5(path) == digest for path, digest in sorted(packages.conffiles().items())}


def may_be_brought(sections: dict[str, Any], path: str, before: files.Entry | None, now: files.Entry | None) -> bool:
    """Whether an upgrade may have made this of a setting: another content, or a new file or folder of root's.

    One that was changed or removed before the baseline no upgrade puts back; a baseline that is older tells of none.
    """
    known: dict[str, bool] = sections.get("conffiles", {})
    if "conffiles" not in sections or now is None or now["type"] not in ("file", "directory"):
        return False
    if before is None:
        return path not in known and now["uid"] == 0 and not now["mode"] & _FOR_OTHERS
    kept = [{key: each.get(key) for key in ("type", "mode", "uid", "gid")} for each in (before, now)]
    return known.get(path, False) and kept[0] == kept[1] and before.get("sha256") != now.get("sha256")


def read_own_settings() -> Snapshot:
    """What provisioning has written for our own programs, the firewall of the next boot among it."""
    if not os.path.isdir(OWN_SETTINGS):
        return {}
    return files.snapshot([OWN_SETTINGS], skip=is_own_that_changes, keep=_is_public)


def own_settings_of(sections: dict[str, Any]) -> Snapshot | None:
    """What a baseline holds of them; None where it is too old to. It may hold what is not compared any more."""
    kept: Snapshot | None = sections.get("own_settings")
    return None if kept is None else {path: entry for path, entry in kept.items() if not is_own_that_changes(path)}


def is_own_that_changes(path: str) -> bool:
    """Whether it is one of our settings that others than provisioning write."""
    return bool(_OWN_THAT_CHANGE.search(path))


def is_own_transient(unit: str) -> bool:
    """Whether a unit that somebody has started without a file has the name of one of ours."""
    return bool(_OWN_TRANSIENT.fullmatch(unit))


def loaded_by_itself(sections: dict[str, Any]) -> list[str]:
    """Where the baseline looked for what is loaded by itself; glob patterns among it."""
    roots: list[str] = sections.get("loaded_by_itself", list(LOADED_BY_ITSELF))
    return roots


def read_kernel_programs() -> dict[str, str]:
    """What the kernel starts by itself: each setting and each registered format, as the kernel tells it."""
    formats = []
    if any(mount.target == BINARY_FORMATS and mount.fstype == "binfmt_misc" for mount in mounts.listed()):
        names = sorted({*os.listdir(BINARY_FORMATS)} - {"register", "status"})
        formats = [os.path.join(BINARY_FORMATS, name) for name in names]
    found = {path: read_text(path) for path in (*_STARTED_BY_THE_KERNEL, *formats)}
    return {path: text for path, text in found.items() if text is not None}


def read_unpackaged(roots: Iterable[str]) -> Snapshot:
    """What lies in no package where it is loaded by itself."""
    packaged = special.packaged_paths()
    found = files.snapshot(roots, skip=lambda path: path in packaged and not os.path.isdir(path), keep=_is_no_secret)
    return {path: entry for path, entry in found.items() if entry["type"] != "directory" and path not in packaged}


def read_accounts() -> dict[str, Any]:
    found: dict[str, Any] = {path: dict(sorted(accounts.lines(path).items())) for path in accounts.BY_NAME}
    for path in accounts.SECRET:
        found[path] = {n: [accounts.masked(line) for line in ls] for n, ls in sorted(accounts.lines(path).items())}
    return found


def read_rights(paths: Iterable[str]) -> dict[str, files.Rights]:
    """Who may read and write these, as far as they are there."""
    found = {path: files.rights(path) for path in paths}
    return {path: rights for path, rights in found.items() if rights is not None}


def good_rights(sections: dict[str, Any], path: str, now: files.Rights | None) -> files.Rights:
    """What `files.rights` should say of a file of accounts, or of the copy before its last change (`passwd-`).

    `now` itself where nothing is wrong: a copy may be stricter than its file, and so may a file of which an older
    baseline tells nothing; the bound is what Debian gives it.
    """
    known: files.Rights | None = sections.get("account_files", {}).get(path.removesuffix("-"))
    if known is not None and not path.endswith("-"):
        return known
    best = known or _debians_rights(sections, path.removesuffix("-"))
    return now if now is not None and _is_no_looser(now, best) else best


def good_store(sections: dict[str, Any], path: str, now: files.Rights) -> files.Rights:
    """The same of a folder whose content is not looked at, for others cannot come there (`special.STORES`).

    Which service makes it stricter later is no matter. A baseline that is older says of none; no engine lets others
    list its store.
    """
    known: files.Rights | None = sections.get("stores", {}).get(path)
    gid = 0 if now["gid"] in UIDS else now["gid"]
    mode = now["mode"] & (~0o027 if now["mode"] & 0o004 else ~0o022)
    best = known or now | {"mode": mode, "uid": 0, "gid": gid, "has_acl": False}
    return now if _is_no_looser(now, best) else best


def _is_no_looser(now: files.Rights, best: files.Rights) -> bool:
    is_the_same_kind = now["is_file"] == best["is_file"] and now["has_acl"] <= best["has_acl"]
    its_owners = now["uid"] in (0, best["uid"]) and now["gid"] in (0, best["gid"])
    return is_the_same_kind and its_owners and not now["mode"] & ~best["mode"]


def is_told_of(sections: dict[str, Any], target: str, fstype: str) -> bool:
    """Whether the baseline would tell of this mount: one that is older is silent of all below /proc and /sys.

    There a container has tmpfs of its own, which hide what is the host's; the walks enter them all the same.
    """
    return "stores" in sections or fstype != "tmpfs" or not mounts.is_the_kernels(target)


def _debians_rights(sections: dict[str, Any], path: str) -> files.Rights:
    is_secret = path in accounts.SECRET
    shadow = sections["accounts"]["/etc/group"].get("shadow", ["shadow:x:0:"])[0]
    gid = int(shadow.split(":")[2]) if is_secret else 0
    return {"is_file": True, "mode": 0o640 if is_secret else 0o644, "uid": 0, "gid": gid, "has_acl": False}


def read_special() -> dict[str, Any]:
    """Set-uid, set-gid and capability files now."""
    return dict(sorted((each.path, special_entry(each)) for each in special.walk() if each.is_special))


def special_entry(each: special.Found) -> dict[str, Any]:
    """One of them, with the digest of its content."""
    return {**(files.look_at(each.path) or {}), "capabilities": each.capabilities}


def read_open() -> dict[str, int | None]:
    """What everybody may write to, by mode, devices among it; what lies below is no longer looked at.

    A tree that is full of it (an operator's data) is one entry without a mode.
    """
    found: dict[str, int | None] = {}
    every_lease = accounts.find_gid(LEASE_GROUP)
    for each in special.walk():
        is_for_all = stat.S_ISDIR(each.mode) and each.mode & 0o002
        if _is_below(found, each.path) or not (
            is_for_all or special.opened(each.path, each.mode, each.gid, each.device, every_lease)
        ):
            continue
        found[each.path] = stat.S_IMODE(each.mode)
        for depth in (3, 2):
            tree = "/".join(each.path.split("/")[:depth]) + "/"
            if sum(path.startswith(tree) for path in found) > _MOST_OPEN:
                found = {path: mode for path, mode in found.items() if not path.startswith(tree)}
                found[tree.rstrip("/")] = None
    return dict(sorted(found.items()))


def _is_below(known: dict[str, int | None], path: str) -> bool:
    return any(folder in known for folder in special.parents(path))


def good_mode(sections: dict[str, Any], path: str, mode: int) -> int:
    """The mode of something that was opened to everybody (a device, a file or a folder)."""
    known: int | None = _open_before(sections).get(path)
    is_device = stat.S_ISBLK(mode) or stat.S_ISCHR(mode)
    return known if known is not None else stat.S_IMODE(mode) & ~(0o006 if is_device else 0o002)


def opened(sections: dict[str, Any], path: str, mode: int, gid: int, device: int) -> str | None:
    """What everybody may do with it and could not in the baseline, in words; None where that is nothing.

    A baseline that is older than its section of this is no measure for data of an operator: the system's places count.
    """
    known = _open_before(sections)
    is_the_systems = path in ("/", "/home", *known) or f"{path}/".startswith(_OF_THE_SYSTEM)
    if ("open_files" not in sections and not device and not is_the_systems) or _is_below(known, path):
        return None
    before = known.get(path)
    if before is not None and before & ~mode & stat.S_ISVTX == 0:
        return None
    return special.opened(path, mode, gid, device, leases_gid(sections))


def leases_gid(sections: dict[str, Any]) -> int | None:
    """The group that every lease is in."""
    lines = sections["accounts"]["/etc/group"].get(LEASE_GROUP, [])
    return int(lines[0].split(":")[2]) if lines else None


def _open_before(sections: dict[str, Any]) -> dict[str, int | None]:
    older = {path: entry["mode"] for path, entry in sections.get("temporary_folders", {}).items()}
    known: dict[str, int | None] = sections.get("open_files", older)
    return known


def read_linger() -> list[str]:
    """Users whose services run without a login."""
    try:
        return sorted(os.listdir("/var/lib/systemd/linger"))
    except FileNotFoundError:
        return []


def read_sshd_effective() -> list[str] | None:
    """The settings that sshd would use, sorted; None where there is no sshd."""
    if find_tool("sshd") is None:
        return None
    os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # `sshd -T` insists on it, and a socket-activated one lacks it
    return sorted(run(["sshd", "-T"]).splitlines())


def module_files(sections: dict[str, Any]) -> dict[str, str]:
    """The files of kernel modules that no package answered for, with their digests; none where it is older than that.

    Only what lay there before any tenant: who has root writes what he likes into updates/dkms.
    """
    known: dict[str, str] = sections.get("module_files", {})
    return known


def strange_module(sections: dict[str, Any], name: str, path: str | None) -> str:
    """What is said of a loaded module whose file is not as a package has brought it or as it was; None: it has none."""
    if path in module_files(sections):
        return f"kernel module {name} comes from {path}, which has another content than in the baseline"
    where = "no file that is known" if path is None else f"{path}, which neither a package nor the baseline vouches for"
    is_told = "module_files" in sections
    return f"kernel module {name} comes from {where}{'' if is_told else ': the baseline is too old to know any'}"


def read_gpu_holders() -> list[str]:
    """The services that hold a GPU open without any tenant: persistence daemon, exporters, the agent itself."""
    return sorted({process.unit for process, _ in processes.gpu_holders() if process.unit is not None})


def read_packages(names: Iterable[str]) -> list[str]:
    """What `dpkg --verify` finds in these packages; settings are compared elsewhere."""
    if find_tool("dpkg") is None:
        return []
    try:
        said = run(["dpkg", "--verify", *_installed(names)], ok=(0, 1), timeout_s=180)
    except ToolFailed as error:
        return [str(error)]
    return sorted(
        line
        for line in said.splitlines()
        if line[10:12] != "c " and not re.search(r"/usr/share/(doc|man|locale)/", line)
    )


def packages_of(sections: dict[str, Any]) -> list[str]:
    """The packages that the baseline looked at: those that decide who may sign in, and what we look with."""
    names: list[str] = sections.get("critical_packages", list(_CRITICAL_PACKAGES))
    return names


def _installed(names: Iterable[str]) -> list[str]:
    listed = run(["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package}\n", *names], ok=(0, 1))
    return [line.split()[1] for line in listed.splitlines() if line.startswith("ii ")]


def read_temporary_folders() -> Snapshot:
    """The folders that everybody may write to, themselves."""
    found = {path: files.look_at(path) for path in TEMPORARY_FOLDERS}
    return {path: entry for path, entry in found.items() if entry is not None}


def _file_reader(section: str) -> Callable[[], Snapshot]:
    profiles = (*HOME_PROFILES, *_LATER_HOME_PROFILES)
    return lambda: read_files(section, homes_of({"accounts": read_accounts()}), profiles=profiles)


_READERS: dict[str, Callable[[], Any]] = {
    "accounts": read_accounts,
    "account_files": lambda: read_rights(accounts.FILES),
    **{section: _file_reader(section) for section in FILE_SECTIONS},
    "home_profiles": lambda: [*HOME_PROFILES, *_LATER_HOME_PROFILES],
    "conffiles": read_conffiles,
    "own_settings": read_own_settings,
    "agent_settings": lambda: files.snapshot(AGENT_SETTINGS, keep=_is_public),
    "authorities": authorities.take,
    "authority_files": lambda: authorities.read_files(_is_public),
    "loaded_by_itself": lambda: [*LOADED_BY_ITSELF, *_LATER_LOADED],
    "unpackaged": lambda: read_unpackaged((*LOADED_BY_ITSELF, *_LATER_LOADED)),
    "kernel_programs": read_kernel_programs,
    "sshd_effective": read_sshd_effective,
    "linger": read_linger,
    "special_files": read_special,
    "open_files": read_open,
    "stores": lambda: read_rights(special.STORES),
    "firewall": firewall.look_at,
    "listening_ports": ports.lasting,
    "docker": docker.everything,
    "mounts": mounts.lasting,
    "swaps": mounts.swaps,
    "modules": modules.loaded,
    "module_files": modules.read_unpackaged,
    "gpu_holders": read_gpu_holders,
    "temporary_folders": read_temporary_folders,
    "critical_packages": lambda: [*_CRITICAL_PACKAGES, *_TRUSTED_PACKAGES],
    "packages": lambda: read_packages((*_CRITICAL_PACKAGES, *_TRUSTED_PACKAGES)),
}


def _within_limit(sections: dict[str, Any]) -> dict[str, Any]:
    """Content is kept in this order until the limit; the rest of /etc and what no package brought lose first."""
    left = CONTENT_LIMIT_BYTES
    for section in ("own_settings", "agent_settings", "authority_files", *FILE_SECTIONS, "unpackaged"):
        for entry in sections.get(section, {}).values():
            left -= len(entry.get("content", ""))
            if left < 0:
                entry.pop("content", None)
    return sections
