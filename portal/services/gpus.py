"""What a host's word about its GPUs means: which values are of now, in which unit, and which can be none.

Pages, API, live overview and samples take them from here, so that no two of them differ. The agent has sorted out what
its driver cannot have meant (gpu_child.py); an agent may be old, so it is looked at again. Pure; what is wrong with a
machine is said in health.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from portal.models import MachineReport

# XIDs after which nobody new gets the GPU, by NVIDIA's catalogue: off the bus, needs a reset, its memory or its NVLink.
BLOCKING_XIDS = frozenset((48, 64, 74, 79, 95, 119, 120, 140))


def of_now(report: MachineReport | None) -> dict[str, dict[str, Any]] | None:
    """What the report says of GPUs now, by UUID: one that is not in it is not there. None where it says nothing, or
    repeats what was seen before the driver hung.
    """
    told = report.gpu if report is not None else None
    if told is None or told["state"] != "ok":
        return None
    return {gpu["uuid"]: _sorted_out(gpu) for gpu in told["gpus"]}


def _sorted_out(gpu: dict[str, Any]) -> dict[str, Any]:
    """Without a use of the whole card while it is divided, whatever is said then, and without a driver's blank."""
    use = gpu["utilization_percent"]
    return {**gpu, "utilization_percent": None} if use is not None and (gpu["mig"] or ratio(use) is None) else gpu


def memory_percent(gpu: Mapping[str, Any]) -> float | None:
    """How full it is: what is used of all, the driver's own reserve not counted as used."""
    used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
    return None if used is None or not total else 100 * used / total


def answers(gpu: Mapping[str, Any]) -> bool:
    """Whether it can be asked at all. One that says that it is in trouble answers."""
    return gpu["state"] != "lost" and not any(error["field"] == "handle" for error in gpu["errors"])


def xids(gpu: Mapping[str, Any]) -> dict[int, datetime]:
    """The XIDs that the driver told since it was loaded, and when each was told last. An older agent tells none."""
    return {told["xid"]: datetime.fromisoformat(told["last_at"]) for told in gpu.get("xids", ())}


def told_since(gpu: Mapping[str, Any], begin: datetime) -> dict[str, Any]:
    """The same without the XIDs of before: the driver may have told them of somebody else's work."""
    if "xids" not in gpu:
        return dict(gpu)
    told = xids(gpu)
    return {**gpu, "xids": [each for each in gpu["xids"] if told[each["xid"]] >= begin]}


def notes(gpu: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a value is not known, and what to know besides: in the words of the driver and of the agent, each once."""
    told = [f"{error['field']}: {error['message']}" for error in gpu["errors"]]
    if errors := gpu["ecc_uncorrected"]:
        told.append(f"ecc_uncorrected: {errors} errors since the driver was loaded")
    told += [f"XID {xid}: {at:%Y-%m-%d %H:%M:%S} UTC" for xid, at in xids(gpu).items()]
    return tuple(dict.fromkeys(told))


def ratio(percent: float | None) -> float | None:
    """Percent as 0 to 1. More than 100 is a driver's blank, not a value."""
    return percent / 100 if percent is not None and 0 <= percent <= 100 else None
