"""Users and groups as the host's files list them, and what belongs to a user by name."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from remotegpu_agent.observe.tools import read_text

# Files with one line for each name; a line that comes or goes is a user or group that comes or goes.
BY_NAME = ("/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid")
SECRET = ("/etc/shadow", "/etc/gshadow")
FILES = (*BY_NAME, *SECRET)
FIRST_PERSON = 1000  # below are the users and groups of the system and of packages
_DAY_S = 24 * 3600


@dataclass(frozen=True)
class User:
    """One line of /etc/passwd."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str


def lines(path: str) -> dict[str, list[str]]:
    """The file's lines by the name they begin with; a name may have several (two users called the same)."""
    found: dict[str, list[str]] = {}
    for line in (read_text(path) or "").splitlines():
        name = line.partition(":")[0]
        if name:
            found.setdefault(name, []).append(line)
    return found


def masked(line: str) -> str:
    """A line of shadow or gshadow that may leave the host: a digest stands for the password, unless there is none."""
    name, _, rest = line.partition(":")
    password, _, tail = rest.partition(":")
    if password.strip("!*"):
        password = "sha256-" + hashlib.sha256(password.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name}:{password}:{tail}"


def unmasked(line: str, now: list[str]) -> str | None:
    """The line that a masked one stands for, with the password of one of the lines of now; None where it is lost."""
    name, password, tail = line.split(":", 2)
    if not password.startswith("sha256-"):
        return line
    for each in now:
        if each.startswith(f"{name}:") and masked(each).split(":", 2)[1] == password:
            return f"{name}:{each.split(':', 2)[1]}:{tail}"
    return None


def users(passwd: dict[str, list[str]] | None = None) -> list[User]:
    """Every user of /etc/passwd, or of the given lines; a line that is no account is left out."""
    found = []
    for name, its_lines in (lines("/etc/passwd") if passwd is None else passwd).items():
        for line in its_lines:
            fields = line.split(":")
            if len(fields) == 7 and fields[2].isdigit() and fields[3].isdigit():
                found.append(User(name, int(fields[2]), int(fields[3]), fields[5], fields[6]))
    return found


def find_user(login: str) -> User | None:
    """The account of that name."""
    return next((user for user in users() if user.name == login), None)


def find_gid(group: str) -> int | None:
    """The id of the group of that name."""
    for line in lines("/etc/group").get(group, []):
        fields = line.split(":")
        if len(fields) >= 3 and fields[2].isdigit():
            return int(fields[2])
    return None


def is_expired(login: str) -> bool:
    """Whether the account is refused today, by key as well as by password; one that does not exist lets nobody in."""
    for line in lines("/etc/shadow").get(login, []):
        fields = line.split(":")
        if len(fields) < 8 or not fields[7].isdigit() or int(fields[7]) > time.time() // _DAY_S:
            return False
    return True
