"""What the portal raises by itself: once, for as long as it is so, and only while Prometheus does not."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from portal.db import utcnow
from portal.models import Alert, Lease, Machine, Opening, Run, Tenant, User
from portal.services import (
    alerts,
    alerts_own,
    alerts_samples,
    leases,
    machines,
    network_forwards,
    network_openings,
    network_requests,
    provisioning,
    tokens,
)
from portal.services.actors import SYSTEM
from portal.services.alerts import Notice
from portal.services.alerts_own import Watch
from portal.settings import Settings
from tests.factories import actor_of, make_lease
from tests.support import network as ground
from tests.support import rental


def sweep(now: datetime | None = None, *, since: datetime | None = None) -> int:
    """Of a worker that has been running since yesterday."""
    return Watch(since or later(days=-1)).sweep(now)


def open_alerts() -> list[str]:
    return sorted(alert.name for alert in alerts.search(is_open=True))


def labels() -> dict[str, str]:
    return dict(Alert.select().order_by(Alert.id.desc()).get().labels)


def later(**span: float) -> datetime:
    return utcnow() + timedelta(**span)


@pytest.fixture
def now(database: Any) -> datetime:
    return utcnow()


def test_where_all_is_well_nothing_is_raised(now: datetime) -> None:
    rental.ready_host("gpu-1")
    assert sweep() == 0
    assert open_alerts() == []


def test_a_silent_agent_is_told_once_and_ends_by_itself(now: datetime) -> None:
    host = rental.ready_host("gpu-1")
    at = later(minutes=5)
    assert [sweep(at), sweep(at)] == [1, 0]
    (told,) = alerts.views(list(alerts.search(is_open=True)))
    assert (told.alert.name, told.machine_name, told.alert.source) == ("AgentSilent", "gpu-1", "portal")
    assert told.alert.labels == {"alertname": "AgentSilent", "severity": "critical", "host": "gpu-1"}
    assert told.way_out
    host.report()
    assert [sweep(), sweep()] == [1, 0]
    assert (Alert.get().state, Alert.select().count()) == ("resolved", 1)
    assert sweep(at) == 1, "silent again is another episode"


def test_a_machine_in_maintenance_is_somebodys_work_already(now: datetime) -> None:
    host = rental.ready_host()
    machines.start_maintenance(host.machine, reason="new fans", by=SYSTEM)
    assert sweep(later(minutes=5)) == 0
    machines.end_maintenance(host.machine, by=SYSTEM)
    assert sweep(later(minutes=5)) == 1


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"clock_offset_s": 600.0}, "ClockOffset"),
        ({"metrics": rental.metrics(free_bytes=rental.GIB)}, "DiskLow"),
        ({"gpu": rental.gpu_report([], state="timeout", message="no answer")}, "GpuDriverFailing"),
        ({"gpu": rental.gpu_report([])}, "GpuLost"),
    ],
)
def test_what_an_agent_reports_as_wrong_is_raised(now: datetime, said: dict[str, Any], name: str) -> None:
    host = rental.ready_host("gpu-1")
    host.report(**said)
    assert sweep() == 1
    assert (open_alerts(), labels()["host"]) == ([name], "gpu-1")
    host.report()
    assert (sweep(), open_alerts()) == (1, [])


def test_one_lost_gpu_of_two_is_named_and_a_second_one_is_the_same_alert(now: datetime) -> None:
    host = rental.ready_host("gpu-1")
    first, second = host.gpu_uuids
    host.report(gpu=rental.gpu_report([rental.gpu(first)]))
    sweep()
    assert second in Alert.get().annotations["summary"]
    host.report(gpu=rental.gpu_report([]))
    sweep()
    assert Alert.select().count() == 1
    assert first in Alert.get().annotations["summary"]


def test_a_machine_that_is_not_proven_clean_is_raised_until_it_is(now: datetime, tenant: Tenant) -> None:
    host = rental.ready_host("gpu-1")
    rental.reclaim(host, leased_and_ended(host, tenant), said=rental.verdict(ports="failed"))
    assert host.state == "quarantined"
    sweep()
    assert open_alerts() == ["MachineQuarantined"]


def leased_and_ended(host: rental.Host, tenant: Tenant) -> Lease:
    lease = rental.allocate(host, tenant)
    host.sees(lease)
    return rental.end(host, lease)


def test_a_failed_run_is_raised_until_the_next_one_goes_well_or_a_day_has_passed(now: datetime) -> None:
    machine = rental.confirm(rental.register("gpu-1"))
    rental.finish_run(provisioning.provision(machine, by=SYSTEM), "failed")
    sweep()
    assert open_alerts() == ["RunFailed"]
    assert labels() == {"alertname": "RunFailed", "severity": "warning", "host": "gpu-1", "playbook": "gpu_hosts"}
    sweep(later(hours=25))
    assert open_alerts() == []
    sweep()
    rental.finish_run(provisioning.provision(machines.get(machine.id), by=SYSTEM))
    sweep()
    assert open_alerts() == []
    assert Run.select().count() == 2


def test_a_failed_run_on_a_machine_in_maintenance_is_somebodys_work_already(now: datetime) -> None:
    machine = rental.confirm(rental.register("gpu-1"))
    rental.finish_run(provisioning.provision(machine, by=SYSTEM), "failed")
    machines.start_maintenance(machines.get(machine.id), reason="new fans", by=SYSTEM)
    sweep()
    assert open_alerts() == []
    machines.end_maintenance(machines.get(machine.id), by=SYSTEM)
    sweep()
    assert open_alerts() == ["RunFailed"]


def test_an_opening_that_failed_on_a_machine_in_maintenance_is_somebodys_work_already(now: datetime) -> None:
    machine = rental.ready_host("gpu-1").machine
    hole = {"protocol": "tcp", "first_port": 80, "last_port": 80, "source": "0.0.0.0/0"}
    Opening.create(machine=machine, observed="failed", **hole)
    machines.start_maintenance(machine, reason="new fans", by=SYSTEM)
    sweep()
    assert open_alerts() == []
    machines.end_maintenance(machine, by=SYSTEM)
    sweep()
    assert open_alerts() == ["OpeningStuck"]


@pytest.mark.parametrize("is_leased", [False, True], ids=["the machine's own", "a lease's, which goes on"])
@pytest.mark.parametrize("observed", ["open", "failed"])
def test_an_opening_that_was_closed_and_is_open_still_is_told_of_until_it_was_seen_closed(
    now: datetime, tenant: Tenant, is_leased: bool, observed: str
) -> None:
    host = rental.ready_host("gpu-1")
    Machine.update(hears_openings=True).execute()
    lease = rental.allocate(host, tenant) if is_leased else None
    kept, closed = (
        network_requests.open_port(host.machine, ground.wish(port), by=SYSTEM, lease=lease) for port in (8888, 9999)
    )
    ground.reports(host, openings=ground.seen(kept, closed))
    network_requests.close_port(closed, by=SYSTEM)
    ground.reports(host, openings=[*ground.seen(kept), *ground.seen(closed, state=observed)])

    def told(after: timedelta) -> list[str]:
        found = alerts_own.conditions(utcnow() + after, utcnow())
        return [each.labels["opening"] for each in found if each.name == "OpeningStuck"]

    assert told(timedelta(minutes=14)) == []
    assert told(timedelta(minutes=16)) == [str(closed.id)]
    sample = f'remotegpu_opening_stuck{{host="gpu-1",opening="{closed.id}"}} 1.0'
    assert sample in alerts_samples.exposition(later(minutes=16)).splitlines()
    ground.reports(host, openings=ground.seen(kept))
    assert told(timedelta(minutes=16)) == []


def test_a_forward_that_failed_or_was_closed_and_is_open_still_is_told_of_with_its_gateway(
    now: datetime, tenant: Tenant
) -> None:
    gateway, host = rental.ready_host("way-in", public_address="198.51.100.1"), rental.ready_host("gpu-1")
    ground.place(gateway, forward_ports="20000-20099")
    ground.place(host, gateway_id=gateway.id)
    Machine.update(hears_openings=True).execute()
    lease = rental.allocate(host, tenant, openings=[ground.wish()])
    ssh, opened = network_forwards.of_lease(lease)

    def told(after: timedelta) -> list[dict[str, str]]:
        found = alerts_own.conditions(utcnow() + after, utcnow())
        return [dict(each.labels) for each in found if each.name == "ForwardStuck"]

    ground.reports(gateway, forwards=[*ground.seen(ssh, state="failed", error="port in use"), *ground.seen(opened)])
    assert told(timedelta()) == [{"host": "way-in", "forward": str(ssh.id)}]
    network_requests.close_port(network_openings.wanted_of(host.machine, lease)[0], by=SYSTEM)
    ground.reports(gateway, forwards=ground.seen(ssh, opened))
    assert told(timedelta(minutes=14)) == []
    assert told(timedelta(minutes=16)) == [{"host": "way-in", "forward": str(opened.id)}]
    sample = f'remotegpu_forward_stuck{{host="way-in",forward="{opened.id}"}} 1.0'
    assert sample in alerts_samples.exposition(later(minutes=16)).splitlines()
    leases.end(lease, by=SYSTEM, reason="done")
    assert told(timedelta(minutes=16)) == [], "GrantStillOpen tells of an ended lease's"


def test_what_an_ended_lease_has_open_still_is_told_of_once(now: datetime, tenant: Tenant) -> None:
    host = rental.ready_host("gpu-1")
    Machine.update(hears_openings=True).execute()
    lease = rental.allocate(host, tenant, openings=[ground.wish()])
    (opening,) = network_openings.wanted_of(host.machine, lease)
    ground.reports(host, openings=ground.seen(opening))
    leases.end(lease, by=SYSTEM, reason="done")
    names = {each.name for each in alerts_own.conditions(later(minutes=16), utcnow())}
    assert {"GrantStillOpen", "OpeningStuck"} & names == {"GrantStillOpen"}


def test_a_lease_that_ends_within_a_day_is_told_and_an_extended_one_is_not(now: datetime, tenant: Tenant) -> None:
    host = rental.ready_host("gpu-1")
    lease = make_lease(host.machine, tenant, ends_at=later(hours=30))
    sweep()
    assert open_alerts() == []
    Lease.update(ends_at=later(hours=23)).where(Lease.id == lease.id).execute()
    sweep()
    assert (open_alerts(), labels()["lease"]) == (["LeaseEnding"], str(lease.id))
    Lease.update(ends_at=later(hours=48)).where(Lease.id == lease.id).execute()
    sweep()
    assert open_alerts() == []


def test_a_certificate_is_told_of_two_weeks_before_its_end(now: datetime, settings: Settings) -> None:
    object.__setattr__(settings, "public_url", "https://localhost")
    settings.certificate_file.parent.mkdir(parents=True)
    settings.certificate_file.write_bytes(certificate(later(days=15)))
    sweep()
    assert open_alerts() == []
    settings.certificate_file.write_bytes(certificate(later(days=13)))
    sweep()
    assert (open_alerts(), labels()["certificate"]) == (["CertificateExpiring"], "portal")
    settings.certificate_file.write_bytes(b"not a certificate")
    sweep()
    assert open_alerts() == []


def test_behind_a_proxy_it_is_the_certificate_that_is_shown_and_not_the_portals_own(
    now: datetime, settings: Settings, tmp_path: Path
) -> None:
    shown = tmp_path / "served.pem"
    behind = {"public_url": "https://localhost", "trusted_proxies": "unix", "host_ca_file": "system"}
    for name, value in behind.items():
        object.__setattr__(settings, name, value)
    settings.certificate_file.parent.mkdir(parents=True)
    for file in (settings.certificate_file, settings.ca_file):
        file.write_bytes(certificate(later(days=1)))
    sweep()
    assert open_alerts() == [], "nobody is shown these"
    object.__setattr__(settings, "served_certificate_file", str(shown))
    assert alerts_own.certificates() == {}, "an authority has not given one yet"
    shown.write_bytes(certificate(later(days=15)) + certificate(later(days=1)))
    sweep()
    assert open_alerts() == [], "the chain below it is not ours"
    shown.write_bytes(certificate(later(days=13)))
    sweep()
    assert (open_alerts(), labels()["certificate"]) == (["CertificateExpiring"], "portal")


def test_the_end_of_the_authority_that_hosts_trust_is_told_of(now: datetime, settings: Settings) -> None:
    settings.ca_file.parent.mkdir(parents=True)
    settings.ca_file.write_bytes(certificate(later(days=13)))
    sweep()
    assert (open_alerts(), labels()["certificate"]) == (["CertificateExpiring"], "ca")


def certificate(ends_at: datetime) -> bytes:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(ends_at - timedelta(days=90))
        .not_valid_after(ends_at)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_programs_token_is_told_of_a_week_before_its_end(now: datetime, operator: User) -> None:
    given = {"name": "alertmanager", "scopes": ["alerts"], "by": actor_of(operator)}
    token, _ = tokens.create(operator, expires_at=later(days=8), **given)
    sweep()
    assert open_alerts() == []
    sweep(later(days=2))
    assert open_alerts() == ["TokenExpiring"]
    tokens.revoke(token, by=actor_of(operator))
    sweep(later(days=2))
    assert open_alerts() == []


def test_after_the_portal_was_down_agents_and_prometheus_get_time_to_speak(now: datetime, settings: Settings) -> None:
    """Else a start would wake somebody for the whole fleet."""
    object.__setattr__(settings, "alertmanager_url", "http://127.0.0.1:1")
    rental.ready_host()
    alerts.note_watchdog(now)
    started = Watch()
    for minutes, told in (
        (60, []),
        (60.5, []),
        (62, ["AgentSilent"]),
        (65, ["AgentSilent"]),
        (67, ["AgentSilent", "MonitoringSilent"]),
    ):
        started.sweep(later(minutes=minutes))
        assert open_alerts() == told, minutes


# Beside Prometheus


def test_while_prometheus_raises_alerts_the_portal_does_not(now: datetime) -> None:
    rental.ready_host()
    at = later(minutes=5)
    alerts.note_watchdog(at)
    assert sweep(at) == 0
    assert open_alerts() == []


def test_when_prometheus_falls_silent_the_portal_says_so_and_raises_its_own(now: datetime) -> None:
    rental.ready_host()
    for minutes in (-1, 0):
        alerts.note_watchdog(later(minutes=minutes))
    sweep(later(minutes=5))
    assert open_alerts() == []
    sweep(later(minutes=7))
    assert open_alerts() == ["AgentSilent", "MonitoringSilent"]
    alerts.note_watchdog(later(minutes=8))
    sweep(later(minutes=8))
    assert open_alerts() == ["AgentSilent"], "what is still so stays until Prometheus takes it over or it is over"


def test_prometheus_takes_over_what_the_portal_raised_and_ends_it(now: datetime) -> None:
    host = rental.ready_host("gpu-1")
    at = later(minutes=5)
    sweep(at)
    alerts.acknowledge(alerts.get(Alert.get().id), by=SYSTEM, remark="on my way")
    notice = Notice(Alert.get().fingerprint, Alert.get().labels, {"summary": "told by Prometheus"}, at)
    assert alerts.deliver([notice], by=SYSTEM).unchanged == 1
    kept = Alert.get()
    assert (kept.source, kept.state, kept.remark) == ("alertmanager", "acknowledged", "on my way")
    host.report()
    alerts.note_watchdog(utcnow())
    sweep()
    assert Alert.get().state == "acknowledged", "it is Prometheus's now"
    over = Notice(notice.fingerprint, notice.labels, {}, at, ends_at=at + timedelta(minutes=1))
    alerts.deliver([over], by=SYSTEM)
    assert (Alert.get().state, Alert.select().count()) == ("resolved", 1)


def test_an_alertmanager_that_is_configured_and_never_heard_is_missed(now: datetime, settings: Settings) -> None:
    object.__setattr__(settings, "alertmanager_url", "http://127.0.0.1:1")
    sweep()
    assert open_alerts() == ["MonitoringSilent"]


def test_a_prometheus_that_was_taken_away_is_not_missed_for_ever(now: datetime) -> None:
    for minutes in (-1, 0):
        alerts.note_watchdog(later(minutes=minutes))
    sweep(later(hours=23))
    assert open_alerts() == ["MonitoringSilent"]
    sweep(later(hours=25))
    assert open_alerts() == []


def test_a_watchdog_that_is_repeated_seldom_is_not_missed_too_soon(now: datetime, settings: Settings) -> None:
    """Alertmanager's default is four hours; where the portal asks it itself, it hears every minute all the same."""
    alerts.note_watchdog(later(hours=-4))
    sweep(later(hours=-3))
    assert open_alerts() == [], "it came once: nobody knows how often it will"
    alerts.note_watchdog(now)
    sweep(later(hours=7))
    assert open_alerts() == []
    sweep(later(hours=9))
    assert open_alerts() == ["MonitoringSilent"]
    alerts.note_watchdog(later(hours=9))
    object.__setattr__(settings, "alertmanager_url", "http://127.0.0.1:1")
    sweep(later(hours=9.2))
    assert open_alerts() == ["MonitoringSilent"]


def test_how_long_the_watchdog_may_be_away_is_a_setting(now: datetime, settings: Settings) -> None:
    object.__setattr__(settings, "alertmanager_url", "http://127.0.0.1:1")
    object.__setattr__(settings, "monitoring_silent_s", 30.0)
    alerts.note_watchdog(now)
    sweep(later(seconds=29))
    assert open_alerts() == []
    sweep(later(seconds=31))
    assert open_alerts() == ["MonitoringSilent"]


def test_the_portals_own_alert_is_not_closed_by_hand(now: datetime, operator: User) -> None:
    rental.ready_host()
    sweep(later(minutes=5))
    with pytest.raises(alerts.Conflict, match="Silence it instead"):
        alerts.close(Alert.get(), by=actor_of(operator), remark="go away")
