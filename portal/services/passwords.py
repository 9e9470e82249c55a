"""Passwords: one policy, one hash (argon2id), and the random ones that are shown once.

Hashing takes tens of milliseconds of pure C; under gevent it runs in the hub's thread pool, so that the other greenlets
of the process go on. Never call it inside a transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import cache
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

MIN_LENGTH = 12
MAX_LENGTH = 200  # hashing a megabyte is a gift to whoever wants to keep us busy
_hasher = PasswordHasher()


def problems_of(password: str, *, username: str = "") -> list[str]:
    """What is wrong with it, in sentences; empty if nothing is. The same for create, change and reset."""
    found = []
    if len(password) < MIN_LENGTH:
        found.append(f"Use at least {MIN_LENGTH} characters.")
    if len(password) > MAX_LENGTH:
        found.append(f"Use at most {MAX_LENGTH} characters.")
    if len(set(password)) < 5:
        found.append("Use at least 5 different characters.")
    if username and username.lower() in password.lower():
        found.append("It must not contain the user name.")
    return found


def random_password() -> str:
    """Four groups of five letters and digits that cannot be mistaken for each other (98 bits)."""
    letters = "abcdefghjkmnpqrstuvwxyz23456789"
    return "-".join("".join(secrets.choice(letters) for _ in range(5)) for _ in range(4))


def hash_of(password: str) -> str:
    return str(_in_pool(_hasher.hash, password))


def matches(password: str, password_hash: str) -> bool:
    """Whether it is the password of this hash. Takes the same time for every answer."""
    return bool(_in_pool(_verify, password_hash, password))


def waste_time_on(password: str) -> None:
    """Do the work of `matches` for a user that does not exist, so that the clock does not tell."""
    matches(password, _nobodys_hash())


def _verify(password_hash: str, password: str) -> bool:
    try:
        return _hasher.verify(password_hash, password)
    except (VerificationError, InvalidHashError):
        return False


@cache
def _nobodys_hash() -> str:
    return hash_of(secrets.token_urlsafe())


def _in_pool(work: Callable[..., Any], *args: Any) -> Any:
    """Run `work` in gevent's thread pool where this process is patched by gevent, else right here."""
    from gevent import get_hub, monkey  # imported late: the worker and the command line run without gevent's hub

    if not monkey.is_module_patched("threading"):
        return work(*args)
    return get_hub().threadpool.apply(work, args)
