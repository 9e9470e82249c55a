"""A disk of a host's own that can be filled without filling this machine's: a sparse file behind a loop device."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.hosts import Host

MOUNT = "/srv/scratch"
SIZE_GIB = 20  # below 16 nobody minds: /boot and its like fill up without harm
LEFT_BYTES = 512 * 1024**2


@contextmanager
def full_disk(host: Host) -> Iterator[str]:
    """Mounted in the running system, with half a GiB left; gone afterwards. Needs root: devices are this machine's."""
    inside, pid = "/var/lib/docker/scratch.img", inspect(host, "{{json .State.Pid}}")
    volumes: list[dict[str, str]] = inspect(host, "{{json .Mounts}}")
    volume = next(Path(each["Source"]) for each in volumes if each["Destination"] == "/var/lib/docker")
    with ExitStack() as stack:
        host.run(f"truncate --size={SIZE_GIB}G {inside} && mkfs.ext4 -q -m 0 -E lazy_itable_init=1 {inside}")
        stack.callback(host.run, ["rm", "-f", inside])
        device = here("losetup", "--find", "--show", str(volume / Path(inside).name)).strip()
        stack.callback(here, "losetup", "--detach", device)
        # From here into the host's mounts: what the host itself may do with devices is less.
        number = here("stat", "--format=%Hr %Lr", device).split()
        namespace = ["nsenter", f"--target={pid}", "--mount", "--"]
        here(*namespace, "sh", "-c", 'test -e "$0" || mknod "$0" b "$1" "$2"', device, *number)
        stack.callback(host.run, ["rm", "-f", device])
        here(*namespace, "mkdir", "-p", MOUNT)
        here(*namespace, "mount", device, MOUNT)
        stack.callback(here, *namespace, "umount", MOUNT)
        host.run(f"fallocate --length=$(($(df --output=avail -B1 {MOUNT} | tail -1) - {LEFT_BYTES})) {MOUNT}/ballast")
        yield MOUNT


def inspect(host: Host, what: str) -> Any:
    return json.loads(here("docker", "inspect", f"--format={what}", host.id))


def here(*argv: str) -> str:
    """Run on this machine; its output. Raises AssertionError with what it said."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
    return done.stdout
