"""The portal's own samples: null is no sample and never 0, and every number has one meaning."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from portal.db import atomic, utcnow
from portal.models import Gpu, Machine, Tenant
from portal.models.states import MACHINE
from portal.services import monitoring_samples
from portal.services.monitoring_samples import exposition, normalised
from tests.factories import make_lease, make_machine
from tests.support import rental
from tests.support.rental import GIB, Host

Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def taken(text: str | None = None) -> Found:
    """Every sample by name and labels; each only once."""
    found: Found = {}
    for family in text_string_to_metric_families(exposition(utcnow()) if text is None else text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def values(found: Found, name: str, *labels: str) -> dict[Any, float]:
    """The samples of one name by these labels."""
    keyed = {}
    for (each, pairs), value in found.items():
        if each == name:
            of_sample = dict(pairs)
            keyed[tuple(of_sample.get(label, "") for label in labels) if len(labels) > 1
                  else of_sample.get(labels[0], "")] = value  # fmt: skip
    return keyed


@pytest.fixture
def host(database: Any) -> Host:
    return rental.ready_host("gpu-1", region="eu")


def of(host: Host, **changes: Any) -> Iterable[dict[str, Any]]:
    return [rental.gpu(each, index, **changes) for index, each in enumerate(host.gpu_uuids)]


def test_a_uuid_is_written_as_the_exporter_writes_it() -> None:
    assert normalised("GPU-8F1B2C3D-0000-ABCD") == "8f1b2c3d-0000-abcd"
    assert normalised("gpu-8f") == "8f"


def test_what_the_agent_measured_is_told_in_base_units(host: Host) -> None:
    measured = {"utilization_percent": 93, "memory_used_bytes": 7 * GIB, "temperature_c": 61, "power_w": 612.5}
    host.report(gpu=rental.gpu_report(of(host, **measured)))
    found = taken()
    uuids = {normalised(each) for each in host.gpu_uuids}
    assert values(found, "remotegpu_gpu_utilization_ratio", "uuid") == dict.fromkeys(uuids, 0.93)
    assert values(found, "remotegpu_gpu_memory_used_bytes", "uuid") == dict.fromkeys(uuids, 7 * GIB)
    assert values(found, "remotegpu_gpu_temperature_celsius", "uuid") == dict.fromkeys(uuids, 61)
    assert values(found, "remotegpu_gpu_power_watts", "uuid") == dict.fromkeys(uuids, 612.5)
    assert values(found, "remotegpu_gpu_up", "uuid") == dict.fromkeys(uuids, 1)
    assert values(found, "remotegpu_machine_info", "host", "region", "gpu_model") == {("gpu-1", "eu", "NVIDIA H100"): 1}


FIELDS = ("utilization_percent", "memory_used_bytes", "temperature_c", "power_w", "ecc_uncorrected",
          "memory_bandwidth_percent", "power_limit_w", "memory_total_bytes", "mig", "processes")  # fmt: skip


def test_what_is_unknown_has_no_sample_and_zero_has_one(host: Host) -> None:
    known, unknown = host.gpu_uuids
    gpus = [rental.gpu(known, 0), rental.gpu(unknown, 1, **dict.fromkeys(FIELDS))]
    host.report(gpu=rental.gpu_report(gpus))
    found = taken()
    told = {name: values(found, name, "uuid") for name, _ in found if name.startswith("remotegpu_gpu_")}
    assert told.pop("remotegpu_gpu_info").keys() == told.pop("remotegpu_gpu_up").keys()
    assert {name for name, by_uuid in told.items() if by_uuid.keys() != {normalised(known)}} == set()
    assert len(told) == len(FIELDS)
    assert told["remotegpu_gpu_utilization_ratio"] == {normalised(known): 0}


def test_a_divided_gpu_has_no_utilisation_whatever_its_driver_says(host: Host) -> None:
    host.report(gpu=rental.gpu_report(of(host, mig=True, utilization_percent=0)))
    found = taken()
    assert values(found, "remotegpu_gpu_utilization_ratio", "uuid") == {}
    assert set(values(found, "remotegpu_gpu_mig", "uuid").values()) == {1}
    assert len(values(found, "remotegpu_gpu_temperature_celsius", "uuid")) == 2


def test_more_than_everything_is_a_drivers_blank(host: Host) -> None:
    host.report(gpu=rental.gpu_report(of(host, utilization_percent=4294967295)))
    assert values(taken(), "remotegpu_gpu_utilization_ratio", "uuid") == {}


def test_a_gpu_that_is_lost_or_gone_is_down_and_the_other_goes_on(host: Host) -> None:
    first, second = host.gpu_uuids
    host.report(gpu=rental.gpu_report([rental.gpu(first)]))
    assert values(taken(), "remotegpu_gpu_up", "uuid") == {normalised(first): 1, normalised(second): 0}
    lost = rental.gpu(second, 1, **dict.fromkeys(FIELDS), state="lost")
    host.report(gpu=rental.gpu_report([rental.gpu(first), lost]))
    assert values(taken(), "remotegpu_gpu_up", "uuid") == {normalised(first): 1, normalised(second): 0}


@pytest.mark.parametrize("state", ["stale", "mismatch", "driver_not_loaded", "error"])
def test_values_of_another_moment_are_none(host: Host, state: str) -> None:
    host.report(gpu=rental.gpu_report(of(host, temperature_c=61), state=state, message="it hangs"))
    found = taken()
    assert values(found, "remotegpu_gpu_temperature_celsius", "uuid") == {}
    assert values(found, "remotegpu_gpu_up", "uuid") == {}
    assert values(found, "remotegpu_agent_nvml", "state") == {state: 1}
    assert values(found, "remotegpu_machine_problem", "code") == {"nvml": 1}


def test_a_silent_host_has_an_age_and_no_values(host: Host) -> None:
    host.report(received_at=utcnow() - timedelta(seconds=300))
    found = taken()
    assert values(found, "remotegpu_agent_online", "host") == {"gpu-1": 0}
    assert values(found, "remotegpu_agent_report_age_seconds", "host")["gpu-1"] == pytest.approx(300, abs=5)
    assert [name for name, _ in found if name.startswith("remotegpu_host_")] == []
    assert values(found, "remotegpu_gpu_temperature_celsius", "uuid") == {}


def test_a_host_that_never_reported_has_no_age(database: Any) -> None:
    make_machine("new", state="registered")
    found = taken()
    assert values(found, "remotegpu_agent_online", "host") == {}
    assert values(found, "remotegpu_agent_report_age_seconds", "host") == {}
    assert values(found, "remotegpu_machine_state", "host") == {"new": 1}


def test_each_machine_is_counted_once_and_every_state_is_there(host: Host, tenant: Tenant) -> None:
    for state in MACHINE:
        make_machine(f"one-{state}", state=state)
    make_lease(Machine.get(Machine.name == "one-leased"), tenant)
    found = taken()
    counted = values(found, "remotegpu_machines", "state", "reachability")
    assert len(counted) == len(MACHINE) * 3
    assert sum(counted.values()) == Machine.select().count() == len(MACHINE) + 1
    assert (counted["ready", "online"], counted["ready", "never"], counted["retired", "offline"]) == (1, 1, 0)
    assert values(found, "remotegpu_leases", "state") == {"active": 1, "scheduled": 0, "ending": 0, "ended": 0}
    assert values(found, "remotegpu_runs", "state")["succeeded"] == 1
    assert values(found, "remotegpu_queue_depth", "queue") == {"runs": 0, "commands": 0, "tasks": 0}
    assert "one-retired" not in values(found, "remotegpu_machine_state", "host")


def test_a_host_cannot_make_up_series(host: Host) -> None:
    """A root on a host chooses names: those of its own GPUs are the portal's, the rest is bounded and told once."""
    interfaces = ["eth0", "eth0", "veth12ab", "docker0", "lo", *(f"enp{number}" for number in range(100))]
    disks = [{"mount": f"/{number}", "device": "d", "total_bytes": 2, "used_bytes": 1, "free_bytes": 1}
             for number in range(128)]  # fmt: skip
    network = [{"interface": name, "received_bytes": 5, "sent_bytes": None} for name in interfaces]
    strange = rental.gpu("GPU-of-another-host", 7)
    host.report(
        metrics=rental.metrics() | {"disks": disks, "network": network},
        gpu=rental.gpu_report([*of(host), strange]),
    )
    found = taken()
    told = values(found, "remotegpu_host_network_received_bytes_total", "interface")
    assert len(told) == monitoring_samples.MOST_INTERFACES
    assert "eth0" in told
    assert not {"veth12ab", "docker0", "lo"} & told.keys()
    assert values(found, "remotegpu_host_network_sent_bytes_total", "interface") == {}
    assert len(values(found, "remotegpu_host_disk_free_bytes", "mount")) == monitoring_samples.MOST_DISKS
    assert values(found, "remotegpu_gpu_up", "uuid").keys() == {normalised(each) for each in host.gpu_uuids}


def test_a_name_with_quotes_and_line_ends_stays_a_name(host: Host) -> None:
    with atomic():
        Machine.update(region='"eu"\n\\west} 1').execute()
        Gpu.update(name='H100 "odd"\n').execute()
    found = taken()
    assert values(found, "remotegpu_machine_info", "region", "gpu_model") == {('"eu"\n\\west} 1', 'H100 "odd"\n'): 1}


def test_no_word_about_a_customer_is_told(host: Host, tenant: Tenant) -> None:
    host.sees(rental.allocate(host, tenant, remark="Acme pays late"))
    text = exposition(utcnow())
    assert 'remotegpu_machine_state{host="gpu-1",machine_id=' in text
    assert "Acme" not in text
    assert "lease1" not in text
