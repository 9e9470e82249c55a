"""The portal's own alerts: what it knows by itself and raises while no Prometheus does.

Pure at heart: `conditions` reads the rows and says what is wrong now; `Watch` raises what is new and ends what is over.
While the Watchdog arrives, Prometheus raises the same alerts by the delivered rules, with the same labels and so the
same fingerprints, and the portal only watches over that; when it stays away, the portal says so and raises its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import peewee
from cryptography import x509

from portal.db import utcnow
from portal.models import (
    Alert,
    ApiToken,
    Forward,
    Grant,
    Lease,
    Machine,
    MachineReport,
    Opening,
    Run,
    RunHost,
    User,
)
from portal.models.states import ALERT_OPEN
from portal.services import alerts, alerts_relay, alerts_silences, config, health, machines, network, network_applied
from portal.services.actors import SYSTEM
from portal.services.alerts import Notice, fingerprint_of
from portal.services.health import Health, Problem

MONITORING_FORGOTTEN = timedelta(days=1)  # a Prometheus that was taken away is not missed for ever
LEASE_ENDING = timedelta(hours=24)
STILL_OPEN = timedelta(minutes=15)  # a host is told within a second; a pipeline takes its minutes
NOT_APPLIED = timedelta(hours=1)
RUN_REMEMBERED = timedelta(hours=24)
CERTIFICATE_ENDING = timedelta(days=14)
TOKEN_ENDING = timedelta(days=7)
WITH_AGENT = ("ready", "leased", "reclaiming", "quarantined")

# Every alert that the portal raises by itself, and how bad it is. All but the first are delivered as rules too.
NAMES = {
    "MonitoringSilent": "critical",
    "AgentSilent": "critical",
    "GpuLost": "critical",
    "GpuFailing": "warning",
    "GpuDriverFailing": "critical",
    "ClockOffset": "warning",
    "DiskLow": "critical",
    "MachineFrozen": "critical",
    "MachineQuarantined": "critical",
    "RunFailed": "warning",
    "LeaseEnding": "info",
    "GrantStillOpen": "critical",
    "OpeningStuck": "warning",
    "ForwardStuck": "warning",
    "NetworkNotApplied": "warning",
    "NetworkFrozen": "critical",
    "CertificateExpiring": "warning",
    "TokenExpiring": "warning",
}

# Those that Prometheus alone raises, by the rules of the role `prometheus`.
OF_PROMETHEUS_ALONE = (
    alerts.WATCHDOG,
    *("MachineOffline", "ExporterUnreachable", "CpuHigh", "MemoryHigh", "DiskFilling", "DiskNearlyFull"),
    *("DiskFull", "GpuExporterDown", "GpuHot", "GpuTooHot", "GpuMemoryFull", "GpuEccErrors", "GpuRowRemapPending"),
    *("GpuRowRemapFailed", "GpuXidRestart", "GpuXidReset", "GpuXidHardware", "GpuXidApplication", "GpuXidUnknown"),
    *("GpuXidNoted", "PortalDown", "PortalErrors", "SweepsFailing", "DatabaseConnections"),
    *("BackupOld", "BackupMissing", "RedisDown", "RedisMemory"),
    *("HarborRobotExpiring", "HarborRobotExpired", "HarborRobotsUnknown"),
)
DELIVERED = frozenset((*NAMES, *OF_PROMETHEUS_ALONE))  # no other rule may have one of these names

# What the agent's last report says → the alert that tells of it.
BY_PROBLEM = {
    "gpu_missing": "GpuLost",
    "gpu_lost": "GpuLost",
    "gpu_error": "GpuFailing",
    "gpu_xid": "GpuFailing",
    "nvml": "GpuDriverFailing",
    "clock": "ClockOffset",
    "disk": "DiskLow",
    "frozen": "MachineFrozen",
    "unheard": "MachineFrozen",
}


@dataclass(frozen=True)
class Condition:
    """Something that is wrong now. Its name and labels are its identity; the sentences may change."""

    name: str
    summary: str
    way_out: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_labels(self) -> dict[str, str]:
        return {"alertname": self.name, "severity": NAMES[self.name], **self.labels}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.all_labels)

    def notice(self, now: datetime) -> Notice:
        annotations = {"summary": self.summary, "way_out": self.way_out}
        return Notice(self.fingerprint, self.all_labels, annotations, now, source="portal")


@dataclass
class Watch:
    """The rounds of one process. What was silent while nobody listened is given time to speak: `since` is the first."""

    since: datetime | None = None

    def sweep(self, now: datetime | None = None) -> int:
        """Raise what is new, end what is over; returns how many changed."""
        now = now or utcnow()
        self.since = self.since or now
        silent = tuple(_monitoring(now, self.since))
        true_now = {condition.fingerprint: condition for condition in (*silent, *conditions(now, self.since))}
        wanted = {each.fingerprint: each for each in silent} if is_monitored(now) else true_now
        still_open = {alert.fingerprint: alert for alert in Alert.select().where(Alert.state << ALERT_OPEN)}
        return _raise(wanted, still_open, now) + _end(true_now, still_open, now)


def _raise(wanted: Mapping[str, Condition], still_open: Mapping[str, Alert], now: datetime) -> int:
    raised = 0
    for fingerprint, condition in wanted.items():
        known = still_open.get(fingerprint)
        if known is None or _says_otherwise(known, condition):
            starts_at = now if known is None else known.starts_at
            raised += alerts.hear(condition.notice(starts_at), by=SYSTEM, now=now)[1] == "fired"
    return raised


def _end(true_now: Mapping[str, Condition], still_open: Mapping[str, Alert], now: datetime) -> int:
    over = [
        alert for fingerprint, alert in still_open.items() if alert.source == "portal" and fingerprint not in true_now
    ]
    return sum(alerts.end(alert, reason="It is over.", now=now) for alert in over)


def _says_otherwise(alert: Alert, condition: Condition) -> bool:
    return alert.source == "portal" and alert.annotations != condition.notice(alert.starts_at).annotations


def is_monitored(now: datetime) -> bool:
    """Whether Prometheus evidently raises alerts that arrive here."""
    heard_at = alerts.watchdog_heard_at()
    return heard_at is not None and now - heard_at < _silent()


def conditions(now: datetime, since: datetime) -> Iterator[Condition]:
    """All that is wrong now, as far as the portal knows without Prometheus, listening since then."""
    fleet = list(Machine.select().where(Machine.state << WITH_AGENT))
    yield from _agents(fleet, now, since)
    yield from _reclaims(fleet)
    yield from _runs(now)
    yield from _leases(now)
    yield from _still_open(now)
    yield from _network(now)
    yield from _certificates(now)
    yield from _tokens(now)


def _monitoring(now: datetime, since: datetime) -> Iterator[Condition]:
    patience = _patience(now)
    if patience is not None and now - max(alerts.watchdog_heard_at() or since, since) >= patience:
        yield Condition(
            "MonitoringSilent",
            "No Watchdog arrives from Prometheus and Alertmanager.",
            "Look whether both run and reach the portal, and whether Prometheus may read it. "
            "Until then the portal raises what it knows by itself.",
        )


def _patience(now: datetime) -> timedelta | None:
    """How long the Watchdog may be away before that is an alert; None where nobody expects it.

    Where the portal asks Alertmanager itself, it hears of it every minute. Else it comes as often as Alertmanager was
    told to repeat it, which is seen from the times before.
    """
    if config.current().alertmanager_url is not None:
        return _silent()
    heard_at, gap = alerts.watchdog_heard_at(), alerts.watchdog_gap()
    if heard_at is None or gap is None or now - heard_at >= MONITORING_FORGOTTEN:
        return None
    return max(_silent(), 2 * gap)


def _silent() -> timedelta:
    return timedelta(seconds=config.current().monitoring_silent_s)


def _agents(fleet: Sequence[Machine], now: datetime, since: datetime) -> Iterator[Condition]:
    """Silent agents, and what the others say is wrong. A machine in maintenance is somebody's work already."""
    watched = [machine for machine in fleet if machine.maintenance_since is None]
    ids = [machine.id for machine in watched]
    gpus, limits = machines.gpus_by_machine(ids), machines.limits()
    reports = {report.machine_id: report for report in MachineReport.select().where(MachineReport.machine << ids)}
    for machine in watched:
        report = reports.get(machine.id)
        told = health.of(machine, gpus.get(machine.id, []), report, now, limits)
        if told.is_online or now - since > timedelta(seconds=limits.silence_s):
            yield from _of_agent(machine, told)


def _of_agent(machine: Machine, told: Health) -> Iterator[Condition]:
    if not told.is_online:
        yield Condition(
            "AgentSilent",
            f"The agent of {machine.name} does not report.",
            "Look at the host: `remotegpu-agent doctor`. A lease on it still ends by itself.",
            {"host": machine.name},
        )
        return
    by_alert: dict[str, list[Problem]] = {}
    for problem in told.problems:
        if problem.code in BY_PROBLEM:
            by_alert.setdefault(BY_PROBLEM[problem.code], []).append(problem)
    for name, problems in by_alert.items():
        yield Condition(
            name,
            " ".join(problem.message for problem in problems),
            "The machine's page has the details; nobody new gets it meanwhile.",
            {"host": machine.name},
        )


def _reclaims(fleet: Iterable[Machine]) -> Iterator[Condition]:
    for machine in fleet:
        if machine.state == "quarantined":
            yield Condition(
                "MachineQuarantined",
                f"{machine.name} is not proven clean and is offered to nobody.",
                "Open the report of its reclaim, mend what it names and reclaim it again, or install it anew.",
                {"host": machine.name},
            )


def newest_runs(now: datetime) -> dict[tuple[str, str], Run]:
    """By machine and playbook the newest run that ended within a day; a verifying one ends in quarantine instead.

    Of a run only id, playbook and state: asked every few seconds, facts and statistics would be read for nothing.
    """
    of_hosts = (
        RunHost.select(RunHost.id, Run.id, Run.playbook, Run.state, Machine.name)
        .join(Run)
        .switch(RunHost)
        .join(Machine)
        .where(
            Run.state << ("succeeded", "failed", "lost"),
            Run.ended_at > now - RUN_REMEMBERED,
            Run.purpose != "verify",
        )
        .order_by(Run.id)
    )
    return {(entry.machine.name, entry.run.playbook): entry.run for entry in of_hosts}


def _runs(now: datetime) -> Iterator[Condition]:
    in_maintenance = {
        each.name for each in Machine.select(Machine.name).where(Machine.maintenance_since.is_null(False))
    }
    for (name, playbook), run in newest_runs(now).items():
        if run.state != "succeeded" and name not in in_maintenance:
            yield Condition(
                "RunFailed",
                f"The playbook {playbook} has failed on {name}: run {run.id} is {run.state}.",
                "Read the run's output, mend what it names, and run it again.",
                {"host": name, "playbook": playbook},
            )


def _leases(now: datetime) -> Iterator[Condition]:
    ending = (
        Lease.select(Lease, Machine)
        .join(Machine)
        .where(Lease.state == "active", Lease.ends_at <= now + LEASE_ENDING)
        .order_by(Lease.id)
    )
    for lease in ending:
        yield Condition(
            "LeaseEnding",
            f"Lease {lease.id} of {lease.machine.name} ends at {lease.ends_at:%Y-%m-%d %H:%M} UTC.",
            "Ask the customer whether it is to be extended; its data is wiped after the retention.",
            {"host": lease.machine.name, "lease": str(lease.id)},
        )


def grants_still_open() -> peewee.ModelSelect[Grant]:
    """What ended leases have open still, part by part, as far as nobody has written it off."""
    return (
        Grant.select(Grant, Lease, Machine)
        .join(Lease)
        .join(Machine)
        .where(
            Lease.state == "ending",
            Grant.desired == "closed",
            Grant.observed != "closed",
            Grant.written_off_at.is_null(),
        )
        .order_by(Grant.id)
    )


def openings_stuck(now: datetime) -> peewee.ModelSelect[Opening]:
    """What a host cannot open, and what it has open though nobody wants it any more; an ended lease's are grants'."""
    goes_on = Opening.lease.is_null() | (Lease.state == "active")
    return (
        Opening.select(Opening, Machine)
        .join(Machine)
        .switch(Opening)
        .join(Lease, peewee.JOIN.LEFT_OUTER)
        .where(Machine.state != "retired", _is_failed(Opening) | (_is_left(Opening, now) & goes_on))
        .order_by(Opening.id)
    )


def forwards_stuck(now: datetime) -> peewee.ModelSelect[Forward]:
    """The same of a gateway and its forwards, with the gateway: only leases have any."""
    return (
        Forward.select(Forward, Machine)
        .join(Machine, on=Forward.gateway)
        .switch(Forward)
        .join(Lease)
        .where(Forward.released_at.is_null(), Lease.state == "active", _is_failed(Forward) | _is_left(Forward, now))
        .order_by(Forward.id)
    )


def _is_failed(hole: type[Opening | Forward]) -> peewee.Expression:
    return hole.closed_at.is_null() & (hole.observed == "failed")


def _is_left(hole: type[Opening | Forward], now: datetime) -> peewee.Expression:
    return (hole.closed_at <= now - STILL_OPEN) & (hole.observed << ("open", "failed"))


def _still_open(now: datetime) -> Iterator[Condition]:
    for grant in grants_still_open().where(Grant.desired_at <= now - STILL_OPEN):
        lease = grant.lease
        yield Condition(
            "GrantStillOpen",
            f"Lease {lease.id} of {lease.machine.name} has ended, and a part of it is not seen closed since "
            f"{grant.desired_at:%Y-%m-%d %H:%M} UTC: {grant.kind}",
            "Look at the agent, or at the pipeline for names and groups. What cannot be reached can be written off.",
            {"host": lease.machine.name, "lease": str(lease.id), "part": grant.kind},
        )
    for opening in openings_stuck(now).where(Machine.maintenance_since.is_null()):
        why, state = opening.error or "The host does not say why.", opening.observed
        hole = f"{opening.protocol} {opening.first_port}-{opening.last_port} from {opening.source}"
        yield Condition(
            "OpeningStuck",
            f"Opening {opening.id} of {opening.machine.name} ({hole}) is {state}, which is not wanted: {why}",
            "Look at the host: `remotegpu-agent doctor`.",
            {"host": opening.machine.name, "opening": str(opening.id)},
        )
    for forward in forwards_stuck(now).where(Machine.maintenance_since.is_null()):
        why, state = forward.error or "The host does not say why.", forward.observed
        way = f"{forward.protocol} {forward.public_port} from {forward.source}"
        yield Condition(
            "ForwardStuck",
            f"Forward {forward.id} of {forward.gateway.name} ({way}) is {state}, which is not wanted: {why}",
            "Look at the host: `remotegpu-agent doctor`.",
            {"host": forward.gateway.name, "forward": str(forward.id)},
        )


def network_behind_since() -> datetime | None:
    """Since when a change waits for a stack; None where none does, or there is no stack."""
    since: datetime | None = network.state().behind_since
    return since if since is not None and network_applied.last_words() else None


def _network(now: datetime) -> Iterator[Condition]:
    why, since = network.state().frozen_reason, network_behind_since()
    if why is not None:
        yield Condition(
            "NetworkFrozen",
            f"The network is frozen: {why}",
            "Compare what is wanted with what the stacks have applied, then thaw it. No stack gets an export before.",
        )
    elif since is not None and since <= now - NOT_APPLIED:
        yield Condition(
            "NetworkNotApplied",
            f"A change of the network waits to be applied since {since:%Y-%m-%d %H:%M} UTC.",
            "Look at the pipeline's last run. Names and security groups stay as they were until it has applied it.",
        )


def certificates() -> dict[str, datetime]:
    """When the certificate that is shown ends, and the authority that hosts trust for it; those that can be read."""
    settings = config.current()
    shown = {"portal": settings.served_certificate, "ca": settings.ca_for_hosts}
    ends = {name: _end_of(file) for name, file in shown.items() if file is not None}
    return {name: ends_at for name, ends_at in ends.items() if ends_at is not None}


def _certificates(now: datetime) -> Iterator[Condition]:
    for name, ends_at in certificates().items():
        if ends_at <= now + CERTIFICATE_ENDING:
            yield Condition(
                "CertificateExpiring",
                f"The certificate {name} of the portal ends at {ends_at:%Y-%m-%d %H:%M} UTC.",
                "Its own: `systemctl start remotegpu-certificate`, by hand `portal init`. The authority (ca): "
                "docs/operator.md, A new authority. By ACME: `certbot renew`. Another one is for you to bring.",
                {"certificate": name},
            )


def _end_of(file: Path) -> datetime | None:
    """When the certificate in this file ends; None where there is none, as before an authority has given the first."""
    try:
        return x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None


def _tokens(now: datetime) -> Iterator[Condition]:
    """Of programs: with Prometheus's or Alertmanager's the monitoring would end. One that has ended is not missed."""
    ending = (
        ApiToken.select(ApiToken, User)
        .join(User)
        .where(ApiToken.revoked_at.is_null(), ApiToken.expires_at > now, ApiToken.expires_at <= now + TOKEN_ENDING)
    )
    for token in ending:
        yield Condition(
            "TokenExpiring",
            f"The API token “{token.name}” of {token.user.username} ends at {token.expires_at:%Y-%m-%d %H:%M} UTC.",
            "Make a new one, give it to the program that uses it, and revoke this one.",
            {"token": str(token.id)},
        )


def sweeps() -> tuple[tuple[str, Callable[[], object], float], ...]:
    """What happens to alerts by itself: name, act, seconds between. services/sweeps.py makes the rounds."""
    return (
        ("alerts_silences.end_due", alerts_silences.end_due, 5),
        ("alerts_relay.start", alerts_relay.start, 60),
        ("alerts_own.sweep", Watch().sweep, 10),
        ("alerts.prune", alerts.prune, 3600),
    )
