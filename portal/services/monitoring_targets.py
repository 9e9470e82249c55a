"""What Prometheus shall ask: the exporters of every host in service, as http_sd wants them.

Whether one of them answers is Prometheus's to find out (`up`). What the portal itself knows of hosts is in
monitoring_samples.py. No tenant, user or remark is ever in a label: labels are kept for years, and read by many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from portal.models import Baseline, Gpu, Machine

NODE_PORT = 9100
GPU_PORT = 9835
IN_SERVICE = ("ready", "leased", "reclaiming", "quarantined")


@dataclass(frozen=True)
class Exporter:
    """A program on a host that Prometheus asks. `job` is the label by which charts and rules know it."""

    job: str
    port: int


NODE = Exporter("node", NODE_PORT)
NVIDIA = Exporter("nvidia_gpu", GPU_PORT)


def target_groups(job: str | None = None) -> list[dict[str, Any]]:
    """The whole list in the order of names, or one job's part; empty only if no host is in service.

    A machine that was never ready has no exporter yet, and a retired one none any more. A quarantined one has: whoever
    looks for the reason wants its charts. A database that does not answer raises: Prometheus then keeps what it has.
    """
    rows = list(_in_service().order_by(Machine.name))
    models = _models([machine.id for machine in rows])
    return [
        _group(machine, exporter, models.get(machine.id, []))
        for machine in rows
        for exporter in (NODE, NVIDIA)
        if job in (None, exporter.job) and (exporter is NODE or machine.id in models)
    ]


def _in_service() -> Any:
    """Also one that is provisioned anew, or where that has failed: it was ready once, so the exporters are there."""
    was_ready = Machine.id << Baseline.select(Baseline.machine)
    again = (Machine.state << ("provisioning", "failed")) & was_ready
    return Machine.select().where((Machine.state << IN_SERVICE) | again)


def _models(ids: Sequence[int]) -> dict[int, list[str]]:
    """The models of the GPUs that each machine is expected to have; a machine without any is not in it."""
    models: dict[int, list[str]] = {}
    for gpu in Gpu.select(Gpu.machine, Gpu.name).where(Gpu.machine << ids).order_by(Gpu.name):
        models.setdefault(gpu.machine_id, []).append(gpu.name or "unknown")
    return models


def _group(machine: Machine, exporter: Exporter, models: Sequence[str]) -> dict[str, Any]:
    """`instance` and `job` are set here, so that series keep their names when an address or a port changes."""
    labels = {
        "job": exporter.job,
        "instance": machine.name,
        **labels_of(machine, models),
    }
    host = f"[{machine.address}]" if ":" in machine.address else machine.address
    return {"targets": [f"{host}:{exporter.port}"], "labels": labels}


def labels_of(machine: Machine, models: Sequence[str]) -> dict[str, str]:
    """What every series of a host says about it. An empty label is none, so what is unknown is left out."""
    labels = {
        "host": machine.name,
        "machine_id": str(machine.id),
        "gpu_model": ", ".join(sorted(set(models))),
        "region": machine.region or "",
        "rack": machine.rack or "",
    }
    return {name: value for name, value in labels.items() if value}
