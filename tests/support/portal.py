"""A whole portal as an operator runs it: instance folder, web and worker as separate processes, HTTPS with its own CA.

`Portal` starts and stops processes; `Client` is a person or a program that talks to it over HTTP, and knows no Python
of it.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 90.0  # a busy machine has needed more than 30
STOP_TIMEOUT_S = 20.0
IDLE_S = 20.0  # less than the 30 s after which the portal closes a connection
OWN_PASSWORD = "A horse that chose correctly 42"


@dataclass
class Answer:
    """What the portal said: the status, and its JSON."""

    status: int
    body: Any

    def __getitem__(self, key: str) -> Any:
        return self.body[key]


class Refused(AssertionError):
    """The portal refused what the test needed."""

    def __init__(self, answer: Answer, what: str) -> None:
        super().__init__(f"{what}: {answer.status} {answer.body}")
        self.answer = answer


@dataclass
class Portal:
    """`start("web", "worker")`, use, `stop()`; stopping and starting again is the portal being down for a while."""

    instance: Path
    address: str = "127.0.0.1"
    environ: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = self.port or free_port(self.address)

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def ca_file(self) -> Path:
        return self.instance / "ca" / "ca.pem"

    @property
    def log(self) -> Path:
        return self.instance / "log.txt"

    def set_up(self) -> Client:
        """Secrets, database and an administrator who is signed in with a password of their own."""
        self.command("init")
        self.command("migrate")
        shown = self.command("create-admin", "admin")
        found = re.search(r"password\S*:?\s+(\S+)", shown, re.IGNORECASE)
        assert found, shown
        self.start("web")
        admin = Client(self)
        admin.sign_in_first_time("admin", found[1])
        return admin

    def command(self, *argv: str, check: bool = True) -> str:
        """Run `python -m portal …` and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "portal", *argv],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check:
            assert done.returncode == 0, f"portal {' '.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, *names: str) -> None:
        for name in names:
            command = name.split("-")[0]
            with self.log.open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "portal", command],
                    cwd=ROOT, env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            if command == "web":
                until(self._answers, f"{self.url} to answer", timeout_s=START_TIMEOUT_S, also=self.tail)

    def stop(self, *names: str) -> None:
        """End these processes, or all of them, and wait until they are gone."""
        for name in names or tuple(self._processes):
            process = self._processes.pop(name)
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self, name: str) -> None:
        """As the machine would: no word of farewell."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def is_running(self, name: str) -> bool:
        return name in self._processes and self._processes[name].poll() is None

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/healthz", verify=str(self.ca_file), timeout=2).status_code == 200
        except requests.RequestException:
            assert "web" not in self._processes or self._processes["web"].poll() is None, self.tail()
            return False

    def environment(self) -> dict[str, str]:
        """What a process of it is started with."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return {
            **kept,
            "PYTHONUNBUFFERED": "1",
            "INSTANCE_DIR": str(self.instance),
            "PUBLIC_URL": self.url,
            "BIND": f"{self.address}:{self.port}",
            **self.environ,
        }


@contextmanager
def running(portal: Portal) -> Iterator[Portal]:
    """End whatever of it runs, however the block ends."""
    try:
        yield portal
    finally:
        portal.stop()


class Client:
    """Somebody who uses the API. Names are paths under /api/v1."""

    def __init__(self, portal: Portal) -> None:
        self.portal = portal
        self._session = requests.Session()
        self._session.trust_env = False  # a CA bundle or a proxy of this machine's environment is not ours
        self._session.verify = str(portal.ca_file)
        self._asked_at = 0.0

    def sign_in(self, username: str, password: str) -> None:
        self._take(self.post("auth/login", username=username, password=password))
        self._credentials = (username, password)

    def sign_in_again(self) -> None:
        """With the name and password of the last time."""
        self.sign_in(*self._credentials)

    def sign_in_first_time(self, username: str, given: str) -> None:
        """Sign in with the password that was given, and choose another one."""
        self.sign_in(username, given)
        self._take(self.post("auth/password", old_password=given, new_password=OWN_PASSWORD))
        self._credentials = (username, OWN_PASSWORD)

    def _take(self, answer: Answer) -> None:
        self._session.headers["Authorization"] = f"Bearer {answer['access_token']}"
        self._refresh_token = answer["refresh_token"]

    def get(self, path: str, **query: Any) -> Answer:
        return self._needed("GET", path, params=query)

    def post(self, path: str, **body: Any) -> Answer:
        return self._needed("POST", path, json=body)

    def patch(self, path: str, **body: Any) -> Answer:
        return self._needed("PATCH", path, json=body)

    def delete(self, path: str) -> Answer:
        return self._needed("DELETE", path)

    def page(self, path: str) -> str:
        """A page as a browser would show it, by the token in place of a cookie."""
        answer = self._request("GET", f"{self.portal.url}{path}", allow_redirects=False)
        assert answer.status_code == 200, (path, answer.status_code, answer.text[:500])
        return answer.text

    def download(self, path: str) -> bytes:
        """A file, byte for byte."""
        answer = self._send("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.content

    def ask(self, method: str, path: str, **options: Any) -> Answer:
        """Any answer, a refusal too."""
        answer = self._send(method, path, **options)
        is_json = "json" in answer.headers.get("Content-Type", "")
        return Answer(answer.status_code, answer.json() if is_json and answer.content else answer.content)

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        """A request, with a new access token if the old one has run out meanwhile."""
        url = f"{self.portal.url}/api/v1/{path}"
        answer = self._request(method, url, **options)
        if answer.status_code != 401 or answer.json()["code"] != "token_expired":
            return answer
        bearer = {"Authorization": f"Bearer {self._refresh_token}"}
        fresh = self._request("POST", f"{self.portal.url}/api/v1/auth/refresh", headers=bearer)
        if fresh.status_code != 200:
            return fresh  # the sign-in itself has ended meanwhile
        self._take(Answer(fresh.status_code, fresh.json()))
        return self._request(method, url, **options)

    def _request(self, method: str, url: str, **options: Any) -> requests.Response:
        """On a connection that was used just now, or a new one: the portal may be closing one that was idle."""
        if time.monotonic() - self._asked_at > IDLE_S:
            self._session.close()
        self._asked_at = time.monotonic()
        return self._session.request(method, url, timeout=60, **options)

    def _needed(self, method: str, path: str, **options: Any) -> Answer:
        answer = self.ask(method, path, **options)
        if answer.status >= 400:
            raise Refused(answer, f"{method} {path}")
        return answer


def free_port(address: str) -> int:
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])
