"""Sixty-four people allocate one machine at the same moment, over HTTP, against two web processes: one gets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from portal.models import Lease, Tenant, User
from portal.services import leases
from portal.settings import Settings
from tests.support import rental
from tests.support.portal import free_port
from tests.support.rental import Host, ready_host, tomorrow
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
CALLERS = 64
Answers = list[tuple[int, dict[str, Any]]]


@pytest.fixture
def ports(database: Any, settings: Settings, tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Two web processes of the portal on the test's database, and where they listen."""
    free = (free_port("127.0.0.1"), free_port("127.0.0.1"))
    with ExitStack() as processes:
        for port in free:
            processes.enter_context(web_process(settings, port, log_of(tmp_path, port)))
        for port in free:
            until(partial(answers, port), f"port {port}", timeout_s=60, also=log_of(tmp_path, port).read_text)
        yield free


def log_of(folder: Path, port: int) -> Path:
    return folder / f"web-{port}.log"


def web_process(settings: Settings, port: int, log: Path) -> ExitStack:
    """`python -m portal web`, ended when the stack is left."""
    environment = {
        **os.environ,
        "INSTANCE_DIR": str(settings.instance_dir),
        "DATABASE_URL": settings.database_url,
        "PUBLIC_URL": f"http://127.0.0.1:{port}",
        "BIND": f"127.0.0.1:{port}",
        "PEOPLE_LIMIT": settings.people_limit,
        "SECRET_KEY": settings.secret_key,
        "JWT_SECRET_KEY": settings.jwt_secret_key,
        "ENCRYPTION_KEY": settings.encryption_key,
    }
    stack = ExitStack()
    file = stack.enter_context(log.open("wb"))
    command = [sys.executable, "-m", "portal", "web"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)
    return stack


def answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def all_at_once(ports: tuple[int, int], path: str, body: dict[str, Any], headers: dict[str, str]) -> Answers:
    """What each of the callers is answered; all are connected before the first one asks."""
    gate, told, lock = threading.Barrier(CALLERS), Answers(), threading.Lock()
    payload = json.dumps(body).encode()

    def call(port: int) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.connect()
        gate.wait(60)
        try:
            connection.request("POST", path, payload, {**headers, "Content-Type": "application/json"})
            answer = connection.getresponse()
            known = (answer.status, json.loads(answer.read()))
        except (OSError, HTTPException) as error:
            known = (0, {"detail": repr(error)})
        finally:
            connection.close()
        with lock:
            told.append(known)

    callers = [threading.Thread(target=call, args=(ports[number % 2],)) for number in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    return told


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_of_sixty_four_parallel_allocations_one_wins(
    ports: tuple[int, int], tenant: Tenant, operator: User, sign_in: Callable[[User], Any], rounds: int
) -> None:
    host = ready_host("gpu-1")
    body = {"tenant_id": tenant.id, "until": tomorrow().isoformat(), "retain_s": 0}
    for number in range(rounds):
        host.report()
        headers = sign_in(operator).headers  # 200 rounds may take longer than a token lives
        answered = all_at_once(ports, f"/api/v1/admin/machines/{host.id}/allocate", body, headers)
        statuses = Counter(status for status, _ in answered)
        assert statuses == {201: 1, 409: CALLERS - 1}, (
            f"round {number}: {[each for each in answered if each[0] not in (201, 409)][:3]}"
        )
        (winner,) = [told for status, told in answered if status == 201]
        assert {told["code"] for status, told in answered if status == 409} == {"cannot_allocate"}
        assert_one_has_it(host, winner["id"], rounds_before=number)
        rental.reclaim(host, rental.end(host, leases.get(winner["id"])))


def assert_one_has_it(host: Host, lease_id: int, *, rounds_before: int) -> None:
    """One open lease, the winner's; who lost has left nothing, not even a used UID."""
    assert [lease.id for lease in Lease.select().where(Lease.state != "ended")] == [lease_id]
    assert Lease.select().count() == rounds_before + 1
    assert (host.state, host.machine.next_uid) == ("leased", 20000 + rounds_before + 1)
