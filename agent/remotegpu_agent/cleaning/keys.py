"""Kernel keys: they belong to no process and no file, and their owner may let everybody read them."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from typing import NoReturn

from remotegpu_agent import killing
from remotegpu_agent.cleaning.processes import wait_until
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding, NotApplicable
from remotegpu_agent.observe.tools import read_text

_LISTED = re.compile(r"([0-9a-f]+) (\S+) +\d+ +\S+ [0-9a-f]{8} +(\d+) +-?\d+ (\S+) +(.*)")
_GONE = set("RDi")  # revoked, dead, invalidated: nobody can read it any more
_OWN_RINGS = r"_(uid|uid_ses|persistent)\.{uid}: .*"  # the kernel makes them, and they hold nothing but their number

_SYSTEM_CALL = {"x86_64": 250, "aarch64": 219}  # keyctl(2), which the C library does not have
_SET_PERMISSIONS, _CLEAR, _LINK, _GET_PERSISTENT = 5, 7, 8, 22
_OF_PROCESS, _OF_USER, _OF_USERS_SESSIONS = -2, -4, -5
_FOR_ITS_OWNER = 0x3F3F0000


def look_for_keys(scope: Scope) -> Iterator[Finding]:
    """Keys of the tenant that others are shown: the kernel lists no others."""
    listed = read_text("/proc/keys")
    if listed is None:
        raise NotApplicable("this kernel keeps no keys")
    for line in listed.splitlines():  # a description may hold anything, a line's end too
        if key := _LISTED.fullmatch(line):
            serial, flags, uid, kind, description = key.groups()
            is_the_kernels = kind == "keyring" and re.fullmatch(_OWN_RINGS.format(uid=uid), description)
            if scope.owns(int(uid)) and not is_the_kernels and not _GONE & set(flags):
                yield Finding(int(uid), f"kernel key {serial} ({description}) of uid {uid} is shown to others")


def clear_keyrings(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Empty what keeps a user's keys when he is gone; the kernel forgets a key that nothing holds any more."""
    uids = {finding.subject for finding in found}
    for uid in sorted(uids | scope.uids):
        _clear(uid)
    yield from (f"cleared the keyrings of uid {uid}" for uid in sorted(uids))
    wait_until(lambda: not list(look_for_keys(scope)))


def _clear(uid: int) -> None:
    libc, number = ctypes.CDLL(None), _SYSTEM_CALL.get(os.uname().machine)
    if number is None:
        return  # what is left is seen by the next look
    child = os.fork()
    if child == 0:
        _become_and_clear(uid, libc, number)
    killing.wait_for(child)


def _become_and_clear(uid: int, libc: ctypes.CDLL, number: int) -> NoReturn:
    """In a child. The keyring that stays for days is asked for as root, whom no quota of the user's keeps from it."""

    def keyctl(operation: int, ring: int, argument: int = 0) -> int:
        return int(libc.syscall(number, operation, ring, argument, 0, 0))

    try:
        persistent = keyctl(_GET_PERSISTENT, uid, _OF_PROCESS)
        if persistent > 0:
            keyctl(_CLEAR, persistent)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        for ring in (_OF_USER, _OF_USERS_SESSIONS):
            keyctl(_SET_PERMISSIONS, ring, _FOR_ITS_OWNER)
            keyctl(_CLEAR, ring)
        keyctl(_LINK, _OF_USER, _OF_USERS_SESSIONS)  # as the kernel makes them
    finally:
        os._exit(0)
