"""What this host does right now: processor, memory, disks, network; GPUs are in gpu.py.

Null is unknown, 0 is counted.
"""

import os
import time
from typing import Any

from remotegpu_agent.protocol import format_time, now

IMAGES = ("squashfs", "iso9660", "udf", "erofs")  # always full, so their room says nothing: snaps, discs, data sets


def sample() -> dict[str, Any]:
    """One sample as the protocol's `metrics`. The processor's share is since the sample before; null in the first."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "sampled_at": format_time(now()),
        "cpu_percent": _cpu_percent(),
        "load1": round(os.getloadavg()[0], 2),
        "memory_total_bytes": memory.total,
        "memory_used_bytes": memory.total - memory.available,
        "uptime_s": round(time.clock_gettime(time.CLOCK_BOOTTIME), 1),
        "disks": _disks(),
        "network": [
            {"interface": name[:64], "received_bytes": counters.bytes_recv, "sent_bytes": counters.bytes_sent}
            for name, counters in sorted(psutil.net_io_counters(pernic=True, nowrap=False).items())[:128]
            if name != "lo"
        ],
    }


_is_warm = False


def _cpu_percent() -> float | None:
    """psutil's first answer means nothing, and is 0.0."""
    global _is_warm
    import psutil

    percent, known = psutil.cpu_percent(interval=None), _is_warm
    _is_warm = True
    return percent if known else None


def _disks() -> list[dict[str, Any]]:
    """File systems to write to, each device once: bind mounts and containers show the same one again and again."""
    import psutil

    found: dict[str, dict[str, Any]] = {}
    for part in psutil.disk_partitions(all=False):
        if part.device in found or part.fstype in IMAGES or not os.path.isdir(part.mountpoint):
            continue
        try:
            usage = psutil.disk_usage(part.mountpoint)
        except OSError:
            continue
        found[part.device] = {
            "mount": part.mountpoint[:300],
            "device": part.device[:300],
            "total_bytes": usage.total,
            "used_bytes": usage.used,
            "free_bytes": usage.free,
        }
    if not any(disk["mount"] == "/" for disk in found.values()):
        usage = psutil.disk_usage("/")  # an overlay or a pool that psutil does not list
        root = {
            "mount": "/",
            "device": "unknown",
            "total_bytes": usage.total,
            "used_bytes": usage.used,
            "free_bytes": usage.free,
        }
        return [root, *list(found.values())[:127]]
    return list(found.values())[:128]
