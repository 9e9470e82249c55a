#!/usr/bin/python3
"""Stands in for Harbor's API, as far as the lists of its projects and robot accounts: who may see them, page by page.

It does what Harbor's description and source say (src/server/v2.0/handler/robot.go, project.go): robots of the system
and of each project are separate lists, in the order of their names; a list has at most 100 rows a page and says in Link
whether there is another; public projects are listed for everybody. tests/roles/test_harbor_robots.py holds its answers
against the description. Run as a program it is the front of the stand-in for the whole: https, and http that leads
there.
"""

from __future__ import annotations

import argparse
import base64
import json
import signal
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

BASE = "/api/v2.0"
CREATED = "2026-01-02T03:04:05.000Z"
PULL = {"resource": "repository", "action": "pull", "effect": "allow"}
MESSAGES = {
    400: ("BAD_REQUEST", "bad request"),
    401: ("UNAUTHORIZED", "unauthorized"),
    403: ("FORBIDDEN", "forbidden"),
    404: ("NOT_FOUND", "not found"),
    422: ("UNPROCESSABLE_ENTITY", "page_size in query should be less than or equal to 100"),
}


class Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class World:
    """What it holds. `robots` are told apart by their project's id, 0 is the system."""

    logins: dict[str, str] = field(default_factory=dict)
    projects: dict[int, str] = field(default_factory=dict)
    robots: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    closed: dict[str, set[int]] = field(default_factory=dict)  # a login → whose robots it may not list

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of a GET."""
        url = urlsplit(path)
        asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
        lists: dict[str, Callable[[str | None, dict[str, str]], list[dict[str, Any]]]] = {
            f"{BASE}/robots": self._robots,
            f"{BASE}/projects": self._projects,
        }
        try:
            if url.path not in lists:
                raise Refused(404)
            rows = lists[url.path](self._login(authorization), asked)
            return paged(url.path, asked, rows)
        except Refused as refused:
            code, message = MESSAGES[refused.status]
            return refused.status, {}, {"errors": [{"code": code, "message": message}]}

    def _login(self, authorization: str | None) -> str | None:
        """Whose it is. Nobody's is what a wrong password makes of it."""
        user, _, password = base64.b64decode((authorization or "").removeprefix("Basic ")).decode().partition(":")
        return user if self.logins.get(user) == password else None

    def _projects(self, login: str | None, _asked: dict[str, str]) -> list[dict[str, Any]]:
        shown = {number: name for number, name in self.projects.items() if login or name == "library"}
        return [project(number, name) for number, name in sorted(shown.items(), key=lambda item: item[1])]

    def _robots(self, login: str | None, asked: dict[str, str]) -> list[dict[str, Any]]:
        if login is None:
            raise Refused(401)
        words = dict(word.partition("=")[::2] for word in asked.get("q", "").split(",") if word)
        number = 0
        if words.get("Level", "system") == "project":
            if not words.get("ProjectID", "").isdigit():
                raise Refused(400)
            number = int(words["ProjectID"])
            if number not in self.projects:
                raise Refused(404)
        if number in self.closed.get(login, ()):
            raise Refused(403)
        return sorted(self.robots.get(number, []), key=lambda row: row["name"])


def paged(path: str, asked: dict[str, str], rows: list[dict[str, Any]]) -> tuple[int, dict[str, str], Any]:
    page, size = int(asked.get("page", 1)), int(asked.get("page_size", 10))
    if size > 100:
        raise Refused(422)
    links = [("prev", page - 1)] * (page > 1) + [("next", page + 1)] * (page * size < len(rows))
    headers = {"X-Total-Count": str(len(rows))}
    if links:
        addresses = ((word, urlencode({**asked, "page": other, "page_size": size})) for word, other in links)
        headers["Link"] = " , ".join(f'<{path}?{query}>; rel="{word}"' for word, query in addresses)
    return 200, headers, rows[(page - 1) * size : page * size]


def project(number: int, name: str) -> dict[str, Any]:
    return {
        "project_id": number,
        "name": name,
        "owner_id": 1,
        "owner_name": "admin",
        "creation_time": CREATED,
        "update_time": CREATED,
        "repo_count": 0,
        "metadata": {"public": json.dumps(name == "library")},
    }


def robot(name: str, ends_at: int, *, of: str = "", disable: bool = False) -> dict[str, Any]:
    """One of a project where that is named, else of the system."""
    permission = {"kind": "project", "namespace": of or "*", "access": [PULL]}
    return {
        "id": len(name),
        "name": name,
        "description": "",
        "level": "project" if of else "system",
        "duration": -1 if ends_at == -1 else 30,
        "editable": True,
        "disable": disable,
        "expires_at": ends_at,
        "permissions": [permission],
        "creator_type": "local",
        "creator_ref": 1,
        "creation_time": CREATED,
        "update_time": CREATED,
    }


def sample(password: str) -> World:
    """More robots than a page has, and one of each kind."""
    many = [robot(f"robot$many-{number:03}", -1) for number in range(120)]
    ending = [robot("robot$hosts", 4102444800), robot("robot$sync", 4102531200)]  # 2100: before and after the many
    of_a = [robot("robot$a+b", 4102617600, of="a"), robot("robot$a+off", 1735689600, of="a", disable=True)]
    return World({"admin": password}, {1: "library", 2: "a"}, {0: [*many, *ending], 2: of_a})


class Handler(BaseHTTPRequestHandler):
    timeout = 10
    world: World

    def do_GET(self) -> None:
        if self.path == f"{BASE}/ping":
            return self.say(200, {"Content-Type": "text/plain"}, b"Pong")
        status, headers, body = self.world.answer(self.path, self.headers.get("Authorization"))
        return self.say(status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode())

    def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


class ToHttps(Handler):
    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").partition(":")[0]
        self.say(308, {"Location": f"https://{host}{self.path}"}, b"")


def serve(world: World, port: int, certificate: Path, key: Path, address: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server for it over TLS, not yet running."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer((address, port), type("OfWorld", (Handler,), {"world": world}))
    # Whoever only knocks must not keep others waiting: hands are shaken in the thread of the connection.
    server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Stand in for the front of Harbor.")
    parser.add_argument("--https", required=True, type=int, help="its port")
    parser.add_argument("--http", required=True, type=int, help="the port that leads there")
    parser.add_argument("--certificate", required=True, type=Path)
    parser.add_argument("--key", required=True, type=Path)
    parser.add_argument("--password", required=True, type=Path, help="a file with the admin's, as JSON")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the first process of a container has no other way to end
    world = sample(json.loads(options.password.read_text()))
    front = ThreadingHTTPServer(("0.0.0.0", options.http), ToHttps)  # noqa: S104 - in a container
    threading.Thread(target=front.serve_forever, daemon=True).start()
    serve(world, options.https, options.certificate, options.key, "0.0.0.0").serve_forever()  # noqa: S104
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
