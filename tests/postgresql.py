"""A PostgreSQL server for one test session: on a free port, without fsync, gone when the session is."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg2

DEADLINE_S = 60.0


def programs() -> Path:
    """The newest PostgreSQL's folder of programs. Raises RuntimeError that says what to install."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise RuntimeError("no PostgreSQL under /usr/lib/postgresql: apt-get install postgresql")
    return found[-1].parent


@contextmanager
def server() -> Iterator[str]:
    """Start a server and yield its address, `postgresql://postgres@127.0.0.1:PORT`."""
    folder = Path(tempfile.mkdtemp(prefix="remotegpu-pg-"))
    as_postgres = ["setpriv", "--pdeathsig", "INT"]  # killed tests leave no server behind
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        as_postgres[1:1] = ["--reuid=postgres", "--regid=postgres", "--init-groups"]
    data, port = folder / "data", _free_port()
    subprocess.run(
        [*as_postgres, programs() / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True, stdout=subprocess.DEVNULL, cwd=folder, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    options = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300",
               "listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": str(folder)}  # fmt: skip
    flags = [f"--{key}={value}" for key, value in options.items()]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*as_postgres, programs() / "postgres", "-D", data, *flags], stdout=log, stderr=log, cwd=folder
        )
    try:
        url = f"postgresql://postgres@127.0.0.1:{port}"
        _wait_for(url, process, folder / "log")
        yield url
    finally:
        process.send_signal(2)  # fast shutdown
        process.wait(DEADLINE_S)
        shutil.rmtree(folder, ignore_errors=True)


def execute(url: str, *statements: str) -> None:
    """Run statements that no transaction may hold (CREATE and DROP DATABASE)."""
    connection = psycopg2.connect(f"{url}/postgres")
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
    finally:
        connection.close()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up_at and process.poll() is None:
        with suppress(psycopg2.OperationalError):
            return psycopg2.connect(f"{url}/postgres").close()
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
