"""What the delivered alerts rest on is in /metrics, with the values of the rows."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest

from portal.db import utcnow
from portal.models import Lease, Tenant, User
from portal.services import alerts_samples, provisioning, sweeps, tokens
from portal.services.actors import SYSTEM
from portal.settings import Settings
from tests.factories import actor_of, make_lease, make_machine
from tests.support import rental


def samples() -> dict[str, float]:
    """`name{labels}` → value."""
    lines = alerts_samples.exposition(utcnow()).splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def of_rows() -> dict[str, float]:
    return {name: value for name, value in samples().items() if not name.startswith("remotegpu_database")}


def test_where_there_is_nothing_there_is_no_sample(database: Any) -> None:
    assert of_rows() == {}


def test_the_end_of_an_active_lease_is_told_and_nothing_of_its_tenant(database: Any, tenant: Tenant) -> None:
    machine = make_machine("gpu-1", state="leased")
    lease = make_lease(machine, tenant)
    name = f'remotegpu_lease_end_timestamp_seconds{{host="gpu-1",machine_id="{machine.id}",lease="{lease.id}"}}'
    assert of_rows() == {name: pytest.approx(lease.ends_at.timestamp())}
    Lease.update(state="ended").execute()
    assert of_rows() == {}


def test_a_failed_run_is_1_and_0_after_the_next_one_went_well(database: Any) -> None:
    machine = rental.confirm(rental.register("gpu-1"))
    rental.finish_run(provisioning.provision(machine, by=SYSTEM), "failed")
    name = 'remotegpu_run_failed{host="gpu-1",playbook="gpu_hosts"}'
    assert of_rows() == {name: 1}
    rental.finish_run(provisioning.provision(machine, by=SYSTEM))
    assert of_rows() == {name: 0}


def test_a_programs_token_is_told_by_its_number_alone(database: Any, operator: User) -> None:
    ends_at = utcnow() + timedelta(days=3)
    token, secret = tokens.create(operator, name="secret", scopes=["alerts"], expires_at=ends_at, by=actor_of(operator))
    assert of_rows() == {
        f'remotegpu_token_end_timestamp_seconds{{token="{token.id}"}}': pytest.approx(ends_at.timestamp())
    }
    assert secret not in alerts_samples.exposition(utcnow())


def test_when_a_worker_last_swept_well_is_told(database: Any) -> None:
    began = utcnow()
    sweeps.Round(()).go(0)
    (told,) = of_rows().items()
    assert told[0] == "remotegpu_sweep_success_timestamp_seconds"
    assert began.timestamp() <= told[1] <= utcnow().timestamp()


def test_connections_are_counted_where_they_can_run_out(database: Any, database_url: str) -> None:
    told = samples()
    if database_url.startswith("sqlite"):
        assert told == {}
    else:
        assert 1 <= told["remotegpu_database_connections"] < told["remotegpu_database_connections_limit"] == 300


def test_a_redis_that_is_away_is_told_and_no_error(database: Any, settings: Settings) -> None:
    object.__setattr__(settings, "redis_url", "redis://127.0.0.1:1/0")
    told = {name: value for name, value in samples().items() if name.startswith("remotegpu_redis")}
    assert told == {"remotegpu_redis_up": 0}


def test_every_family_is_described(database: Any, tenant: Tenant) -> None:
    make_lease(make_machine(state="leased"), tenant)
    text = alerts_samples.exposition(utcnow())
    named = set(re.findall(r"^(remotegpu_\w+)[{ ]", text, re.MULTILINE))
    assert named == set(re.findall(r"^# TYPE (\w+) gauge$", text, re.MULTILINE))
