"""Machines: from an address that somebody typed to one that is ready, and out of service again."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from portal.db import utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.models import AgentCredential, AuditEntry, Baseline, Command, Lease, Machine, Run, Tenant, User
from portal.services import (
    commands,
    frozen,
    heartbeats,
    leases,
    machines,
    network_machines,
    provisioning,
    retirement,
    runs,
)
from portal.services.actors import SYSTEM, of_user
from portal.services.availability import CannotAllocate
from portal.services.heartbeats import Heartbeat
from portal.services.transitions import WrongState
from tests.factories import ssh_key_pair
from tests.support import rental
from tests.support.rental import HOST_KEY, OTHER_HOST_KEY, Host, allocate, confirm, ready_host, register, tomorrow

SignIn = Callable[[User], Any]
SECRET = "correct-horse-battery-staple"
TEMPLATE = "{{ lookup('pipe', 'touch /tmp/owned') }}"
NEW = {"name": "gpu-17", "address": "GPU-17.Example.org.", "ssh_user": "root"}


@pytest.fixture
def staff(operator: User, sign_in: SignIn) -> Any:
    """The operator at the API."""
    return sign_in(operator)


# Register


def test_a_machine_is_written_down_normalised_and_nothing_is_dialled(staff: Any) -> None:
    answer = staff.post("/admin/machines", {**NEW, "credential": {"password": SECRET}, "labels": {"pool": "a"}})
    assert answer.status_code == 201
    told = answer.json
    assert (told["name"], told["address"], told["ssh_port"], told["state"]) == (
        "gpu-17",
        "gpu-17.example.org",
        22,
        "registered",
    )
    assert (told["reachability"], told["gpus"], told["host_key_fingerprint"]) == ("never", [], None)
    assert told["has_first_contact"] is True
    assert Run.select().count() == 0


def test_the_credential_is_encrypted_and_told_to_nobody(staff: Any) -> None:
    _, private_key = ssh_key_pair()
    given = {"password": SECRET, "become_password": SECRET, "private_key": private_key}
    answer = staff.post("/admin/machines", {**NEW, "credential": given})
    machine = machines.get(answer.json["id"])
    staff.patch(f"/admin/machines/{machine.id}", {"credential": given})
    everything = "".join(
        [
            answer.get_data(as_text=True),
            staff.get(f"/admin/machines/{machine.id}").get_data(as_text=True),
            staff.get("/admin/machines").get_data(as_text=True),
            json.dumps([entry.detail for entry in AuditEntry.select()]),
            str(machine.first_contact),
        ]
    )
    assert SECRET not in everything
    assert "PRIVATE KEY" not in everything
    contact = machines.first_contact(machine)
    assert contact is not None
    assert (contact["password"], contact["private_key"].strip()) == (SECRET, private_key.strip())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "GPU-17"}, "name"),
        ({"name": "-gpu"}, "name"),
        ({"name": "gpu_17"}, "name"),
        ({"name": "gpu 17"}, "name"),
        ({"name": "g" * 64}, "name"),
        ({"name": ""}, "name"),
        ({"name": TEMPLATE}, "name"),
        ({"name": "gpu-17\n"}, "name"),
        ({"name": "all"}, "name"),
        ({"name": "localhost"}, "name"),
        ({"address": TEMPLATE}, "address"),
        ({"address": "-oProxyCommand=id"}, "address"),
        ({"address": "127.1"}, "address"),
        ({"ssh_port": 0}, "ssh_port"),
        ({"ssh_port": 65536}, "ssh_port"),
        ({"ssh_port": "22"}, "ssh_port"),
        ({"ssh_user": "root; id"}, "ssh_user"),
        ({"ssh_user": "-l"}, "ssh_user"),
        ({"ssh_user": TEMPLATE[:32]}, "ssh_user"),
        ({"public_address": "0.0.0.0"}, "public_address"),
        ({"labels": {TEMPLATE: "x"}}, "labels"),
        ({"labels": {"a": "x\ny"}}, "labels"),
        ({"labels": {"a": 1}}, "labels.a.value"),
        ({"region": "a\nb"}, "region"),
        ({"credential": {"password": "a\nb"}}, "credential"),
        ({"credential": {"private_key": "nonsense"}}, "credential"),
        ({"state": "ready"}, "state"),
        ({"id": 7}, "id"),
        ({"host_key": HOST_KEY}, "host_key"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_the_field(staff: Any, change: dict[str, Any], field: str) -> None:
    answer = staff.post("/admin/machines", {**NEW, **change})
    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])
    assert Machine.select().count() == 0


def test_every_faulty_field_is_named_at_once(staff: Any) -> None:
    answer = staff.post("/admin/machines", {"name": "a b", "address": "a b", "ssh_user": "a b", "ssh_port": -1})
    assert set(answer.json["errors"]) == {"name", "address", "ssh_user", "ssh_port"}


def test_text_that_looks_like_a_template_stays_text(staff: Any) -> None:
    told = staff.post("/admin/machines", {**NEW, "remark": TEMPLATE, "labels": {"note": TEMPLATE}}).json
    assert (told["remark"], told["labels"]) == (TEMPLATE, {"note": TEMPLATE})


def test_two_machines_never_have_one_address_and_port_and_the_answer_names_the_other(staff: Any) -> None:
    staff.post("/admin/machines", NEW)
    answer = staff.post("/admin/machines", {**NEW, "name": "gpu-18", "address": "gpu-17.EXAMPLE.org"})
    assert (answer.status_code, answer.json["code"]) == (409, "address_in_use")
    assert "'gpu-17' has the address gpu-17.example.org port 22 already" in answer.json["detail"]
    assert answer.json["info"]["machine_name"] == "gpu-17"
    assert Machine.select().count() == 1


def test_two_hosts_behind_one_address_have_different_ports(staff: Any) -> None:
    assert staff.post("/admin/machines", {**NEW, "ssh_port": 2201}).status_code == 201
    assert staff.post("/admin/machines", {**NEW, "name": "gpu-18", "ssh_port": 2202}).status_code == 201


def test_a_name_is_taken_once(staff: Any) -> None:
    staff.post("/admin/machines", NEW)
    answer = staff.post("/admin/machines", {**NEW, "address": "other.example.org"})
    assert (answer.status_code, answer.json["code"]) == (409, "name_in_use")


def test_saving_a_machine_unchanged_is_no_conflict_and_no_news(staff: Any) -> None:
    machine_id = staff.post("/admin/machines", NEW).json["id"]
    before = AuditEntry.select().count()
    answer = staff.patch(f"/admin/machines/{machine_id}", {**NEW, "ssh_port": 22})
    assert answer.status_code == 200
    assert AuditEntry.select().count() == before


def test_an_edit_cannot_take_anothers_name_or_address_or_set_a_state(staff: Any) -> None:
    staff.post("/admin/machines", NEW)
    other = staff.post("/admin/machines", {**NEW, "name": "gpu-18", "address": "192.0.2.18"}).json
    path = f"/admin/machines/{other['id']}"
    taken = staff.patch(path, {"address": "gpu-17.example.org"})
    assert (taken.status_code, taken.json["info"]["machine_name"]) == (409, "gpu-17")
    assert staff.patch(path, {"name": "gpu-17"}).json["code"] == "name_in_use"
    assert staff.patch(path, {"state": "ready"}).status_code == 422
    assert staff.get(path).json["address"] == "192.0.2.18"


def test_an_edit_says_in_the_trail_what_changed(staff: Any) -> None:
    machine_id = staff.post("/admin/machines", NEW).json["id"]
    told = staff.patch(f"/admin/machines/{machine_id}", {"region": "cn-north", "rack": "R7"}).json
    assert (told["region"], told["rack"]) == ("cn-north", "R7")
    entry = AuditEntry.get(AuditEntry.action == "machine.edited")
    assert (entry.actor_name, entry.detail["fields"]) == ("olga", {"region": "cn-north", "rack": "R7"})


def test_customers_see_no_machine_of_the_house(customer: User, sign_in: SignIn, database: Any) -> None:
    machine = register()
    person = sign_in(customer)
    for method, path in (
        ("GET", ""), ("POST", ""), ("GET", f"/{machine.id}"), ("PATCH", f"/{machine.id}"), ("DELETE", f"/{machine.id}"),
        ("POST", f"/{machine.id}/provision"), ("POST", f"/{machine.id}/thaw"), ("POST", f"/{machine.id}/host-key"),
    ):  # fmt: skip
        assert person.open(method, f"/admin/machines{path}", json={}).status_code == 403


# Look


def test_machines_are_listed_by_name_filtered_and_found(staff: Any) -> None:
    online = ready_host("gpu-b")
    silent = ready_host("gpu-a")
    silent.report(received_at=utcnow() - timedelta(hours=1))
    register("gpu-c", address="2001:db8::7", region="cn-north")

    def names(query: str) -> list[str]:
        return [item["name"] for item in staff.get(f"/admin/machines?{query}").json["items"]]

    assert names("") == ["gpu-a", "gpu-b", "gpu-c"]
    assert names("state=ready") == ["gpu-a", "gpu-b"]
    assert names("reachability=online") == ["gpu-b"]
    assert names("reachability=offline") == ["gpu-a"]
    assert names("reachability=never") == ["gpu-c"]
    assert names("keyword=north") == ["gpu-c"]
    assert names("keyword=2001:DB8:0::7") == ["gpu-c"]
    assert names("keyword=%25") == []
    assert names("page=2&page_size=2") == ["gpu-c"]
    assert staff.get("/admin/machines?page_size=201").status_code == 422
    assert staff.get("/admin/machines?reachability=perhaps").status_code == 422
    assert online.machine.id


def test_the_detail_shows_what_is_there_now(staff: Any, tenant: Tenant) -> None:
    host = ready_host("gpu-1")
    lease = allocate(host, tenant)
    host.report(gpu=rental.gpu_report([rental.gpu(host.gpu_uuids[0], utilization_percent=93)]))
    told = staff.get(f"/admin/machines/{host.id}").json
    assert (told["reachability"], told["is_healthy"]) == ("online", False)
    assert [problem["code"] for problem in told["problems"]] == ["gpu_missing"]
    assert [gpu["live"] and gpu["live"]["utilization_percent"] for gpu in told["gpus"]] == [93, None]
    assert (told["lease"]["id"], told["lease"]["tenant_name"], told["agent_version"]) == (lease.id, "Acme", "0.1.0")
    assert told["metrics"]["memory_total_bytes"] == 512 * rental.GIB
    assert told["facts"]["os"] == "Debian GNU/Linux 12"
    assert staff.get("/admin/machines/999999").status_code == 404


def test_what_a_silent_host_said_last_is_no_value_of_now(staff: Any) -> None:
    """Three days ago it was hot, had lost a GPU and got another one; its problems stay those of its last word."""
    host = ready_host("gpu-1")
    hot = rental.gpu(host.gpu_uuids[0], utilization_percent=97, temperature_c=88)
    given = {"gpu": rental.gpu_report([hot, rental.gpu("GPU-new", 1)]), "clock_offset_s": 4.2}
    values = ("97 %", "88 °C", "GPU-new</div>", "missing</span>", "clock 4.2 s", "500.0 of 1000.0 GiB free")

    def shown() -> list[str]:
        page = staff.client.get(f"/machines/{host.id}", headers={**staff.headers, "HX-Request": "true"}).text
        return [value for value in values if value in page]

    host.report(**given)
    assert shown() == list(values)
    last_seen_at = utcnow() - timedelta(days=3)
    host.report(**given, received_at=last_seen_at)
    assert shown() == []
    for told in (staff.get(f"/admin/machines/{host.id}").json, *staff.get("/admin/machines").json["items"]):
        assert (told["reachability"], told["last_seen_at"]) == ("offline", last_seen_at.isoformat())
        assert ([gpu["live"] for gpu in told["gpus"]], told["metrics"]) == ([None, None], None)
        assert [problem["code"] for problem in told["problems"]] == ["gpu_missing", "gpu_unexpected"]


# Confirm the host key


def test_a_host_key_is_pinned_when_its_fingerprint_was_offered(staff: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = register()
    offered = [{"type": "ssh-ed25519", "line": HOST_KEY, "fingerprint": machines.fingerprint(HOST_KEY)}]
    monkeypatch.setattr("portal.integrations.host_keys.scan", lambda *_: offered)
    shown = staff.post(f"/admin/machines/{machine.id}/host-key").json
    assert shown["host_keys_offered"] == [{"type": "ssh-ed25519", "fingerprint": machines.fingerprint(HOST_KEY)}]
    assert shown["host_key_fingerprint"] is None
    path = f"/admin/machines/{machine.id}/host-key/confirm"
    wrong = staff.post(path, {"fingerprint": "SHA256:" + "A" * 43})
    assert (wrong.status_code, list(wrong.json["errors"])) == (422, ["fingerprint"])
    right = staff.post(path, {"fingerprint": machines.fingerprint(HOST_KEY)})
    assert right.json["host_key_fingerprint"] == machines.fingerprint(HOST_KEY)
    assert machines.get(machine.id).host_key == HOST_KEY


def test_another_host_key_is_taken_with_a_reason_alone_and_the_trail_has_both(database: Any) -> None:
    machine = confirm(register())
    machines.offer_host_keys(machine, [{"type": "ssh-ed25519", "line": OTHER_HOST_KEY}], by=SYSTEM)
    assert machines.get(machine.id).host_key == HOST_KEY
    with pytest.raises(Invalid, match="reason"):
        machines.confirm_host_key(machine, machines.fingerprint(OTHER_HOST_KEY), by=SYSTEM)
    machines.confirm_host_key(machine, machines.fingerprint(OTHER_HOST_KEY), by=SYSTEM, reason="new board")
    entry = AuditEntry.get(AuditEntry.action == "machine.host_key_replaced")
    assert entry.detail["before"] == machines.fingerprint(HOST_KEY)
    assert (entry.detail["fingerprint"], entry.detail["reason"]) == (machines.fingerprint(OTHER_HOST_KEY), "new board")


def test_what_a_scan_says_a_fingerprint_is_does_not_count(database: Any) -> None:
    machine = register()
    lie = machines.fingerprint(OTHER_HOST_KEY)
    machines.offer_host_keys(machine, [{"type": "ssh-ed25519", "line": HOST_KEY, "fingerprint": lie}], by=SYSTEM)
    with pytest.raises(Invalid, match="has not offered"):
        machines.confirm_host_key(machine, lie, by=SYSTEM)


# Provision


def test_provisioning_needs_a_confirmed_host_key(staff: Any) -> None:
    machine = register()
    answer = staff.post(f"/admin/machines/{machine.id}/provision")
    assert (answer.status_code, answer.json["code"]) == (409, "host_key_not_confirmed")
    assert machines.get(machine.id).state == "registered"


def test_a_gateway_is_made_by_its_own_playbook_and_ready_without_gpus(staff: Any) -> None:
    host = Host(confirm(register("gateway-1", public_address="203.0.113.1")), gpus=0)
    network_machines.place(host.machine, by=SYSTEM, forward_ports="20000-20999")
    run = runs.get_run(staff.post(f"/admin/machines/{host.id}/provision").json["id"])
    assert run.playbook == "gateways"
    host.enrol()
    rental.finish_run(run)
    host.answers("baseline", rental.baseline())
    host.report(gpu=rental.gpu_report([], state="no_library"))
    told = staff.get(f"/admin/machines/{host.id}").json
    assert (told["state"], told["is_healthy"], told["problems"]) == ("ready", True, [])


def test_a_bare_machine_becomes_ready(staff: Any) -> None:
    host = Host(confirm(register("gpu-1")))
    answer = staff.post(f"/admin/machines/{host.id}/provision")
    assert (answer.status_code, answer.json["state"], host.state) == (202, "queued", "provisioning")
    run = runs.get_run(answer.json["id"])
    assert (run.playbook, run.purpose, runs.machines_of(run)) == ("gpu_hosts", "provision", [host.machine])
    host.enrol()
    assert host.state == "provisioning"
    rental.finish_run(run)
    assert (host.state, host.machine.first_contact) == ("provisioning", None)
    host.answers("baseline", rental.baseline())
    assert host.state == "ready"
    assert [gpu.uuid for gpu in machines.expected_gpus(host.machine)] == host.gpu_uuids
    assert Baseline.select().count() == 1


def test_the_agent_may_come_after_the_end_of_the_run(database: Any) -> None:
    host = Host(confirm(register()))
    rental.finish_run(provisioning.provision(host.machine, by=SYSTEM))
    assert Command.select().where(Command.kind == "baseline").count() == 0
    host.enrol()
    host.answers("baseline", rental.baseline())
    assert host.state == "ready"


def test_the_password_is_forgotten_when_the_run_succeeded_and_not_before(database: Any) -> None:
    machine = confirm(register())
    rental.finish_run(provisioning.provision(machine, by=SYSTEM), "failed")
    assert machines.first_contact(machines.get(machine.id)) == {"password": "pw"}
    rental.finish_run(provisioning.provision(machine, by=SYSTEM))
    assert machines.first_contact(machines.get(machine.id)) is None
    entries = AuditEntry.select().where(AuditEntry.action == "machine.first_contact_forgotten")
    assert [entry.resource_id for entry in entries] == [machine.id]


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_run_that_did_not_succeed_fails_the_machine_with_its_reason(staff: Any, state: str) -> None:
    machine = confirm(register())
    run = rental.finish_run(provisioning.provision(machine, by=SYSTEM), state)
    told = staff.get(f"/admin/machines/{machine.id}").json
    assert (told["state"], told["has_first_contact"]) == ("failed", True)
    assert told["state_reason"] == f"The provisioning run {run.id} is {state}: it went wrong"


def test_a_machine_whose_agent_never_comes_is_failed(database: Any) -> None:
    machine = confirm(register())
    run = rental.finish_run(provisioning.provision(machine, by=SYSTEM))
    assert run.ended_at is not None
    assert provisioning.fail_overdue(run.ended_at + provisioning.READY_DEADLINE - timedelta(seconds=1)) == 0
    assert provisioning.fail_overdue(run.ended_at + provisioning.READY_DEADLINE) == 1
    failed = machines.get(machine.id)
    assert failed.state == "failed"
    assert "no agent that enrols" in str(failed.state_reason)


def test_a_machine_whose_run_is_still_going_is_not_overdue(database: Any) -> None:
    machine = confirm(register())
    provisioning.provision(machine, by=SYSTEM)
    assert provisioning.fail_overdue(utcnow() + timedelta(days=1)) == 0


def test_a_baseline_that_could_not_be_taken_fails_the_machine(database: Any) -> None:
    host = Host(confirm(register()))
    run = provisioning.provision(host.machine, by=SYSTEM)
    host.enrol()
    rental.finish_run(run)
    host.answers("baseline", None, ok=False, message="/etc cannot be read")
    assert host.state == "failed"
    assert "/etc cannot be read" in str(host.machine.state_reason)


def test_a_baseline_that_nobody_asked_for_is_not_kept(database: Any, tenant: Tenant) -> None:
    host = ready_host()
    allocate(host, tenant)
    provisioning.baseline_taken(host.machine, rental.baseline())
    assert Baseline.select().count() == 1
    assert AuditEntry.select().where(AuditEntry.action == "baseline.refused", AuditEntry.outcome == "refused").exists()
    assert host.state == "leased"


def test_a_baseline_taken_while_the_run_is_still_going_does_not_count(database: Any) -> None:
    host = ready_host()
    provisioning.provision(host.machine, by=SYSTEM)
    provisioning.baseline_taken(host.machine, rental.baseline())
    assert host.state == "provisioning"


def test_a_leased_machine_is_not_provisioned(tenant: Tenant) -> None:
    host = ready_host()
    allocate(host, tenant)
    with pytest.raises(Conflict):
        provisioning.provision(host.machine, by=SYSTEM)
    assert (host.state, Run.select().count()) == ("leased", 1)


def test_a_machine_is_provisioned_once_at_a_time(database: Any) -> None:
    machine = confirm(register())
    provisioning.provision(machine, by=SYSTEM)
    with pytest.raises(WrongState, match="is provisioning by now"):
        provisioning.provision(machine, by=SYSTEM)
    assert Run.select().count() == 1


def test_a_ready_machine_can_be_provisioned_again_and_gets_a_new_baseline(database: Any) -> None:
    host = ready_host()
    rental.finish_run(provisioning.provision(host.machine, by=SYSTEM))
    host.answers("baseline", rental.baseline())
    assert (host.state, Baseline.select().count()) == ("ready", 2)


# A host that an operator changes later


@pytest.mark.parametrize("playbook", ["gpu_hosts", "site"])
def test_an_operators_run_on_a_free_machine_ends_with_a_new_baseline(
    tenant: Tenant, operator: User, playbook: str
) -> None:
    host = ready_host()
    rental.finish_run(runs.queue(playbook, [host.machine], by=of_user(operator), tags=["base"]))
    assert host.state == "provisioning"
    with pytest.raises(CannotAllocate, match="is provisioning, not ready"):
        allocate(host, tenant)
    new = {**rental.baseline(), "boot_id": str(uuid.uuid4())}
    host.answers("baseline", new)
    assert host.state == "ready"
    kept = machines.find_baseline(host.machine)
    assert kept is not None
    assert (kept.content, Baseline.select().count()) == (new, 2)
    lease = rental.end(host, allocate(host, tenant))
    assert rental.reclaim(host, lease).state == "passed"
    report = json.loads(str(rental.reclaim_of(lease).report))
    assert report["baseline"]["sha256"] == kept.digest


def test_a_run_that_only_looks_or_has_failed_there_leaves_the_baseline(database: Any) -> None:
    good, bad = ready_host(), ready_host()
    rental.finish_run(runs.queue("gpu_hosts", [good.machine], by=SYSTEM, check=True))
    rental.finish_run(runs.queue("gpu_hosts", [bad.machine], by=SYSTEM), "failed")
    rental.finish_run(runs.queue("verify", [bad.machine], by=SYSTEM))
    assert (good.state, bad.state, Baseline.select().count()) == ("ready", "ready", 2)
    told = dict.fromkeys(("ok", "changed", "failed", "unreachable", "skipped", "rescued", "ignored"), 0)
    stats = {good.machine.name: told, bad.machine.name: {**told, "unreachable": 1}}
    rental.finish_run(runs.queue("gpu_hosts", [good.machine, bad.machine], by=SYSTEM), "failed", stats=stats)
    assert (good.state, bad.state) == ("provisioning", "ready"), "one host that is away is no other's matter"


def test_a_leased_machine_never_becomes_its_own_measure(tenant: Tenant, staff: Any) -> None:
    host = ready_host()
    allocate(host, tenant)
    machines.start_maintenance(host.machine, by=SYSTEM, reason="a port is closed")
    rental.finish_run(runs.queue("gpu_hosts", [host.machine], by=SYSTEM))
    answer = staff.post(f"/admin/machines/{host.id}/baseline", {"reason": "it was me"})
    assert (answer.status_code, answer.json["code"]) == (409, "wrong_state")
    assert (host.state, Baseline.select().count()) == ("leased", 1)
    assert not Command.select().where(Command.kind == "baseline", Command.state == "queued").exists()


def test_a_baseline_that_was_begun_before_a_runs_end_is_taken_again(database: Any) -> None:
    host = ready_host()
    for _ in range(2):
        rental.finish_run(runs.queue("gpu_hosts", [host.machine], by=SYSTEM))
    early, late = Command.select().where(Command.kind == "baseline").order_by(Command.id.desc()).limit(2)[::-1]
    said = {"ok": True, "message": None, "result": rental.baseline()}
    commands.finished(host.machine, {"command_id": early.id, **said})
    assert (early.state, host.state, Baseline.select().count()) == ("cancelled", "provisioning", 1)
    commands.finished(host.machine, {"command_id": late.id, **said})
    assert (host.state, Baseline.select().count()) == ("ready", 2)


def test_an_operator_who_changed_a_host_from_a_shell_has_a_new_baseline_taken_and_says_why(staff: Any) -> None:
    host = ready_host()
    path = f"/admin/machines/{host.id}/baseline"
    assert "reason" in staff.post(path, {}).json["errors"]
    answer = staff.post(path, {"reason": "ada is an operator now"})
    assert (answer.status_code, answer.json["state"]) == (202, "provisioning")
    host.answers("baseline", rental.baseline())
    assert (host.state, Baseline.select().count()) == ("ready", 2)
    entry = AuditEntry.get(AuditEntry.action == "baseline.renewing")
    assert (entry.resource_id, entry.detail["reason"]) == (host.id, "ada is an operator now")


def test_a_baseline_may_take_hours_as_long_as_it_moves(database: Any) -> None:
    host = ready_host()
    provisioning.take_baseline(host.machine, by=SYSTEM, reason="a large disk")
    order = host.queued("baseline")
    assert provisioning.fail_overdue(order.created_at + provisioning.READY_DEADLINE - timedelta(seconds=1)) == 0
    later = order.created_at + timedelta(hours=3)
    Command.update(result={"progress": 7, "moved_at": later.isoformat()}).where(Command.id == order.id).execute()
    assert provisioning.fail_overdue(later + provisioning.READY_DEADLINE - timedelta(seconds=1)) == 0
    assert provisioning.fail_overdue(later + provisioning.READY_DEADLINE) == 1
    assert "neither a baseline nor a word that it moves for 15 min" in str(host.machine.state_reason)


# GPUs


def test_a_gpu_belongs_to_one_machine_and_both_are_named(database: Any) -> None:
    first = ready_host("gpu-1")
    second = Host(confirm(register("gpu-2")))
    second.gpu_uuids = [first.gpu_uuids[0], "GPU-own"]
    provisioning.provision(second.machine, by=SYSTEM)
    second.enrol()
    assert second.state == "failed"
    reason = str(second.machine.state_reason)
    assert f"GPU {first.gpu_uuids[0]} is already the machine gpu-1's, gpu-2 reports it too" in reason
    assert machines.expected_gpus(second.machine) == []
    assert len(machines.expected_gpus(first.machine)) == 2


def test_a_gpu_that_appears_later_is_not_taken_in_by_itself(tenant: Tenant) -> None:
    host = ready_host()
    provisioning.seen_gpus(host.machine, [rental.gpu("GPU-new", 2)])
    assert [gpu.uuid for gpu in machines.expected_gpus(host.machine)] == host.gpu_uuids


def test_gpus_that_come_with_a_later_report_are_taken_in_while_none_is_known(database: Any) -> None:
    host = ready_host(gpus=0)
    assert machines.expected_gpus(host.machine) == []
    provisioning.seen_gpus(host.machine, [rental.gpu("GPU-late")])
    assert [gpu.uuid for gpu in machines.expected_gpus(host.machine)] == ["GPU-late"]


def test_a_lost_gpu_stays_expected_until_somebody_says_that_it_was_taken_out(staff: Any) -> None:
    host = ready_host()
    gone = host.gpu_uuids[1]
    provisioning.provision(host.machine, by=SYSTEM)
    provisioning.seen_gpus(host.machine, [rental.gpu(host.gpu_uuids[0])])
    assert len(machines.expected_gpus(host.machine)) == 2
    assert staff.delete(f"/admin/machines/{host.id}/gpus/{gone}?reason=sent+back").status_code == 204
    assert [gpu.uuid for gpu in machines.expected_gpus(host.machine)] == host.gpu_uuids[:1]
    assert staff.delete(f"/admin/machines/{host.id}/gpus/{gone}?reason=again").status_code == 404
    assert staff.delete(f"/admin/machines/{host.id}/gpus/{host.gpu_uuids[0]}").status_code == 422


@pytest.mark.parametrize("flushed_between", [True, False])
def test_a_report_between_two_full_ones_leaves_the_last_measurements_in_place(
    database: Any, flushed_between: bool
) -> None:
    host = ready_host()
    values = {"machine_id": host.id, "clock_offset_s": 0.0, "agent_version": "0.1.0", "boot_id": rental.BOOT}
    values |= {"frozen": False, "leases": []}
    gpus = rental.gpu_report([rental.gpu(each) for each in host.gpu_uuids])
    full = Heartbeat(**values, seq=1, received_at=utcnow(), metrics=rental.metrics(free_bytes=7 * rental.GIB), gpu=gpus)
    heartbeats.note(full)
    if flushed_between:
        heartbeats.flush()
    heartbeats.note(Heartbeat(**values, seq=2, received_at=utcnow(), metrics=None, gpu=None))
    heartbeats.buffer.stop()
    report = machines.find_report(host.machine)
    assert report is not None
    assert (report.seq, report.metrics["disks"][0]["free_bytes"], report.gpu) == (2, 7 * rental.GIB, gpus)
    assert machines.health_of(host.machine, utcnow()).is_healthy


# In service


def test_maintenance_is_a_flag_that_leaves_state_and_lease_alone(staff: Any, tenant: Tenant) -> None:
    host = ready_host("gpu-1")
    lease = allocate(host, tenant)
    path = f"/admin/machines/{host.id}/maintenance"
    told = staff.post(path, {"reason": "new fans", "until": tomorrow().isoformat()}).json
    assert (told["state"], told["maintenance_reason"], told["lease"]["id"]) == ("leased", "new fans", lease.id)
    assert told["maintenance_since"] is not None
    assert staff.post(path, {"reason": "fans and dust"}).json["maintenance_since"] == told["maintenance_since"]
    assert staff.delete(f"/admin/machines/{host.id}").status_code == 409
    told = staff.delete(path).json
    assert (told["state"], told["maintenance_since"], told["maintenance_reason"]) == ("leased", None, None)
    assert leases.get(lease.id).state == "active"
    assert staff.post(path, {"reason": "  "}).status_code == 422


def test_a_frozen_host_is_thawed_with_a_new_epoch(staff: Any) -> None:
    host = ready_host()
    refused = staff.post(f"/admin/machines/{host.id}/thaw", {"reason": "compared"})
    assert (refused.status_code, refused.json["code"]) == (409, "not_frozen")
    host.report(frozen=True)
    epoch = host.machine.epoch
    assert staff.post(f"/admin/machines/{host.id}/thaw", {"reason": "compared"}).status_code == 200
    command = host.queued("thaw")
    assert host.machine.epoch != epoch
    assert command.args["epoch"] == host.machine.epoch
    assert command.args["generation"] <= host.machine.generation
    assert host.state == "ready"


def test_a_ready_machine_whose_host_knows_more_leases_than_we_do_is_quarantined_by_a_thaw(tenant: Tenant) -> None:
    host = ready_host()
    forgotten = {"lease_id": 4711, "login": "lease4711", "state": "closed"}
    host.report(frozen=True, leases=[forgotten])
    frozen.thaw(host.machine, by=SYSTEM, reason="restored from yesterday")
    assert (host.state, host.machine.needs_reimage) == ("quarantined", True)
    assert "lease4711" in str(host.machine.state_reason)
    assert Command.select().where(Command.kind == "clean").count() == 0


# The end


def test_a_retired_machine_frees_its_address_and_gpus_and_keeps_its_history(staff: Any) -> None:
    host = ready_host("gpu-1", address="192.0.2.50", ssh_port=22)
    told = staff.post(f"/admin/machines/{host.id}/retire", {"reason": "sold"}).json
    assert (told["state"], told["state_reason"]) == ("retired", "sold")
    assert not machines.is_enrolled(host.machine)
    assert AgentCredential.select().where(AgentCredential.machine == host.id).count() == 1
    again = ready_host("gpu-1b", address="192.0.2.50", ssh_port=22)
    assert again.state == "ready"
    with pytest.raises(WrongState):
        provisioning.provision(host.machine, by=SYSTEM)


def test_the_name_of_a_retired_machine_can_be_given_again_once_that_one_has_another(staff: Any) -> None:
    host = ready_host("gpu-1")
    staff.post(f"/admin/machines/{host.id}/retire", {"reason": "sold"})
    new = {"name": "gpu-1", "address": "192.0.2.51", "ssh_user": "root"}
    told = staff.post("/admin/machines", new)
    assert (told.status_code, told.json["code"], "another name first" in told.json["detail"]) == (
        409,
        "name_in_use",
        True,
    )
    assert staff.patch(f"/admin/machines/{host.id}", {"name": "gpu-1-sold"}).status_code == 200
    assert staff.post("/admin/machines", new).status_code == 201


def test_a_leased_machine_is_neither_retired_nor_deleted(staff: Any, tenant: Tenant) -> None:
    host = ready_host()
    allocate(host, tenant)
    assert staff.post(f"/admin/machines/{host.id}/retire", {"reason": "sold"}).status_code == 409
    assert staff.delete(f"/admin/machines/{host.id}").json["code"] == "has_leases"
    assert host.state == "leased"


def test_a_machine_with_a_lease_for_later_is_not_retired(tenant: Tenant) -> None:
    host = ready_host()
    lease = allocate(host, tenant, starts_at=utcnow() + timedelta(hours=1), until=tomorrow())
    with pytest.raises(Conflict, match=f"Lease {lease.id} is scheduled"):
        retirement.retire(host.machine, by=SYSTEM, reason="sold")


def test_only_what_was_never_leased_and_never_touched_is_deleted(staff: Any, tenant: Tenant) -> None:
    bare = register()
    assert staff.delete(f"/admin/machines/{bare.id}").status_code == 204
    assert staff.get(f"/admin/machines/{bare.id}").status_code == 404
    used = ready_host()
    assert staff.delete(f"/admin/machines/{used.id}").json["code"] == "has_runs"
    rental.end(used, allocate(used, tenant))
    assert staff.delete(f"/admin/machines/{used.id}").json["code"] == "has_leases"
    assert Lease.select().count() == 1


def test_a_machine_that_vanished_meanwhile_is_not_found(database: Any) -> None:
    machine = register()
    retirement.delete(machine, by=SYSTEM)
    for act in (provisioning.provision, retirement.delete, machines.end_maintenance):
        with pytest.raises(NotFound):
            act(machine, by=SYSTEM)


def test_no_side_path_changes_the_state_of_a_leased_machine(staff: Any, tenant: Tenant) -> None:
    host = ready_host("gpu-1")
    allocate(host, tenant)
    provisioning.enrolled(host.machine, rental.facts())
    provisioning.seen_gpus(host.machine, [rental.gpu("GPU-other")])
    provisioning.baseline_taken(host.machine, rental.baseline())
    provisioning.baseline_failed(host.machine, "no")
    provisioning.fail_overdue(utcnow() + timedelta(days=1))
    machines.end_maintenance(host.machine, by=SYSTEM)
    staff.patch(f"/admin/machines/{host.id}", {"remark": "x", "credential": {"password": "y"}})
    assert host.state == "leased"
