"""What is mounted where, and which file systems hold data of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from remotegpu_agent.observe.tools import read_text

LOCAL_TYPES = frozenset({
    "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "jfs", "reiserfs", "vfat", "exfat", "ntfs3",
    "overlay", "tmpfs", "ramfs", "devtmpfs",
})  # fmt: skip
# What the system itself mounts and unmounts while it runs; the same place says nothing about a tenant.
_COMING_AND_GOING = re.compile(
    r"^(/run/user/\d+(/.*)?|/run/credentials/.*|/run/docker/.*|/var/lib/docker/.+|/run/netns/.*"
    r"|/run/containerd/.*|/run/systemd/.*|/dev/pts/.*)$"
)
# Below /proc and /sys the kernel's own views come and go: nobody can keep anything in them.
_VIEWS = frozenset({
    "proc", "sysfs", "cgroup", "cgroup2", "autofs", "binfmt_misc", "bpf", "configfs", "debugfs", "tracefs", "efivarfs",
    "fusectl", "pstore", "securityfs", "selinuxfs", "resctrl", "nfsd", "nsfs", "fuse.lxcfs",
})  # fmt: skip
_OF_THE_KERNEL = ("/proc/", "/sys/")
_A_PROCESS = re.compile(r"/proc/\d+(/|$)")  # nobody but who wants to hide it mounts there


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    target: str
    fstype: str
    source: str
    device: str
    root: str


def listed(text: str | None = None) -> list[Mount]:
    """Every mount of this mount namespace, in the order they were made."""
    if text is None:
        text = read_text("/proc/self/mountinfo")
    if text is None:
        raise OSError("/proc/self/mountinfo cannot be read")
    return [_parsed(line) for line in text.splitlines()]


def _parsed(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    fields, tail = left.split(" "), right.split(" ")
    return Mount(
        target=_unescaped(fields[4]),
        fstype=tail[0],
        source=_unescaped(tail[1]),
        device=fields[2],
        root=_unescaped(fields[3]),
    )


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), field)


def comes_and_goes(target: str, fstype: str) -> bool:
    """Whether the system itself mounts and unmounts that there as it runs."""
    if is_the_kernels(target):
        return fstype in _VIEWS and not _A_PROCESS.match(target)
    return bool(_COMING_AND_GOING.match(target))


def is_the_kernels(target: str) -> bool:
    """Whether it lies below /proc or /sys."""
    return target.startswith(_OF_THE_KERNEL)


def lasting() -> list[dict[str, str]]:
    """The mounts that should be the same tomorrow: target and type, as often as they are there."""
    kept = [(m.target, m.fstype) for m in listed() if not comes_and_goes(m.target, m.fstype)]
    return [{"target": target, "fstype": fstype} for target, fstype in sorted(kept)]


def local() -> list[str]:
    """Where a walk over this machine's own data has to start: one place for each tree, not entering other mounts."""
    seen: set[tuple[str, str]] = set()
    places = []
    for mount in listed():
        if mount.fstype not in LOCAL_TYPES:
            continue
        if (mount.device, mount.root) in seen:
            continue  # the same tree bound a second time
        seen.add((mount.device, mount.root))
        places.append(mount.target)
    return places


def points() -> frozenset[str]:
    """Every path that something is mounted on."""
    return frozenset(m.target for m in listed())


def swaps() -> list[str]:
    """The swap devices and files in use."""
    lines = (read_text("/proc/swaps") or "").splitlines()[1:]
    return sorted(_unescaped(line.split()[0]) for line in lines if line.strip())
