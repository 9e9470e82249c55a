"""What this host is: facts that change with a reboot or an upgrade at most. What changes by the second is
metrics.py's.
"""

import functools
import os
import platform
from pathlib import Path
from typing import Any

from remotegpu_agent.files import find_text

DRIVER = "/sys/module/nvidia"


def boot_id() -> str:
    """The kernel's name for this very boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def driver_load() -> int | None:
    """The kernel's number for this very loading of the NVIDIA driver, or None where it has no such module: a module's
    folder gets a new one each time.
    """
    try:
        return os.stat(DRIVER).st_ino
    except OSError:
        return None


@functools.cache
def collect() -> dict[str, Any]:
    """The host's facts as the protocol's `facts`; null is unknown."""
    from remotegpu_agent.leases import openssh_banner

    release = _release()
    return {
        "hostname": platform.node()[:255],
        "machine_id": (find_text(Path("/etc/machine-id")) or "").strip(),
        "product_uuid": _product_uuid(),
        "os": release.get("PRETTY_NAME", "unknown")[:200],
        "kernel": platform.release()[:200],
        "architecture": platform.machine()[:40],
        "cpu_model": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "memory_total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "openssh": openssh_banner()[:80] or None,
    }


def _release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _product_uuid() -> str | None:
    text = (find_text(Path("/sys/class/dmi/id/product_uuid")) or "").strip()
    return text[:64] or None


def _cpu_model() -> str | None:
    for line in (find_text(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()[:200]
    return None
