"""Charts out of a real Prometheus: what is there, what is not and why, and nothing from before a customer's lease.

One hour of the past is written for each host, so that every kind of gap is in it. The hosts are named before they are
made: each test's database begins with machine 1.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from portal.db import atomic
from portal.errors import NotFound
from portal.integrations.prometheus import PrometheusRefused
from portal.models import Lease, Machine, Tenant
from portal.services import leases, monitoring_charts, monitoring_live
from portal.services.monitoring_charts import SPANS
from portal.services.monitoring_measures import MEASURES
from portal.settings import Settings
from tests.support import prometheus, rental
from tests.support.prometheus import Sample
from tests.support.rental import GIB

RULES = Path(__file__).parents[2] / "roles" / "prometheus" / "files" / "remotegpu.recording.rules.yml"
STEP_S = 15
HOUR_S = 3600
DAY_S = 24 * HOUR_S
FIRST, SECOND = "0001-0", "0001-1"  # the GPUs of tests' machine 1, as exporters write them
Since = Callable[[int], bool]


class Past:
    """Samples of one host, every 15 s of the last hour. Minutes count from its beginning."""

    def __init__(self, host: str, now: float) -> None:
        self.host, self.end = host, now
        self.samples: list[Sample] = []

    def add(self, series: str, value: float, begins: int = 0, ends: int = 60, **labels: str) -> None:
        start = self.end - HOUR_S
        moments = range(begins * 60, ends * 60 + (STEP_S if ends == 60 else 0), STEP_S)
        self.samples += [Sample(series, {"host": self.host, **labels}, start + each, value) for each in moments]

    def exporter(self, value: float, begins: int = 0, ends: int = 60) -> None:
        for job in ("node", "nvidia_gpu"):
            self.add("up", value, begins, ends, job=job)


def with_exporters(now: float) -> list[Sample]:
    """Well; down; its exporter failing; one GPU gone; that GPU divided; well again, and idle."""
    past = Past("gpu-1", now)
    past.exporter(1, 0, 10)
    past.exporter(0, 10, 20)
    past.exporter(1, 20, 60)
    past.add("nvidia_smi_command_exit_code", 0, 0, 10)
    past.add("nvidia_smi_command_exit_code", 6, 20, 30)
    past.add("nvidia_smi_command_exit_code", 0, 30, 60)
    for uuid, times in ((FIRST, [(0, 10), (30, 60)]), (SECOND, [(0, 10), (40, 60)])):
        for begins, ends in times:
            past.add("nvidia_smi_gpu_info", 1, begins, ends, uuid=uuid, name="NVIDIA H100")
            past.add("nvidia_smi_temperature_gpu", 61, begins, ends, uuid=uuid)
            past.add("nvidia_smi_memory_used_bytes", 20 * GIB, begins, ends, uuid=uuid)
            past.add("nvidia_smi_memory_total_bytes", 80 * GIB, begins, ends, uuid=uuid)
    past.add("nvidia_smi_utilization_gpu_ratio", 0.5, 0, 10, uuid=FIRST)
    past.add("nvidia_smi_utilization_gpu_ratio", 0.5, 30, 50, uuid=FIRST)
    past.add("nvidia_smi_utilization_gpu_ratio", 0, 50, 60, uuid=FIRST)
    past.add("nvidia_smi_utilization_gpu_ratio", 0.9, 0, 10, uuid=SECOND)
    past.add("nvidia_smi_mig_mode_current", 1, 40, 50, uuid=SECOND)
    past.add("nvidia_smi_mig_mode_current", 0, 50, 60, uuid=SECOND)
    past.add("nvidia_smi_utilization_gpu_ratio", 0.7, 50, 60, uuid=SECOND)
    past.add("nvidia_smi_clocks_throttle_reasons_hw_slowdown", 1, uuid=FIRST)  # an old driver's name,
    past.add("nvidia_smi_clocks_event_reasons_hw_slowdown", 0, uuid=SECOND)  # and a new one's
    past.add("nvidia_smi_power_draw_watts", 300, uuid=FIRST)
    past.add("nvidia_smi_power_draw_instant_watts", 400, uuid=SECOND)
    past.add("nvidia_smi_clocks_current_sm_clock_hz", 1.98e9, uuid=FIRST)
    past.add("nvidia_smi_ecc_errors_uncorrected_volatile_total", 3, uuid=FIRST)
    return past.samples


def with_an_agent_alone(now: float) -> list[Sample]:
    """Nobody installed an exporter: both are down, and the agent tells. Its second GPU is lost from minute 30 on."""
    past = Past("gpu-2", now)
    past.exporter(0)
    past.add("remotegpu_agent_online", 1)
    past.add("remotegpu_gpu_up", 1, uuid=FIRST)
    past.add("remotegpu_gpu_up", 1, 0, 30, uuid=SECOND)
    past.add("remotegpu_gpu_up", 0, 30, 60, uuid=SECOND)
    past.add("remotegpu_gpu_utilization_ratio", 0.25, uuid=FIRST)
    past.add("remotegpu_gpu_utilization_ratio", 0.75, 0, 30, uuid=SECOND)
    past.add("remotegpu_host_cpu_ratio", 0.125)
    past.add("remotegpu_host_disk_total_bytes", 1000, mount="/")
    past.add("remotegpu_host_disk_free_bytes", 250, mount="/")
    for minute in range(60):
        received = minute * 60 * 1000.0
        past.add("remotegpu_host_network_received_bytes_total", received, minute, minute + 1, interface="eth0")
    return past.samples


def with_the_portal_down(now: float) -> list[Sample]:
    """The portal is down from minute 20 to 30. One host is down from minute 40 to 50, its exporters were never let in.
    The other, whose exporters answered, goes down together with the portal.
    """
    portal, never_let_in, down = (Past(name, now) for name in ("portal", "gpu-5", "gpu-6"))
    portal.add("up", 1, 0, 20, job="portal")
    portal.add("up", 0, 20, 30, job="portal")
    portal.add("up", 1, 30, 60, job="portal")
    never_let_in.exporter(0)
    for begins, ends, online in ((0, 20, 1), (30, 40, 1), (40, 50, 0), (50, 60, 1)):
        never_let_in.add("remotegpu_agent_online", online, begins, ends)
        if online:
            never_let_in.add("remotegpu_host_cpu_ratio", 0.5, begins, ends)
    down.exporter(1, 0, 20)
    down.exporter(0, 20, 60)
    down.add("remotegpu_agent_online", 1, 0, 20)
    down.add("remotegpu_host_cpu_ratio", 0.5, 0, 20)
    down.add("remotegpu_agent_online", 0, 30, 60)
    return portal.samples + never_let_in.samples + down.samples


def with_a_control_plane(now: float) -> list[Sample]:
    """The host of the fleet uses a quarter of what it has, the control plane's own machine all."""
    samples = []
    for job, free in (("node", 75), ("control_plane", 0)):
        past = Past(f"a-{job}", now)
        past.add("node_filesystem_avail_bytes", free, job=job, mountpoint="/", fstype="ext4")
        past.add("node_filesystem_size_bytes", 100, job=job, mountpoint="/", fstype="ext4")
        past.add("node_memory_MemAvailable_bytes", free, job=job)
        past.add("node_memory_MemTotal_bytes", 100, job=job)
        samples += past.samples
    return samples


def before_and_in_a_lease(now: float, began: float, host: str) -> list[Sample]:
    """99 until the lease began, 1 from then on: in the samples, and in what the recording rules made of them."""
    samples = []
    for at in range(int(now - HOUR_S), int(now) + 1, STEP_S):
        value = 0.99 if at < began else 0.01
        samples.append(Sample("nvidia_smi_utilization_gpu_ratio", {"host": host, "uuid": FIRST}, at, value))
        samples.append(Sample("nvidia_smi_temperature_gpu", {"host": host, "uuid": FIRST}, at, 100 * value))
    return samples


def recorded(now: float, began: float, host: str) -> list[Sample]:
    """A value covers the five minutes before it: the first ones of the lease still hold some of what was before."""
    return [
        Sample("gpu:utilization_percent:avg5m", {"host": host, "uuid": FIRST}, at, 99 if at < began + 300 else 1)
        for at in range(int(now - 30 * DAY_S), int(now) + 1, 300)
    ]


def of_the_fleet(now: float) -> list[Sample]:
    """30 days of five minutes, a day of them missing."""
    return [
        Sample("fleet:utilization_percent:avg5m", {}, at, 40.0)
        for at in range(int(now - 30 * DAY_S), int(now) + 1, 300)
        if not 10 * DAY_S <= now - at < 11 * DAY_S
    ]


@pytest.fixture(scope="module")
def now() -> datetime:
    """On the hour, so that every grid ends here."""
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


@pytest.fixture(scope="module")
def history(now: datetime) -> Iterator[str]:
    """The address of a Prometheus that remembers all of this."""
    end = now.timestamp()
    short, long = end - 25 * 60, end - 3 * DAY_S
    with prometheus.server() as server:
        server.load(
            [
                *with_exporters(end),
                *with_an_agent_alone(end),
                *with_the_portal_down(end),
                *with_a_control_plane(end),
                *before_and_in_a_lease(end, short, "gpu-3"),
                *recorded(end, long, "gpu-4"),
                *of_the_fleet(end),
            ]
        )
        server.start()
        yield server.url


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """What is asked of Prometheus does not depend on the kind of database: SQLite alone."""
    file = tmp_path / "instance" / "remotegpu.db"
    file.parent.mkdir(exist_ok=True)
    shutil.copy(sqlite_template, file)
    return f"sqlite:///{file}"


@pytest.fixture
def site(settings: Settings, history: str, database: Any) -> None:
    object.__setattr__(settings, "prometheus_url", history)


@pytest.fixture
def chart(site: None, now: datetime) -> Callable[..., dict[str, Any]]:
    def of(name: str, measure: str, span: str = "1h", **given: Any) -> dict[str, Any]:
        host = rental.ready_host(name) if not Machine.select().where(Machine.name == name).exists() else None
        machine = host.machine if host else Machine.get(Machine.name == name)
        return monitoring_charts.of_machine(machine, measure, span, now, **given)

    return of


def at_minute(line: dict[str, Any], minute: float) -> float | None:
    value: float | None = line["values"][int(minute * 60 / STEP_S)]
    return value


def causes(chart: dict[str, Any], line: dict[str, Any], *minutes: float) -> list[str | None]:
    """The cause that is told for each of these minutes, None where there is a value."""
    told = []
    for minute in minutes:
        at = chart["times"][0] + minute * 60
        told.append(next((gap["cause"] for gap in line["gaps"] if gap["from"] <= at <= gap["to"]), None))
    return told


def test_every_gap_of_a_host_with_exporters_has_its_cause(chart: Callable[..., dict[str, Any]]) -> None:
    drawn = chart("gpu-1", "utilization")
    assert (drawn["unit"], drawn["step_s"], drawn["source"], len(drawn["times"])) == ("percent", 15, "samples", 241)
    first, second = drawn["lines"]
    assert [line["name"] for line in (first, second)] == ["0 NVIDIA H100", "1 NVIDIA H100"]
    middles = (5, 15, 25, 35, 45, 55)
    assert [at_minute(first, minute) for minute in middles] == [50, None, None, 50, 50, 0]
    assert [at_minute(second, minute) for minute in middles] == [90, None, None, None, None, 70]
    assert causes(drawn, first, *middles) == [None, "host_down", "exporter_failing", None, None, None]
    assert causes(drawn, second, *middles) == [None, "host_down", "exporter_failing", "gpu_gone", "mig", None]


def test_while_the_portal_is_down_a_host_that_it_alone_hears_is_not_called_down(
    chart: Callable[..., dict[str, Any]],
) -> None:
    minutes = (10, 25, 35, 45, 55)
    drawn = {name: chart(name, "cpu") for name in ("gpu-5", "gpu-6")}
    assert {name: causes(each, each["lines"][0], *minutes) for name, each in drawn.items()} == {
        "gpu-5": [None, "no_data", None, "host_down", None],
        "gpu-6": [None, "host_down", "host_down", "host_down", "host_down"],
    }


def test_a_divided_gpu_still_has_a_temperature(chart: Callable[..., dict[str, Any]]) -> None:
    _first, second = chart("gpu-1", "temperature")["lines"]
    assert at_minute(second, 45) == 61


def test_every_name_that_drivers_gave_a_value_is_read(chart: Callable[..., dict[str, Any]]) -> None:
    def last(measure: str) -> list[float | None]:
        return [line["values"][-1] for line in chart("gpu-1", measure)["lines"]]

    assert last("slowdown") == [100, 0]
    assert last("power") == [300, 400]
    assert last("clock") == [1.98e9, None]
    assert last("ecc") == [3, None]
    assert last("memory") == [25, 25]


def test_without_exporters_the_agent_tells(chart: Callable[..., dict[str, Any]], database: Any) -> None:
    rental.ready_host("gpu-2")  # machine 1, whose UUIDs these are
    drawn = chart("gpu-2", "utilization")
    first, second = drawn["lines"]
    assert [at_minute(line, 10) for line in (first, second)] == [25, 75]
    assert (at_minute(first, 45), at_minute(second, 45)) == (25, None)
    assert causes(drawn, second, 45) == ["gpu_gone"]
    (cpu,) = chart("gpu-2", "cpu")["lines"]
    assert cpu["values"][-1] == 12.5
    (disk,) = chart("gpu-2", "disk")["lines"]
    assert (disk["name"], disk["values"][-1]) == ("/", 75)
    (network,) = chart("gpu-2", "network")["lines"]
    assert network["name"] == "received"
    assert 500 < at_minute(network, 40) < 1500


def test_a_host_that_prometheus_never_heard_of_is_a_gap_that_says_so(chart: Callable[..., dict[str, Any]]) -> None:
    drawn = chart("gpu-9", "utilization")
    assert [set(line["values"]) for line in drawn["lines"]] == [{None}, {None}]
    span = {"from": drawn["times"][0], "to": drawn["times"][-1]}
    assert [line["gaps"] for line in drawn["lines"]] == [[{**span, "cause": "no_data"}]] * 2
    assert chart("gpu-9", "cpu")["lines"][0]["gaps"] == [{**span, "cause": "no_data"}]


def test_one_gpu_is_drawn_alone_and_only_one_of_this_machine(chart: Callable[..., dict[str, Any]]) -> None:
    (line,) = chart("gpu-1", "temperature", gpu_uuid=f"GPU-{SECOND}")["lines"]
    assert line["name"] == "1 NVIDIA H100"
    with pytest.raises(NotFound, match="is not expected to have such a GPU"):
        chart("gpu-1", "temperature", gpu_uuid="GPU-of-another")


@pytest.mark.parametrize("span", SPANS)
def test_prometheus_takes_every_question(chart: Callable[..., dict[str, Any]], now: datetime, span: str) -> None:
    """Every measure, of a machine and of the fleet, the causes of gaps included."""
    for measure in MEASURES:
        for drawn in (chart("gpu-1", measure, span), monitoring_charts.of_fleet(measure, span, now)):
            assert all(len(line["values"]) == len(drawn["times"]) for line in drawn["lines"]), measure
            assert drawn["times"][-1] == now.timestamp()
            assert drawn["times"][-1] - drawn["times"][0] == SPANS[span].length_s


def test_a_month_of_the_fleet_comes_from_the_recording_rules(site: None, now: datetime) -> None:
    drawn = monitoring_charts.of_fleet("utilization", "30d", now)
    (line,) = drawn["lines"]
    assert (drawn["source"], drawn["step_s"], len(line["values"])) == ("recorded", 3600, 721)
    missing = [index for index, value in enumerate(line["values"]) if value is None]
    assert missing == list(range(missing[0], missing[-1] + 1)), "one gap, of a day, and never 0"
    assert 22 <= len(missing) <= 24
    assert {value for value in line["values"] if value is not None} == {40}
    (gap,) = line["gaps"]
    assert (gap["cause"], gap["from"]) == ("no_data", drawn["times"][missing[0]])


def test_a_chart_of_the_fleet_is_without_the_control_plane(site: None, now: datetime) -> None:
    """The other host whose disk is known, by its agent, has three quarters in use, and no memory that is told."""
    lines = [monitoring_charts.of_fleet(measure, "1h", now)["lines"] for measure in ("disk", "host_memory")]
    assert [[line["values"][-1] for line in each] for each in lines] == [[75], [25]]


# A customer's lease


@pytest.fixture
def leased(site: None, tenant: Tenant) -> Callable[[str, datetime], Lease]:
    def of(name: str, began: datetime) -> Lease:
        host = rental.ready_host(name)
        lease = rental.allocate(host, tenant)
        host.sees(lease)
        with atomic():
            Lease.update(activated_at=began).execute()
        return leases.get(lease.id)

    return of


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("measure", ["utilization", "temperature"])
def test_a_customer_sees_nothing_from_before_the_lease(
    leased: Callable[[str, datetime], Lease], now: datetime, span: str, measure: str
) -> None:
    """99 was the tenant before: not one value may hold any of it."""
    lease = leased("gpu-3", now - timedelta(minutes=25))
    drawn = monitoring_charts.of_lease(lease, measure, span, now)
    values = [value for line in drawn["lines"] for value in line["values"] if value is not None]
    assert set(values) == {1}
    assert len(values) > 80, "a lease of minutes is drawn finely, however long the range"
    assert drawn["times"][0] >= (now - timedelta(minutes=25)).timestamp()
    assert monitoring_charts.of_machine(lease.machine, measure, "1h", now)["lines"][0]["values"][0] == 99


@pytest.mark.parametrize("span", ["7d", "30d"])
def test_nor_out_of_what_was_recorded(leased: Callable[[str, datetime], Lease], now: datetime, span: str) -> None:
    lease = leased("gpu-4", now - timedelta(days=3))
    drawn = monitoring_charts.of_lease(lease, "utilization", span, now)
    values = [value for value in drawn["lines"][0]["values"] if value is not None]
    assert (drawn["source"], set(values)) == ("recorded", {1})
    assert len(values) > 280


def test_nor_after_its_end(leased: Callable[[str, datetime], Lease], now: datetime) -> None:
    lease = leased("gpu-3", now - timedelta(minutes=25))
    lease.ending_at = now - timedelta(minutes=10)
    drawn = monitoring_charts.of_lease(lease, "utilization", "1h", now)
    assert drawn["times"][-1] <= (now - timedelta(minutes=10)).timestamp()


def test_a_lease_that_has_just_begun_has_an_empty_chart(
    leased: Callable[[str, datetime], Lease], now: datetime
) -> None:
    drawn = monitoring_charts.of_lease(leased("gpu-3", now - timedelta(seconds=30)), "utilization", "1h", now)
    assert (drawn["times"], drawn["lines"]) == ([], [])


# The live overview and the rules


def test_the_overview_takes_prometheus_first_and_the_agent_where_it_has_nothing(
    settings: Settings, database: Any
) -> None:
    """The live values of now are loaded a moment before now: what is live cannot be in a past of an hour."""
    host = rental.ready_host("gpu-1")
    first, second = (rental.gpu(each, index, utilization_percent=11) for index, each in enumerate(host.gpu_uuids))
    host.report(gpu=rental.gpu_report([first, second]))
    moment = datetime.now(UTC)
    just_now = [
        Sample("nvidia_smi_utilization_gpu_ratio", {"host": "gpu-1", "uuid": FIRST}, moment.timestamp() - 20, 0.88)
    ]
    with prometheus.server() as server:
        server.load(just_now)
        server.start()
        object.__setattr__(settings, "prometheus_url", server.url)
        devices = monitoring_live.devices(moment)["items"]
        seen = monitoring_live.overview(moment)
    assert [(device["utilization_percent"], device["source"]) for device in devices] == [
        (88, "prometheus"),
        (11, "agent"),
    ]
    assert seen["prometheus"] == {"state": "ok", "message": None}
    assert seen["gpus"]["utilization_percent"] == 49.5


def test_a_question_that_prometheus_refuses_is_told(site: None, settings: Settings, history: str) -> None:
    object.__setattr__(settings, "prometheus_url", f"{history}/nowhere")
    with pytest.raises(PrometheusRefused, match="HTTP 404"):
        monitoring_charts.of_fleet("utilization", "1h", datetime.now(UTC))


def of_nodes(job: str, idle: str, available: str, received: str) -> dict[str, str]:
    """What a node_exporter tells of itself, as promtool takes it: one host for each job."""
    labels = f'host="{job}",job="{job}"'
    root = f'{{mountpoint="/",fstype="ext4",{labels}}}'
    return {
        f'node_cpu_seconds_total{{cpu="0",mode="idle",{labels}}}': idle,
        f"node_memory_MemAvailable_bytes{{{labels}}}": available,
        f"node_memory_MemTotal_bytes{{{labels}}}": "100x10",
        f'node_network_receive_bytes_total{{device="eth0",{labels}}}': received,
        f"node_filesystem_avail_bytes{root}": available,
        f"node_filesystem_size_bytes{root}": "100x10",
    }


def test_the_fleet_in_the_recording_rules_is_without_the_control_plane(tmp_path: Path) -> None:
    """Its own machine is busy and full: neither a mean, nor a sum, nor a maximum of the hosts holds any of it."""
    series = {
        **of_nodes("node", idle="0+45x10", available="75x10", received="0+600x10"),
        **of_nodes("control_plane", idle="0x10", available="1x10", received="0+6000x10"),
    }
    expected = {
        "host:cpu_percent:avg5m": [('{host="node"}', 25)],
        "fleet:cpu_percent:avg5m": [("", 25)],
        "fleet:host_memory_percent:avg5m": [("", 25)],
        "fleet:network_bytes_per_second:avg5m": [('{direction="received"}', 10)],
        "fleet:disk_percent:avg5m": [("", 25)],
    }
    try_rules(tmp_path, series, expected)


def test_the_recording_rules_join_both_sources(tmp_path: Path) -> None:
    """promtool evaluates the file of the role: an exporter's GPU, an agent's GPU, a null and a 0."""
    series = {
        'nvidia_smi_utilization_gpu_ratio{host="a",uuid="1",job="nvidia_gpu"}': "0.5x10",
        'remotegpu_gpu_utilization_ratio{host="a",uuid="1",job="portal"}': "0.9x10",
        'remotegpu_gpu_utilization_ratio{host="b",uuid="2",job="portal"}': "0x10",
        'remotegpu_gpu_up{host="b",uuid="3",job="portal"}': "1x10",
        # Bit masks of both names: thermal, a power cap (which is no slowdown), hardware and a power cap.
        'nvidia_smi_clocks_throttle_reasons_active{host="c",uuid="4"}': "32x10",
        'nvidia_smi_clocks_event_reasons_active{host="c",uuid="5"}': "4x10",
        'nvidia_smi_clocks_event_reasons_active{host="c",uuid="6"}': "12x10",
    }
    expected = {
        "gpu:utilization_percent:avg5m": [('{host="a",uuid="1"}', 50), ('{host="b",uuid="2"}', 0)],
        "fleet:utilization_percent:avg5m": [("", 25)],
        "gpu:slowdown_percent:avg5m": [
            ('{host="c",uuid="4"}', 100),
            ('{host="c",uuid="5"}', 0),
            ('{host="c",uuid="6"}', 100),
        ],
    }
    try_rules(tmp_path, series, expected)


def try_rules(tmp_path: Path, series: dict[str, str], expected: Mapping[str, Sequence[tuple[str, float]]]) -> None:
    """The samples of each record after five minutes, one value of each series a minute."""
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "5m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": record,
                        "eval_time": "5m",
                        "exp_samples": [{"labels": record + labels, "value": value} for labels, value in samples],
                    }
                    for record, samples in expected.items()
                ],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(test))
    tested = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert tested.returncode == 0, tested.stdout + tested.stderr
