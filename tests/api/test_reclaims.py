"""A machine is offered again only when it is proven clean: each silence, each lie and each late word quarantines it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.integrations import protocol
from portal.models import AuditEntry, Command, Lease, Machine, Reclaim, Run, Tenant, User
from portal.services import commands, keys, leases, machines, provisioning, reclaims, reports, retirement, runs
from portal.services.actors import SYSTEM
from portal.services.availability import CannotAllocate
from tests.api.test_leases import at_once
from tests.factories import actor_of, make_machine
from tests.support import rental
from tests.support.rental import Host, clean_result, ready_host, reclaim_of, tomorrow, verdict

SignIn = Callable[[User], Any]


@pytest.fixture
def host(database: Any) -> Host:
    return ready_host("gpu-1")


@pytest.fixture
def ended(host: Host, tenant: Tenant) -> Lease:
    """A lease that has ended on the host; nothing is retained."""
    return rental.end(host, rental.allocate(host, tenant))


def actions_of(machine: Host) -> list[str]:
    """What the trail says of the machine and its reclaims, in order."""
    return [entry.action for entry in AuditEntry.select().order_by(AuditEntry.id)]


def without(check: str) -> tuple[dict[str, Any], str]:
    """A verdict that says nothing of one check, and what is said of it."""
    said = verdict()
    kept = [each for each in said["checks"] if each["id"] != check]
    return {**said, "checks": kept}, f"Nothing is said of the checks {check}. An older agent does not know them"


# The way that ends well


def test_a_lease_ends_and_the_machine_is_proven_clean_and_ready(host: Host, ended: Lease) -> None:
    assert (reclaim_of(ended).state, host.state) == ("waiting", "leased")
    reclaims.advance_due()
    assert (reclaim_of(ended).state, host.state) == ("cleaning", "reclaiming")
    host.answers("clean", clean_result())
    assert (reclaim_of(ended).state, host.state) == ("verifying", "reclaiming")
    rental.finish_run(reclaim_of(ended).run_id, verdicts={"gpu-1": verdict()})
    assert (reclaim_of(ended).state, host.state) == ("passed", "ready")
    assert machines.is_proven_clean(host.machine)


def test_a_passed_reclaim_gives_the_agent_a_new_credential(host: Host, ended: Lease) -> None:
    rental.reclaim(host, ended)
    assert host.queued("rotate_credential").state == "queued"


def test_the_machine_can_be_leased_again_with_another_login_and_uid(
    host: Host, ended: Lease, other_tenant: Tenant
) -> None:
    rental.reclaim(host, ended)
    host.report()
    following = rental.allocate(host, other_tenant)
    assert following.login != ended.login
    assert following.uid == ended.uid + 1


# The report


def test_the_report_says_who_what_and_why_and_is_signed(host: Host, ended: Lease) -> None:
    file = reclaims.report_file(rental.reclaim(host, ended))
    key = reports.serialization.load_pem_public_key(reports.public_key_pem().encode())
    report = reports.verify(file.encode(), key)  # type: ignore[arg-type]  # it is an Ed25519 key
    assert (report["result"], report["reasons"], report["level"]) == ("passed", [], "tidy")
    assert report["machine"] == {"id": host.id, "name": "gpu-1"}
    assert (report["lease"]["id"], report["lease"]["uid"]) == (ended.id, ended.uid)
    assert report["baseline"]["sha256"] == machines.find_baseline(host.machine).digest
    steps = [step["id"] for step in report["cleaning"]["result"]["steps"]]
    assert steps == list(protocol.words("cleaning_step"))
    checks = [check["id"] for check in report["verification"]["verdict"]["checks"]]
    assert checks == [*reclaims.FROM_OUTSIDE, *protocol.words("host_check")]
    assert [gpu["uuid"] for gpu in report["gpus"]] == host.gpu_uuids
    assert report["previous_report_sha256"] is None


def test_the_report_names_who_ended_the_lease_and_why(host: Host, tenant: Tenant, operator: User) -> None:
    lease = rental.allocate(host, tenant)
    leases.end(lease, by=actor_of(operator), reason="the customer has moved out")
    host.sees(lease, "closed")
    report = json.loads(str(rental.reclaim(host, lease).report))
    assert (report["reclaim"]["requested_by"], report["reclaim"]["reason"]) == ("olga", "the customer has moved out")


def test_each_report_carries_the_hash_of_the_one_before_it(host: Host, ended: Lease, tenant: Tenant) -> None:
    first = rental.reclaim(host, ended)
    host.report()
    second = rental.reclaim(host, rental.end(host, rental.allocate(host, tenant)))
    digest = reports.hashlib.sha256(first.report.encode()).hexdigest()
    assert json.loads(second.report)["previous_report_sha256"] == digest


def test_a_failed_reclaim_has_a_signed_report_as_well(host: Host, ended: Lease) -> None:
    failed = rental.reclaim(host, ended, said=verdict(ports_from_outside="failed"))
    report = json.loads(reclaims.report_file(failed))["report"]
    assert report["result"] == "failed"
    assert report["reasons"][0] == "ports_from_outside failed: ports_from_outside was seen"


def test_the_report_is_downloaded_by_staff_alone(
    host: Host, ended: Lease, sign_in: SignIn, operator: User, customer: User
) -> None:
    done = rental.reclaim(host, ended)
    answer = sign_in(operator).get(f"/admin/reclaims/{done.id}/report")
    assert answer.status_code == 200
    assert answer.headers["Content-Disposition"] == f'attachment; filename="reclaim-{done.id}.json"'
    assert answer.get_data(as_text=True) == reclaims.report_file(done)
    assert sign_in(customer).get(f"/admin/reclaims/{done.id}/report").status_code == 403
    pem = sign_in(operator).get("/admin/reclaims/public-key")
    assert pem.get_data(as_text=True).startswith("-----BEGIN PUBLIC KEY-----")


def test_there_is_no_report_before_the_end(host: Host, ended: Lease) -> None:
    with pytest.raises(NotFound, match="is waiting"):
        reclaims.report_file(reclaim_of(ended))


# What quarantines


@pytest.mark.parametrize("result", ["failed", "unknown"])
def test_a_cleaning_step_that_did_not_pass_quarantines_with_its_reason(host: Host, ended: Lease, result: str) -> None:
    reclaims.advance_due()
    host.answers("clean", clean_result(home=result))
    assert (reclaim_of(ended).state, host.state) == ("failed", "quarantined")
    assert host.machine.state_reason == f"home {result}: home is still there"


def test_a_step_that_is_not_applicable_is_no_fault(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    host.answers("clean", clean_result(containers="not_applicable"))
    assert reclaim_of(ended).state == "verifying"


def test_an_agent_that_could_not_clean_quarantines(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    host.answers("clean", None, ok=False, message="the baseline is another one")
    assert host.state == "quarantined"
    assert "the baseline is another one" in str(host.machine.state_reason)


def test_a_cleaning_without_steps_proves_nothing(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    host.answers("clean", {**clean_result(), "steps": []})
    assert host.state == "quarantined"
    assert "no steps" in str(host.machine.state_reason)


@pytest.mark.parametrize("missing", ["loader", "account"])
def test_a_cleaning_that_lacks_a_step_proves_nothing_and_says_the_way_out(
    host: Host, ended: Lease, missing: str
) -> None:
    reclaims.advance_due()
    said = clean_result()
    host.answers("clean", {**said, "steps": [step for step in said["steps"] if step["id"] != missing]})
    assert (reclaim_of(ended).state, host.state) == ("failed", "quarantined")
    assert host.machine.state_reason == (
        f"Nothing is said of the steps {missing}. An older agent does not know them: upgrade it, then reclaim again."
    )


def test_one_step_that_passed_is_not_all_of_them(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    first, *others = clean_result()["steps"]
    host.answers("clean", {**clean_result(), "steps": [first]})
    assert host.state == "quarantined"
    assert f"steps {', '.join(step['id'] for step in others)}." in str(host.machine.state_reason)


def test_a_step_that_this_portal_does_not_know_counts_as_well(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    host.answers("clean", clean_result(of_a_newer_agent="failed"))
    assert host.machine.state_reason == "of_a_newer_agent failed: of_a_newer_agent is still there"


def test_after_an_upgrade_of_the_agent_the_same_lease_is_reclaimed_again(
    host: Host, ended: Lease, operator: User
) -> None:
    reclaims.advance_due()
    said = clean_result()
    host.answers("clean", {**said, "steps": said["steps"][:-1]})
    runs.queue("upgrade_agent", [host.machine], by=SYSTEM)
    reclaims.again(host.machine, by=actor_of(operator), reason="its agent is upgraded")
    host.answers("clean", clean_result())
    assert reclaim_of(ended).state == "verifying"


def test_an_agent_that_falls_silent_while_cleaning_quarantines(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    reclaims.advance_due(utcnow() + reclaims.CLEAN_DEADLINE - timedelta(seconds=5))
    assert host.state == "reclaiming"
    command = host.queued("clean")
    reclaims.advance_due(utcnow() + reclaims.CLEAN_DEADLINE)
    assert (reclaim_of(ended).state, host.state) == ("failed", "quarantined")
    assert Command.get_by_id(command.id).state == "cancelled"


def test_a_wipe_that_moves_may_take_hours_and_one_that_hangs_may_not(
    host: Host, ended: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    reclaims.advance_due()
    began = utcnow()
    command = host.queued("clean")

    def after(minutes: float, progress: int) -> datetime:
        now = began + timedelta(minutes=minutes)
        monkeypatch.setattr(commands, "utcnow", lambda: now)
        commands.note_progress(host.machine, command.id, progress)
        reclaims.advance_due(now)
        return now

    for hour in range(1, 6):
        after(hour * 60 - 45, progress=hour)  # within the deadline of before, again and again
        after(hour * 60 - 30, progress=hour * 1000)
        after(hour * 60 - 15, progress=hour * 2000)
        after(hour * 60, progress=hour * 3000)
    assert host.state == "reclaiming"
    after(305, progress=15000)  # as five minutes ago
    assert host.state == "reclaiming"
    after(319.9, progress=15000)
    assert host.state == "reclaiming"
    after(320.1, progress=15000)
    assert (reclaim_of(ended).state, host.state) == ("failed", "quarantined")
    assert "nor that it moves for 20 minutes" in str(host.machine.state_reason)
    after(321, progress=16000)  # it goes on and changes nothing: the order was taken back
    assert host.state == "quarantined"


def test_after_a_wipe_of_hours_the_verification_has_its_whole_time(
    host: Host, ended: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    reclaims.advance_due()
    began = utcnow()
    command = host.queued("clean")
    for quarter in range(1, 21):  # five hours in which it always moved
        now = began + timedelta(minutes=15 * quarter)
        monkeypatch.setattr(commands, "utcnow", lambda: now)  # noqa: B023 - asked in this round
        commands.note_progress(host.machine, command.id, quarter)
        reclaims.advance_due(now)
    cleaned_at = now
    host.answers("clean", clean_result())
    run_id = reclaim_of(ended).run_id
    Run.update(created_at=cleaned_at).where(Run.id == run_id).execute()
    for waited in (timedelta(0), timedelta(minutes=1), reclaims.VERIFY_DEADLINE - timedelta(seconds=1)):
        reclaims.advance_due(cleaned_at + waited)
        assert (reclaim_of(ended).state, host.state) == ("verifying", "reclaiming")
        assert runs.get_run(run_id).cancel_requested_at is None
    rental.finish_run(run_id, verdicts={"gpu-1": verdict()})
    assert (reclaim_of(ended).state, host.state) == ("passed", "ready")


def test_what_an_agent_says_of_the_work_of_another_is_nothing(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    foreign = commands.queue(make_machine("another"), "baseline", by=SYSTEM)
    for command_id in (foreign.id, 2**31 - 1):
        commands.note_progress(host.machine, command_id, 7)
    assert Command.get_by_id(foreign.id).result is None


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (verdict(ports_from_outside="failed"), "ports_from_outside failed"),
        (verdict(login_from_outside="unknown"), "login_from_outside unknown"),
        ({"schema": 1, "passed": True, "checks": []}, "no checks"),
        ({"schema": 1, "passed": True}, "no checks"),
        ({**verdict(), "passed": False}, "does not say that all of it passed"),
        ({**verdict(), "passed": "yes"}, "does not say that all of it passed"),
        ({"passed": True, "checks": ["fine"]}, "not described"),
        without("ports_from_outside"),
        without("login_from_outside"),
        without("agent_settings"),
        without("account"),
        without("listening_ports"),
        ({"passed": True, "checks": "fine"}, "no checks"),
    ],
)
def test_a_verdict_that_is_not_a_plain_pass_quarantines(
    host: Host, ended: Lease, said: dict[str, Any], why: str
) -> None:
    assert rental.reclaim(host, ended, said=said).state == "failed"
    assert host.state == "quarantined"
    assert why in str(host.machine.state_reason)


def test_a_verdict_about_another_host_is_none(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    host.answers("clean", clean_result())
    rental.finish_run(reclaim_of(ended).run_id, verdicts={"gpu-2": verdict()})
    assert host.state == "quarantined"


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_verifying_run_that_did_not_succeed_quarantines_whatever_its_verdict(
    host: Host, ended: Lease, state: str
) -> None:
    reclaims.advance_due()
    host.answers("clean", clean_result())
    rental.finish_run(reclaim_of(ended).run_id, state, verdicts={"gpu-1": verdict()})
    assert host.state == "quarantined"
    assert f"is {state}" in str(host.machine.state_reason)


def test_a_run_whose_end_nobody_heard_is_found_by_the_sweep(
    host: Host, ended: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    reclaims.advance_due()
    host.answers("clean", clean_result())
    with monkeypatch.context() as deaf:
        deaf.delitem(runs.when_ended.by_kind, "verify")
        rental.finish_run(reclaim_of(ended).run_id, verdicts={"gpu-1": verdict()})
    assert reclaim_of(ended).state == "verifying"
    reclaims.advance_due()
    assert (reclaim_of(ended).state, host.state) == ("passed", "ready")


def test_a_run_that_never_ends_quarantines(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    host.answers("clean", clean_result())
    reclaims.advance_due(utcnow() + reclaims.VERIFY_DEADLINE - timedelta(seconds=5))
    assert host.state == "reclaiming"
    reclaims.advance_due(utcnow() + reclaims.VERIFY_DEADLINE)
    assert host.state == "quarantined"
    assert runs.get_run(reclaim_of(ended).run_id).state == "cancelled"


def test_a_tenant_who_had_root_leaves_a_machine_that_must_be_installed_anew(host: Host, tenant: Tenant) -> None:
    lease = rental.end(host, rental.allocate(host, tenant, root=True))
    assert rental.reclaim(host, lease).state == "failed"
    machine = host.machine
    assert (machine.state, machine.needs_reimage) == ("quarantined", True)
    with pytest.raises(Conflict, match="install it anew"):
        leases.reclaim(machine, by=SYSTEM, reason="try again")
    assert json.loads(str(reclaim_of(lease).report))["level"] == "reimage"


# What a quarantined machine cannot do, and its way out


def test_of_two_who_reclaim_a_quarantined_machine_at_once_one_is_told_so(database: Any, tenant: Tenant) -> None:
    host = ready_host("gpu-1")
    ended = rental.end(host, rental.allocate(host, tenant))
    rental.reclaim(host, ended, said=verdict(home="failed"))
    again = partial(leases.reclaim, host.machine, by=SYSTEM, reason="once more")
    outcomes = at_once(again, again, again)
    assert sum(isinstance(each, Reclaim) for each in outcomes) == 1
    assert sum(isinstance(each, Conflict) for each in outcomes) == 2
    assert (host.state, reclaim_of(ended).number) == ("reclaiming", 2)


def test_a_quarantined_machine_is_leased_to_nobody(host: Host, ended: Lease, tenant: Tenant) -> None:
    rental.reclaim(host, ended, said=verdict(accounts="failed"))
    host.report()
    with pytest.raises(CannotAllocate, match="quarantined"):
        rental.allocate(host, tenant)
    with pytest.raises(CannotAllocate, match="quarantined"):
        rental.allocate(host, tenant, starts_at=tomorrow(), until=tomorrow() + timedelta(days=1))
    with pytest.raises(Conflict, match="quarantined"):
        provisioning.provision(host.machine, by=SYSTEM)
    assert Lease.select().where(Lease.state != "ended").count() == 0


def test_a_second_reclaim_of_a_quarantined_machine_can_pass(
    host: Host, ended: Lease, operator: User, sign_in: SignIn
) -> None:
    first = rental.reclaim(host, ended, said=verdict(accounts="failed"))
    answer = sign_in(operator).post(f"/admin/machines/{host.id}/reclaim", {"reason": "removed the account by hand"})
    assert (answer.status_code, answer.json["reclaim"]["number"], answer.json["state"]) == (202, 2, "reclaiming")
    host.answers("clean", clean_result())
    rental.finish_run(reclaim_of(ended).run_id, verdicts={"gpu-1": verdict()})
    second = reclaim_of(ended)
    assert (second.number, second.state, second.requested_by.username, host.state) == (2, "passed", "olga", "ready")
    assert Reclaim.get_by_id(first.id).state == "failed"


def test_a_reimaged_machine_comes_back_with_a_new_identity(host: Host, tenant: Tenant) -> None:
    rental.reclaim(host, rental.end(host, rental.allocate(host, tenant, root=True)))
    epoch = host.machine.epoch
    machine = retirement.reimaged(host.machine, by=SYSTEM, reason="installed from the rescue system")
    assert (machine.state, machine.host_key, machine.needs_reimage) == ("quarantined", None, False)
    assert machine.epoch != epoch
    with pytest.raises(Conflict, match="host key"):
        provisioning.provision(machine, by=SYSTEM)
    rental.confirm(machine, rental.OTHER_HOST_KEY)
    run = provisioning.provision(machine, by=SYSTEM)
    host.enrol()
    rental.finish_run(run)
    host.answers("baseline", rental.baseline())
    host.report()
    assert host.state == "ready"
    assert rental.allocate(host, tenant).state == "active"


def test_only_a_quarantined_machine_is_reimaged(host: Host) -> None:
    with pytest.raises(Conflict, match="is ready"):
        retirement.reimaged(host.machine, by=SYSTEM, reason="no")


# Late, repeated and foreign words


def test_the_result_of_a_cleaning_counts_once(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    command = host.answers("clean", clean_result())
    with pytest.raises(Conflict, match="awaits no cleaning"), atomic():
        reclaims.cleaned(command)
    assert (reclaim_of(ended).state, host.state) == ("verifying", "reclaiming")


def test_a_late_cleaning_is_refused_once_another_lease_is_active(
    host: Host, ended: Lease, other_tenant: Tenant
) -> None:
    reclaims.advance_due()
    late = host.queued("clean")
    reclaims.advance_due(utcnow() + reclaims.CLEAN_DEADLINE)
    leases.reclaim(host.machine, by=SYSTEM, reason="again")
    host.answers("clean", clean_result())
    rental.finish_run(reclaim_of(ended).run_id, verdicts={"gpu-1": verdict()})
    host.report()
    following = rental.allocate(host, other_tenant)
    for state in ("done", "failed"):
        late.state = state
        with pytest.raises(Conflict, match=f"Lease {following.id} has the machine"), atomic():
            reclaims.cleaned(late)
    assert (leases.get(following.id).state, host.state) == ("active", "leased")


def test_a_cleaning_that_names_another_lease_is_refused(host: Host, ended: Lease) -> None:
    reclaims.advance_due()
    command = host.queued("clean")
    command.lease_id = ended.id + 1
    with pytest.raises(Conflict, match="belongs to no reclaim"), atomic():
        reclaims.cleaned(command)
    assert reclaim_of(ended).state == "cleaning"


def test_a_machine_without_baseline_cannot_be_cleaned_and_is_quarantined(host: Host, ended: Lease) -> None:
    machines.Baseline.delete().execute()
    reclaims.advance_due()
    assert (reclaim_of(ended).state, host.state) == ("failed", "quarantined")
    assert "no baseline" in str(host.machine.state_reason)


# Retention


def test_data_is_retained_until_the_agreed_time_and_then_wiped(host: Host, tenant: Tenant) -> None:
    lease = rental.end(host, rental.allocate(host, tenant, retain_s=3600))
    waiting = reclaim_of(lease)
    assert waiting.due_at == leases.get(lease.id).ended_at + timedelta(hours=1) or waiting.due_at > utcnow()
    reclaims.advance_due(utcnow() + timedelta(minutes=59))
    assert (reclaim_of(lease).state, host.state) == ("waiting", "leased")
    reclaims.advance_due(utcnow() + timedelta(minutes=61))
    assert (reclaim_of(lease).state, host.state) == ("cleaning", "reclaiming")


def test_force_skips_the_retention_and_needs_the_machines_name(
    host: Host, tenant: Tenant, operator: User, sign_in: SignIn
) -> None:
    rental.end(host, rental.allocate(host, tenant, retain_s=3600))
    staff, path = sign_in(operator), f"/admin/machines/{host.id}/reclaim"
    kept = staff.post(path, {"reason": "needed"})
    assert (kept.status_code, kept.json["code"]) == (409, "retained")
    unconfirmed = staff.post(path, {"reason": "needed", "force": True, "confirm": "gpu"})
    assert (unconfirmed.status_code, list(unconfirmed.json["errors"])) == (422, ["confirm"])
    forced = staff.post(path, {"reason": "needed", "force": True, "confirm": "gpu-1"})
    assert (forced.status_code, forced.json["reclaim"]["force"]) == (202, True)
    reclaims.advance_due()
    assert host.state == "reclaiming"


def test_force_on_an_active_lease_is_kept_and_obeyed(host: Host, tenant: Tenant) -> None:
    lease = rental.allocate(host, tenant, retain_s=3600)
    leases.reclaim(host.machine, by=SYSTEM, reason="contract ended", force=True, confirm="gpu-1")
    host.sees(lease, "closed")
    reclaim = reclaim_of(lease)
    assert (reclaim.force, reclaim.reason) == (True, "contract ended")
    reclaims.advance_due()
    assert host.state == "reclaiming"


def test_force_can_be_added_while_the_lease_is_ending(host: Host, tenant: Tenant) -> None:
    lease = rental.allocate(host, tenant, retain_s=3600)
    leases.reclaim(host.machine, by=SYSTEM, reason="contract ended")
    leases.reclaim(host.machine, by=SYSTEM, reason="and at once", force=True, confirm="gpu-1")
    host.sees(lease, "closed")
    assert reclaim_of(lease).force


def test_a_reclaim_says_why(host: Host, ended: Lease) -> None:
    with pytest.raises(Invalid, match="reason"):
        leases.reclaim(host.machine, by=SYSTEM, reason=" ")


def test_there_is_nothing_to_reclaim_on_a_ready_machine(host: Host) -> None:
    with pytest.raises(Conflict, match="nothing to reclaim"):
        leases.reclaim(host.machine, by=SYSTEM, reason="why not")


# The probe key


def test_the_probe_key_is_among_the_leases_keys_and_known_to_the_verifying_run_alone(
    host: Host, tenant: Tenant, operator: User
) -> None:
    lease = rental.allocate(host, tenant, by=actor_of(operator))
    line = keys.parse(str(reclaims.probe_line(lease)))
    assert line.type == "ssh-ed25519"
    assert "PRIVATE KEY" not in str(lease.probe_key)
    rental.end(host, lease)
    reclaims.advance_due()
    host.answers("clean", clean_result())
    run = runs.get_run(reclaim_of(lease).run_id)
    asked = reclaims.verify_request(run, host.machine)
    assert asked.login == lease.login
    assert "BEGIN OPENSSH PRIVATE KEY" in asked.probe_key
    assert (asked.request["lease_id"], asked.request["uid"]) == (lease.id, lease.uid)
    with pytest.raises(Conflict, match="verifies no reclaim"):
        reclaims.verify_request(run, Machine(id=host.id + 1, name="other"))
    assert "PRIVATE KEY" not in json.dumps([entry.detail for entry in AuditEntry.select()])


def test_two_leases_have_two_probe_keys(host: Host, ended: Lease, tenant: Tenant) -> None:
    rental.reclaim(host, ended)
    host.report()
    assert reclaims.probe_line(rental.allocate(host, tenant)) != reclaims.probe_line(ended)
