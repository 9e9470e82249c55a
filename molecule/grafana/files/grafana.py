#!/usr/bin/python3
"""Stands in for Grafana: reads the same files in the same places, and answers what they say.

It is no Grafana. It knows the settings that the role writes, `$__file{}`, provisioned sources and dashboards, one admin
whose password lies in its database after the first start, and `grafana-cli admin reset-admin-password`.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

ETC, DATABASE = Path("/etc/grafana"), Path("/var/lib/grafana/grafana.db")


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((ETC / "grafana.ini").read_text())
    return parser


def remember(password: str) -> None:
    DATABASE.write_text(hashlib.sha256(password.encode()).hexdigest())


def expanded(value: str) -> str:
    found = re.fullmatch(r"\$__file\{(.+)\}", value)
    return Path(found[1]).read_text() if found else value


def provisioned(kind: str, key: str) -> list[dict[str, Any]]:
    files = sorted((ETC / "provisioning" / kind).glob("*.yml"))
    return [entry for file in files for entry in yaml.safe_load(file.read_text())[key]]


class Grafana(BaseHTTPRequestHandler):
    """Answers the admin alone, but for the health."""

    def do_GET(self) -> None:
        if self.path == "/api/health":
            return self._answer(200, {"database": "ok"})
        given = self.headers["Authorization"] or "Basic Og=="
        user, _, password = base64.b64decode(given.removeprefix("Basic ")).decode().partition(":")
        if user != "admin" or hashlib.sha256(password.encode()).hexdigest() != DATABASE.read_text():
            return self._answer(401, {"message": "Invalid username or password"})
        if self.path == "/api/datasources":
            return self._answer(200, provisioned("datasources", "datasources"))
        if self.path == "/api/search":
            folders = [Path(entry["options"]["path"]) for entry in provisioned("dashboards", "providers")]
            found = [json.loads(file.read_text()) for folder in folders for file in sorted(folder.glob("*.json"))]
            return self._answer(200, [{"uid": each["uid"], "title": each["title"]} for each in found])
        return self._answer(404, {"message": "Not found"})

    def _answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    if sys.argv[1:] == ["admin", "reset-admin-password", "--password-from-stdin"]:
        remember(sys.stdin.read().rstrip("\n"))
        return
    told = settings()
    if not DATABASE.exists():
        remember(expanded(told["security"]["admin_password"]))
    ThreadingHTTPServer((told["server"]["http_addr"], int(told["server"]["http_port"])), Grafana).serve_forever()


if __name__ == "__main__":
    main()
