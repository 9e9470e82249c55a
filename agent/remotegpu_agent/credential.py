"""This agent's own credential: got once with a one-time token, rotated by the portal, read by root alone.

A rotation keeps the old credential until a call with the new one has succeeded, so that a power cut in between locks
nobody out. Here is no decision when to rotate.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remotegpu_agent import __version__
from remotegpu_agent.files import find_json, write_json
from remotegpu_agent.portal import Portal, Refused

ENROLL_PATH = "/api/v1/agent/enroll"


class Credential:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._value: dict[str, Any] = find_json(path) or {}

    @property
    def is_enrolled(self) -> bool:
        return bool(self._value)

    @property
    def machine_id(self) -> int:
        """The portal's number of this machine. Raises KeyError before the enrolment."""
        return int(self._value["machine_id"])

    @property
    def used_id(self) -> int | None:
        """The credential that the portal has accepted last; while a new one is on trial, none."""
        return None if "previous" in self._value else self._value.get("credential_id")

    def call(self, ask: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """Make a call with the credential; with the one before it while the portal does not know the new one yet.
        Raises PortalError.
        """
        with self._lock:
            current, previous = self._value["credential"], self._value.get("previous")
        try:
            answer = ask(current)
        except Refused:
            if previous is None:
                raise
            return ask(previous)
        if previous is not None:
            self._forget_previous(current)
        return answer

    def rotate(self, secret: str, credential_id: int) -> None:
        """Use this one from now on."""
        with self._lock:
            if secret != self._value["credential"]:
                changed = {"credential": secret, "credential_id": credential_id, "previous": self._value["credential"]}
                self._write(self._value | changed)

    def _forget_previous(self, used: str) -> None:
        with self._lock:
            if self._value["credential"] == used and "previous" in self._value:
                with contextlib.suppress(OSError):  # a full disk must not cost us the answer; the next call tries again
                    self._write({name: value for name, value in self._value.items() if name != "previous"})

    def keep(self, answer: dict[str, Any]) -> None:
        """The answer to an enrolment."""
        with self._lock:
            self._write({name: answer[name] for name in ("machine_id", "credential_id", "credential")})

    def _write(self, value: dict[str, Any]) -> None:
        write_json(self._path, value)
        self._value = value


def enroll(portal: Portal, token: str, *, boot_id: str, facts: dict[str, Any], gpu: dict[str, Any]) -> dict[str, Any]:
    """Exchange the one-time token for a credential: the `enroll_response`. Raises PortalError; Refused when the token
    is void.
    """
    message = {"protocol": 1, "agent_version": __version__, "boot_id": boot_id, "facts": facts, "gpu": gpu}
    return portal.call(ENROLL_PATH, message, credential=token)
