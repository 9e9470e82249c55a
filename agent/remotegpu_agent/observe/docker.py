"""Docker's own HTTP interface on its unix socket: just enough to list and to remove."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

SOCKET = "/run/docker.sock"
ROOT = "/var/lib/docker"
LEASE_LABEL = "remotegpu.lease"
# Docker makes these three for itself, with a new id at every start of its daemon.
_OWN_NETWORKS = frozenset({"bridge", "host", "none"})


class DockerFailed(RuntimeError):
    """The daemon is there and did not answer as it must."""


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(SOCKET)


@dataclass(frozen=True)
class Thing:
    """A container, volume, image or network: what it is called, and the lease it was made for."""

    kind: str
    id: str
    name: str
    lease: str | None

    def __str__(self) -> str:
        whose = f" of lease {self.lease}" if self.lease else ""
        number = f" ({self.id[:19]})" if self.name != self.id else ""
        return f"{self.kind} {self.name}{number}{whose}"


def is_installed() -> bool:
    """Whether there is a daemon to ask."""
    return Path(SOCKET).exists()


def call(method: str, path: str, *, timeout_s: float = 60, **query: str) -> Any:
    """One call; raises DockerFailed. None where the answer has no body; a thing that is gone already is no error."""
    connection = _Connection("docker", timeout=timeout_s)
    try:
        connection.request(method, path + ("?" + urlencode(query) if query else ""))
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DockerFailed(f"Docker did not answer {method} {path}: {error}") from error
    finally:
        connection.close()
    if response.status in (304, 404) and method != "GET":
        return None
    if response.status >= 400:
        said = body[:300].decode(errors="replace")
        raise DockerFailed(f"Docker answered {response.status} to {method} {path}: {said}")
    return json.loads(body) if body.strip() else None


def containers() -> list[Thing]:
    """Every container, stopped ones too."""
    return [
        Thing("container", each["Id"], each["Names"][0].lstrip("/") if each["Names"] else each["Id"], _lease(each))
        for each in call("GET", "/containers/json", all="1")
    ]


def volumes() -> list[Thing]:
    """Every volume."""
    listed = call("GET", "/volumes")["Volumes"] or []
    return [Thing("volume", each["Name"], each["Name"], _lease(each)) for each in listed]


def images() -> list[Thing]:
    """Every image, untagged ones too; layers in between belong to the image built on them."""
    return [
        Thing("image", each["Id"], next(iter(each.get("RepoTags") or []), each["Id"]), _lease(each))
        for each in call("GET", "/images/json")
    ]


def networks() -> list[Thing]:
    """Every network but Docker's own three."""
    return [
        Thing("network", each["Id"], each["Name"], _lease(each))
        for each in call("GET", "/networks")
        if each["Name"] not in _OWN_NETWORKS
    ]


def _lease(listed: dict[str, Any]) -> str | None:
    value = (listed.get("Labels") or {}).get(LEASE_LABEL)
    return None if value is None else str(value)


def remove(thing: Thing) -> None:
    """Remove it, running or not; a container takes its unnamed volumes along."""
    where = f"/{thing.kind}s/{quote(thing.id, safe=':')}"
    if thing.kind == "container":
        call("DELETE", where, force="1", v="1")
    elif thing.kind == "network":
        call("DELETE", where)
    else:
        call("DELETE", where, force="1")


def everything() -> dict[str, list[str]] | None:
    """The ids of all there is, by kind; None where there is no Docker."""
    if not is_installed():
        return None
    return {
        "containers": sorted(each.id for each in containers()),
        "volumes": sorted(each.id for each in volumes()),
        "images": sorted(each.id for each in images()),
        "networks": sorted(each.id for each in networks()),
    }
