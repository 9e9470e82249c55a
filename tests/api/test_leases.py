"""Leases: one at a time on a machine, extended when the host says so, ended when the host has closed."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from portal.db import atomic, connection, utcnow
from portal.errors import Conflict, Invalid
from portal.models import Attempt, AuditEntry, Event, Grant, Lease, Machine, MachineReport, Task, Tenant, User
from portal.services import agents, availability, commands, desired, grants, leases, machines, reclaims, runs
from portal.services.actors import SYSTEM
from portal.services.availability import CannotAllocate
from portal.services.runs import Outcome
from portal.services.transitions import WrongState
from tests.factories import actor_of
from tests.support import rental
from tests.support.rental import Host, allocate, ready_host, reclaim_of, tomorrow

SignIn = Callable[[User], Any]
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture
def host(database: Any) -> Host:
    return ready_host("gpu-1")


@pytest.fixture
def lease(host: Host, tenant: Tenant) -> Lease:
    """Active, seen open by the host, its data retained for an hour after the end."""
    lease = allocate(host, tenant, retain_s=3600)
    host.sees(lease, "open")
    return leases.get(lease.id)


def reasons(refusal: pytest.ExceptionInfo[CannotAllocate]) -> set[str]:
    return {reason.code for reason in refusal.value.reasons}


def wanted(host: Host) -> list[tuple[str, str]]:
    """What the host is told of leases."""
    return [(entry["login"], entry["state"]) for entry in desired.desired_of(host.machine)["leases"]]


# Allocate


def test_a_machine_is_allocated_over_http(host: Host, tenant: Tenant, operator: User, sign_in: SignIn) -> None:
    until = tomorrow()
    body = {"tenant_id": tenant.id, "until": until.isoformat(), "retain_s": 60, "remark": "for the demo"}
    answer = sign_in(operator).post(f"/admin/machines/{host.id}/allocate", body)
    assert answer.status_code == 201
    told = answer.json
    assert (told["state"], told["login"], told["uid"]) == ("active", f"lease{told['id']}", 20000)
    assert {grant["kind"]: (grant["desired"], grant["observed"]) for grant in told["grants"]} == {
        "keys": ("open", "unknown"),
        "tasks": ("open", "unknown"),
    }
    assert (told["is_end_acknowledged"], told["retain_s"]) == (False, 60)
    assert (host.state, wanted(host)) == ("leased", [(told["login"], "open")])
    assert "probe" not in answer.get_data(as_text=True)


def test_a_lease_raises_the_generation_and_leaves_an_audit_entry_and_an_event(
    host: Host, tenant: Tenant, operator: User
) -> None:
    before = host.machine.generation
    lease = allocate(host, tenant, by=actor_of(operator))
    assert host.machine.generation > before
    entry = AuditEntry.get(AuditEntry.action == "lease.active")
    assert (entry.actor_name, entry.resource_id, entry.tenant_id) == ("olga", lease.id, tenant.id)
    assert Event.select().where(Event.topic == "lease.active", Event.resource_id == lease.id).exists()
    assert Event.select().where(Event.topic == "machine.generation", Event.machine_id == host.id).exists()


def test_a_machine_has_one_lease_at_a_time(host: Host, lease: Lease, other_tenant: Tenant) -> None:
    generation = host.machine.generation
    with pytest.raises(CannotAllocate, match="gpu-1 is leased, not ready") as refusal:
        allocate(host, other_tenant)
    assert refusal.value.status == 409
    assert Lease.select().where(Lease.state << ("active", "ending")).count() == 1
    assert Lease.select().where(Lease.tenant == other_tenant).count() == 0
    assert (host.machine.generation, host.machine.next_uid) == (generation, 20001)


def test_the_database_refuses_a_second_open_lease_even_if_the_checks_are_wrong(
    host: Host, lease: Lease, other_tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "start_refusals", lambda *_: [])
    monkeypatch.setattr(availability, "overlaps", lambda *_args, **_kwargs: [])
    with atomic():
        Machine.update(state="ready").where(Machine.id == host.id).execute()
    with pytest.raises(CannotAllocate, match="at this moment"):
        allocate(host, other_tenant)
    assert Lease.select().where(Lease.tenant == other_tenant).count() == 0


def unsay_report(host: Host) -> None:
    MachineReport.delete().where(MachineReport.machine == host.id).execute()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (unsay_report, "offline"),
        (lambda host: host.report(received_at=utcnow() - HOUR), "offline"),
        (lambda host: host.report(gpu=rental.gpu_report([])), "gpu_missing"),
        (lambda host: host.report(gpu=rental.gpu_report([], state="driver_not_loaded")), "nvml"),
        (lambda host: host.report(clock_offset_s=300), "clock"),
        (lambda host: host.report(metrics=rental.metrics(free_bytes=1)), "disk"),
        (lambda host: host.report(agent_version="0.0.1"), "agent_version"),
        (lambda host: host.report(frozen=True), "frozen"),
        (lambda host: machines.start_maintenance(host.machine, reason="new fans", by=SYSTEM), "maintenance"),
        (lambda host: runs.queue("site", [host.machine], by=SYSTEM), "disruptive_run"),
    ],
)
def test_each_missing_condition_refuses_with_a_code_of_its_own(
    host: Host, tenant: Tenant, spoil: Callable[[Host], object], code: str
) -> None:
    spoil(host)
    with pytest.raises(CannotAllocate) as refusal:
        allocate(host, tenant)
    assert code in reasons(refusal)
    assert host.state == "ready"


def test_everything_that_stands_in_the_way_is_told_at_once(
    host: Host, tenant: Tenant, operator: User, sign_in: SignIn
) -> None:
    host.report(received_at=utcnow() - HOUR, clock_offset_s=300)
    machines.start_maintenance(host.machine, reason="new fans", by=SYSTEM)
    with atomic():
        Tenant.update(archived_at=utcnow()).where(Tenant.id == tenant.id).execute()
    body = {"tenant_id": tenant.id, "until": tomorrow().isoformat()}
    answer = sign_in(operator).post(f"/admin/machines/{host.id}/allocate", body)
    assert (answer.status_code, answer.json["code"]) == (409, "cannot_allocate")
    told = {reason["code"]: reason["message"] for reason in answer.json["info"]["reasons"]}
    assert set(told) == {"tenant_archived", "offline", "clock", "maintenance"}
    assert "new fans" in told["maintenance"]


def test_a_run_that_may_disturb_is_named_until_it_has_ended(host: Host, tenant: Tenant) -> None:
    run = runs.queue("site", [host.machine], by=SYSTEM)
    runs.queue("verify", [host.machine], by=SYSTEM)
    with pytest.raises(CannotAllocate, match=rf"Run {run.id} \(site\) is queued on gpu-1"):
        allocate(host, tenant)
    token = str(uuid.uuid4())
    assert runs.claim(token, lock_s=60) == run
    with pytest.raises(CannotAllocate, match=rf"Run {run.id} \(site\) is running on gpu-1"):
        allocate(host, tenant)
    assert host.machine.next_uid == 20000, "a refusal leaves nothing behind"
    runs.finish(run, token, Outcome("succeeded", exit_code=0))
    host.answers("baseline", rental.baseline())
    allocate(host, tenant)
    assert host.state == "leased", "a run that only looks stands in nobody's way"


def test_a_lease_for_later_waits_for_the_end_of_a_run_that_may_disturb(host: Host, tenant: Tenant) -> None:
    lease = allocate(host, tenant, starts_at=utcnow() + HOUR)
    run = runs.queue("site", [host.machine], by=SYSTEM)
    host.report(received_at=lease.starts_at)
    assert leases.activate_due(lease.starts_at) == 0
    runs.cancel(run, by=SYSTEM)
    assert leases.activate_due(lease.starts_at) == 1


def test_a_retained_lease_is_not_continued_under_a_run_that_may_disturb(host: Host, lease: Lease) -> None:
    rental.end(host, lease)
    runs.queue("site", [host.machine], by=SYSTEM)
    with pytest.raises(CannotAllocate) as refusal:
        leases.extend(lease, until=tomorrow(), by=SYSTEM)
    assert reasons(refusal) == {"disruptive_run"}
    assert reclaim_of(lease).state == "waiting", "and its data is still there"


def test_a_machine_that_was_never_provisioned_is_not_ready(database: Any, tenant: Tenant) -> None:
    machine = rental.register("gpu-9")
    with pytest.raises(CannotAllocate, match="is registered, not ready"):
        leases.allocate(machine, to=tenant, until=tomorrow(), retain_s=0, by=SYSTEM)


def test_a_machine_without_a_passed_report_after_its_last_lease_is_refused(host: Host, tenant: Tenant) -> None:
    rental.end(host, allocate(host, tenant))
    with atomic():  # as if somebody had meddled with the state
        Machine.update(state="ready").where(Machine.id == host.id).execute()
    with pytest.raises(CannotAllocate) as refusal:
        allocate(host, tenant)
    assert "not_clean" in reasons(refusal)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"until": utcnow() - HOUR}, "until"),
        ({"until": utcnow() + HOUR, "starts_at": utcnow() + DAY}, "until"),
        ({"starts_at": utcnow() - HOUR}, "starts_at"),
        ({"retain_s": -1}, "retain_s"),
        ({"retain_s": leases.MAX_RETAIN_S + 1}, "retain_s"),
    ],
)
def test_times_that_cannot_be_are_refused_by_field(
    host: Host, tenant: Tenant, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refusal:
        allocate(host, tenant, **given)
    assert list(refusal.value.fields) == [field]
    assert Lease.select().count() == 0


@pytest.mark.parametrize(
    "body",
    [
        {"until": "2030-01-01T00:00:00"},
        {"until": "tomorrow"},
        {"until": "2030-01-01T00:00:00Z", "state": "active"},
        {"until": "2030-01-01T00:00:00Z", "uid": 0},
        {"until": "2030-01-01T00:00:00Z", "login": "root"},
        {"until": "2030-01-01T00:00:00Z", "tenant_id": "1"},
        {"until": "2030-01-01T00:00:00Z", "retain_s": 1.5},
        {},
    ],
)
def test_a_caller_sets_the_fields_that_are_theirs_and_times_have_a_zone(
    host: Host, tenant: Tenant, operator: User, sign_in: SignIn, body: dict[str, Any]
) -> None:
    answer = sign_in(operator).post(f"/admin/machines/{host.id}/allocate", {"tenant_id": tenant.id, **body})
    assert answer.status_code == 422
    assert host.state == "ready"


def test_customers_allocate_and_end_nothing(host: Host, lease: Lease, customer: User, sign_in: SignIn) -> None:
    person = sign_in(customer)
    body = {"tenant_id": 1, "until": tomorrow().isoformat()}
    assert person.post(f"/admin/machines/{host.id}/allocate", body).status_code == 403
    for what in ("extend", "end", "write-off"):
        assert person.post(f"/admin/leases/{lease.id}/{what}", {"reason": "x"}).status_code == 403
    assert person.get("/admin/leases").status_code == 403
    assert leases.get(lease.id).state == "active"


def test_a_uid_is_never_used_twice_on_a_machine(host: Host, tenant: Tenant) -> None:
    seen = []
    for _ in range(3):
        lease = allocate(host, tenant)
        seen.append((lease.login, lease.uid))
        rental.reclaim(host, rental.end(host, lease))
        host.report()
    assert [uid for _, uid in seen] == [20000, 20001, 20002]
    assert len({login for login, _ in seen}) == 3


def test_a_machine_that_has_used_up_its_uids_is_not_leased(host: Host, tenant: Tenant) -> None:
    with atomic():
        Machine.update(next_uid=leases.LAST_UID + 1).where(Machine.id == host.id).execute()
    with pytest.raises(CannotAllocate, match="used up its UIDs"):
        allocate(host, tenant)


# Later


def test_a_lease_for_later_waits_and_begins_at_its_time(host: Host, tenant: Tenant) -> None:
    start = utcnow() + HOUR
    lease = allocate(host, tenant, starts_at=start, until=start + DAY)
    assert (lease.state, host.state, wanted(host)) == ("scheduled", "ready", [])
    assert leases.activate_due(start - timedelta(seconds=1)) == 0
    host.report(received_at=start)
    assert leases.activate_due(start) == 1
    assert (leases.get(lease.id).state, host.state, wanted(host)) == ("active", "leased", [(lease.login, "open")])


def test_a_lease_for_later_waits_until_its_machine_is_ready(
    host: Host, tenant: Tenant, operator: User, sign_in: SignIn
) -> None:
    start = utcnow() + HOUR
    lease = allocate(host, tenant, starts_at=start, until=start + DAY)
    host.report(received_at=start, clock_offset_s=300)
    assert leases.activate_due(start) == 0
    assert leases.get(lease.id).state == "scheduled"
    with atomic():
        Lease.update(starts_at=utcnow() - HOUR).where(Lease.id == lease.id).execute()
    told = sign_in(operator).get(f"/admin/leases/{lease.id}").json["waits_for"]
    assert [reason["code"] for reason in told] == ["clock"]
    host.report(received_at=start)
    assert leases.activate_due(start) == 1


def test_a_lease_that_could_never_begin_ends_and_says_why(host: Host, tenant: Tenant) -> None:
    start = utcnow() + HOUR
    lease = allocate(host, tenant, starts_at=start, until=start + HOUR)
    assert leases.activate_due(start + HOUR) == 0
    ended = leases.get(lease.id)
    assert (ended.state, ended.activated_at) == ("ended", None)
    assert "not ready" in ended.end_reason
    assert machines.is_proven_clean(host.machine)
    assert (wanted(host), host.state) == ([], "ready")


def test_a_scheduled_lease_is_called_off(host: Host, tenant: Tenant) -> None:
    start = utcnow() + HOUR
    lease = allocate(host, tenant, starts_at=start, until=start + DAY)
    called_off = leases.end(lease, by=SYSTEM, reason="not needed")
    assert (called_off.state, called_off.end_reason) == ("ended", "not needed")
    assert leases.activate_due(start) == 0
    assert allocate(host, tenant).state == "active"


@pytest.mark.parametrize(
    ("starts_h", "hours", "fits"),
    [(1, 9, True), (1, 9.5, False), (30, 2, True), (20, 1, False), (9, 30, False), (24.5, 1, False), (25, 1, True)],
)
def test_leases_for_later_never_overlap_and_retention_counts(
    host: Host, tenant: Tenant, starts_h: float, hours: float, fits: bool
) -> None:
    """One from hour 10.5 to 24 with an hour of retention is there; each other one has an hour of retention too."""
    now = utcnow()
    allocate(host, tenant, starts_at=now + 10.5 * HOUR, until=now + 24 * HOUR, retain_s=3600)
    given = {"starts_at": now + starts_h * HOUR, "until": now + (starts_h + hours) * HOUR, "retain_s": 1800}
    if fits:
        assert allocate(host, tenant, **given).state == "scheduled"
    else:
        with pytest.raises(CannotAllocate, match="its retention included") as refusal:
            allocate(host, tenant, **given)
        assert reasons(refusal) == {"overlap"}


def test_a_lease_from_now_must_end_before_the_next_one_begins(host: Host, tenant: Tenant) -> None:
    allocate(host, tenant, starts_at=utcnow() + HOUR, until=utcnow() + DAY)
    with pytest.raises(CannotAllocate, match="retention included"):
        allocate(host, tenant, until=utcnow() + 2 * HOUR)
    assert allocate(host, tenant, until=utcnow() + HOUR / 2).state == "active"


# Extend


def test_an_extension_counts_once_the_host_has_acknowledged_it(
    host: Host, lease: Lease, operator: User, sign_in: SignIn
) -> None:
    staff, first = sign_in(operator), lease.ends_at
    later = first + DAY
    told = staff.post(f"/admin/leases/{lease.id}/extend", {"until": later.isoformat()}).json
    assert datetime.fromisoformat(told["ends_at"]) == later
    assert datetime.fromisoformat(told["acknowledged_ends_at"]) == first
    assert told["is_end_acknowledged"] is False
    host.sees(lease, "open", ends_at=rental.told(first))
    assert leases.get(lease.id).acknowledged_ends_at == first
    host.sees(lease, "open")
    assert staff.get(f"/admin/leases/{lease.id}").json["is_end_acknowledged"] is True


def test_an_end_that_is_not_armed_is_not_acknowledged(host: Host, tenant: Tenant) -> None:
    lease = allocate(host, tenant)
    host.sees(lease, "open", end_armed=False)
    assert leases.get(lease.id).acknowledged_ends_at is None


def test_the_host_is_told_the_new_end(host: Host, lease: Lease) -> None:
    before = host.machine.generation
    leases.extend(lease, until=lease.ends_at + DAY, by=SYSTEM)
    (told,) = desired.desired_of(host.machine)["leases"]
    assert datetime.fromisoformat(told["ends_at"]) == lease.ends_at + DAY
    assert host.machine.generation > before


def test_an_extension_is_later_and_meets_no_other_lease(host: Host, lease: Lease, other_tenant: Tenant) -> None:
    with pytest.raises(Invalid, match="later"):
        leases.extend(lease, until=lease.ends_at - HOUR, by=SYSTEM)
    start = lease.ends_at + DAY
    allocate(host, other_tenant, starts_at=start, until=start + DAY)
    with pytest.raises(CannotAllocate, match="retention included"):
        leases.extend(lease, until=start, by=SYSTEM)
    with pytest.raises(CannotAllocate, match="retention included"):
        leases.extend(lease, until=start - HOUR / 2, by=SYSTEM)  # its own retention would reach into it
    assert leases.extend(lease, until=start - HOUR, by=SYSTEM).ends_at == start - HOUR


def test_a_lease_that_is_over_or_ending_is_not_extended(host: Host, lease: Lease) -> None:
    with atomic():
        Lease.update(ends_at=utcnow() - timedelta(seconds=1)).where(Lease.id == lease.id).execute()
    with pytest.raises(Conflict, match="is ending on the host"):
        leases.extend(lease, until=tomorrow(), by=SYSTEM)
    leases.end_due()
    with pytest.raises(Conflict, match="is ending on the host"):
        leases.extend(lease, until=tomorrow(), by=SYSTEM)


def test_an_extension_that_came_first_keeps_the_sweep_from_closing(host: Host, lease: Lease) -> None:
    over = lease.ends_at
    leases.extend(lease, until=over + DAY, by=SYSTEM)
    assert leases.end_due(over) == 0
    assert leases.get(lease.id).state == "active"


def test_within_the_retention_a_lease_goes_on_with_login_uid_and_data(host: Host, lease: Lease) -> None:
    rental.end(host, lease)
    following = leases.extend(lease, until=tomorrow(), by=SYSTEM)
    assert following.id != lease.id
    assert (following.state, following.login, following.uid) == ("active", lease.login, lease.uid)
    assert (following.continues_id, following.host_id) == (lease.id, lease.id)
    assert (reclaim_of(lease).state, host.state) == ("cancelled", "leased")
    assert wanted(host) == [(lease.login, "open")]
    reclaims.advance_due(utcnow() + DAY)
    assert host.state == "leased"
    host.sees(following, "open")
    assert leases.get(following.id).acknowledged_ends_at == following.ends_at


def test_a_continued_lease_ends_and_is_reclaimed_like_any_other(host: Host, lease: Lease) -> None:
    rental.end(host, lease)
    following = leases.extend(lease, until=tomorrow(), by=SYSTEM)
    rental.end(host, following)
    reclaims.advance_due(utcnow() + 2 * HOUR)
    assert reclaim_of(following).state == "cleaning"
    assert host.queued("clean").lease_id == following.id


def test_after_the_wipe_has_begun_nothing_is_continued(host: Host, lease: Lease) -> None:
    rental.end(host, lease)
    reclaims.advance_due(utcnow() + 2 * HOUR)
    with pytest.raises(Conflict, match="not there any more"):
        leases.extend(lease, until=tomorrow(), by=SYSTEM)
    assert Lease.select().count() == 1


def test_one_continues_the_lease_when_two_ask(host: Host, lease: Lease) -> None:
    rental.end(host, lease)
    leases.extend(lease, until=tomorrow(), by=SYSTEM)
    with pytest.raises(Conflict, match="it goes on as lease"):
        leases.extend(lease, until=tomorrow(), by=SYSTEM)
    assert Lease.select().where(Lease.state == "active").count() == 1


def test_retained_data_keeps_the_machine_from_others(host: Host, lease: Lease, other_tenant: Tenant) -> None:
    rental.end(host, lease)
    with pytest.raises(CannotAllocate) as refusal:
        allocate(host, other_tenant)
    assert reasons(refusal) == {"not_ready", "overlap"}
    with pytest.raises(CannotAllocate, match="retention included"):
        allocate(host, other_tenant, starts_at=utcnow() + HOUR / 2, until=utcnow() + DAY)


# End


def test_a_lease_ends_when_the_host_has_closed_everything(host: Host, lease: Lease) -> None:
    leases.end(lease, by=SYSTEM, reason="paid until today")
    ending = leases.get(lease.id)
    assert (ending.state, ending.end_reason, wanted(host)) == ("ending", "paid until today", [(lease.login, "closed")])
    host.sees(lease, "open", processes=3)
    assert leases.get(lease.id).state == "ending"
    host.sees(lease, "closed", processes=1)
    assert leases.get(lease.id).state == "ending"
    host.sees(lease, "closed", processes=None)
    assert leases.get(lease.id).state == "ending"
    host.sees(lease, "error", message="a process resists")
    assert leases.get(lease.id).state == "ending"
    host.sees(lease, "closed", processes=0)
    ended = leases.get(lease.id)
    assert (ended.state, host.state, reclaim_of(lease).state) == ("ended", "leased", "waiting")
    assert wanted(host) == []


def test_the_page_can_say_what_is_still_open_and_since_when(
    host: Host, lease: Lease, operator: User, sign_in: SignIn
) -> None:
    leases.end(lease, by=SYSTEM, reason="done")
    host.sees(lease, "error", message="a process resists")
    told = {grant["kind"]: grant for grant in sign_in(operator).get(f"/admin/leases/{lease.id}").json["grants"]}
    assert (told["keys"]["desired"], told["keys"]["observed"]) == ("closed", "unknown")
    assert told["keys"]["detail"]["message"] == "a process resists"
    assert datetime.fromisoformat(told["keys"]["desired_at"]) <= utcnow()


def test_the_sweep_closes_what_is_over_and_nothing_else(host: Host, lease: Lease, tenant: Tenant) -> None:
    other = ready_host("gpu-2")
    going_on = allocate(other, tenant, until=lease.ends_at + DAY)
    assert leases.end_due(lease.ends_at - timedelta(seconds=1)) == 0
    assert leases.end_due(lease.ends_at) == 1
    assert leases.end_due(lease.ends_at) == 0
    assert [leases.get(each.id).state for each in (lease, going_on)] == ["ending", "active"]


def test_a_host_that_closed_by_itself_while_we_were_away_is_believed_after_our_own_end(
    host: Host, lease: Lease
) -> None:
    host.sees(lease, "closed")
    assert leases.get(lease.id).state == "active"
    leases.end_due(lease.ends_at)
    host.sees(lease, "closed")
    assert leases.get(lease.id).state == "ended"


def test_a_lease_that_the_host_never_heard_of_ends_once_it_has_applied_everything(host: Host, tenant: Tenant) -> None:
    lease = allocate(host, tenant)
    leases.end(lease, by=SYSTEM, reason="a slip")
    leases.observed(host.machine, [])
    assert leases.get(lease.id).state == "ending"
    host.applies_everything()
    leases.observed(host.machine, [])
    assert leases.get(lease.id).state == "ended"


def test_a_host_does_not_speak_for_the_lease_of_another(host: Host, lease: Lease) -> None:
    leases.end(lease, by=SYSTEM, reason="done")
    stranger = ready_host("gpu-2")
    leases.observed(stranger.machine, [rental.observed(lease, "closed")])
    assert leases.get(lease.id).state == "ending"
    assert [grant.observed for grant in grants.of_lease(lease)] == ["open", "open"]


def a_running_attempt(lease: Lease, user: User) -> Attempt:
    task = Task.create(lease=lease, created_by=user, name="train", command="sleep 1000", state="running")
    return Attempt.create(task=task, number=1, state="running")


def test_a_closed_lease_waits_for_the_exit_codes_of_its_tasks(host: Host, lease: Lease, customer: User) -> None:
    attempt = a_running_attempt(lease, customer)
    leases.end(lease, by=SYSTEM, reason="done")
    assert Attempt.get_by_id(attempt.id).desired == "stop"
    host.sees(lease, "closed")
    assert leases.get(lease.id).state == "ending"
    Attempt.update(state="stopped").where(Attempt.id == attempt.id).execute()
    host.sees(lease, "closed")
    assert leases.get(lease.id).state == "ended"


def test_a_task_whose_end_is_never_told_does_not_hold_the_lease_for_ever(
    host: Host, lease: Lease, customer: User
) -> None:
    a_running_attempt(lease, customer)
    leases.end(lease, by=SYSTEM, reason="done")
    host.sees(lease, "closed")
    assert leases.finish_silent(utcnow() + leases.TASKS_WAIT - timedelta(seconds=5)) == 0
    assert leases.get(lease.id).state == "ending"
    assert leases.finish_silent(utcnow() + leases.TASKS_WAIT) == 1
    assert leases.get(lease.id).state == "ended"


def test_a_lease_is_ended_once(host: Host, lease: Lease) -> None:
    leases.end(lease, by=SYSTEM, reason="first")
    with pytest.raises(WrongState, match="is ending by now"):
        leases.end(lease, by=SYSTEM, reason="second")
    assert leases.get(lease.id).end_reason == "first"


def test_an_operator_writes_off_a_host_that_will_not_answer(
    host: Host, lease: Lease, operator: User, sign_in: SignIn
) -> None:
    answer = sign_in(operator).post(f"/admin/leases/{lease.id}/write-off", {"reason": "the rack burned down"})
    assert (answer.status_code, answer.json["state"]) == (200, "ended")
    entry = AuditEntry.get(AuditEntry.action == "lease.ended")
    assert entry.detail["not_observed_closed"] == ["keys", "tasks"]
    reclaims.advance_due(utcnow() + 2 * HOUR)
    reclaims.advance_due(utcnow() + DAY)
    assert host.state == "quarantined"


def test_what_runs_on_a_host_that_is_written_off_is_lost(host: Host, lease: Lease, customer: User) -> None:
    attempt = a_running_attempt(lease, customer)
    leases.write_off(lease, by=SYSTEM, reason="the rack burned down")
    lost = Attempt.get_by_id(attempt.id)
    assert (lost.state, lost.exit_code) == ("lost", None)


def test_only_what_is_open_is_written_off(host: Host, lease: Lease) -> None:
    rental.end(host, lease)
    with pytest.raises(Conflict, match="is ended"):
        leases.write_off(lease, by=SYSTEM, reason="again")


# Grants


def test_a_grant_says_since_when_it_is_so(host: Host, tenant: Tenant) -> None:
    lease = allocate(host, tenant)
    host.sees(lease, "open", key_fingerprints=["SHA256:b", "SHA256:a"])
    first = grants.get(lease, "keys")
    assert (first.observed, first.detail["fingerprints"]) == ("open", ["SHA256:a", "SHA256:b"])
    host.sees(lease, "open", key_fingerprints=["SHA256:a"])
    second = grants.get(lease, "keys")
    assert (second.observed_at, second.detail["fingerprints"]) == (first.observed_at, ["SHA256:a"])
    host.sees(lease, "closed")
    assert grants.get(lease, "keys").observed_at > first.observed_at


def test_a_report_without_news_writes_nothing(host: Host, lease: Lease) -> None:
    entry = rental.observed(lease, "open")
    leases.observed(host.machine, [entry])
    before = (Event.select().count(), AuditEntry.select().count(), [g.observed_at for g in grants.of_lease(lease)])
    leases.observed(host.machine, [entry])
    after = (Event.select().count(), AuditEntry.select().count(), [g.observed_at for g in grants.of_lease(lease)])
    assert before == after


def test_no_grant_is_left_open_by_an_end(host: Host, lease: Lease) -> None:
    leases.end(lease, by=SYSTEM, reason="done")
    assert Grant.select().where(Grant.lease == lease, Grant.desired == "open").count() == 0


# Look


def test_leases_are_listed_newest_first_and_filtered(
    host: Host, lease: Lease, other_tenant: Tenant, operator: User, sign_in: SignIn
) -> None:
    later = allocate(ready_host("gpu-2"), other_tenant)
    staff = sign_in(operator)
    assert [item["id"] for item in staff.get("/admin/leases").json["items"]] == [later.id, lease.id]
    assert [item["id"] for item in staff.get(f"/admin/leases?machine_id={host.id}").json["items"]] == [lease.id]
    assert [item["id"] for item in staff.get(f"/admin/leases?tenant_id={other_tenant.id}").json["items"]] == [later.id]
    assert staff.get("/admin/leases?state=ended").json["total"] == 0
    assert staff.get("/admin/leases?state=nonsense").status_code == 422
    assert staff.get("/admin/leases/999999").status_code == 404


def test_times_are_answered_in_utc(host: Host, lease: Lease, operator: User, sign_in: SignIn) -> None:
    told = sign_in(operator).get(f"/admin/leases/{lease.id}").json["ends_at"]
    assert datetime.fromisoformat(told).tzinfo is not None
    assert datetime.fromisoformat(told).astimezone(UTC) == lease.ends_at


# At the same moment


def at_once(*acts: Callable[[], object]) -> list[object]:
    """Do all of it in threads of their own; what each came to: its answer, or the refusal."""
    gate = threading.Barrier(len(acts))
    outcomes: list[object] = [None for _ in acts]

    def do(place: int) -> None:
        with connection():
            gate.wait(30)
            try:
                outcomes[place] = acts[place]()
            except Conflict as refusal:
                outcomes[place] = refusal

    threads = [threading.Thread(target=do, args=(place,)) for place in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


def test_an_extension_and_the_sweep_at_one_moment_have_one_winner(host: Host, tenant: Tenant) -> None:
    for _ in range(5):
        host.report()
        lease = allocate(host, tenant)
        over, later = lease.ends_at, lease.ends_at + DAY
        closed, _ = at_once(partial(leases.end_due, over), partial(leases.extend, lease, until=later, by=SYSTEM))
        now = leases.get(lease.id)
        assert (now.state, now.ends_at) in (("active", later), ("ending", over))
        assert closed == (1 if now.state == "ending" else 0)
        if now.state == "active":
            leases.end(now, by=SYSTEM, reason="done")
        host.sees(now, "closed")
        rental.reclaim(host, leases.get(lease.id))


def try_to_claim() -> object:
    """What a worker does all the time."""
    return next((run for _ in range(30) if (run := runs.claim(str(uuid.uuid4()), lock_s=60)) is not None), None)


BEGINNINGS: dict[str, Callable[[Host, Tenant], Callable[[], object]]] = {
    "allocated": lambda host, tenant: partial(allocate, host, tenant),
    "begun": lambda host, tenant: partial(leases.activate_due, scheduled(host, tenant).starts_at),
    "continued": lambda host, tenant: partial(leases.extend, retained(host, tenant), until=tomorrow(), by=SYSTEM),
}


def scheduled(host: Host, tenant: Tenant) -> Lease:
    lease = allocate(host, tenant, starts_at=utcnow() + HOUR)
    host.report(received_at=lease.starts_at)
    return lease


def retained(host: Host, tenant: Tenant) -> Lease:
    return rental.end(host, allocate(host, tenant, retain_s=3600))


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_lease_and_a_run_that_may_disturb_it_never_have_a_machine_both(
    database: Any, tenant: Tenant, beginning: str
) -> None:
    for number in range(6):
        host = ready_host(f"gpu-{number}")
        begin = BEGINNINGS[beginning](host, tenant)
        at_once(begin, partial(runs.queue, "site", [host.machine], by=SYSTEM), try_to_claim)
        lease, run = leases.find_open(host.machine), runs.find_disrupting(host.machine)
        assert (lease is None) != (run is None), f"{lease and lease.state} and {run and run.state}"
        if run is not None and run.state == "queued":
            runs.cancel(run, by=SYSTEM)


ACTS: dict[str, Callable[[Host, Lease], object]] = {
    "extend": lambda _, lease: leases.extend(lease, until=lease.ends_at + DAY, by=SYSTEM),
    "end": lambda _, lease: leases.end(lease, by=SYSTEM, reason="done"),
    "end_due": lambda _, lease: leases.end_due(lease.ends_at),
    "observed": lambda host, lease: host.sees(lease, "closed"),
    "write_off": lambda _, lease: leases.write_off(lease, by=SYSTEM, reason="burned down"),
    "maintenance": lambda host, _: machines.start_maintenance(host.machine, reason="fans", by=SYSTEM),
    "credential": lambda host, _: agents.rotate(host.machine, by=SYSTEM),
    "command": lambda host, _: commands.queue(host.machine, "baseline", by=SYSTEM),
}


@pytest.mark.parametrize("name", ACTS)
def test_whoever_changes_something_of_a_machine_takes_its_row_first(
    host: Host, lease: Lease, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In any other order two transactions could wait for each other for ever."""
    with caplog.at_level(logging.DEBUG, logger="peewee"):
        ACTS[name](host, lease)
    statements = [record.msg[0] for record in caplog.records if record.name == "peewee"]
    writes = [text for text in statements if text.startswith(("UPDATE", "INSERT", "DELETE"))]
    assert writes[0].startswith('UPDATE "machine"')
    assert len(writes) > 1
