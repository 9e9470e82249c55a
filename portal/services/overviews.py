"""What people look at: machines and leases with everything around them, a whole page in a handful of queries.

Read only. Pages and API show the same, because both take it from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import reduce
from operator import or_
from typing import Any

import peewee

from portal.models import Gpu, Grant, Lease, Machine, MachineReport, Reclaim, Tenant, User
from portal.models.states import LEASE_OPEN
from portal.services import addresses, alerts_tenants, availability, gpus, health, machines, tenants
from portal.services.alerts_tenants import Told
from portal.services.health import Health, Problem


@dataclass(frozen=True)
class GpuView:
    """An expected GPU and what the host says of it now; None where it says nothing of it."""

    gpu: Gpu
    live: dict[str, Any] | None


@dataclass(frozen=True)
class MachineView:
    """A machine as it is now. `lease` has it, `reclaim` is its newest.

    `gpus` are those that are expected, `unexpected` what is reported besides. Where GPUs are not told of at all (the
    driver hangs, the host is silent), none of them is missing. `report` is the last one, of whatever age: its values
    are those of now only while the host is online.
    """

    machine: Machine
    gpus: tuple[GpuView, ...]
    unexpected: tuple[dict[str, Any], ...]
    are_gpus_told: bool
    report: MachineReport | None
    health: Health
    lease: Lease | None
    reclaim: Reclaim | None

    @property
    def report_of_now(self) -> MachineReport | None:
        """The last report, while what it says is so now."""
        return self.report if self.health.is_online else None

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What the host measures of itself now."""
        return self.report_of_now.metrics if self.report_of_now is not None else None

    @property
    def host_key_fingerprint(self) -> str | None:
        return None if self.machine.host_key is None else machines.fingerprint(self.machine.host_key)

    @property
    def has_first_contact(self) -> bool:
        """Whether a credential for the first contact is still kept. What it is, nobody is told."""
        return self.machine.first_contact is not None


@dataclass(frozen=True)
class LeaseView:
    """A lease with what it opens. Both ends differ while the host has not acknowledged the newer one."""

    lease: Lease
    grants: tuple[Grant, ...]
    reclaim: Reclaim | None
    waits_for: tuple[Problem, ...]

    @property
    def is_end_acknowledged(self) -> bool:
        return bool(self.lease.acknowledged_ends_at == self.lease.ends_at)


# Machines


def search(
    *, state: str | None = None, reachability: str | None = None, keyword: str | None = None, now: datetime
) -> peewee.ModelSelect[Machine]:
    """Machines by name. The keyword is looked for in name, address, region and remark."""
    query = Machine.select(Machine).order_by(Machine.name)
    if state is not None:
        query = query.where(Machine.state == state)
    if reachability is not None:
        query = query.where(_is_reachable(reachability, now))
    if keyword:
        # An address that is typed in another way is found all the same.
        words = {keyword, _address_or(keyword)}
        columns = (Machine.name, Machine.address, Machine.public_address, Machine.region, Machine.remark)
        hits = [column.contains(word) for column in columns for word in sorted(words)]
        query = query.where(reduce(or_, hits))
    return query


def _is_reachable(wanted: str, now: datetime) -> Any:
    since = now - timedelta(seconds=machines.limits().silence_s)
    heard = MachineReport.select(MachineReport.machine)
    if wanted == "never":
        return Machine.id.not_in(heard)
    recent = MachineReport.received_at >= since if wanted == "online" else MachineReport.received_at < since
    return Machine.id << heard.where(recent)


def _address_or(keyword: str) -> str:
    try:
        return addresses.normalise(keyword)
    except ValueError:
        return keyword


def of_machines(rows: Sequence[Machine], now: datetime) -> list[MachineView]:
    """The views of these machines, in the same order."""
    ids = [machine.id for machine in rows]
    known = machines.gpus_by_machine(ids)
    reports = {report.machine_id: report for report in MachineReport.select().where(MachineReport.machine << ids)}
    open_leases = Lease.select(Lease, Tenant).join(Tenant).where(Lease.machine << ids, Lease.state << LEASE_OPEN)
    by_machine = {lease.machine_id: lease for lease in open_leases}
    reclaims = _newest_reclaims(Reclaim.machine, ids)
    return [
        _view(row, known.get(row.id, []), reports.get(row.id), by_machine.get(row.id), reclaims.get(row.id), now)
        for row in rows
    ]


def of_machine(machine: Machine, now: datetime) -> MachineView:
    return of_machines([machine], now)[0]


def _view(
    machine: Machine,
    expected: Sequence[Gpu],
    report: MachineReport | None,
    lease: Lease | None,
    reclaim: Reclaim | None,
    now: datetime,
) -> MachineView:
    state = health.of(machine, expected, report, now, machines.limits())
    told = gpus.of_now(report if state.is_online else None)
    live = told or {}
    return MachineView(
        machine=machine,
        gpus=tuple(GpuView(gpu, live.get(gpu.uuid)) for gpu in expected),
        unexpected=tuple(live[uuid] for uuid in sorted(live.keys() - {gpu.uuid for gpu in expected})),
        are_gpus_told=told is not None,
        report=report,
        health=state,
        lease=lease,
        reclaim=reclaim,
    )


def _newest_reclaims(by: Any, ids: Sequence[int]) -> dict[int, Reclaim]:
    """The newest reclaim for each id, by machine or by lease."""
    newest = Reclaim.select(peewee.fn.MAX(Reclaim.id)).where(by << list(ids)).group_by(by)
    rows = Reclaim.select().where(Reclaim.id << newest)
    return {getattr(row, by.column_name): row for row in rows}


# Leases


def search_leases(
    *, state: str | None = None, machine_id: int | None = None, tenant_id: int | None = None
) -> peewee.ModelSelect[Lease]:
    """Leases with machine and tenant, newest first."""
    query = Lease.select(Lease, Machine, Tenant).join(Machine).switch(Lease).join(Tenant).order_by(Lease.id.desc())
    for column, wanted in ((Lease.state, state), (Lease.machine, machine_id), (Lease.tenant, tenant_id)):
        if wanted is not None:
            query = query.where(column == wanted)
    return query


def of_leases(rows: Sequence[Lease], now: datetime) -> list[LeaseView]:
    """The views of these leases, in the same order."""
    ids = [lease.id for lease in rows]
    grants: dict[int, list[Grant]] = {}
    for grant in Grant.select().where(Grant.lease << ids).order_by(Grant.id):
        grants.setdefault(grant.lease_id, []).append(grant)
    reclaims = _newest_reclaims(Reclaim.lease, ids)
    return [
        LeaseView(lease, tuple(grants.get(lease.id, ())), reclaims.get(lease.id), _waits_for(lease, now))
        for lease in rows
    ]


def of_lease(lease: Lease, now: datetime) -> LeaseView:
    return of_leases([lease], now)[0]


def _waits_for(lease: Lease, now: datetime) -> tuple[Problem, ...]:
    """Why a lease that should have begun has not."""
    if lease.state != "scheduled" or lease.starts_at > now:
        return ()
    return tuple(availability.start_refusals(lease.machine, now))


# A customer's machines


@dataclass(frozen=True)
class HeldView:
    """A leased machine for the people of its tenant."""

    lease: LeaseView
    machine: MachineView
    may_connect: bool
    alerts: list[Told]


def held(rows: Sequence[Lease], user: User, now: datetime) -> list[HeldView]:
    """The views of these open leases, in the same order, and whether this user may log in. No alert and no XID of
    before the lease is in them.
    """
    usable = set(tenants.ids_of(user, "use"))
    lease_views = of_leases(rows, now)
    machine_views = of_machines([lease.machine for lease in rows], now)
    told, begun = alerts_tenants.of_leases(rows), _had_since(rows)
    return [
        HeldView(
            view,
            _told_since(machine, begun[view.lease.id]),
            view.lease.tenant_id in usable and view.lease.state == "active",
            told[view.lease.id],
        )
        for view, machine in zip(lease_views, machine_views, strict=True)
    ]


def _had_since(rows: Sequence[Lease]) -> dict[int, datetime]:
    """Lease id → since when its people have had the machine: a lease that continues another began with that one."""
    firsts = Lease.select(Lease.id, Lease.activated_at).where(Lease.id << [lease.host_id for lease in rows])
    begun = {first.id: first.activated_at for first in firsts}
    return {lease.id: begun[lease.host_id] for lease in rows}


def _told_since(view: MachineView, begin: datetime) -> MachineView:
    """The driver tells XIDs until it is loaded again, and no cleaning does that."""
    live = [None if entry.live is None else gpus.told_since(entry.live, begin) for entry in view.gpus]
    return replace(
        view,
        gpus=tuple(GpuView(entry.gpu, told) for entry, told in zip(view.gpus, live, strict=True)),
        unexpected=tuple(gpus.told_since(gpu, begin) for gpu in view.unexpected),
    )
