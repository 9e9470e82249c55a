"""Availability: everything that stands in the way of leasing a machine to a tenant, each with a code and a sentence.

Nothing here is changed. Asked while the machine is held (`machines.lock`), an answer stays true until the transaction
ends; who asks, and what follows, is in leases.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from portal.errors import Conflict
from portal.models import Lease, Machine, Reclaim, Tenant
from portal.models.states import LEASE_OPEN
from portal.services import machines, network_forwards, runs
from portal.services.health import Problem


class CannotAllocate(Conflict):
    """The machine cannot be leased now. `reasons` lists everything that stands in the way, each with its code."""

    code = "cannot_allocate"

    def __init__(self, reasons: Sequence[Problem]) -> None:
        told = [{"code": reason.code, "message": reason.message} for reason in reasons]
        super().__init__(" ".join(reason.message for reason in reasons), reasons=told)
        self.reasons = tuple(reasons)


def start_refusals(machine: Machine, now: datetime) -> list[Problem]:
    """Everything that keeps a lease from starting on this machine now, each with a message of its own."""
    refusals: list[Problem] = [*gateway_refusals(machine)]
    if machine.state != "ready":
        refusals.append(_not_ready(machine))
    else:
        if not machines.is_proven_clean(machine):
            refusals.append(Problem("not_clean", f"{machine.name} has no passed reclaim report after its last lease."))
        refusals += run_refusals(machine)
    health = machines.health_of(machine, now)
    if health.reachability == "never":
        refusals.append(Problem("offline", f"The agent of {machine.name} has never reported."))
    elif not health.is_online:
        since = f"{health.last_seen_at:%Y-%m-%d %H:%M} UTC"
        refusals.append(Problem("offline", f"{machine.name} is offline; its last report is from {since}."))
    refusals += health.problems
    if machine.maintenance_since is not None:
        refusals.append(Problem("maintenance", f"{machine.name} is in maintenance: {machine.maintenance_reason}"))
    return [*refusals, *way_refusals(machine, now)]


def _not_ready(machine: Machine) -> Problem:
    why = f": {machine.state_reason}" if machine.state_reason else ""
    return Problem("not_ready", f"{machine.name} is {machine.state}, not ready{why}.")


def run_refusals(machine: Machine) -> Iterable[Problem]:
    run = runs.find_disrupting(machine)
    if run is not None:
        yield Problem(
            "disruptive_run",
            f"Run {run.id} ({run.playbook}) is {run.state} on {machine.name} and may disturb whoever leases it: "
            "wait for its end, or cancel it.",
        )


def plan_refusals(machine: Machine) -> Iterable[Problem]:
    """For later, a machine need not be free or well now, but it must be one that is in service."""
    yield from gateway_refusals(machine)
    if machine.state not in ("ready", "leased", "reclaiming"):
        yield _not_ready(machine)
    yield from past_refusals(machine)


def gateway_refusals(machine: Machine) -> Iterable[Problem]:
    if machine.is_gateway:
        yield Problem("gateway", f"{machine.name} is a gateway for other machines and is leased to nobody.")


def way_refusals(machine: Machine, now: datetime) -> Iterable[Problem]:
    """A machine that nobody can get to is of no use, however well it is itself."""
    if machine.gateway_id is None:
        return
    gateway = machines.get(machine.gateway_id)
    if not machines.health_of(gateway, now).is_online:
        text = f"{gateway.name}, the gateway of {machine.name}, is offline: customers could not get in."
        yield Problem("gateway_offline", text)
    if gateway.frozen_reason is not None:
        text = f"{gateway.name}, the gateway of {machine.name}, is frozen and opens nothing. Thaw it first."
        yield Problem("gateway_frozen", text)
    if not network_forwards.has_port(gateway):
        text = (
            f"{gateway.name}, the gateway of {machine.name}, has no port left in {gateway.forward_ports}: customers "
            "could not get in. Give it a larger pool, or close openings that go through it."
        )
        yield Problem("no_port_left", text)


def past_refusals(machine: Machine) -> Iterable[Problem]:
    """What is not settled about its past: the login and UID that we would choose may be somebody's there."""
    if machine.frozen_reason is not None:
        yield Problem("frozen", f"{machine.name} is frozen: {machine.frozen_reason} Thaw it first.")
    if machine.needs_reimage:
        yield Problem("needs_reimage", f"{machine.name} must be installed anew: {machine.state_reason}")


def overlaps(
    machine: Machine, begins: datetime, until: datetime, retain_s: int, *, but: Lease | None = None
) -> Iterable[Problem]:
    """Other leases that hold the machine in the wanted time, or still retain data on it."""
    wanted_end = until + timedelta(seconds=retain_s)
    retained = Reclaim.select(Reclaim.lease).where(Reclaim.machine == machine, Reclaim.state == "waiting")
    holding = (Lease.state << ("scheduled", *LEASE_OPEN)) | (Lease.id << retained)
    for other in Lease.select().where(Lease.machine == machine, holding, Lease.id != (but.id if but else 0)):
        other_end = (other.ended_at or other.ends_at) + timedelta(seconds=other.retain_s)
        if other.starts_at < wanted_end and begins < other_end:
            span = f"from {other.starts_at:%Y-%m-%d %H:%M} to {other_end:%Y-%m-%d %H:%M} UTC, its retention included"
            yield Problem("overlap", f"Lease {other.id} has {machine.name} {span}.")


def tenant_refusals(tenant: Tenant) -> Iterable[Problem]:
    archived = Tenant.select(Tenant.archived_at).where(Tenant.id == tenant.id).scalar()
    if archived is not None:
        yield Problem("tenant_archived", f"{tenant.name} is archived; restore the customer first.")
