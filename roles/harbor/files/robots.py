#!/usr/bin/python3
"""Tell node_exporter when the robot accounts of Harbor end.

Harbor has them in one list for the system and one for each project, and gives each in pages. A robot that never ends or
is disabled is left out. What was read takes the place of the file in one step; if anything fails the file stays as it
is: ends stay true, and the time of the last success stands still.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

LOOPBACK = "127.0.0.1"
PAGE_SIZE = 100  # it refuses more
STARTING = (502, 503, 504)  # its front answers before what is behind it
NEVER = -1
PAUSE_S = 5
END = "remotegpu_harbor_robot_end_timestamp_seconds"
SUCCESS = "remotegpu_harbor_robots_success_timestamp_seconds"


class Trouble(Exception):
    """Why nothing can be told, and the way out."""


class NotYet(Trouble):
    """Harbor may only be starting."""


class Gone(Trouble):
    """What was asked for is no longer there."""


@dataclass(frozen=True)
class Robot:
    """One that ends. `project` is empty for a robot of the system."""

    name: str
    project: str
    ends_at: int


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        harbor = Harbor(options.hostname, options.port, options.credentials, timeout_s=options.timeout)
        robots = patiently(lambda: read(harbor), options.patience)
        write(options.output, exported(robots, now=time.time()))
    except Trouble as trouble:
        sys.stderr.write(f"{trouble}\n")
        return 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tell node_exporter when the robot accounts of Harbor end.")
    parser.add_argument("--hostname", required=True, help="the name in Harbor's certificate")
    parser.add_argument("--port", required=True, type=int, help="its port for https on this machine")
    parser.add_argument("--output", required=True, type=Path, help="the file that node_exporter reads")
    parser.add_argument("--timeout", default=30, type=float, help="seconds for each question")
    parser.add_argument("--patience", default=0, type=float, help="seconds for Harbor to start")
    parser.add_argument(
        "--credentials",
        default=os.environ.get("CREDENTIALS_DIRECTORY"),
        required="CREDENTIALS_DIRECTORY" not in os.environ,
        type=Path,
        help="a folder with `certificate`, Harbor's own with its chain, and `login`, JSON with user and password",
    )
    return parser.parse_args(argv)


def patiently(question: Callable[[], list[Robot]], patience_s: float) -> list[Robot]:
    until = time.monotonic() + patience_s
    while True:
        try:
            return question()
        except NotYet:
            if time.monotonic() >= until:
                raise
        time.sleep(PAUSE_S)


def read(harbor: Harbor) -> list[Robot]:
    """Every robot that ends. The system's come first: a login that is none is refused there, while projects are listed
    for everybody, the public ones."""
    robots = [robot for row in harbor.rows("robots") for robot in ending(row, "")]
    for project in harbor.rows("projects", with_detail="false"):
        robots += of_project(harbor, field(project, "name", str), field(project, "project_id", int))
    return robots


def of_project(harbor: Harbor, name: str, number: int) -> list[Robot]:
    try:
        rows = list(harbor.rows("robots", q=f"Level=project,ProjectID={number}"))
    except Gone:
        return []  # the project was removed since it was listed, and its robots with it
    return [robot for row in rows for robot in ending(row, name)]


def ending(row: dict[str, Any], project: str) -> Iterator[Robot]:
    name, ends_at = field(row, "name", str), field(row, "expires_at", int)
    if not row.get("disable") and ends_at != NEVER:
        yield Robot(name, project, ends_at)


def field(row: dict[str, Any], name: str, kind: type) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise Trouble(f"Harbor answers with something that has no {name}: this program knows its API v2.0.")
    return value


class Harbor:
    """Its API on this machine, for one login."""

    def __init__(self, hostname: str, port: int, credentials: Path, *, timeout_s: float) -> None:
        self._hostname, self._port, self._timeout_s = hostname, port, timeout_s
        try:
            login = json.loads((credentials / "login").read_text("utf-8"))
            self._user, password = login["user"], login["password"]
            self._tls = trust(credentials / "certificate")
        except (OSError, ValueError, LookupError) as error:
            raise Trouble(f"Login or certificate cannot be read ({error}): run the role harbor again.") from None
        self._basic = base64.b64encode(f"{self._user}:{password}".encode()).decode()

    def rows(self, what: str, **query: str) -> Iterator[dict[str, Any]]:
        """All of a list, page after page."""
        page, is_last = 0, False
        while not is_last:
            page += 1
            path = f"/api/v2.0/{what}?{urlencode({**query, 'page': page, 'page_size': PAGE_SIZE})}"
            rows, is_last = self._ask(path)
            yield from rows

    def _ask(self, path: str) -> tuple[list[dict[str, Any]], bool]:
        """The rows of a page, and whether it is the last."""
        connection = Connection(self._hostname, self._port, timeout=self._timeout_s, context=self._tls)
        try:
            connection.request("GET", path, headers={"Authorization": f"Basic {self._basic}"})
            answer = connection.getresponse()
            body = answer.read()
        except ssl.SSLCertVerificationError as error:
            raise Trouble(
                f"What answers on port {self._port} does not prove to be {self._hostname} ({error.verify_message}). "
                "If the certificate has ended or has not this name, bring another one; run the role harbor again."
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise NotYet(
                f"Harbor does not answer on {LOOPBACK}:{self._port} ({error or type(error).__name__}). "
                "Look at `systemctl status remotegpu-harbor` and `docker ps`."
            ) from None
        finally:
            connection.close()
        if answer.status != 200:
            raise self._trouble(answer.status, path)
        rows = listed(body)
        return rows, not rows or 'rel="next"' not in answer.headers.get("Link", "")

    def _trouble(self, status: int, path: str) -> Trouble:
        if status == 401:
            return Trouble(
                f"Harbor does not know {self._user} with this password. Its admin has harbor_admin_password "
                "no longer than until somebody changes it there: say a login that is good now in harbor_robots_user "
                "and harbor_robots_password, and run the role harbor again."
            )
        if status == 403:
            return Trouble(
                f"Harbor does not let {self._user} ask for {path}: give it the right to list robots, of the system and "
                "of every project, or say another login in harbor_robots_user and harbor_robots_password."
            )
        if status == 404:
            return Gone(f"Harbor has no {path}: this program knows its API v2.0.")
        if status in STARTING:
            return NotYet(f"Harbor answers {status}: a part of it does not run. Look at `docker ps` and its logs.")
        return Trouble(f"Harbor answers {status} to {path}. Why is in its log: `docker logs harbor-core`.")


class Connection(http.client.HTTPSConnection):
    """To this machine, wherever the name leads; by the name the certificate is judged."""

    def __init__(self, hostname: str, port: int, *, timeout: float, context: ssl.SSLContext) -> None:
        super().__init__(hostname, port, timeout=timeout, context=context)
        self._tls = context

    def connect(self) -> None:
        plain = socket.create_connection((LOOPBACK, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


def trust(certificate: Path) -> ssl.SSLContext:
    """Nobody but the certificate that the role gave to Harbor: whoever signed it need not be known here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return context


def listed(body: bytes) -> list[dict[str, Any]]:
    try:
        rows = json.loads(body)
    except ValueError:
        rows = body
    if rows is not None and not isinstance(rows, list):  # an empty list may come as null
        raise Trouble("What answers in Harbor's place does not speak its API v2.0: look at the role harbor's ports.")
    return rows or []


def exported(robots: Iterable[Robot], *, now: float) -> str:
    """The file. A series comes once in it, or node_exporter would refuse all of them."""
    ends: dict[str, int] = {}
    for robot in robots:
        labels = {"robot": robot.name, "level": "project" if robot.project else "system", "project": robot.project}
        key = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items() if value)
        ends[key] = min(robot.ends_at, ends.get(key, robot.ends_at))
    lines = [
        f"# HELP {END} When a robot account of Harbor ends; one that never does or is disabled has none.",
        f"# TYPE {END} gauge",
        *(f"{END}{{{key}}} {ends[key]}" for key in sorted(ends)),
        f"# HELP {SUCCESS} When all of them were last read.",
        f"# TYPE {SUCCESS} gauge",
        f"{SUCCESS} {now:.0f}",
    ]
    return "\n".join(lines) + "\n"


def escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.stem}")  # not *.prom: half a file is not read
    try:
        part.write_text(text, "utf-8")
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        raise Trouble(
            f"{path} cannot be written ({error.strerror}): harbor_robots_metric_dir is to be root's own."
        ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
