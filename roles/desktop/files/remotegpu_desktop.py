#!/usr/bin/python3 -I
"""One's own desktop on this host: `remotegpu-desktop vnc | rdp | show | stop`.

Everything here runs as the user it is for, and everything it makes is the user's own: processes, sockets, a folder in
the home. So a lease's desktop ends as the lease's processes end and goes as its home goes, and no part of it has power
that the user has not. The one exception is `check-password`, which PAM runs as root for xrdp: it becomes the user
before it reads a file of theirs.

A user has one kind of desktop at a time: two of them share one session bus, and the second comes up broken. What is
running is asked of the kernel, never of a file; a password is shown once and kept as VNC and scrypt keep them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import pwd
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/remotegpu/desktop")  # a file of each kind that is installed here, and session.json
VNC_SERVER, VNC_PASSWORD = "/usr/bin/Xtigervnc", "/usr/bin/tigervncpasswd"
SESSION = ("/bin/bash", "--login", "-c", "exec /etc/X11/Xsession")
LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # none that is taken for another
VNC_LETTERS, RDP_LETTERS = 8, 16  # VNC's own authentication looks at no more than eight
SCRYPT = {"n": 2**14, "r": 8, "p": 1, "maxmem": 64 * 2**20}
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 10.0
MAX_BYTES = 4096


class Refused(Exception):
    """It cannot be done; the text says why and what to do about it."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="remotegpu-desktop", description="Your own desktop on this host.")
    parser.add_argument("what", choices=("vnc", "rdp", "show", "stop", "check-password"), nargs="?", default="show")
    parser.add_argument("--size", help="of a new VNC desktop, like 1600x900")
    parser.add_argument("--json", action="store_true", help="answer for programs")
    asked = parser.parse_args(argv)
    umask = os.umask(0o077)  # what is made here is nobody else's business; the session keeps the user's own
    try:
        if asked.what == "check-password":
            return check_password()
        if os.geteuid() == 0:
            raise Refused("root has no desktop here: sign in as the user whom it is for")
        settings = {path.stem: json.loads(path.read_text()) for path in sorted(SETTINGS.glob("*.json"))}
        mine = Desktop(settings, Path(pwd.getpwuid(os.getuid()).pw_dir), umask)
        answer = mine.vnc(asked.size) if asked.what == "vnc" else getattr(mine, asked.what)()
    except (Refused, OSError, subprocess.SubprocessError) as error:
        print(f"remotegpu-desktop: {error}", file=sys.stderr)  # noqa: T201 - a person reads it
        return 1
    print(json.dumps(answer) if asked.json else in_words(answer))  # noqa: T201 - as above
    return 0


class Desktop:
    """What this user has; told in the order of its life."""

    def __init__(self, settings: dict[str, Any], home: Path, umask: int) -> None:
        self._settings, self._umask = settings, umask
        self._kinds = [kind for kind in ("vnc", "rdp") if kind in settings]
        self._folder = home / ".config" / "remotegpu-desktop"

    def show(self) -> dict[str, Any]:
        """What there is, without its password."""
        for display in vnc_servers().values():
            return {"kind": "vnc", "display": display, "address": "127.0.0.1", "port": 5900 + display}
        if self._rdp_password.exists():
            return self._rdp()
        return {"kind": None, "possible": self._kinds}

    def vnc(self, size: str | None) -> dict[str, Any]:
        """Start the VNC desktop, or find it running; a new password in either case."""
        self._need("vnc", unless=self._rdp_password.exists() or bool(rdp_sessions()), other="an RDP desktop")
        size = size or str(self._settings["vnc"]["size"])
        width, _, height = size.partition("x")
        if not (width.isdecimal() and height.isdecimal() and 320 <= int(width) <= 8192 and 200 <= int(height) <= 8192):
            raise Refused(f"--size is '{size}'; it takes width and height in pixels, like 1600x900")
        with self._alone():
            password = new_password(VNC_LETTERS)
            coded = subprocess.run(
                [VNC_PASSWORD, "-f"], input=f"{password}\n".encode(), capture_output=True, check=True
            )
            self._write(self._vnc_password, coded.stdout)
            started = None if vnc_servers() else self._start(size)
        if started is not None:  # outside: whoever watches the session would hold the lock as long as it lasts
            self._start_session(*started)
        return {**self.show(), "password": password}

    def rdp(self) -> dict[str, Any]:
        """Let this user sign in by RDP, with a new password; xrdp starts the session when somebody comes."""
        self._need("rdp", unless=bool(vnc_servers()), other="a VNC desktop")
        with self._alone():
            password, salt = new_password(RDP_LETTERS), secrets.token_bytes(16)
            kept = {"salt": salt.hex(), "hash": hashed(password.encode(), salt).hex()}
            self._write(self._rdp_password, json.dumps(kept).encode())
        return {**self._rdp(), "password": password}

    def stop(self) -> dict[str, Any]:
        """End the desktop with all that runs in it, and forget its password."""
        self._rdp_password.unlink(missing_ok=True)
        self._vnc_password.unlink(missing_ok=True)
        end(lambda: [*vnc_servers(), *rdp_sessions()])
        return self.show()

    def _need(self, kind: str, *, unless: bool, other: str) -> None:
        if kind not in self._kinds:
            raise Refused(f"this host has no {kind} desktops; it has: {', '.join(self._kinds) or 'none'}")
        if unless:
            raise Refused(f"you have {other}; one desktop at a time: 'remotegpu-desktop stop' ends it")

    def _rdp(self) -> dict[str, Any]:
        return {"kind": "rdp", "login": login_name(), **self._settings["rdp"]}

    @property
    def _vnc_password(self) -> Path:
        return self._folder / "vnc-password"

    @property
    def _rdp_password(self) -> Path:
        return rdp_password_of(self._folder)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two who ask at once get one desktop."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, content: bytes) -> None:
        new = path.with_suffix(".new")
        new.write_bytes(content)
        new.replace(path)

    # The X server and the session in it

    def _start(self, size: str) -> tuple[int, Path, int]:
        """Display, cookies and a handle on the server."""
        cookies = self._folder / "Xauthority"
        for display in self._displays():
            cookies.unlink(missing_ok=True)
            add = ["xauth", "-q", "-f", str(cookies), "add", f":{display}", ".", secrets.token_hex(16)]
            subprocess.run(add, check=True, stderr=subprocess.DEVNULL)
            server = self._start_server(display, size, cookies)
            if server is not None:
                self._write(self._folder / "display", f"{display}\n".encode())
                return display, cookies, server
        raise Refused(f"none of the X displays that are free could be had; see {self._folder}/log")

    def _displays(self) -> list[int]:
        """Whoever had one before gets it again, unless somebody else is there."""
        first, last = self._settings["vnc"]["first_display"], self._settings["vnc"]["last_display"]
        free = [display for display in range(first, last + 1) if not is_taken(display)]
        kept = read_own(self._folder / "display").decode(errors="replace").strip()
        return sorted(free, key=lambda display: str(display) != kept)

    def _start_server(self, display: int, size: str, cookies: Path) -> int | None:
        """A handle on the server, which can be asked by now; None where it did not come up."""
        heard, told = os.pipe()
        argv = [
            *(VNC_SERVER, f":{display}", "-auth", str(cookies), "-geometry", size, "-depth", "24", "-noreset"),
            *("-desktop", f"{login_name()}@{socket.gethostname()}", "-nolisten", "tcp", "-displayfd", str(told)),
            *("-rfbport", str(5900 + display), "-localhost=1", "-AlwaysShared=1"),
            *("-SecurityTypes", "VncAuth", "-PasswordFile", str(self._vnc_password)),
        ]
        with (self._folder / "log").open("ab") as log:
            server = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(told,),
                start_new_session=True,
                cwd="/",
            )
        os.close(told)
        with os.fdopen(heard, "rb") as ready:
            in_time, _, _ = select.select([ready], [], [], START_TIMEOUT_S)
            answer = ready.readline() if in_time else b""  # empty too where it ended before it was ready
        if answer.strip() == str(display).encode():
            return os.pidfd_open(server.pid)
        server.kill()
        server.wait()
        return None

    def _start_session(self, display: int, cookies: Path, server: int) -> None:
        """The session, and somebody who ends the server with it. Neither holds on to whoever asked."""
        if os.fork():
            return
        os.setsid()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
        environ = {
            "LANG": self._settings["session"]["locale"],
            **kept,
            "DISPLAY": f":{display}",
            "XAUTHORITY": str(cookies),
            "XDG_SESSION_TYPE": "x11",
        }
        with (self._folder / "log").open("ab") as log, Path(os.devnull).open("rb") as nothing:
            for number, file in ((0, nothing), (1, log), (2, log)):
                os.dup2(file.fileno(), number)
            subprocess.run(SESSION, env=environ, cwd=Path.home(), umask=self._umask, check=False)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(server, signal.SIGTERM)
        os._exit(0)


def login_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


# --- what the kernel says is running


def my_processes() -> Iterator[tuple[int, list[str]]]:
    """This user's processes with their command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.getuid():
                    yield int(entry.name), (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")


def vnc_servers() -> dict[int, int]:
    """Servers of the kind that this program starts, with their displays."""
    ours = str(Path("remotegpu-desktop") / "vnc-password")
    return {
        pid: int(argv[1][1:])
        for pid, argv in my_processes()
        if argv[0] == VNC_SERVER and argv[1][1:].isdecimal() and any(each.endswith(ours) for each in argv)
    }


def rdp_sessions() -> list[int]:
    """X servers that xrdp's session manager started for this user: Xorg with its module, or Xvnc."""
    return [pid for pid, argv in my_processes() if "xrdp/xorg.conf" in argv or Path(argv[0]).name == "Xvnc"]


def is_taken(display: int) -> bool:
    """By a server that runs: a socket without one is a leftover, and the new server removes it."""
    for name in (f"\0/tmp/.X11-unix/X{display}", f"/tmp/.X11-unix/X{display}"):  # noqa: S108 - where X servers are
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asked:
            asked.connect(name)
            return True
    return False


def end(those: Callable[[], Iterable[int]]) -> None:
    """Politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for pid in those():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while any(those()) and time.monotonic() < deadline:
            time.sleep(0.05)
    if left := [*those()]:
        raise Refused(f"these processes do not end: {', '.join(map(str, left))}")


# --- passwords


def new_password(letters: int) -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(letters))


def hashed(password: bytes, salt: bytes) -> bytes:
    return hashlib.scrypt(password, salt=salt, **SCRYPT)  # the cost is ours to say, never the file's


def rdp_password_of(folder: Path) -> Path:
    return folder / "rdp-password"


def check_password() -> int:
    """For pam_exec: PAM_USER in the environment, the password on standard input; 0 lets in."""
    login = pwd.getpwnam(os.environ["PAM_USER"])
    given = sys.stdin.buffer.read(MAX_BYTES).rstrip(b"\0")
    if login.pw_uid == 0:
        return 1
    become(login)
    try:
        kept = json.loads(read_own(rdp_password_of(Path(login.pw_dir) / ".config" / "remotegpu-desktop")))
        wanted, salt = bytes.fromhex(kept["hash"]), bytes.fromhex(kept["salt"])
    except (ValueError, KeyError, TypeError):
        return 1
    if len(wanted) != 64 or vnc_servers():
        return 1
    return 0 if hmac.compare_digest(hashed(given, salt), wanted) else 1


def become(login: pwd.struct_passwd) -> None:
    """For good: what follows reads what the user has written."""
    os.setgroups([])
    os.setgid(login.pw_gid)
    os.setuid(login.pw_uid)


def read_own(path: Path) -> bytes:
    """A small file of this user's own; nothing where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid():
            return b""
        return os.read(handle, MAX_BYTES)
    finally:
        os.close(handle)


# --- words


def in_words(answer: dict[str, Any]) -> str:
    if answer["kind"] is None:
        return f"You have no desktop. Get one with: remotegpu-desktop {' | '.join(answer['possible'])}"
    lines = {name: answer[name] for name in ("login", "password", "certificate_sha256") if name in answer}
    told = [f"{name.replace('_', ' '):<20}{value}" for name, value in lines.items()]
    here = f"{answer['address']}:{answer['port']}"
    if answer["address"] == "127.0.0.1":
        told += [
            "It answers on this host alone. On your own machine, beside what you sign in with:",
            f"  ssh -N -L {answer['port']}:{here} …",
            f"and point your {answer['kind'].upper()} client at localhost:{answer['port']}.",
        ]
    else:
        told.append(f"Point your RDP client at this host, port {answer['port']}.")
    if "password" not in answer:
        told.append(f"A forgotten password: 'remotegpu-desktop {answer['kind']}' makes a new one.")
    return "\n".join(told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
