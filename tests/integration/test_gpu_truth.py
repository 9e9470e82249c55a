"""Every quirk of a GPU driver, from the driver to the chart: what agent, API, page and chart say of it is the truth.

All rows of tests/support/gpu_quirks.py are walked once: the agent's own NVML process asks the fake library, the
stand-in for nvidia_gpu_exporter runs the fake nvidia-smi over the same scenario, the agent's report goes in at the
portal's door, and a real Prometheus holds what exporter and portal say. Each row is two machines: one with an exporter,
and one of which only the agent speaks.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from portal import db as database_module
from portal import start
from portal.api import auth
from portal.app import config_of
from portal.db import utcnow
from portal.integrations.prometheus import Prometheus
from portal.integrations.wake import wake
from portal.models import MachineReport
from portal.services import agents, config, heartbeats, monitoring_samples, sessions, vault
from portal.services.actors import SYSTEM
from portal.services.sessions import Caller
from remotegpu_agent.gpu import GpuProbe
from tests.api.fake_agent import FakeAgent, enroll
from tests.conftest import SignedIn, close_database, settings_in
from tests.factories import make_machine, make_user
from tests.hosts.gpu import Scenario
from tests.support import prometheus, rental
from tests.support.gpu_quirks import ERRORS, LIVE, MEASURES, OF_AGENTS, QUIRKS, TOTAL, UNHEARD, Quirk, Truth, busy
from tests.support.prometheus import Sample
from tests.support.real_card import started_probe
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
GPU_DIR = ROOT / "molecule" / "image" / "gpu"
STUB = ROOT / "molecule" / "nvidia_gpu_exporter" / "files" / "nvidia_gpu_exporter.py"
ROLE = ROOT / "roles" / "nvidia_gpu_exporter" / "defaults" / "main.yml"
STEP_S = 15
BUS_IDS = ("00000000:18:00.0", "00000000:29:00.0")  # of the fake driver's cards
OF_GPUS = ("remotegpu_gpu_", "remotegpu_agent_")  # of the portal's samples, those that charts of GPUs look at
EVERY_QUIRK = pytest.mark.parametrize("quirk", QUIRKS, ids=str)
pytestmark = pytest.mark.timeout(1200)  # the first test waits for the whole walk, half a minute on a quiet machine
BOTH = pytest.mark.parametrize("has_exporter", [True, False], ids=["exporter", "agent alone"])


@dataclass
class Machine:
    """What the portal says of one machine, when all had been said to it."""

    id: int
    name: str
    uuids: tuple[str, ...]
    told: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    devices: dict[str, dict[str, Any]] = field(default_factory=dict)
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Seen:
    """What one quirk led to. `cells` are those of nvidia-smi by UUID, None where it failed."""

    report: dict[str, Any]
    code: int
    cells: dict[str, dict[str, str]] | None
    exposition: str
    machines: dict[bool, Machine]

    @property
    def gpus(self) -> list[dict[str, Any] | None]:
        found = {gpu["uuid"]: gpu for gpu in self.report["gpus"]}
        return [found.get(uuid) for uuid in self.machines[True].uuids]


# From the driver to the agent's word, and to the exporter's


class Driver:
    """The fake driver and its two users: the agent's NVML processes, one for each build, and the exporter."""

    def __init__(self, folder: Path, libraries: Path) -> None:
        self._file, self._libraries = folder / "scenario.ini", libraries
        self._probes: dict[str, GpuProbe] = {}
        self._exporters: dict[tuple[str, tuple[str, ...]], Any] = {}  # by build, and fields
        (libraries / "none").mkdir()
        (libraries / "none" / "libnvidia-ml.so.1").touch()  # no library, also where this machine has one

    def show(self, scenario: Scenario) -> None:
        scenario.write(self._file)

    def upgrade(self, driver: str) -> None:
        """A new file in the library's place, as packages do it: who has the old one open keeps it."""
        library = self._libraries / driver / "libnvidia-ml.so.1"
        shutil.copy(library, library.with_suffix(".new"))
        library.with_suffix(".new").replace(library)

    def _environment(self, driver: str) -> list[str]:
        return ["env", f"LD_LIBRARY_PATH={self._libraries / driver}", f"FAKE_GPU_SCENARIO={self._file}"]

    def new_probe(self, driver: str, *, deadline_s: float = 10.0) -> GpuProbe:
        return started_probe(*self._environment(driver), deadline_s=deadline_s)

    def probe(self, driver: str) -> GpuProbe:
        if driver not in self._probes:
            self._probes[driver] = self.new_probe(driver)
        return self._probes[driver]

    def exporter(self, quirk: Quirk) -> Any:
        """Started while all was well, as the real one has been: see `Collector` for what is else."""
        asked = (*(dict(quirk.spelt).get(name, name) for name in asked_by_the_role()), *quirk.fields)
        key = (quirk.driver, asked)
        if key not in self._exporters:
            argv = [*self._environment(quirk.driver), sys.executable, str(GPU_DIR / "nvidia_smi.py")]
            options = Namespace(
                nvidia_smi_command=" ".join(argv),
                query_field_names=",".join(asked),
                collect_timeout="30s",
            )
            self._exporters[key] = exporter_class()(options)
        exporter = self._exporters[key]
        exporter.timeout_s = 1.0 if quirk.code == -1 else 30.0
        return exporter

    def stop(self) -> None:
        for probe in self._probes.values():
            probe.stop()


def asked_by_the_role() -> list[str]:
    fields: list[str] = yaml.safe_load(ROLE.read_text())["nvidia_gpu_exporter_fields"]
    return fields


def exporter_class() -> Any:
    """The stand-in's collector, which remembers what nvidia-smi last said."""
    spec = importlib.util.spec_from_file_location("stub_of_nvidia_gpu_exporter", STUB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Exporter(module.Collector):  # type: ignore[misc, name-defined]  # a file outside of every package
        last: tuple[int, str] = (0, "")

        def run(self) -> tuple[int, str]:
            self.last = super().run()
            return self.last

    return Exporter


def look(probe: GpuProbe) -> dict[str, Any]:
    probe.ask(wait_s=30)
    return probe.report()


def look_at(driver: Driver, quirk: Quirk, scenario: Scenario) -> dict[str, Any]:
    """What the agent says once the driver, which was well before, does what the quirk is."""
    if quirk.report == "stale":
        return hang(driver, quirk, scenario)
    if not quirk.is_fresh:
        assert look(driver.probe(quirk.driver))["state"] == "ok"
        driver.show(scenario)
        if quirk.is_upgraded:
            driver.upgrade(quirk.driver)
        return look(driver.probe(quirk.driver))
    driver.show(scenario)
    probe = driver.new_probe(quirk.driver)
    report = look(probe)
    end(probe)
    return report


def hang(driver: Driver, quirk: Quirk, scenario: Scenario) -> dict[str, Any]:
    probe = driver.new_probe(quirk.driver, deadline_s=0.3)
    until(lambda: look(probe)["state"] == "ok", "a good sample")
    driver.show(scenario)
    probe.ask()
    report = until(lambda: (found := probe.report())["state"] == "stale" and found, "the sample to be old")
    end(probe)
    return report


def end(probe: GpuProbe) -> None:
    """A hung child heeds no SIGTERM; what hangs here is no driver, so nothing is harmed."""
    child = probe._child
    if child is not None:
        child.kill()
    probe.stop()


def cells_in(output: str) -> dict[str, dict[str, str]]:
    header, *rows = [line.split(", ") for line in output.splitlines()]
    return {row[0]: dict(zip(header, row, strict=False)) for row in rows}


# From the agent's word to the pages and charts


class Portal:
    """A portal of the module's own, with a Prometheus that is told what everybody says at `moment`."""

    def __init__(self, app: Flask, server: prometheus.Server) -> None:
        self.app, self.server = app, server
        self.moment = 0
        operator = make_user("operator", username="olga")
        session = sessions.start(operator, caller=Caller("192.0.2.10"), life_s=3600)
        with app.app_context():
            access, _ = auth.tokens_of(session)
        self.staff = SignedIn(operator, app.test_client(), {"Authorization": f"Bearer {access}"})

    def take_in(self, name: str, well: dict[str, Any], report: dict[str, Any]) -> Machine:
        """A machine whose agent enrolled while all was well, and then reports this."""
        row = make_machine(name)
        token = agents.new_enroll_token(row, by=SYSTEM)
        client = self.app.test_client()
        answer = enroll(client, token, facts=rental.facts(), gpu=well)
        assert answer.status_code == 200, answer.text
        agent = FakeAgent(client, answer.get_json()["credential"])
        agent.report(gpu=report, metrics=rental.metrics())
        return Machine(row.id, name, tuple(gpu["uuid"] for gpu in well["gpus"]))

    def fall_silent(self, *machines: Machine) -> None:
        """Nothing was heard of them for days."""
        heartbeats.flush()
        ids = [machine.id for machine in machines]
        long_ago = utcnow() - timedelta(days=3)
        MachineReport.update(received_at=long_ago).where(MachineReport.machine << ids).execute()

    def remember(self, seen: list[Seen]) -> None:
        """Everybody's samples, from a minute before this moment on, and for as long as the asking may take."""
        self.moment = math.floor(utcnow().timestamp() / STEP_S) * STEP_S
        of_portal = samples_in(monitoring_samples.exposition(utcnow()))
        told = [(each.name, each.labels, each.value) for each in of_portal if each.name.startswith(OF_GPUS)]
        for each in seen:
            of_host = {"host": each.machines[True].name, "instance": each.machines[True].name}
            told += [("up", {**of_host, "job": job}, 1.0) for job in ("node", "nvidia_gpu")]
            told += [
                (sample.name, {**sample.labels, **of_host, "job": "nvidia_gpu"}, sample.value)
                for sample in samples_in(each.exposition)
            ]
        times = range(self.moment - 60, self.moment + 600, 2 * STEP_S)
        self.server.load(Sample(name, labels, at, value) for at in times for name, labels, value in told)
        self.server.start()

    def ask(self, machine: Machine) -> None:
        machine.told = self._get(f"/admin/machines/{machine.id}").get_json()
        for measure in MEASURES:
            chart = self._get(f"/admin/monitoring/machines/{machine.id}/charts?measure={measure}&range=1h").get_json()
            machine.charts[measure] = chart

    def open_page(self, machine: Machine) -> None:
        page = self.staff.client.get(f"/machines/{machine.id}", headers={**self.staff.headers, "HX-Request": "true"})
        assert page.status_code == 200, page.text
        machine.rows = rows_in(page.text, machine.uuids)

    def devices(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self._get(f"/admin/monitoring/devices?page_size=200&page={len(found) // 200 + 1}").get_json()
            found += page["items"]
            if len(found) == page["total"]:
                return found

    def _get(self, path: str) -> Any:
        answer = self.staff.get(path)
        assert answer.status_code == 200, (path, answer.text)
        return answer


def samples_in(text: str) -> Iterator[Any]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def renamed(report: dict[str, Any]) -> dict[str, Any]:
    """The same report of other cards."""
    other: dict[str, Any] = json.loads(json.dumps(report).replace("GPU-", "GPU-a"))
    return other


class Rows(HTMLParser):
    """The rows of a page's tables, each the texts of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, _attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += f" {data}"


def rows_in(page: str, uuids: tuple[str, ...]) -> dict[str, list[str]]:
    parser = Rows()
    parser.feed(page)
    cells = [[" ".join(cell.split()) for cell in row] for row in parser.rows]
    return {uuid: row for uuid in uuids for row in cells if row and uuid in row[0]}


@pytest.fixture(scope="module")
def portal(built_app: Flask, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    """What is told of GPUs does not depend on the kind of database: SQLite alone."""
    settings = settings_in(tmp_path_factory.mktemp("portal"))
    file = settings.instance_dir / "remotegpu.db"
    file.parent.mkdir()
    shutil.copy(sqlite_template, file)
    object.__setattr__(settings, "offline_after_s", 3600.0)  # the rows are looked at when all have reported
    database = database_module.connect(settings.database_url)
    config.use(settings)
    vault.unlock(settings)
    start.bind(settings)
    built_app.config.from_mapping(config_of(settings))
    with prometheus.server() as server:
        yield Portal(built_app, server)
    wake.stop()
    heartbeats.buffer.stop()
    close_database(database)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, libraries: Path) -> Iterator[Driver]:
    folder = tmp_path_factory.mktemp("driver")
    shutil.copytree(libraries, folder, dirs_exist_ok=True)  # it puts others in their place
    made = Driver(folder, folder)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def truth(driver: Driver, portal: Portal) -> dict[str, Seen]:
    """Every row walked, by its sentence."""
    seen = {quirk.sentence: walk(number, quirk, driver, portal) for number, quirk in enumerate(QUIRKS)}
    heartbeats.flush()
    portal.remember(list(seen.values()))
    object.__setattr__(config.current(), "prometheus_url", portal.server.url)
    devices = portal.devices()
    for machine in (machine for each in seen.values() for machine in each.machines.values()):
        machine.devices = {device["uuid"]: device for device in devices if device["machine_id"] == machine.id}
        portal.ask(machine)
    for each in seen.values():
        portal.open_page(each.machines[False])  # the page shows what the agent says, whatever an exporter knows
    return seen


def walk(number: int, quirk: Quirk, driver: Driver, portal: Portal) -> Seen:
    before = busy(quirk.sentence)
    driver.show(before)
    well = look(driver.probe("none" if quirk.has_none else "current"))
    exporter = driver.exporter(quirk)
    after = quirk.change(before)
    report = look_at(driver, quirk, after)
    exporter.collect()
    code, output = exporter.last
    machines = {
        True: portal.take_in(f"q{number}", well, report),
        False: portal.take_in(f"q{number}-alone", renamed(well), renamed(report)),
    }
    if quirk.is_silent:
        portal.fall_silent(*machines.values())
    return Seen(report, code, cells_in(output) if code == 0 else None, exporter.text, machines)


@pytest.fixture
def seen(truth: dict[str, Seen], quirk: Quirk) -> Seen:
    return truth[quirk.sentence]


# The promises


def pairs(quirk: Quirk, things: Any) -> list[tuple[Truth, Any]]:
    return list(zip(() if quirk.has_none else (quirk.first, quirk.second), things, strict=True))


MEASURED: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "utilization": lambda gpu: gpu["utilization_percent"],
    "memory": lambda gpu: gpu["memory_used_bytes"] and 100 * gpu["memory_used_bytes"] / gpu["memory_total_bytes"],
    "temperature": lambda gpu: gpu["temperature_c"],
    "power": lambda gpu: gpu["power_w"],
    "ecc": lambda gpu: gpu["ecc_uncorrected"],
}


def nearly(value: float | None, tolerance: float = 0.01) -> Any:
    return None if value is None else pytest.approx(value, abs=tolerance)


@EVERY_QUIRK
def test_the_agent_tells_it(seen: Seen, quirk: Quirk) -> None:
    assert seen.report["state"] == quirk.report
    assert quirk.says in (seen.report["message"] or "")
    if quirk.report == "stale":
        assert [gpu["uuid"] for gpu in seen.report["gpus"]] == list(seen.machines[True].uuids), "none is forgotten"
    if quirk.report != "ok":
        return
    for right, gpu in pairs(quirk, seen.gpus):
        assert (gpu and gpu["state"]) == right.state
        if gpu is None:
            continue
        assert {measure: of(gpu) for measure, of in MEASURED.items()} == {
            measure: nearly(right.value(measure)) for measure in OF_AGENTS
        }
        assert gpu["mig"] == right.mig
        assert sorted((error["field"], error["code"]) for error in gpu["errors"]) == sorted(right.notes)
        assert all(error["message"] for error in gpu["errors"])
        assert tuple(told["xid"] for told in gpu["xids"]) == right.xids
        assert {name: gpu[name] for name in right.fields} == right.fields


@EVERY_QUIRK
def test_nvidia_smi_exits_as_the_real_one_does_and_agrees_with_the_library(seen: Seen, quirk: Quirk) -> None:
    assert seen.code == quirk.code
    assert f"nvidia_smi_command_exit_code {quirk.code}\n" in seen.exposition
    if seen.cells is None or quirk.spoils or quirk.sentence.startswith("A cell"):
        return
    for right, uuid in pairs(quirk, seen.machines[True].uuids):
        if (cells := seen.cells.get(uuid)) is None:
            assert right.state in ("error", None)
            continue
        gpu = next(gpu for gpu in seen.report["gpus"] if gpu["uuid"] == uuid)
        assert cells["temperature.gpu"] == in_a_cell(gpu, "temperature_c")
        assert cells["utilization.gpu [%]"] == in_a_cell(gpu, "utilization_percent", " %") or right.mig or right.notes
        assert cells["ecc.errors.uncorrected.volatile.total"] == in_a_cell(gpu, "ecc_uncorrected") or right.notes
        assert cells["pci.bus_id"] == gpu["pci_bus_id"]
        if gpu["memory_used_bytes"] is not None:
            assert cells["memory.used [MiB]"] == f"{gpu['memory_used_bytes'] // 2**20} MiB"
            assert cells["memory.reserved [MiB]"] == f"{gpu['memory_reserved_bytes'] // 2**20} MiB"
        if gpu["power_w"] is not None:
            assert cells["power.draw [W]"] == f"{gpu['power_w']:.2f} W"


def in_a_cell(gpu: dict[str, Any], name: str, unit: str = "") -> str:
    """As nvidia-smi prints the value, or the error in its place."""
    if gpu[name] is not None:
        return f"{gpu[name]}{unit}"
    words = dict(ERRORS.values()) | {4242: "Unknown Error"}  # a code that nvidia-smi does not know
    words |= {8: "Insufficient External Power", 11: "Interrupt Request Issue", 16: "GPU requires reset"}
    said = [words[error["code"]] for error in gpu["errors"] if error["field"] == name and error["code"]]
    return f"[{said[0]}]" if said else "[N/A]"


@EVERY_QUIRK
@BOTH
def test_the_api_tells_it(seen: Seen, quirk: Quirk, has_exporter: bool) -> None:
    machine = seen.machines[has_exporter]
    wrong = {"lost": ["gpu_lost"], "error": ["gpu_error"], None: ["gpu_missing"], "ok": []}
    rights = (quirk.first, quirk.second)
    expected = [code for right in rights for code in ([right.problem] if right.problem else wrong[right.state])]
    problems = [problem["code"] for problem in machine.told["problems"]]
    assert sorted(problems) == sorted(expected if quirk.report == "ok" else [quirk.problem])
    assert machine.told["is_healthy"] == (not problems)
    live = {gpu["uuid"]: gpu["live"] for gpu in machine.told["gpus"]}
    for right, uuid in pairs(quirk, machine.uuids):
        told, device = live[uuid], machine.devices[uuid]
        is_told = quirk.is_told and right.state is not None
        assert (told is not None) == is_told
        if told is not None:
            assert {m: of(told) for m, of in MEASURED.items()} == {m: nearly(right.value(m)) for m in OF_AGENTS}
        assert device["state"] == (right.device if quirk.is_told else "unknown")
        assert device["mig"] == (right.mig if is_told else None)
        assert {
            "utilization": device["utilization_percent"],
            "memory": device["memory_percent"],
            "temperature": device["temperature_c"],
            "power": device["power_w"],
        } == {m: nearly(quirk.charted(right, m, has_exporter=has_exporter), 0.06) for m in LIVE}
        assert device["memory_total_bytes"] == TOTAL, "the inventory's, where the driver does not say"


@EVERY_QUIRK
def test_the_page_tells_it(seen: Seen, quirk: Quirk) -> None:
    machine = seen.machines[False]
    for (right, uuid), bus_id in zip(pairs(quirk, machine.uuids), BUS_IDS, strict=False):
        name, *cells = machine.rows[uuid]
        assert f"{uuid} PCI {bus_id}" in name, "as the kernel log calls it, also of one that is lost"
        assert cells == cells_of(right if quirk.is_told else UNHEARD)
        assert re.findall(r"\b(missing|unknown|lost|error)\b", name.partition("GPU-")[0]) == badge_of(quirk, right)
        noted = [f"{note}: " for note, _code in right.notes if quirk.report == "ok"]
        noted += [f"XID {xid}: " for xid in right.xids]
        noted += [f"ecc_uncorrected: {right.ecc:.0f} errors"] if right.ecc else []
        assert all(note in name for note in noted), "why a value is not known"
        assert ("ecc_uncorrected: " in name) == any("ecc_uncorrected: " in note for note in noted), "0 is no news"


def cells_of(right: Truth) -> list[str]:
    use, heat, power = right.utilization, right.temperature, right.power
    used = None if right.memory is None else round(right.memory / 100 * TOTAL / 2**30, 1)
    return [
        "n/a (MIG)" if right.mig else "—" if use is None else f"{use:.0f} %",
        f"{'—' if used is None else used} / {TOTAL / 2**30:.1f} GiB",
        "—" if heat is None else f"{heat:.0f} °C",
        "—" if power is None else f"{power:.0f} W",
    ]


def badge_of(quirk: Quirk, right: Truth) -> list[str]:
    if not quirk.is_told:
        return ["unknown"]
    return [] if right.state == "ok" else [right.state or "missing"]


@EVERY_QUIRK
@BOTH
def test_the_chart_draws_it(portal: Portal, seen: Seen, quirk: Quirk, has_exporter: bool) -> None:
    machine = seen.machines[has_exporter]
    for right, uuid in pairs(quirk, machine.uuids):
        for measure in MEASURES:
            value = quirk.charted(right, measure, has_exporter=has_exporter)
            cause = None if value is not None else quirk.why_not(right, measure, has_exporter=has_exporter)
            assert drawn(machine.charts[measure], uuid, portal.moment) == (nearly(value), cause), measure


@EVERY_QUIRK
def test_the_alerts_are_told_of_xids(portal: Portal, seen: Seen, quirk: Quirk) -> None:
    """What the rules of the XIDs look at, out of Prometheus."""
    asking = Prometheus(portal.server.url)
    host = seen.machines[False].name
    found = asking.query(f'remotegpu_gpu_xid_last_timestamp_seconds{{host="{host}"}}', at=portal.moment)
    assert sorted(int(series.labels["xid"]) for series in found) == list(quirk.first.xids)
    first = seen.machines[False].uuids[:1]
    assert {series.labels["uuid"] for series in found} <= {monitoring_samples.normalised(uuid) for uuid in first}


def drawn(chart: dict[str, Any], uuid: str, moment: int) -> tuple[float | None, str | None]:
    """The value of a GPU's line at that moment, and the cause that is told of a gap there."""
    (line,) = (line for line in chart["lines"] if line["uuid"] == monitoring_samples.normalised(uuid))
    causes = [gap["cause"] for gap in line["gaps"] if gap["from"] <= moment <= gap["to"]]
    return line["values"][chart["times"].index(moment)], causes[0] if causes else None


def test_every_quirk_is_told_once() -> None:
    assert len({quirk.sentence for quirk in QUIRKS}) == len(QUIRKS)
