"""The operations at the front door: who may, what each answers, and what a page says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_jwt_extended import decode_token
from werkzeug.test import TestResponse

from portal.api import auth
from portal.db import utcnow
from portal.integrations import login_key_files
from portal.models import AuditEntry, Baseline, Command, Machine, Run, RunHost, Tenant, User
from portal.services import drift, runs, sessions
from portal.services.actors import SYSTEM
from portal.services.sessions import Caller
from portal.settings import Settings
from tests.conftest import SignedIn
from tests.support.rental import allocate, finish_run, ready_host
from tests.support.runs import make_machine

SignIn = Callable[[User], SignedIn]
InBrowser = Callable[[User], "Browser"]
OPERATIONS = ("upgrade_agent", "rotate_credentials", "drift")
CHANGE = {"role": "docker", "task": "Ensure it", "item": None, "path": "/etc/docker/daemon.json", "diff": "-<b>\n+b"}


@pytest.fixture
def olga(sign_in: SignIn, operator: User) -> SignedIn:
    return sign_in(operator)


@pytest.fixture
def machine(database: Any) -> Machine:
    return made("gpu-1")


def made(name: str, **fields: Any) -> Machine:
    """A machine that was made a GPU host."""
    machine = make_machine(name, **fields)
    Baseline.create(machine=machine, digest="0" * 64, content={"sections": {}}, taken_at=utcnow())
    return machine


@dataclass
class Browser:
    """A signed-in person in front of the pages."""

    client: FlaskClient
    csrf: str

    def get(self, path: str, **options: Any) -> TestResponse:
        answer = self.client.get(path, **options)
        assert answer.status_code == 200, answer.text
        return answer

    def post(self, path: str, form: dict[str, str]) -> TestResponse:
        return self.client.post(path, data={**form, "csrf_token": self.csrf})


@pytest.fixture
def in_browser(app: Flask) -> Callable[[User], Browser]:
    def of(user: User) -> Browser:
        session = sessions.start(user, caller=Caller("192.0.2.10"), life_s=3600)
        with app.app_context():
            access, _ = auth.tokens_of(session)
            csrf = str(decode_token(access)["csrf"])
        client = app.test_client()
        client.set_cookie("access_token_cookie", access)
        client.set_cookie("csrf_access_token", csrf)
        return Browser(client, csrf)

    return of


def body(answer: TestResponse) -> Any:
    return answer.json


@pytest.mark.parametrize("playbook", OPERATIONS)
def test_an_operator_starts_an_operation_on_named_machines(olga: SignedIn, machine: Machine, playbook: str) -> None:
    answer = olga.post("/admin/runs", {"playbook": playbook, "machines": ["gpu-1"]})
    assert answer.status_code == 201, body(answer)
    assert body(answer)["options"]["check"] is (playbook == "drift"), "a look only looks"
    assert AuditEntry.get(AuditEntry.action == "run.queued").detail["playbook"] == playbook


def test_an_operation_under_a_lease_says_whom_it_meets(olga: SignedIn, tenant: Tenant) -> None:
    host = ready_host("gpu-1")
    lease = allocate(host, tenant)
    met = [{"id": lease.id, "machine": "gpu-1", "tenant": tenant.name, "ends_at": lease.ends_at.isoformat()}]
    answer = olga.post("/admin/runs", {"playbook": "upgrade_agent", "machines": ["gpu-1"]})
    assert answer.status_code == 201, body(answer)
    assert body(answer)["impact"] == {"leases": met, "tasks": []}
    assert body(olga.get("/admin/runs/impact?machines=gpu-1"))["leases"] == met


@pytest.mark.parametrize("playbook", OPERATIONS)
def test_a_customer_starts_none(sign_in: SignIn, customer: User, machine: Machine, playbook: str) -> None:
    assert sign_in(customer).post("/admin/runs", {"playbook": playbook, "machines": ["gpu-1"]}).status_code == 403
    assert Run.select().count() == 0


def test_drift_is_read_with_its_time_and_its_cause(olga: SignedIn, machine: Machine) -> None:
    other = made("gpu-2")
    nobody = body(olga.get(f"/admin/drift/{machine.id}"))
    assert (nobody["state"], nobody["looked_at"], nobody["changes"]) == ("unknown", None, [])
    run = runs.queue(drift.PLAYBOOK, [machine, other], by=SYSTEM)
    finish_run(run, "failed", {"gpu-1": {"state": "drifted", "reason": None, "changes": [CHANGE]}})
    found = body(olga.get(f"/admin/drift/{machine.id}"))
    assert (found["state"], found["run_id"], found["changes"]) == ("drifted", run.id, [CHANGE])
    assert found["looked_at"].startswith(str(utcnow().year))
    listed = body(olga.get("/admin/drift"))["items"]
    assert [(row["machine"], row["state"], row["change_count"]) for row in listed] == [
        ("gpu-1", "drifted", 1),
        ("gpu-2", "unknown", 0),
    ]
    assert listed[1]["reason"] == "it went wrong"
    assert [row["machine"] for row in body(olga.get("/admin/drift?state=unknown"))["items"]] == ["gpu-2"]
    assert olga.get("/admin/drift?state=fine").status_code == 422
    assert olga.get("/admin/drift/999").status_code == 404


def test_drift_is_nothing_for_customers(sign_in: SignIn, customer: User, machine: Machine) -> None:
    anna = sign_in(customer)
    assert anna.get("/admin/drift").status_code == 403
    assert anna.get(f"/admin/drift/{machine.id}").status_code == 403
    assert anna.get("/admin/runs/login-key").status_code == 403
    assert anna.post(f"/admin/machines/{machine.id}/agent-credential").status_code == 403


def test_an_agents_credential_is_rotated_by_the_number_that_a_shell_waits_for(olga: SignedIn, machine: Machine) -> None:
    answer = olga.post(f"/admin/machines/{machine.id}/agent-credential")
    assert answer.status_code == 202
    sent = body(answer)["credential_id"]
    command = Command.get(Command.machine == machine, Command.kind == "rotate_credential")
    assert command.args["credential_id"] == sent
    again = body(olga.post(f"/admin/machines/{machine.id}/agent-credential"))
    assert again["credential_id"] == sent, "while one is on its way it is the same"


def test_the_login_key_says_how_far_its_rotation_is(olga: SignedIn, machine: Machine, settings: Settings) -> None:
    settings.ssh_key_file.parent.mkdir(parents=True, exist_ok=True)
    login_key_files.ensure(settings.ssh_key_file)
    at_rest = body(olga.get("/admin/runs/login-key"))
    assert (at_rest["is_rotating"], at_rest["pending"]) == (False, [])
    login_key_files.replace(settings.ssh_key_file)
    going_on = body(olga.get("/admin/runs/login-key"))
    assert (going_on["is_rotating"], going_on["pending"]) == (True, ["gpu-1"])
    assert going_on["fingerprint"] != at_rest["fingerprint"]


# Pages


def test_the_machines_page_shows_what_differs_in_both_languages(
    in_browser: InBrowser, operator: User, machine: Machine
) -> None:
    page = in_browser(operator)
    assert "Nobody has looked yet." in page.get(f"/machines/{machine.id}").text
    run = runs.queue(drift.PLAYBOOK, [machine], by=SYSTEM)
    finish_run(run, verdicts={"gpu-1": {"state": "drifted", "reason": "It broke.", "changes": [CHANGE]}})
    found = drift.find(machine)
    assert found is not None
    shown = page.get(f"/machines/{machine.id}").text
    for text in (
        "/etc/docker/daemon.json",
        "Ensure it",
        "-&lt;b&gt;",
        "It broke.",
        "drifted",
        found.looked_at.isoformat(),
    ):
        assert text in shown, text
    chinese = page.get(f"/machines/{machine.id}", headers={"Accept-Language": "zh-CN"}).text
    for text in ("配置偏差", "有偏差", "只检查了一部分", "检查配置偏差", "升级代理程序", "轮换凭据"):
        assert text in chinese, text
    run = runs.queue(drift.PLAYBOOK, [machine], by=SYSTEM)
    finish_run(run, verdicts={"gpu-1": {"state": "none", "reason": None, "changes": []}})
    assert "Provisioning would change nothing." in page.get(f"/machines/{machine.id}").text


def test_what_is_not_shown_of_a_difference_is_said_in_both_languages(
    in_browser: InBrowser, operator: User, machine: Machine
) -> None:
    hidden = {**CHANGE, "diff": "its content is not shown: not everybody on the host may read it"}
    more = {"role": None, "task": "and 3 more", "item": None, "path": None, "diff": None}
    run = runs.queue(drift.PLAYBOOK, [machine], by=SYSTEM)
    finish_run(run, verdicts={"gpu-1": {"state": "drifted", "reason": None, "changes": [hidden, more]}})
    page = in_browser(operator)
    english = page.get(f"/machines/{machine.id}").text
    assert "Its content is not shown: not everybody on the host may read it." in english
    assert "and 3 more" in english
    assert ">None<" not in english
    chinese = page.get(f"/machines/{machine.id}", headers={"Accept-Language": "zh-CN"}).text
    assert "内容不显示：该文件并非主机上所有人可读。" in chinese
    assert "its content is not shown" not in chinese


def test_a_run_on_the_fleet_names_a_few_of_its_machines_and_how_many_more(
    in_browser: InBrowser, operator: User, database: Any
) -> None:
    for number in range(1, 9):
        made(f"gpu-{number}")
    page = in_browser(operator)
    page.post("/runs/operations", {"playbook": "drift"})
    listed = page.get("/runs").text
    assert "gpu-1, gpu-2, gpu-3, gpu-4, gpu-5" in listed
    assert "and 3 more" in listed
    assert "gpu-6" not in listed


@pytest.mark.parametrize("playbook", OPERATIONS)
def test_a_button_starts_it_on_the_machine_and_on_the_whole_fleet(
    in_browser: InBrowser, operator: User, machine: Machine, playbook: str
) -> None:
    made("gpu-2", state="leased")
    made("gpu-3", state="retired")
    make_machine("gpu-4", state="registered")  # never made a host: there is nothing to keep
    page = in_browser(operator)
    assert f'value="{playbook}"' in page.get(f"/machines/{machine.id}").text
    assert f'value="{playbook}"' in page.get("/runs").text
    assert page.post(f"/machines/{machine.id}/operations", {"playbook": playbook}).status_code == 303
    assert machines_of(Run.get()) == ["gpu-1"]
    assert page.post("/runs/operations", {"playbook": playbook}).status_code == 303
    assert machines_of(Run.select().order_by(Run.id.desc()).get()) == ["gpu-1", "gpu-2"]


def test_a_button_starts_nothing_else(in_browser: InBrowser, operator: User, machine: Machine) -> None:
    page = in_browser(operator)
    for playbook in ("site", "gpu_hosts", "verify", "../drift", ""):
        page.post(f"/machines/{machine.id}/operations", {"playbook": playbook})
        page.post("/runs/operations", {"playbook": playbook})
    assert Run.select().count() == 0


def test_a_page_that_came_back_with_a_refusal_goes_on_showing_how_the_machine_is(
    in_browser: InBrowser, operator: User
) -> None:
    """It came from the address of the refused form, where nothing can be read."""
    machine = made("gpu-1", state="leased")
    refused = in_browser(operator).post(f"/machines/{machine.id}/reclaim", {"reason": ""})
    assert refused.status_code == 422
    assert f'hx-get="/machines/{machine.id}"' in refused.text


def machines_of(run: Run) -> list[str]:
    rows = RunHost.select(RunHost, Machine).join(Machine).where(RunHost.run == run).order_by(Machine.name)
    return [row.machine.name for row in rows]
