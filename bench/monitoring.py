"""The live overview of 8,000 GPUs and a fleet chart of 30 days, each beside Prometheus's own answer.

`python -m bench.monitoring` fills a PostgreSQL with a thousand hosts and their reports, and a Prometheus (promtool
writes the blocks) with an hour of samples every 30 s, which reaches a while beyond now, and with 30 days of what the
recording rules make of a fleet. Then two of `python -m portal web` with one Redis are asked over HTTP. Cached is what
comes out of the 30 s in which the overview is kept: by the process that computed it, and the first time by the other
one, which finds it in Redis. A chart is timed when it is asked for the first time, once for each measure. `--hosts N`
for fewer.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TextIO
from urllib.parse import urlencode, urlsplit

from bench.figures import Figure, percentile, show
from bench.sync import report_of, web
from portal import db
from portal.db import utcnow
from portal.migrate import migrate
from portal.models import Gpu, MachineReport
from portal.services import monitoring_charts, tokens
from portal.services.monitoring_live import FIELDS
from portal.services.monitoring_measures import MEASURES, RECORDED_S
from portal.services.monitoring_samples import normalised
from tests import postgresql
from tests.factories import actor_of, make_machine, make_user
from tests.support import prometheus, redis

HOSTS = 1000
GPUS = 8
SAMPLES_S = 30
HOUR_S = 3600
AHEAD_S = 1200  # what is asked for now must still be there when everything has been loaded
MONTH_S = 30 * 24 * HOUR_S
BLOCK_S = 2 * HOUR_S  # Prometheus's own
TIMES = 50
OVERVIEW = "/api/v1/admin/monitoring/realtime"
CACHED_GOAL_S = 0.020
CHART_GOAL_S = 0.300

SERIES = {
    "nvidia_smi_utilization_gpu_ratio": 0.93,
    "nvidia_smi_memory_used_bytes": 6.4e10,
    "nvidia_smi_memory_total_bytes": 8.5e10,
    "nvidia_smi_temperature_gpu": 61.0,
    "nvidia_smi_power_draw_watts": 612.5,
}


def main() -> int:
    """Print the figures; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=HOSTS)
    return show(take(parser.parse_args().hosts))


def take(hosts: int = HOSTS) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="rgpu-bench-") as folder, postgresql.server() as server:
        postgresql.execute(server, "CREATE DATABASE bench")
        url = f"{server}/bench"
        token = make_fleet(url, hosts)
        with (
            history(Path(folder), hosts) as asked,
            redis.server(Path(folder)) as shared,
            told_of(PROMETHEUS_URL=asked.url, REDIS_URL=shared.url),
            web(url, Path(folder), 1) as port,
            web(url, Path(folder), 1) as other_port,
        ):
            return measure(Door(port, token), Door(other_port, token), asked.url, hosts)


def make_fleet(url: str, hosts: int) -> str:
    """Hosts with eight GPUs and a report that stays fresh; returns an API token that may read."""
    database = db.connect(url)
    migrate()
    with db.connection(), db.atomic():
        for number in range(hosts):
            machine = make_machine(f"host-{number}", region=f"region-{number % 5}")
            report = report_of(machine.epoch, machine.generation, number)["report"]
            for gpu in report["gpu"]["gpus"]:
                Gpu.create(machine=machine, uuid=gpu["uuid"], slot=gpu["index"], name=gpu["name"])
            MachineReport.create(
                machine=machine,
                received_at=utcnow() + timedelta(seconds=AHEAD_S),
                clock_offset_s=0.0,
                agent_version="0.1.0",
                boot_id="b",
                seq=1,
                metrics=report["metrics"],
                gpu=report["gpu"],
            )
        owner, expires_at = make_user("operator"), utcnow() + timedelta(days=1)
        scopes = ["prometheus", "read"]
        _, token = tokens.create(owner, name="bench", scopes=scopes, expires_at=expires_at, by=actor_of(owner))
    database.close_all()  # type: ignore[attr-defined]  # the pool's
    return token


@contextmanager
def history(folder: Path, hosts: int) -> Iterator[prometheus.Server]:
    """A Prometheus with an hour of every GPU and a month of the fleet.

    Loaded in two parts that meet where a block begins: promtool reads its whole file again for each block, and the
    month in blocks of two hours would be 360 of them; blocks that overlap would be merged while we measure.
    """
    end = int(time.time()) + AHEAD_S
    meet = (end - HOUR_S) // BLOCK_S * BLOCK_S
    with prometheus.server() as server:
        text = folder / "samples.txt"
        with text.open("w") as file:
            write_fleet(file, end - MONTH_S, meet)
            file.write("# EOF\n")
        server.load_file(text, "--max-block-duration=744h")
        with text.open("w") as file:
            write_gpus(file, hosts, end)
            write_fleet(file, meet, end)
            file.write("# EOF\n")
        server.load_file(text)
        text.unlink()
        server.start(timeout_s=300)
        yield server


def write_gpus(file: TextIO, hosts: int, end: int) -> None:
    """What the exporters of so many hosts would have told in the hour before `end`: 520 MB for a thousand."""
    moments = [f" {at}\n" for at in range(end - HOUR_S, end, SAMPLES_S)]
    for name, value in SERIES.items():
        for host in range(hosts):
            for index in range(GPUS):
                uuid = normalised(f"GPU-{host:08d}-0000-0000-0000-{index:012d}")
                line = f'{name}{{host="host-{host}",uuid="{uuid}"}} {value}'
                file.write(line + line.join(moments))


def write_fleet(file: TextIO, begin: int, end: int) -> None:
    """What the recording rules would have made of a fleet meanwhile."""
    for measure in MEASURES.values():
        labels = ['{direction="received"}', '{direction="sent"}'] if "direction" in measure.by else [""]
        for each in labels:
            moments = range(math.ceil(begin / RECORDED_S) * RECORDED_S, end, RECORDED_S)
            file.writelines(f"{measure.fleet_record}{each} {at % 97} {at}\n" for at in moments)


@contextmanager
def told_of(**servers: str) -> Iterator[None]:
    """The portals that are started meanwhile have these."""
    os.environ.update(servers)
    try:
        yield
    finally:
        for name in servers:
            del os.environ[name]


class Door:
    """One web process, asked over a connection that stays."""

    def __init__(self, port: int, token: str) -> None:
        self._portal = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._bearer = {"Authorization": f"Bearer {token}"}

    def ask(self, path: str) -> bytes:
        self._portal.request("GET", path, headers=self._bearer)
        answer = self._portal.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {body[:300]!r}")
        return body


def measure(portal: Door, other: Door, url: str, hosts: int) -> list[Figure]:
    gpus = f"{hosts * GPUS:,} GPUs"
    ask = portal.ask
    other.ask("/api/v1/prometheus/targets")  # the first answer of all is that of a process that has just begun
    first = timed(lambda: ask(OVERVIEW))
    shared = timed(lambda: other.ask(OVERVIEW))
    if json.loads(ask(OVERVIEW))["computed_at"] != json.loads(other.ask(OVERVIEW))["computed_at"]:
        raise RuntimeError("the other process has computed for itself: it was not kept in Redis")
    cached = [timed(lambda: ask(OVERVIEW)) for _ in range(TIMES)]
    own = sum(timed(lambda name=name: prometheus_query(url, name)) for name in FIELDS)  # type: ignore[misc]  # of this round
    charts = [timed(lambda name=name: ask(chart_path(name))) for name in MEASURES]  # type: ignore[misc]  # of this round
    raw = [timed(lambda name=name: prometheus_range(url, name)) for name in MEASURES]  # type: ignore[misc]  # of this round
    scraped = timed(lambda: ask("/metrics"))
    return [
        Figure(f"overview of {gpus}, cached (median)", statistics.median(cached), at_most=CACHED_GOAL_S),
        Figure(f"overview of {gpus}, cached (95 of 100)", percentile(cached, 95)),
        Figure(f"overview of {gpus}, out of Redis by another process", shared),
        Figure(f"overview of {gpus}, computed", first),
        Figure("Prometheus alone, the same four questions", own),
        Figure("fleet chart of 30 days (median of the measures)", statistics.median(charts), at_most=CHART_GOAL_S),
        Figure("Prometheus alone, the same question", statistics.median(raw)),
        Figure(f"/metrics with {gpus}", scraped),
    ]


def chart_path(name: str) -> str:
    return f"/api/v1/admin/monitoring/charts?measure={name}&range=30d"


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def prometheus_query(url: str, name: str) -> None:
    _post(url, "query", query=MEASURES[name].raw({}, monitoring_charts.WINDOW_S))


def prometheus_range(url: str, name: str) -> None:
    span = monitoring_charts.FLEET_SPANS["30d"]
    end = int(time.time()) // span.step_s * span.step_s
    times = {"start": str(end - span.length_s), "end": str(end), "step": str(span.step_s)}
    _post(url, "query_range", query=MEASURES[name].fleet_recorded(span.window_s), **times)


def _post(url: str, what: str, **asked: str) -> None:
    """The answer is read and thrown away: what is timed is Prometheus alone."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request(
        "POST", f"/api/v1/{what}", urlencode(asked), {"Content-Type": "application/x-www-form-urlencoded"}
    )
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != 200 or b'"result":[]' in body:
        raise RuntimeError(f"{what}: {answer.status} {body[:300]!r}")


if __name__ == "__main__":
    sys.exit(main())
