"""A portal that was restored from a backup: what was lost between the two is asked for, never guessed, and never wiped.

The backup is made and restored as the command line does it; then the process forgets, as a new one would. `lost` is
the past that only the host remembers: after the backup its lease ended, was reclaimed, and another tenant came.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from portal.backup import backup, restore
from portal.cli import main
from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid
from portal.integrations.wake import wake
from portal.models import Attempt, AuditEntry, Command, Lease, Machine, Reclaim, Tenant, User
from portal.services import commands, frozen, grants, heartbeats, leases, machines, reclaims, runs, sync
from portal.services.actors import SYSTEM
from portal.services.availability import CannotAllocate
from tests.api.fake_agent import FakeAgent, agent_of, attempt_report, command_result, make_task, observed, time_of
from tests.support import rental
from tests.support.rental import Host, allocate, ready_host, tomorrow


@dataclass
class Past:
    """What the host lived through, and the portal forgets."""

    host: Host
    agent: FakeAgent
    known: Lease  # open in the backup
    lost: dict[str, Any]  # as the host reports the lease that the portal does not know
    file: Path

    @property
    def machine(self) -> Machine:
        return self.host.machine


@pytest.fixture
def past(app: Flask, tenant: Tenant, other_tenant: Tenant, tmp_path: Path) -> Past:
    """A backup with an open lease; after it that lease was reclaimed, and another one has the machine."""
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    known = allocate(host, tenant)
    host.sees(known)
    file = tmp_path / "backup.tar"
    backup(file)
    rental.reclaim(host, rental.end(host, known))
    host.report()
    lost = allocate(host, other_tenant)
    agent.hold(epoch=host.machine.epoch)
    return Past(host, agent, known, observed(lost), file)


def come_back(file: Path) -> None:
    """The portal is restored, and starts."""
    heartbeats.flush()
    restore(file, force=True)
    wake.stop()
    sync._known.clear()


def freeze(past: Past) -> None:
    """The portal comes back, the host hears of it, and says what it has."""
    come_back(past.file)
    past.agent.report(leases=[past.lost])
    past.agent.report(leases=[past.lost], frozen=True)


def thaw(past: Past) -> dict[str, Any]:
    """An operator has compared; the host takes it. Returns what the host was told."""
    frozen.thaw(past.machine, by=SYSTEM, reason="compared with the host")
    told = past.agent.await_order()
    (command,) = [each for each in told["commands"] if each["kind"] == "thaw"]
    past.agent.report(command_results=[command_result(command["command_id"])])
    return told


def actions(machine: Machine) -> list[str]:
    entries = AuditEntry.select().where(AuditEntry.resource_type == "machine", AuditEntry.resource_id == machine.id)
    return [entry.action for entry in entries.order_by(AuditEntry.id)]


def cleanings() -> int:
    return Command.select().where(Command.kind == "clean").count()


# Nothing is told


def test_a_host_that_knows_more_is_told_nothing_and_its_page_says_why(operator: User, past: Past, sign_in: Any) -> None:
    held = past.agent.generation
    come_back(past.file)
    before = [(grant.desired, grant.observed) for grant in grants.of_lease(past.known)]
    answer = past.agent.report(leases=[past.lost])
    assert answer["desired"] is None
    assert answer["generation"] < held, "from which the host sees it too, and freezes"
    past.agent.report(leases=[past.lost], attempts=[attempt_report(4711, "running")], frozen=True)
    heartbeats.flush()
    assert past.agent.hold()["desired"] is None
    assert past.agent.hold(epoch=None, generation=0)["desired"] is None
    assert [(grant.desired, grant.observed) for grant in grants.of_lease(past.known)] == before

    page = sign_in(operator).get(f"/admin/machines/{past.host.id}").json
    assert f"The host holds generation {held}" in page["frozen_reason"]
    assert (page["reachability"], page["state"], page["frozen_at"] is None) == ("online", "leased", False)
    assert "frozen" in {problem["code"] for problem in page["problems"]}
    told = machines.find_report(past.machine)
    assert told is not None
    assert [lease["login"] for lease in told.leases] == [past.lost["login"]], "for the operator to compare"
    assert actions(past.machine)[-2:] == ["machine.frozen", "machine.frozen"], "at the restoration, and by the host"


def test_whatever_the_restored_portal_counts_on_the_host_is_not_fooled(past: Past) -> None:
    """Its ids and generations would meet those that the host has seen, and its orders would be believed."""
    come_back(past.file)
    for _ in range(past.agent.generation):
        commands.queue(past.machine, "baseline", by=SYSTEM)
    assert past.machine.generation > past.agent.generation
    answer = past.agent.hold()
    assert (answer["desired"], answer["generation"] < past.agent.generation) == (None, True)
    assert "older backup" in str(past.machine.frozen_reason)


def test_a_host_for_which_nothing_was_lost_goes_on_by_itself(app: Flask, tenant: Tenant, tmp_path: Path) -> None:
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    lease = allocate(host, tenant)
    agent.hold()
    backup(tmp_path / "backup.tar")
    come_back(tmp_path / "backup.tar")
    leases.extend(lease, until=lease.ends_at + timedelta(days=1), by=SYSTEM)
    assert agent.hold()["desired"] is None, "it has not said yet that it knows no more"
    agent.report(leases=[observed(lease)])
    assert host.machine.frozen_reason is None
    told = agent.await_order()
    assert [each["login"] for each in told["leases"]] == [lease.login]
    assert told["epoch"] == host.machine.epoch
    assert actions(host.machine)[-2:] == ["machine.frozen", "machine.frozen_ended"]


def test_a_host_that_has_frozen_itself_does_not_go_on_by_itself(app: Flask, tmp_path: Path, tenant: Tenant) -> None:
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    backup(tmp_path / "backup.tar")
    come_back(tmp_path / "backup.tar")
    agent.report(frozen=True)
    agent.report()
    assert "frozen itself" in str(host.machine.frozen_reason)


def test_a_database_that_came_back_as_a_file_is_said_to_the_portal(
    past: Past, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as a restoration, without the file of `backup`: here the rows just are those of the past again."""
    restore(past.file, force=True)
    Machine.update(**frozen.NOT_FROZEN).execute()  # as pg_restore leaves them
    monkeypatch.setattr("portal.cli.freeze.open_portal", lambda: None)
    assert main(["freeze", "restored from the snapshot of Monday"]) == 0
    assert "1 hosts" in capsys.readouterr().out
    wake.stop()
    sync._known.clear()
    for _ in range(past.agent.generation):
        commands.queue(past.machine, "baseline", by=SYSTEM)
    assert past.machine.generation > past.agent.generation, "while the host was away"
    assert past.agent.hold()["desired"] is None
    assert "older backup" in str(past.machine.frozen_reason)


def test_a_machine_without_an_agent_is_not_asked(database: Any, tmp_path: Path) -> None:
    machine = rental.register("gpu-9")
    backup(tmp_path / "backup.tar")
    come_back(tmp_path / "backup.tar")
    assert machines.get(machine.id).frozen_reason is None


def test_a_thaw_of_the_past_is_no_thaw_now(past: Past) -> None:
    with atomic():
        commands.queue(past.machine, "thaw", by=SYSTEM, epoch=past.machine.epoch, generation=1)
    past.file.unlink()
    backup(past.file)
    come_back(past.file)
    assert past.agent.hold(generation=past.agent.generation + 10)["desired"] is None
    assert Command.get(Command.kind == "thaw").state == "cancelled"


def test_nothing_is_reclaimed_provisioned_or_planned_while_nobody_knows(past: Past, other_tenant: Tenant) -> None:
    freeze(past)
    leases.write_off(past.known, by=SYSTEM, reason="over")
    reclaims.advance_due(utcnow() + timedelta(days=1))
    assert rental.reclaim_of(past.known).state == "waiting"
    assert cleanings() == 0
    with pytest.raises(Conflict, match="Thaw it first") as refusal:
        runs.queue("gpu_hosts", [past.machine], by=SYSTEM)
    assert refusal.value.code == "machine_frozen"
    later = {"starts_at": tomorrow() + timedelta(days=1), "until": tomorrow() + timedelta(days=2)}
    with pytest.raises(CannotAllocate, match="Thaw it first"):
        allocate(past.host, other_tenant, **later)


# The thaw


def test_after_the_thaw_the_host_goes_on_in_a_new_epoch_beyond_all_that_it_has_seen(past: Past) -> None:
    held, epoch = past.agent.generation, past.machine.epoch
    freeze(past)
    told = thaw(past)
    assert told["epoch"] not in (epoch, None)
    assert told["generation"] > held
    assert [(each["login"], each["state"]) for each in told["leases"]] == [(past.known.login, "open")], (
        "what is not named is closed there, at most"
    )
    assert [each["kind"] for each in told["commands"]] == ["thaw"]
    assert past.machine.frozen_reason is None
    assert past.agent.report(leases=[observed(past.known)])["desired"] is not None
    assert actions(past.machine)[-3:] == ["machine.needs_reimage", "machine.thawed", "machine.frozen_ended"]
    entry = AuditEntry.get(AuditEntry.action == "machine.thawed")
    assert entry.detail["lost_leases"] == [past.lost["login"]]


def test_what_the_portal_has_lost_is_named_so_that_the_rest_is_heard(past: Past) -> None:
    freeze(past)
    thaw(past)
    own = observed(past.known, processes=3)
    response = past.agent.say(past.agent.message(leases=[own, past.lost], attempts=[attempt_report(4711, "running")]))
    assert response.status_code == 409
    items = response.get_json()["info"]["items"]
    assert (items["leases"], items["attempts"]) == ([past.lost["lease_id"]], [4711])
    past.agent.report(leases=[own])
    assert grants.get(past.known, "keys").observed == "open"


def test_a_machine_with_somebody_s_lost_data_is_quarantined_at_the_end_of_its_lease(
    past: Past, other_tenant: Tenant
) -> None:
    freeze(past)
    thaw(past)
    assert (past.host.state, past.machine.needs_reimage) == ("leased", True)
    rental.end(past.host, past.known)
    with pytest.raises(CannotAllocate, match="must be installed anew"):
        leases.extend(past.known, until=tomorrow(), by=SYSTEM)
    reclaims.advance_due()
    reclaim = rental.reclaim_of(past.known)
    assert (past.host.state, past.machine.needs_reimage, reclaim.state) == ("quarantined", True, "failed")
    assert past.lost["login"] in str(past.machine.state_reason)
    assert cleanings() == 0, "what is on it was never ours to wipe"
    with pytest.raises(Conflict) as refusal:
        leases.reclaim(past.machine, by=SYSTEM, reason="again")
    assert refusal.value.code == "needs_reimage"
    with pytest.raises(CannotAllocate):
        allocate(past.host, other_tenant)


def test_a_cleaning_of_the_past_never_meets_the_lease_that_came_after_it(
    app: Flask, tenant: Tenant, other_tenant: Tenant, tmp_path: Path
) -> None:
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    rental.end(host, allocate(host, tenant))
    reclaims.advance_due()
    backup(tmp_path / "backup.tar")
    host.answers("clean", rental.clean_result())
    rental.finish_run(Reclaim.get().run_id, verdicts={host.machine.name: rental.verdict()})
    host.report()
    lost = observed(allocate(host, other_tenant))
    agent.hold()
    past = Past(host, agent, Lease.get(), lost, tmp_path / "backup.tar")
    freeze(past)
    assert host.queued("clean")
    told = thaw(past)
    assert [each["kind"] for each in told["commands"]] == ["thaw"]
    assert (host.state, host.machine.needs_reimage) == ("quarantined", True)
    assert Command.get(Command.kind == "clean").state == "cancelled"


def test_a_lease_that_was_continued_after_the_backup_is_lost_though_its_login_is_known(
    app: Flask, tenant: Tenant, tmp_path: Path
) -> None:
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    ended = rental.end(host, allocate(host, tenant, retain_s=3600))
    backup(tmp_path / "backup.tar")
    lost = observed(leases.extend(ended, until=tomorrow(), by=SYSTEM))
    agent.hold()
    past = Past(host, agent, ended, lost, tmp_path / "backup.tar")
    freeze(past)
    thaw(past)
    reclaims.advance_due(utcnow() + timedelta(days=2))
    assert (host.state, host.machine.needs_reimage, cleanings()) == ("quarantined", True, 0)


def test_a_retained_lease_that_lies_closed_there_is_not_lost(app: Flask, tenant: Tenant, tmp_path: Path) -> None:
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    ended = rental.end(host, allocate(host, tenant, retain_s=3600))
    backup(tmp_path / "backup.tar")
    agent.hold()
    agent.generation += 1
    past = Past(host, agent, ended, observed(ended, "closed"), tmp_path / "backup.tar")
    freeze(past)
    told = thaw(past)
    assert not host.machine.needs_reimage
    (order,) = told["commands"]
    assert order["args"]["retained"] == [ended.id], "so that the host can open it again"
    following = leases.extend(ended, until=tomorrow(), by=SYSTEM)
    assert (following.login, following.host_id) == (ended.login, ended.id)
    rental.end(host, following)
    reclaims.advance_due(utcnow() + timedelta(days=2))
    assert rental.reclaim_of(following).state == "cleaning"


def test_no_login_and_no_uid_of_the_lost_past_comes_a_second_time(
    app: Flask, tenant: Tenant, other_tenant: Tenant, tmp_path: Path
) -> None:
    """Not even those of leases that are wiped there: the host still remembers that they were somebody's."""
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    backup(tmp_path / "backup.tar")
    lost = []
    for _ in range(3):
        lease = allocate(host, other_tenant)
        lost.append((lease.login, lease.uid))
        rental.reclaim(host, rental.end(host, lease))
        host.report()
    agent.hold()
    come_back(tmp_path / "backup.tar")
    agent.report(frozen=True)
    frozen.thaw(host.machine, by=SYSTEM, reason="nothing is left of it")
    told = agent.await_order()
    agent.report(command_results=[command_result(each["command_id"]) for each in told["commands"]])
    host.report()
    elsewhere, here = allocate(ready_host("gpu-2"), tenant), allocate(host, tenant)
    assert here.id != elsewhere.id
    assert (here.login, here.host_id) == (f"lease{here.id}", here.id)
    assert here.login not in {login for login, _ in lost}
    assert here.uid > max(uid for _, uid in lost)
    assert allocate(ready_host("gpu-3"), tenant).id > here.id, "and ids go on from there, for everybody"


def test_a_task_that_is_made_anew_is_not_taken_for_one_that_the_portal_has_lost(
    app: Flask, tenant: Tenant, customer: User, tmp_path: Path
) -> None:
    """The same person gives the same script again. Its host has that one's end, under its number."""
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    lease = allocate(host, tenant)
    host.sees(lease)
    _, known = make_task(lease, customer)
    backup(tmp_path / "backup.tar")
    _, lost = make_task(lease, customer)
    agent.hold(epoch=host.machine.epoch)
    come_back(tmp_path / "backup.tar")
    _, unheard = make_task(lease, customer)
    agent.report(leases=[observed(lease)])
    agent.report(leases=[observed(lease)], frozen=True)
    _, heard = make_task(lease, customer)
    assert known.id < lost.id < unheard.id < heard.id < lost.id + 3 * frozen.ATTEMPTS_SET_ASIDE
    come_back(tmp_path / "backup.tar")
    assert make_task(lease, customer)[1].id > lost.id, "also when the same backup comes a second time"


def test_two_operators_who_thaw_at_once_leave_no_thaw_for_the_next_time(past: Past) -> None:
    """It would be sent when the host freezes again, and nobody would have compared anything."""
    freeze(past)
    frozen.thaw(past.machine, by=SYSTEM, reason="compared")
    thaw(past)
    assert past.machine.frozen_reason is None
    assert not commands.queued(past.machine, "thaw").exists()
    past.agent.generation += 5
    assert past.agent.report()["desired"] is None
    assert "older backup" in str(past.machine.frozen_reason)
    assert past.agent.hold()["desired"] is None


def test_a_host_that_says_absurd_numbers_harms_nobody(past: Past, tenant: Tenant) -> None:
    most = 2**31 - 1
    come_back(past.file)
    past.agent.generation = most
    past.agent.report()
    past.agent.report(frozen=True, leases=[past.lost | {"lease_id": most, "login": f"lease{most}"}])
    frozen.thaw(past.machine, by=SYSTEM, reason="it lies")
    for _ in range(3):
        commands.queue(past.machine, "baseline", by=SYSTEM)
    assert allocate(ready_host("gpu-2"), tenant).id < 1_000_000


def test_a_host_is_not_thawed_before_it_has_said_what_it_knows(past: Past) -> None:
    come_back(past.file)
    past.agent.hold()
    with pytest.raises(Conflict, match="has not yet said what it knows") as refusal:
        frozen.thaw(past.machine, by=SYSTEM, reason="in a hurry")
    assert refusal.value.code == "unheard"
    assert Command.select().where(Command.kind == "thaw").count() == 0


def test_a_host_that_stays_silent_is_thawed_unheard_and_then_installed_anew(past: Past) -> None:
    come_back(past.file)
    with atomic():
        Machine.update(frozen_at=utcnow() - frozen.UNHEARD_WAIT).where(Machine.id == past.host.id).execute()
    frozen.thaw(past.machine, by=SYSTEM, reason="its credential is lost")
    assert (past.host.state, past.machine.needs_reimage) == ("leased", True)
    assert "unheard" in str(past.machine.state_reason)
    assert AuditEntry.get(AuditEntry.action == "machine.thawed").detail["is_heard"] is False


# A lease that was extended since


@dataclass
class Extended:
    """A lease whose later end only the host remembers, with a task at work in it."""

    lease: Lease
    later: datetime
    attempt: Attempt
    agent: FakeAgent

    def stands(self) -> tuple[str, str]:
        return leases.get(self.lease.id).state, Attempt.get_by_id(self.attempt.id).desired


@pytest.fixture
def extended(app: Flask, tenant: Tenant, customer: User, tmp_path: Path) -> Extended:
    """The portal comes back after the end that its backup has, and its sweeps begin; then the host says what it has."""
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    lease = allocate(host, tenant)
    _, attempt = make_task(lease, customer)
    agent.hold()
    agent.report(leases=[observed(lease)], attempts=[attempt_report(attempt.id, "running")])
    Lease.update(starts_at=utcnow() - timedelta(hours=2)).execute()
    backup(tmp_path / "backup.tar")
    later = utcnow() + timedelta(days=7)
    has = observed(leases.extend(lease, until=later, by=SYSTEM))
    agent.hold()
    come_back(tmp_path / "backup.tar")
    Lease.update(ends_at=utcnow() - timedelta(minutes=1)).execute()  # so much later it is
    assert leases.end_due() == 0
    agent.report(leases=[has])
    agent.report(leases=[has], frozen=True)
    assert leases.end_due() == 0
    return Extended(leases.get(lease.id), later, attempt, agent)


def take_the_thaw(extended: Extended) -> dict[str, Any]:
    frozen.thaw(extended.lease.machine, by=SYSTEM, reason="compared with the host")
    assert leases.end_due() == 0, "the host has not taken it yet"
    told = extended.agent.await_order()
    (command,) = [each for each in told["commands"] if each["kind"] == "thaw"]
    extended.agent.report(command_results=[command_result(command["command_id"])])
    return told


def test_a_lease_that_was_extended_after_the_backup_is_extended_again_and_its_task_goes_on(extended: Extended) -> None:
    assert extended.stands() == ("active", "run")
    with pytest.raises(Invalid, match="Lies in the past"):
        leases.extend(extended.lease, until=utcnow() - timedelta(seconds=1), by=SYSTEM)
    leases.extend(extended.lease, until=extended.later, by=SYSTEM)
    told = take_the_thaw(extended)
    assert [(each["state"], each["ends_at"]) for each in told["leases"]] == [("open", time_of(extended.later))]
    assert leases.end_due() == 0
    assert extended.stands() == ("active", "run")


def test_one_that_nobody_extends_again_ends_with_the_thaw(extended: Extended) -> None:
    told = take_the_thaw(extended)
    assert [each["state"] for each in told["leases"]] == ["closed"]
    assert leases.end_due() == 1
    assert extended.stands() == ("ending", "stop")
    with pytest.raises(Conflict, match="is ending on the host"):
        leases.extend(extended.lease, until=extended.later, by=SYSTEM)


def test_its_pages_say_what_to_do_before_the_thaw(extended: Extended, operator: User, sign_in: Any) -> None:
    staff = sign_in(operator)
    pages = [f"/leases/{extended.lease.id}", f"/machines/{extended.lease.machine_id}"]
    words = "Extend the lease before you thaw the machine"
    for page in pages:
        assert words in staff.client.get(page, headers=staff.headers).get_data(as_text=True), page
    leases.extend(extended.lease, until=extended.later, by=SYSTEM)
    for page in pages:
        assert words not in staff.client.get(page, headers=staff.headers).get_data(as_text=True), page


# A lease that has begun since


@pytest.mark.parametrize(
    ("hours", "is_told", "stands"),
    [
        pytest.param(-1, True, ("active", "leased", False), id="it goes on"),
        pytest.param(-1, False, ("scheduled", "ready", False), id="the host knows nothing of it"),
        pytest.param(1, True, ("scheduled", "quarantined", True), id="it is not due, whatever the host says"),
    ],
)
def test_a_lease_that_has_begun_after_the_backup_goes_on_after_the_thaw(
    app: Flask, tenant: Tenant, tmp_path: Path, hours: int, is_told: bool, stands: tuple[str, str, bool]
) -> None:
    host = ready_host("gpu-1")
    agent = agent_of(app, host.machine)
    lease = allocate(host, tenant, starts_at=utcnow() + timedelta(minutes=30))
    backup(tmp_path / "backup.tar")
    Lease.update(starts_at=utcnow()).execute()
    assert leases.activate_due() == 1
    has = [observed(leases.get(lease.id))] if is_told else []
    agent.hold(epoch=host.machine.epoch)
    come_back(tmp_path / "backup.tar")
    Lease.update(starts_at=utcnow() + timedelta(hours=hours)).execute()
    agent.report(leases=has)
    agent.report(leases=has, frozen=True)
    assert (leases.activate_due(), leases.get(lease.id).state) == (0, "scheduled")
    frozen.thaw(host.machine, by=SYSTEM, reason="compared with the host")
    assert (leases.get(lease.id).state, host.state, host.machine.needs_reimage) == stands
    told = agent.await_order()
    assert [(each["login"], each["state"]) for each in told["leases"]] == (
        [(lease.login, "open")] if stands[0] == "active" else []
    )
