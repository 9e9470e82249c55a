"""The faults, each a story of its own: pull the plug, see the right alert and page, mend it, see both go away.

A rule that staff write in the portal is told here as well: it has the same story, and nothing needs to break for it.

A fault is a context manager: what it did is undone at the end of its block, whatever happened in it. Those of one round
are pulled beside each other, since none of them hides another: no two touch the same part of a host, and whoever takes
away what carries the alerts, or the host itself, is in a round of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.hosts import Host
from tests.hosts.gpu import Scenario
from tests.site.disk import MOUNT, full_disk
from tests.site.site import LEASED, Site
from tests.support.portal import OWN_PASSWORD, Client
from tests.support.waiting import until

PATIENCE_S = 450.0  # the longest needs 50 s on a quiet machine; what was told as a problem is over two minutes later
FREE = "bookworm"
OWN_RULE = "DoesSomething"


@dataclass(frozen=True)
class Fault:
    """`where` is the suite of a host, or None for the control plane. `alerts` are names with their severity."""

    name: str
    round: int
    where: str | None
    pulled: Callable[[Site, Host], AbstractContextManager[object]]
    alerts: tuple[tuple[str, str], ...]
    source: str
    seen: Callable[[Site, Host], None]
    over: Callable[[Site, Host], None]
    work_goes_on: bool = True  # the customer's; not where a fault of the round ends it

    def tell(self, site: Site) -> None:
        """The whole story, with the customer's work going on meanwhile."""
        host = site.hosts[self.where] if self.where else site.control
        machine = host.name if self.where else None
        work = site.task_at_work()
        self._wait_until_well(site, machine)
        with self.pulled(site, host):
            fired = until(
                lambda: self._all_open(site, machine),
                f"{' and '.join(name for name, _ in self.alerts)} of {machine or 'the control plane'}",
                timeout_s=PATIENCE_S, also=site.tell,
            )  # fmt: skip
            self._are_told(site, fired, host)
            self.seen(site, host)
            if self.work_goes_on:
                is_at_work(site, work)
        self._wait_until_well(site, machine)
        for alert in fired.values():
            ended = site.world.admin.get(f"admin/alerts/{alert['id']}")
            assert (ended["state"], ended["resolved_by"]) == ("resolved", None), "it ends by itself"
            assert f"/alerts/{alert['id']}" not in site.page("/alerts")
        self.over(site, host)
        if self.work_goes_on:
            is_at_work(site, work)

    def _wait_until_well(self, site: Site, machine: str | None) -> None:
        until(
            lambda: not self._open(site, machine), f"{self.name} to be over", timeout_s=PATIENCE_S,
            also=site.tell,
        )  # fmt: skip

    def _open(self, site: Site, machine: str | None) -> dict[str, Any]:
        wanted = {name for name, _ in self.alerts}
        return {
            each["name"]: each for each in site.alerts() if each["name"] in wanted and each["machine_name"] == machine
        }

    def _all_open(self, site: Site, machine: str | None) -> dict[str, Any] | None:
        found = self._open(site, machine)
        return found if len(found) == len(self.alerts) else None

    def _are_told(self, site: Site, fired: dict[str, Any], host: Host) -> None:
        """With severity, source, words and a way out, in the list that staff look at."""
        page = site.page("/alerts")
        for name, severity in self.alerts:
            alert = fired[name]
            assert (alert["severity"], alert["source"]) == (severity, self.source), alert
            assert alert["way_out"], alert
            assert f"/alerts/{alert['id']}" in page
            assert alert["machine_id"] == site.world.machines.get(host.name)


# -- what is seen


def is_at_work(site: Site, task_id: int) -> None:
    """The customer's task of before runs, and says something new."""
    before = written(site, task_id)
    until(lambda: written(site, task_id) > before, "the customer's task to write on", timeout_s=PATIENCE_S)
    assert site.worker.client.get(f"customer/tasks/{task_id}")["state"] == "running"


def written(site: Site, task_id: int) -> int:
    """Bytes of its log that the portal has."""
    return int(site.worker.client.get(f"customer/tasks/{task_id}")["attempts"][-1]["log_bytes"])


def has_problem(site: Site, host: Host, code: str, words: str) -> dict[str, Any]:
    """The machine says what is wrong, in the API and on its page; it reports on, and nobody new gets it for that."""

    def told() -> Any:
        machine = site.world.machine(host)
        return machine if any(each["code"] == code for each in machine["problems"]) else None

    machine = until(
        told, f"{host.name} to have the problem {code}", timeout_s=PATIENCE_S, also=lambda: site.world.machine(host)
    )
    assert (machine["reachability"], machine["is_healthy"]) == ("online", False)
    assert words in site.page(f"/machines/{machine['id']}")
    body = {"tenant_id": 1, "until": "2099-01-01T00:00:00Z"}
    refused = site.world.admin.ask("POST", f"admin/machines/{machine['id']}/allocate", json=body)
    assert refused.status == 409, refused
    assert code in [reason["code"] for reason in refused["info"]["reasons"]], refused
    return dict(machine)


def problems(site: Site, host: Host) -> list[str]:
    return [each["code"] for each in site.world.machine(host)["problems"]]


def of_host(site: Site, name: str, host: Host) -> list[dict[str, Any]]:
    """Open alerts of that name about this host."""
    return [each for each in site.alerts(name=name) if each["machine_name"] == host.name]


def open_alert(site: Site, name: str, host: Host) -> dict[str, Any]:
    """The one of that name about this host, as soon as it is there."""
    (alert,) = until(
        lambda: of_host(site, name, host), f"{name} of {host.name} to be open", timeout_s=PATIENCE_S, also=site.tell
    )
    return alert


def rid_of(code: str) -> Callable[[Site, Host], None]:
    """That problem is gone. Another fault of the same round may still be there."""

    def over(site: Site, host: Host) -> None:
        until(
            lambda: code not in problems(site, host), f"{host.name} to be rid of {code}", timeout_s=PATIENCE_S,
            also=lambda: problems(site, host),
        )  # fmt: skip

    return over


def is_well(site: Site, host: Host) -> None:
    machine = site.world.wait_until_healthy(host)
    assert [gpu["live"]["state"] for gpu in machine["gpus"]] == ["ok", "ok"]


# -- GPUs


def shows(change: Callable[[Scenario], Scenario]) -> Callable[[Site, Host], AbstractContextManager[object]]:
    """The driver answers otherwise, until the end of the block."""

    @contextmanager
    def pulled(_: Site, host: Host) -> Iterator[None]:
        before = host.gpu.scenario
        host.gpu.show(change(before))
        try:
            yield
        finally:
            host.gpu.show(before)

    return pulled


def one_gpu_is_lost(site: Site, host: Host) -> None:
    """The one that is lost, by its UUID; the other has its values."""
    machine = has_problem(site, host, "gpu_lost", "has fallen off the bus")
    well, lost = machine["gpus"]
    assert (well["live"]["state"], well["live"]["temperature_c"] is not None) == ("ok", True)
    assert (lost["live"]["state"], lost["live"]["temperature_c"]) == ("lost", None), "null, never 0"
    assert lost["uuid"] in site.page(f"/machines/{machine['id']}")
    # One lost card makes nvidia-smi fail for all: no series of the exporter is left, and no old one is shown.
    assert site.prometheus(f'nvidia_smi_temperature_gpu{{host="{host.name}"}}') == []


@contextmanager
def mismatched(site: Site, host: Host) -> Iterator[None]:
    """As after an upgrade by hand: who has the library open goes on, and everybody new is refused. The agent runs on,
    and all that it can see of that is another file in the library's place.
    """
    with shows(Scenario.mismatch)(site, host):
        host.gpu.plug()
        yield


def driver_is_mismatched(site: Site, host: Host) -> None:
    machine = has_problem(site, host, "nvml", "NVML does not answer (mismatch)")
    assert [gpu["live"] for gpu in machine["gpus"]] == [None, None], "values of before would be a lie"


@contextmanager
def own_rule(site: Site, host: Host) -> Iterator[None]:
    """Written in the portal for this host alone, of a condition that always holds; Prometheus fetches it by itself."""
    written = site.world.admin.post(
        "admin/alerts/rules", name=OWN_RULE, metric="load1", condition=">=", threshold=0, duration_s=0, severity="info",
        scope={"machines": [host.name]}, summary="It does something.", way_out="Look who does it.", is_on=True,
    )  # fmt: skip
    try:
        yield
    finally:
        site.world.admin.delete(f"admin/alerts/rules/{written['id']}")


def own_rule_is_told(site: Site, host: Host) -> None:
    """In the words of whoever wrote it, and of nobody else's machine."""
    alert = open_alert(site, OWN_RULE, host)
    assert alert["summary"].startswith(f"It does something ({host.name}: "), alert
    assert alert["way_out"] == "Look who does it."
    assert [each["machine_name"] for each in site.alerts(name=OWN_RULE)] == [host.name]


def own_rule_is_gone(site: Site, host: Host) -> None:
    asked = ["curl", "--fail", "--silent", "--show-error", "http://127.0.0.1:9090/api/v1/rules"]
    assert OWN_RULE not in site.control.run(asked).stdout


def exporter_gave_up(site: Site, host: Host) -> None:
    """A hung nvidia-smi holds up nobody: the exporter answers, and the agent's own look at the cards goes on."""
    (told,) = site.prometheus(f'up{{host="{host.name}", job="nvidia_gpu"}}')
    assert told["value"][1] == "1", "the exporter hangs as well"
    machine = site.world.machine(host)
    assert (machine["reachability"], machine["is_healthy"]) == ("online", True)
    temperatures = [gpu["live"]["temperature_c"] for gpu in machine["gpus"]]
    assert None not in temperatures
    assert all(f"{each} °C" in site.page(f"/machines/{machine['id']}") for each in temperatures)
    assert site.prometheus(f'nvidia_smi_temperature_gpu{{host="{host.name}"}}') == [], "an old value"


# -- hosts


def disk_is_full(site: Site, host: Host) -> None:
    has_problem(site, host, "disk", f"{MOUNT} has 0.5 GiB free")
    alert = open_alert(site, "DiskFull", host)
    assert alert["labels"]["mountpoint"] == MOUNT
    assert f"{MOUNT} of {host.name} is 97 % full" in alert["summary"]


@contextmanager
def clock_is_off(_: Site, host: Host) -> Iterator[None]:
    """Of the agent's unit alone; the clock of the machine is everybody's."""
    library = host.run("dpkg-query --listfiles libfaketime | grep '/libfaketime.so.1$'").stdout.strip()
    folder = "/etc/systemd/system/remotegpu-agent.service.d"
    host.put(
        f"{folder}/faketime.conf",
        f'[Service]\nEnvironment=LD_PRELOAD={library} "FAKETIME=+600s" FAKETIME_DONT_FAKE_MONOTONIC=1\n',
    )
    host.run("systemctl daemon-reload && systemctl restart remotegpu-agent")
    try:
        yield
    finally:
        host.run(f"rm -r {folder} && systemctl daemon-reload && systemctl restart remotegpu-agent")


def clock_is_told(site: Site, host: Host) -> None:
    machine = has_problem(site, host, "clock", "clock is +60")
    (problem,) = [each for each in machine["problems"] if each["code"] == "clock"]
    assert "600 s off" in problem["message"] or "599 s off" in problem["message"], problem
    alert = open_alert(site, "ClockOffset", host)
    assert "s off" in alert["summary"]


@contextmanager
def switched_off(_: Site, host: Host) -> Iterator[None]:
    """A reboot that takes its time, as servers do: down in order, and up again at the end of the block."""
    host.power_off()
    try:
        yield
    finally:
        host.power_on()


def host_is_away(site: Site, host: Host) -> None:
    machine = site.world.machine(host)
    assert machine["reachability"] == "offline"
    assert host.name in site.page("/alerts/offline")
    mine = site.worker.client.get("customer/machines")["items"]
    assert [each["name"] for each in mine] == [host.name], "the lease goes on"


def host_is_back(site: Site, host: Host) -> None:
    """With another boot: what ran is lost and says so, the lease and its login are as before, and work can begin."""
    is_well(site, host)
    ended = site.worker.client.get("customer/tasks", state="lost")["items"]
    assert ended, "the task that the reboot ended"
    lease = site.world.machine(host)["lease"]
    assert lease["state"] == "active"
    done = host.ssh(f"lease{lease['id']}", site.worker.key, "uptime")
    assert done.ok, done
    is_at_work(site, site.task_at_work())


# -- the control plane


def stopped(unit: str) -> Callable[[Site, Host], AbstractContextManager[object]]:
    @contextmanager
    def pulled(site: Site, _: Host) -> Iterator[None]:
        site.control.run(["systemctl", "kill", "--signal=KILL", unit])  # dead, not told to go
        site.control.run(["systemctl", "stop", unit])  # systemd would start it again
        try:
            yield
        finally:
            site.control.run(["systemctl", "reset-failed", unit], check=False)
            site.control.run(["systemctl", "start", unit])

    return pulled


def portal_goes_on_without_redis(site: Site, host: Host) -> None:
    """People sign in, pages come, agents report and take orders."""
    assert [site.world.machine(each)["reachability"] for each in site.hosts.values()] == ["online", "online"]
    began = datetime.now(UTC)
    Client(site.world.portal).sign_in("admin", OWN_PASSWORD)
    assert "Redis does not answer the portal." in site.page("/alerts")
    now = site.world.admin.get("admin/monitoring/realtime")
    assert now["machines"]["by_reachability"]["online"] == 2
    assert (datetime.now(UTC) - began).total_seconds() < 20


def redis_is_used(site: Site, host: Host) -> None:
    (told,) = site.prometheus("remotegpu_redis_up")
    assert told["value"][1] == "1"


@contextmanager
def prometheus_is_dead(site: Site, host: Host) -> Iterator[None]:
    """And an agent falls silent meanwhile, which only the portal can see now."""
    with stopped("prometheus.service")(site, host):
        site.hosts[FREE].run("systemctl stop remotegpu-agent")
        try:
            yield
        finally:
            site.hosts[FREE].run("systemctl start remotegpu-agent")


def portal_watches_alone(site: Site, host: Host) -> None:
    """History is gone and says so, values come from the agents; what the portal sees by itself it now raises itself."""

    def told() -> Any:
        answer = site.world.admin.get("admin/monitoring/realtime")
        return answer if answer["prometheus"]["state"] == "down" else None

    now = until(told, "the overview to say that Prometheus is away", timeout_s=PATIENCE_S, every_s=1)
    assert now["gpus"]["answering"] == 2, "those of the agent that speaks"
    devices = site.world.admin.get("admin/monitoring/devices")["items"]
    told_by = {(each["host"], each["source"]) for each in devices}
    assert told_by == {(site.hosts[LEASED].name, "agent"), (site.hosts[FREE].name, None)}
    assert "Values come from the agents." in site.page("/monitoring")
    chart = site.world.admin.ask("GET", "admin/monitoring/charts", params={"measure": "temperature"})
    assert chart.status == 503, chart
    alert = open_alert(site, "AgentSilent", site.hosts[FREE])
    assert (alert["source"], alert["severity"]) == ("portal", "critical")


def prometheus_is_back(site: Site, host: Host) -> None:
    is_well(site, site.hosts[FREE])
    until(site.is_watched, "Prometheus to see every machine", timeout_s=PATIENCE_S, also=site.tell)
    until(
        lambda: not of_host(site, "AgentSilent", site.hosts[FREE]), "the portal's own alert to end",
        timeout_s=PATIENCE_S, also=site.tell,
    )  # fmt: skip


FAULTS = (
    Fault(
        "GPU lost", 1, FREE, shows(lambda scenario: scenario.lost(1)),
        (("GpuLost", "critical"),), "alertmanager", one_gpu_is_lost, rid_of("gpu_lost"),
    ),
    Fault(
        "driver and library differ", 1, LEASED, mismatched,
        (("GpuDriverFailing", "critical"),), "alertmanager", driver_is_mismatched, rid_of("nvml"),
    ),
    Fault(
        "disk full", 1, FREE, lambda _, host: full_disk(host),
        (("DiskFull", "critical"), ("DiskLow", "critical")), "alertmanager", disk_is_full, rid_of("disk"),
    ),
    Fault(
        "clock of the agent 10 minutes off", 1, LEASED, clock_is_off,
        (("ClockOffset", "warning"),), "alertmanager", clock_is_told, rid_of("clock"),
    ),
    Fault(
        "Redis dead", 1, None, stopped("redis-server.service"),
        (("RedisDown", "critical"),), "alertmanager", portal_goes_on_without_redis, redis_is_used,
    ),
    Fault(
        "a rule of one's own", 1, FREE, own_rule,
        ((OWN_RULE, "info"),), "alertmanager", own_rule_is_told, own_rule_is_gone,
    ),
    Fault(
        "nvidia-smi hangs", 2, FREE, shows(lambda scenario: scenario.having("smi", hang="yes")),
        (("GpuDriverFailing", "critical"),), "alertmanager", exporter_gave_up, is_well, work_goes_on=False,
    ),
    Fault(
        "host rebooted", 2, LEASED, switched_off,
        (("MachineOffline", "critical"), ("AgentSilent", "critical")), "alertmanager", host_is_away, host_is_back,
        work_goes_on=False,
    ),
    Fault(
        "Prometheus dead", 3, None, prometheus_is_dead,
        (("MonitoringSilent", "critical"),), "portal", portal_watches_alone, prometheus_is_back,
    ),
)  # fmt: skip
