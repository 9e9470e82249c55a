#!/usr/bin/python
"""What a host says about NVIDIA hardware and its driver, without asking the driver: a hung one answers nobody.

Read from sysfs, procfs and efivars, and by `modprobe` and `modinfo` for the module of the kernel that runs, and of the
one that the next boot would start. Unknown is None, never a guess. What to do about it is decided in tasks/ and vars/;
here is only looked.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: nvidia_facts
short_description: NVIDIA hardware and driver of a host
description:
  - Gives the fact C(nvidia) with the GPUs and switches on the PCI bus, what leads to switches that are not on it, the
    driver that is loaded, the one on disk for this kernel and for the next boot's, and what stands in its way.
options:
  root:
    description: Folder that stands for C(/); another one in tests, where no driver can be loaded.
    type: path
    default: /
"""

VENDOR = "0x10de"
GPU_CLASSES = ("0x0300", "0x0302")  # VGA and 3D controller; audio and USB of a card are other classes
BRIDGE_CLASS = "0x0680"  # an NVSwitch of an HGX board up to Hopper
# From Blackwell on (NVLink 5) no NVSwitch is on the bus: ConnectX devices lead to them, which are told from network
# cards with the same id by their product data alone. The fabric manager reaches them through the kernel's InfiniBand.
CONNECTX_VENDOR, NETWORK = "0x15b3", "0x02"
SWITCH_MANAGER = b"SW_MNG"
INFINIBAND_MODULES = ("mlx5_ib", "ib_umad")
# Variables of UEFI carry four bytes of attributes before their value.
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
TURING, BLACKWELL = 0x1E00, 0x2900  # the first PCI device ids of each; NVIDIA gives them out upwards
# The driver's module is called nvidia once it is loaded. Its file is by NVIDIA and Ubuntu; Debian has others for it.
DRIVER_FILES = ("nvidia", "nvidia-current-open", "nvidia-current")
MODPROBE_SETTINGS = ("etc", "run", "usr/local/lib", "usr/lib", "lib")
KMOD_TIMEOUT_S = 20.0


def look(root: Path) -> dict[str, Any]:
    """Everything at once. `root` stands for /."""
    devices = [device for path in folder(root / "sys/bus/pci/devices") if (device := nvidia_device(path)) is not None]
    gpus = [device for device in devices if device["class"] in GPU_CLASSES]
    loaded = find_text(root / "proc/driver/nvidia/version")
    modules = (find_text(root / "proc/modules") or "").splitlines()
    kernel = os.uname().release
    next_kernel = newest_kernel(root) or kernel
    on_disk = driver(root, kernel, "version")
    open_required = any(generation(gpu) >= BLACKWELL for gpu in gpus)
    managers = switch_managers(root) if open_required else 0
    return {
        "gpus": gpus,
        "nvswitches": sum(device["class"] == BRIDGE_CLASS for device in devices),
        "open_possible": all(generation(gpu) >= TURING for gpu in gpus),
        "open_required": open_required,
        "switch_managers": managers,
        "without_infiniband": [
            each for each in sorted({kernel, next_kernel}) if managers and not has_infiniband(root, each)
        ],
        "loaded": version_in(loaded or ""),
        "loaded_open": None if loaded is None else "Open Kernel Module" in loaded,
        "on_disk": on_disk,
        "on_disk_signer": driver(root, kernel, "signer") if on_disk else None,
        "has_programs": os.path.lexists(root / "usr/bin/nvidia-smi"),
        "nouveau_loaded": any(line.split(" ")[0] == "nouveau" for line in modules),
        "secure_boot": secure_boot(root),
        "kernel": kernel,
        "headers": (root / "lib/modules" / kernel / "build").exists(),
        "next_kernel": next_kernel,
        "next_on_disk": on_disk if next_kernel == kernel else driver(root, next_kernel, "version"),
    }


def nvidia_device(path: Path) -> dict[str, Any] | None:
    """One function on the PCI bus, or None where it is somebody else's."""
    if find_text(path / "vendor") != VENDOR:
        return None
    code, kind = find_text(path / "device"), find_text(path / "class")
    if code is None or kind is None:
        return None
    return {"address": path.name, "device": f"10de:{code[2:]}", "class": kind[:6]}


def switch_managers(root: Path) -> int:
    """The ConnectX devices that lead to NVSwitches, whether or not a module serves them already.

    Product data takes its time to read, so it is asked for where such a board may be. A virtual function has none.
    """
    return sum(
        SWITCH_MANAGER in find_bytes(path / "vpd")
        for path in folder(root / "sys/bus/pci/devices")
        if find_text(path / "vendor") == CONNECTX_VENDOR and (find_text(path / "class") or "").startswith(NETWORK)
    )


def has_infiniband(root: Path, kernel: str) -> bool:
    """Whether this kernel has what the fabric manager reaches those devices by."""
    return all(modinfo(root, kernel, "filename", module) is not None for module in INFINIBAND_MODULES)


def generation(gpu: dict[str, Any]) -> int:
    """The PCI device id as a number: larger is newer."""
    return int(gpu["device"].partition(":")[2], 16)


def version_in(text: str) -> str | None:
    """The driver's version in the first line of /proc/driver/nvidia/version.

    >>> version_in("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Thu …")
    '535.261.03'
    """
    first = text.splitlines()[0] if text else ""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", first)
    return found.group(1) if found else None


def secure_boot(root: Path) -> bool | None:
    """Whether the firmware loads signed code only; None where it is no UEFI or does not say."""
    try:
        value = (root / SECURE_BOOT).read_bytes()
    except OSError:
        return None
    return bool(value[4]) if len(value) == 5 else None


def newest_kernel(root: Path) -> str | None:
    """What the next boot starts, where nobody has told the boot loader otherwise; None where no kernel is there.

    Modules stay behind of kernels that were removed, so the kernel itself has to be there too.
    """
    there = [path.name for path in folder(root / "lib/modules") if (root / "boot" / f"vmlinuz-{path.name}").exists()]
    return max(there, key=by_number, default=None)


def by_number(release: str) -> list[tuple[int, str]]:
    """What sorts releases as the boot loader does.

    >>> max("6.8.0-9-generic", "6.8.0-60-generic", key=by_number)
    '6.8.0-60-generic'
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", release)]


def driver(root: Path, kernel: str, field: str) -> str | None:
    """A field of the driver's module that this kernel would load, or None where there is none."""
    return modinfo(root, kernel, field, driver_file(root, kernel))


def driver_file(root: Path, kernel: str) -> str:
    """The name of the file that the driver is loaded from, as `modinfo` takes it.

    Debian's packages build the module under names of their own, so that several can be there, and tell modprobe which
    one it is. Where nothing is told it is the one that is there.
    """
    settings = [word for name in MODPROBE_SETTINGS for word in ("-C", str(root / name / "modprobe.d"))]
    said = ask(root, "modprobe", "-d", str(root), *settings, "-S", kernel, "--show-depends", "nvidia")
    told = re.search(r"^install .*?\bmodprobe(?: -\S+)* (nvidia\S*)", said or "", re.MULTILINE)
    names = (told.group(1),) if told else DRIVER_FILES
    return next((name for name in names if modinfo(root, kernel, "filename", name) is not None), names[0])


def modinfo(root: Path, kernel: str, field: str, module: str) -> str | None:
    """A field of the module in the file of that name, or None where this kernel has none."""
    return ask(root, "modinfo", "-k", kernel, "-F", field, module, "-b", str(root))


def ask(root: Path, name: str, *arguments: str) -> str | None:
    """What a program of kmod says, or None where it fails, or says nothing."""
    own = root / "usr/sbin" / name
    try:
        done = subprocess.run(
            [str(own) if own.exists() else name, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=KMOD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def folder(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def find_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def find_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def main() -> None:
    module = AnsibleModule(argument_spec={"root": {"type": "path", "default": "/"}}, supports_check_mode=True)
    module.exit_json(changed=False, ansible_facts={"nvidia": look(Path(module.params["root"]))})


if __name__ == "__main__":
    main()
