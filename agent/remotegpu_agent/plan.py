"""The decision: what is wanted and what is there in, ordered steps out. An empty list is rest.

Pure: no host, no clock, no file, so that every corner is tested without any. leases.py and tasks.py carry the steps
out. Close before open: nothing serves two tenants, not even for a moment.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone

from remotegpu_agent.protocol import Desired, DesiredAttempt, DesiredLease


@dataclass(frozen=True)
class HostLease:
    """What one lease has on this host now."""

    lease_id: int
    login: str
    uid: int
    exists: bool  # its account is there, made by us
    is_closed: bool  # closed in our own register
    ends_at: datetime
    keys: str = ""  # content of its keys file; "" lets nobody in
    expires_on: date | None = None  # the first day on which its account is refused
    armed_at: datetime | None = None  # when its end timer elapses
    processes: int = 0

    def is_shut(self) -> bool:
        return self.is_closed and not self.keys and not self.processes


@dataclass(frozen=True)
class HostAttempt:
    attempt_id: int
    lease_id: int
    has_ended: bool
    is_stopping: bool
    is_disowned: bool = False  # of a task that the portal has lost: whatever is ordered by this id is another


@dataclass(frozen=True)
class Host:
    leases: Mapping[int, HostLease] = field(default_factory=dict)
    attempts: Mapping[int, HostAttempt] = field(default_factory=dict)
    obstacles: Mapping[int, str] = field(default_factory=dict)  # lease id → why it cannot be opened here


@dataclass(frozen=True)
class StopAttempt:
    attempt_id: int
    reason: str


@dataclass(frozen=True)
class CloseLease:
    lease_id: int
    reason: str


@dataclass(frozen=True)
class MakeLogin:
    lease: DesiredLease


@dataclass(frozen=True)
class ArmEnd:
    """The end timer, and the register from which the guard arms it again after a reboot."""

    lease: DesiredLease


@dataclass(frozen=True)
class SetExpiry:
    lease: DesiredLease


@dataclass(frozen=True)
class WriteKeys:
    lease: DesiredLease


@dataclass(frozen=True)
class StartAttempt:
    attempt: DesiredAttempt


@dataclass(frozen=True)
class EndUnstarted:
    """An attempt that will never run here: it gets an end, so that nobody waits for one."""

    attempt: DesiredAttempt
    state: str
    reason: str


TAKEN = "another task of before the restore has this number on the host; run it again"

Step = StopAttempt | CloseLease | MakeLogin | ArmEnd | SetExpiry | WriteKeys | StartAttempt | EndUnstarted


def plan(
    desired: Desired | None, host: Host, *, at: datetime, frozen: bool, render_keys: Callable[[DesiredLease], str]
) -> list[Step]:
    """What must change on the host now."""
    if desired is None or frozen:
        return list(_overdue(host.leases.values(), at))
    wanted = {lease.lease_id: lease for lease in desired.leases if lease.is_open and lease.ends_at > at}
    possible = [lease for lease in wanted.values() if lease.lease_id not in host.obstacles]
    open_ids = {lease.lease_id for lease in possible}
    return [
        *_stops(desired.attempts, host.attempts),
        *_closings(desired, host.leases, wanted),
        *(step for lease in possible for step in _opening(lease, host.leases.get(lease.lease_id), render_keys)),
        *_starts(desired.attempts, host, open_ids, wanted),
    ]


def expiry_day(ends_at: datetime) -> date:
    """Accounts expire by whole days in UTC: the first whole day after the end. The hour is kept by the keys and the
    timer.
    """
    return ends_at.astimezone(timezone.utc).date() + timedelta(days=1)


def _overdue(leases: Iterable[HostLease], at: datetime) -> Iterable[CloseLease]:
    """A lease's end needs nobody's word but the one given when it was opened."""
    for lease in leases:
        if (lease.is_closed or lease.ends_at <= at) and not lease.is_shut():
            yield CloseLease(lease.lease_id, "its end has come")


def _closings(
    desired: Desired, leases: Mapping[int, HostLease], wanted: Mapping[int, DesiredLease]
) -> Iterable[CloseLease]:
    named = {lease.lease_id: lease for lease in desired.leases}
    for lease in leases.values():
        if lease.lease_id in wanted or lease.is_shut():
            continue
        order = named.get(lease.lease_id)
        if order is None:
            reason = "the portal no longer names it"
        else:
            reason = "the portal closed it" if not order.is_open else "its end has come"
        yield CloseLease(lease.lease_id, reason)


def _opening(
    lease: DesiredLease, there: HostLease | None, render_keys: Callable[[DesiredLease], str]
) -> Iterable[Step]:
    """First the end, then the door: no key is ever accepted without an armed end."""
    if there is None or not there.exists:
        yield from (MakeLogin(lease), ArmEnd(lease), SetExpiry(lease), WriteKeys(lease))
        return
    if there.is_closed or there.ends_at != lease.ends_at or there.armed_at != lease.ends_at:
        yield ArmEnd(lease)
    if there.expires_on != expiry_day(lease.ends_at):
        yield SetExpiry(lease)
    if there.keys != render_keys(lease):
        yield WriteKeys(lease)


def _stops(orders: Iterable[DesiredAttempt], there: Mapping[int, HostAttempt]) -> Iterable[Step]:
    for order in orders:
        attempt = there.get(order.attempt_id)
        if order.is_wanted:
            continue
        if attempt is None or attempt.is_disowned:
            yield EndUnstarted(order, "stopped", "stopped before it started")
        elif not attempt.has_ended and not attempt.is_stopping:
            yield StopAttempt(order.attempt_id, "stopped by request")


def _starts(
    orders: Iterable[DesiredAttempt], host: Host, open_ids: Collection[int], wanted: Collection[int]
) -> Iterable[StartAttempt | EndUnstarted]:
    for order in orders:
        there = host.attempts.get(order.attempt_id)
        if not order.is_wanted or (there is not None and not there.is_disowned):
            continue
        if there is not None:
            yield EndUnstarted(order, "failed", TAKEN)
        elif order.lease_id in open_ids:
            yield StartAttempt(order)
        elif order.lease_id in wanted:
            yield EndUnstarted(order, "failed", f"its lease cannot be opened: {host.obstacles[order.lease_id]}")
        else:
            yield EndUnstarted(order, "stopped", "its lease has ended")
