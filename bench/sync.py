"""How many reports the portal takes: `agent/sync` on PostgreSQL against pgbench doing the same read and update.

`python -m bench.sync` starts a PostgreSQL server and `python -m portal web`, and takes both in turns: reports of hosts
with eight GPUs over HTTP on loopback from a process of its own, then pgbench with as many clients, which looks up a
credential with its machine and updates that machine's report. Prints the ratio of the medians. The goal, at least 0.35,
is for a web process a core, since pgbench's server uses every core as well; what one process takes is told beside it.
Bounded: ROUNDS times SECONDS for each of the two.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from bench.figures import Figure, show
from portal import db
from portal.cli.init import init
from portal.db import utcnow
from portal.integrations import protocol
from portal.migrate import migrate
from portal.models import AgentCredential, MachineReport
from tests import postgresql
from tests.factories import make_machine

GOAL = 0.35
HOSTS = 200
CLIENTS = 16
ROUNDS = 3
SECONDS = 4.0
MOST = 200_000  # reports in one round, whatever happens
ROOT = Path(__file__).parents[1]


def main() -> int:
    """Print the figures; 1 if the goal is missed."""
    return show(take())


def take() -> list[Figure]:
    cores = os.cpu_count() or 1
    alone, beside_alone = measure(1)
    reports, transactions = measure(cores)
    return [
        Figure("agent/sync, one web process", alone, "reports/s"),
        Figure("agent/sync, one web process / pgbench", alone / beside_alone, ""),
        Figure(f"agent/sync, {cores} web processes", reports, "reports/s"),
        Figure("pgbench, the same read and update", transactions, "transactions/s"),
        Figure("agent/sync, a web process a core / pgbench", reports / transactions, "", at_least=GOAL),
    ]


def measure(processes: int, rounds: int = ROUNDS) -> tuple[float, float]:
    """Reports and transactions per second, medians of `rounds` taken in turns."""
    reports, transactions = [], []
    with tempfile.TemporaryDirectory(prefix="rgpu-bench-") as folder, postgresql.server() as server:
        postgresql.execute(server, "CREATE DATABASE bench")
        url = f"{server}/bench"
        messages = make_hosts(url)
        script = make_script(Path(folder) / "same.sql")
        with web(url, Path(folder), processes) as port:
            requests = [as_request(message, credential) for message, credential in messages]
            load(port, requests, 1.0)  # what a process remembers is remembered
            for _round in range(rounds):
                reports.append(load(port, requests, SECONDS))
                transactions.append(pgbench(url, script))
        check_kept(url)
    return statistics.median(reports), statistics.median(transactions)


def make_hosts(url: str) -> list[tuple[dict[str, Any], str]]:
    """Machines whose agents are let in, and a report of each."""
    database = db.connect(url)
    migrate()
    made = []
    with db.connection(), db.atomic():
        for number in range(HOSTS):
            machine = make_machine(f"host-{number}")
            secret = f"credential-of-host-{number}"
            digest = hashlib.sha256(secret.encode()).hexdigest()
            AgentCredential.create(machine=machine, token_sha256=digest, state="current", used_at=utcnow())
            made.append((report_of(machine.epoch, machine.generation, number), secret))
            MachineReport.create(machine=machine, received_at=utcnow(), agent_version="0", boot_id="none", seq=0)
    database.close_all()  # type: ignore[attr-defined]  # the pool's
    return made


def report_of(epoch: str, generation: int, number: int) -> dict[str, Any]:
    now = protocol.format_time(utcnow())
    gpus = [
        {
            "index": index,
            "uuid": f"GPU-{number:08d}-0000-0000-0000-{index:012d}",
            "name": "NVIDIA H100 80GB HBM3",
            "serial": f"16535230{index:05d}",
            "pci_bus_id": f"00000000:{index:02X}:00.0",
            "memory_total_bytes": 85520809984,
            "memory_used_bytes": 72351744 * (index + 1),
            "memory_reserved_bytes": 655360000,
            "utilization_percent": 97,
            "memory_bandwidth_percent": 41,
            "temperature_c": 61,
            "power_w": 612.3,
            "power_limit_w": 700.0,
            "ecc_uncorrected": 0,
            "mig": False,
            "processes": [{"pid": 4000 + index, "memory_bytes": 72351744, "uid": 20000}],
            "errors": [],
            "state": "ok",
        }
        for index in range(8)
    ]
    report = {
        "seq": 1,
        "boot_id": "3d1c0c4e-8d8a-4a9e-9a53-2f6a8f0f6f7e",
        "agent_version": "0.1.0",
        "sent_at": now,
        "frozen": False,
        "facts": None,
        "metrics": {
            "sampled_at": now,
            "cpu_percent": 12.5,
            "load1": 3.2,
            "memory_total_bytes": 1 << 40,
            "memory_used_bytes": 1 << 38,
            "uptime_s": 86400.5,
            "disks": [
                {
                    "mount": f"/data{n}",
                    "device": f"/dev/nvme{n}n1",
                    "total_bytes": 1 << 42,
                    "used_bytes": 1,
                    "free_bytes": 2,
                }
                for n in range(4)
            ],
            "network": [{"interface": f"eth{n}", "received_bytes": 1 << 44, "sent_bytes": 1 << 43} for n in range(2)],
        },
        "gpu": {
            "state": "ok",
            "message": None,
            "sampled_at": now,
            "driver_version": "550.54.15",
            "nvml_version": "12.550.54.15",
            "gpus": gpus,
        },
        "leases": [],
        "applied_generation": generation,
        "attempts": [],
        "logs": [],
        "command_results": [],
        "journal": [],
    }
    message = {"protocol": 1, "epoch": epoch, "generation": generation, "wait_s": 0, "report": report}
    protocol.check(message, "sync_request")
    return message


def as_request(message: dict[str, Any], credential: str) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    head = (
        "POST /api/v1/agent/sync HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {credential}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextmanager
def web(url: str, folder: Path, processes: int) -> Iterator[int]:
    """So many web processes, as an operator starts them; yields their port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "INSTANCE_DIR": str(folder / "instance"),
        "DATABASE_URL": url,
        "PUBLIC_URL": f"http://127.0.0.1:{port}",
        "BIND": f"127.0.0.1:{port}",
        "WORKERS": str(processes),
    }
    os.environ["INSTANCE_DIR"] = environment["INSTANCE_DIR"]
    init()
    with (folder / "web.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "portal", "web"], env=environment, cwd=ROOT, stdout=log, stderr=log
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/healthz", process, folder / "web.log")
        yield port
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urlopen(url, timeout=1) as response:  # noqa: S310 - our own address
                if response.status == 200:
                    return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.1)


def load(port: int, requests: list[bytes], seconds: float) -> float:
    """Reports answered per second, sent from a process of its own over CLIENTS connections."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(send, (port, requests, seconds))


def send(port: int, requests: list[bytes], seconds: float) -> float:
    """Each connection sends a report, waits for its answer, and sends the next host's."""
    selector = selectors.DefaultSelector()
    connections = [socket.create_connection(("127.0.0.1", port)) for _client in range(CLIENTS)]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, selectors.EVENT_READ, data=connection)
    following = itertools.cycle(requests)
    answered = 0
    began = time.perf_counter()
    for connection in connections:
        connection.sendall(next(following))
    while time.perf_counter() - began < seconds and answered < MOST:
        for key, _ in selector.select(1.0):
            receive(key.data)
            answered += 1
            key.data.sendall(next(following))
    taken = time.perf_counter() - began
    for connection in connections:
        connection.close()
    return answered / taken


def receive(connection: socket.socket) -> None:
    """One whole answer. Raises RuntimeError if it is a refusal: only reports that were taken count."""
    answer = connection.recv(65536)
    while answer.startswith(b"HTTP/1.1 200 ") and not answer.endswith(b"}"):  # head and body may come apart
        answer += connection.recv(65536)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(answer.decode(errors="replace"))


def make_script(file: Path) -> Path:
    """The same for pgbench: who calls, and what was reported."""
    report = report_of("epoch", 1, 1)["report"]
    columns = {name: json.dumps(report[name], separators=(",", ":")) for name in ("metrics", "gpu")}
    file.write_text(
        f"\\set host random(1, {HOSTS})\n"
        "SELECT c.machine_id, c.state, m.epoch, m.generation, m.frozen_reason FROM agent_credential c "
        "JOIN machine m ON m.id = c.machine_id WHERE c.id = :host;\n"
        "UPDATE machine_report SET received_at = now(), clock_offset_s = 0.01, agent_version = '0.1.0', seq = seq + 1, "
        f"frozen = false, metrics = '{columns['metrics']}', gpu = '{columns['gpu']}', leases = '[]' "
        "WHERE machine_id = :host;\n"
    )
    return file


def pgbench(url: str, script: Path) -> float:
    """Transactions per second with as many clients."""
    argv = ["pgbench", "-n", "-f", str(script), "-c", str(CLIENTS), "-j", "1", "-T", str(int(SECONDS)), url]
    ran = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=SECONDS + 60)
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("tps = ")]
    return float(line.split()[2])


def check_kept(url: str) -> None:
    """The reports are in the table, those of the last half second before the process ended too."""
    database = db.connect(url)
    with db.connection():
        kept = MachineReport.select().where(MachineReport.boot_id != "none", MachineReport.gpu.is_null(False)).count()
    database.close_all()  # type: ignore[attr-defined]  # the pool's
    if kept != HOSTS:
        raise RuntimeError(f"the reports of {kept} of {HOSTS} hosts are in the table")


if __name__ == "__main__":
    sys.exit(main())
