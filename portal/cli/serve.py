"""Serve the whole portal: migrate once, start web and worker, keep them running, end them together."""

from __future__ import annotations

import argparse
import contextlib
import errno
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from types import FrameType
from urllib.parse import urlsplit

from portal.cli import open_portal
from portal.integrations.processes import LEASH
from portal.settings import Settings

PARTS = ("web", "worker")
ENDING_S = 5.0  # so long a portal that was ended just now may still have the port
LOOK_S = 0.2
STOP_S = 12.0  # gunicorn's grace, and a run that ends its processes
STEADY_S = 30.0  # a part that lived this long starts again at once
LONGEST_PAUSE_S = 30.0
MAX_FAILURES = 5  # ends in a row, each soon after its start: it will not get better by itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--first-run", action="store_true", help="make secrets and CA if they are missing, and a first administrator"
    )


def run(args: argparse.Namespace) -> int:
    os.umask(0o077)  # the database is private as well, also in an instance folder that others may enter
    warn_without_ssh()
    if args.first_run:
        from portal.cli.init import init

        init()
    settings = open_portal()
    if not may_listen(settings):
        return 1
    warn_of_another_port(settings)
    _migrate()
    if args.first_run:
        _first_administrator()
    supervisor = Supervisor([Part(name) for name in PARTS])
    threading.Thread(target=_announce, args=(settings, supervisor), daemon=True).start()
    return supervisor.run()


def warn_without_ssh() -> None:
    """Pages, API and leases work without it; what fails is the first contact with a host, long after this."""
    if not (shutil.which("ssh") and shutil.which("ssh-keyscan")):
        print("serve: there is no ssh here, so no host can be reached: apt-get install openssh-client", file=sys.stderr)


def may_listen(settings: Settings) -> bool:
    """Whether this user can use the port: gunicorn would try in vain for a minute, and not say the ways out."""
    bound = _bound(settings)
    if bound is None:
        return True
    give_up_at = time.monotonic() + ENDING_S
    while (error := _refusal(bound)) and error.errno == errno.EADDRINUSE and time.monotonic() < give_up_at:
        time.sleep(LOOK_S)
    if error is not None:
        print(f"serve: {_way_out(error, settings, *bound)}", file=sys.stderr)
    return error is None


def _refusal(bound: tuple[str, int]) -> OSError | None:
    """What stands against listening there: in use, not of this machine, or not for this user."""
    with socket.socket(socket.AF_INET6 if ":" in bound[0] else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(bound)
            trial.listen()
        except OSError as error:
            return error
    return None


def _way_out(error: OSError, settings: Settings, address: str, port: int) -> str:
    if isinstance(error, PermissionError):
        return (
            f"only root may listen on port {port}, which {settings.public_url} needs. "
            "Name a port from 1024 on, such as PUBLIC_URL=https://portal.example.org:8443, or put a proxy in front "
            "and name it in TRUSTED_PROXIES."
        )
    if error.errno == errno.EADDRINUSE:
        return (
            f"something listens on port {port} of {address} already, perhaps another portal. End it, or name another "
            f"port, such as PUBLIC_URL=https://127.0.0.1:{port + 1 if port < 65535 else port - 1}."
        )
    return f"nobody can listen on port {port} of {address}: {error.strerror}. BIND says where to listen."


def warn_of_another_port(settings: Settings) -> None:
    """Hosts are told PUBLIC_URL: where nothing leads from its port to ours, no agent ever enrols."""
    bound = _bound(settings)
    if bound is not None and bound[1] != settings.public_port and not settings.trusted_proxies:
        print(
            f"serve: hosts and browsers call {settings.public_url} at port {settings.public_port}, and the portal "
            f"listens on port {bound[1]}. Unless something leads from the one to the other, none of them gets here: "
            f"name port {bound[1]} in PUBLIC_URL, port {settings.public_port} in BIND, or a proxy in TRUSTED_PROXIES.",
            file=sys.stderr,
        )


def _bound(settings: Settings) -> tuple[str, int] | None:
    """Address and port of BIND; None for what is no such thing, such as a socket file."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{settings.bind}")
        if parts.port is not None:
            return parts.hostname or "", parts.port
    return None


def _migrate() -> None:
    from portal.db import db
    from portal.migrate import migrate

    for name in migrate():
        print(f"applied {name}")
    if not db.is_closed():
        db.close()  # before the parts start: no connection is shared with them


def _first_administrator() -> None:
    """Where nobody can sign in yet: an administrator, whose one-time password is printed now and never again."""
    from portal.db import connection
    from portal.models import User
    from portal.services import robots, users
    from portal.services.actors import SYSTEM

    with connection():
        if User.select().where(User.username != robots.OWNER).exists():
            return
        user, password = users.create_staff("admin", "admin", by=SYSTEM)
    print(f"user name: {user.username}\none-time password: {password}", flush=True)


@dataclass
class Part:
    """One child process, and how well it keeps."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_again_at: float = 0.0
    failures: int = field(default=0)

    def start(self) -> None:
        self.started_at = time.monotonic()
        # A session of its own: Ctrl-C in a terminal reaches us alone, and we end the parts in order.
        argv = [*LEASH, sys.executable, "-m", "portal", self.name]
        self.process = subprocess.Popen(argv, start_new_session=True)

    def look(self, now: float) -> None:
        """Start it, if it has ended and its pause is over."""
        if self.process is not None:
            if self.process.poll() is None:
                return
            self._note_end(now)
        if now >= self.start_again_at:
            self.start()

    def _note_end(self, now: float) -> None:
        assert self.process is not None  # noqa: S101 - only called for one that was started
        code, self.process = self.process.returncode, None
        self.failures = 1 if now - self.started_at > STEADY_S else self.failures + 1
        pause_s = 0.0 if self.failures == 1 else min(2.0 ** (self.failures - 2), LONGEST_PAUSE_S)
        self.start_again_at = now + pause_s
        print(f"serve: {self.name} ended with code {code}; it starts again in {pause_s:.0f} s", file=sys.stderr)


class Supervisor:
    """Keeps the parts running until SIGTERM or Ctrl-C; a second one does not wait any longer."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts
        self.stopping = threading.Event()
        self._hurry = threading.Event()

    def run(self) -> int:
        """Returns the exit code: 0 when it was told to stop, 1 if a part does not keep running."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._told)
        code = 0
        try:
            while not self.stopping.is_set():
                for part in self._parts:
                    part.look(time.monotonic())
                if hopeless := [part.name for part in self._parts if part.failures >= MAX_FAILURES]:
                    print(f"serve: {', '.join(hopeless)} does not keep running; see above", file=sys.stderr)
                    code = 1
                    break
                self.stopping.wait(0.2)
        finally:
            self.stopping.set()
            self._stop()
        return code

    def _told(self, _number: int, _frame: FrameType | None) -> None:
        if self.stopping.is_set():
            self._hurry.set()
        self.stopping.set()

    def _stop(self) -> None:
        alive = [part.process for part in self._parts if part.process is not None]
        for process in alive:
            process.terminate()
        give_up_at = time.monotonic() + STOP_S
        while any(process.poll() is None for process in alive):
            if self._hurry.is_set() or time.monotonic() > give_up_at:
                break
            time.sleep(0.05)
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its own children, which share its session
            process.wait()


def _announce(settings: Settings, supervisor: Supervisor) -> None:
    """Say where the portal answers, once it does."""
    while not supervisor.stopping.wait(0.1):
        if _answers(settings):
            print(f"RemoteGPU answers at {settings.public_url} (Ctrl-C ends it)", flush=True)
            return


def _answers(settings: Settings) -> bool:
    """Whether the web part is healthy, asked at the port that it binds, past any proxy."""
    address, port = _bound(settings) or ("127.0.0.1", 8000)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address, address)  # noqa: S104 - compared, not bound
    connection = http.client.HTTPConnection(host, port, timeout=2)
    if settings.is_secure and not settings.trusted_proxies:
        context = ssl.create_default_context(cafile=str(settings.ca_file))
        context.check_hostname = False  # the certificate names the public address, not the one that is bound
        connection = http.client.HTTPSConnection(host, port, timeout=2, context=context)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
