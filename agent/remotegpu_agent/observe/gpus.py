"""The GPUs as their driver tells them, asked once and anew; and whether this host has any.

What the running agent last saw is gpu.py's, and may be old: here a child of our own is asked, waited for no longer than
the deadline, and ended. Who holds a device open is processes.py's.
"""

from __future__ import annotations

import glob
from typing import Any

from remotegpu_agent import config
from remotegpu_agent.gpu import GpuProbe
from remotegpu_agent.observe.tools import read_text

DEADLINE_S = 60.0  # without persistence mode each GPU is set up for whoever looks first, which takes seconds
_NVIDIA, _DISPLAY = "0x10de", "0x03"


def ask() -> dict[str, Any]:
    """The protocol's `gpu_report` of this moment; `stale` without a GPU in it where the driver did not answer in time.

    As root: of a card that is divided (MIG) the driver tells nobody else what the whole of it is used for.
    Raises ConfigError where this program is not installed.
    """
    probe = GpuProbe([config.load().program, "nvml-child", "--as-root"], deadline_s=DEADLINE_S)
    probe.start()
    try:
        probe.ask(wait_s=DEADLINE_S)
        return probe.report()
    finally:
        probe.stop()


def are_there() -> bool:
    """Whether the kernel shows an NVIDIA GPU, whatever its driver says."""
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    on_the_bus = (path.removesuffix("/vendor") for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(
        (read_text(f"{device}/vendor") or "").startswith(_NVIDIA)
        and (read_text(f"{device}/class") or "").startswith(_DISPLAY)
        for device in on_the_bus
    )
