"""A disk of a host's own that can be filled without filling this machine's: a sparse file behind a loop device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.hosts import Host

MOUNT = "/srv/scratch"
SIZE_GIB = 20  # below 16 nobody minds: /boot and its like fill up without harm
LEFT_BYTES = 512 * 1024**2

# What a host must have been booted with: loop devices, and who gives them out.
LOOP_DEVICES = ("--device-cgroup-rule=b 7:* rmw", "--device-cgroup-rule=c 10:237 rmw")
NODES = """
test -e /dev/loop-control || mknod /dev/loop-control c 10 237
for number in $(seq 0 63); do test -e /dev/loop$number || mknod /dev/loop$number b 7 $number; done
"""


@contextmanager
def full_disk(host: Host) -> Iterator[str]:
    """Mounted in the running system, with half a GiB left; gone afterwards."""
    image = "/var/lib/docker/scratch.img"  # on a real file system, which knows sparse files
    with ExitStack() as stack:
        host.run(f"truncate --size={SIZE_GIB}G {image} && mkfs.ext4 -q -m 0 -E lazy_itable_init=1 {image}")
        stack.callback(host.run, f"rm -f {image} /dev/loop*")
        host.run(f"{NODES} mkdir -p {MOUNT}")
        device = host.run(f"losetup --find --show {image}").stdout.strip()
        stack.callback(host.run, ["losetup", "--detach", device])
        host.run(["mount", device, MOUNT])
        stack.callback(host.run, ["umount", MOUNT])
        host.run(f"fallocate --length=$(($(df --output=avail -B1 {MOUNT} | tail -1) - {LEFT_BYTES})) {MOUNT}/ballast")
        yield MOUNT
