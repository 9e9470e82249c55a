"""Whose traces are removed: one lease's login and uid, and whoever has appeared since the baseline.

Everything that cleaning does is bounded here. It refuses to start where the order and the host do not fit together:
a name and a uid that are not one account, an account that the baseline knows, another lease that is open.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from remotegpu_agent.baseline import homes_of
from remotegpu_agent.observe import accounts, operators
from remotegpu_agent.observe.accounts import FIRST_PERSON
from remotegpu_agent.observe.tools import read_text
from remotegpu_agent.protocol import UIDS

LEASE_KEYS = "/etc/remotegpu/authorized_keys"
_LEASE_LOGIN = re.compile(r"lease[0-9]{1,10}")


class Refused(ValueError):
    """The order does not fit this host; nothing has been touched."""


@dataclass(frozen=True)
class Scope:
    """The lease that is cleaned up after, and the host as it was before any tenant."""

    lease_id: int
    login: str
    uid: int
    gid: int
    home: str
    sections: dict[str, Any]

    @cached_property
    def known_uids(self) -> frozenset[int]:
        """The uids of the baseline: whatever happens, nothing of theirs is removed."""
        return frozenset(user.uid for user in accounts.users(self.sections["accounts"]["/etc/passwd"]))

    @cached_property
    def uids(self) -> frozenset[int]:
        """The lease's uid, and those of people's accounts added since the baseline (as they were when cleaning began).

        Not those of the system's own range: a package that was installed meanwhile brings its user along. Nor an
        operator's: he is named, and the host not proven clean, but his work goes on.
        """
        ours = operators.names()
        added = {user.uid for user in accounts.users() if user.uid >= FIRST_PERSON and user.name not in ours}
        return frozenset({self.uid, *(added - self.known_uids)})

    @cached_property
    def subordinate_uids(self) -> tuple[range, ...]:
        """What /etc/subuid lends to these accounts: a container without root runs as one of them."""
        lent = []
        for user in accounts.users():
            for line in accounts.lines("/etc/subuid").get(user.name, []) if user.uid in self.uids else []:
                first, count = (int(each) for each in line.split(":")[1:3])
                lent.append(range(first, first + count))
        return tuple(lent)

    def is_tenants(self, uid: int) -> bool:
        """Whether whatever runs under this uid is a tenant's."""
        return uid in self.uids or any(uid in lent for lent in self.subordinate_uids)

    def owns(self, uid: int) -> bool:
        """Whether a file of this owner is a tenant's; one that an earlier lease left behind counts too."""
        return self.is_tenants(uid) or (uid in UIDS and uid not in self.known_uids)

    def is_its_group(self, gid: int) -> bool:
        """Whether this is the lease's own group."""
        return gid == self.gid and gid not in self._known_gids

    @cached_property
    def _known_gids(self) -> frozenset[int]:
        groups = self.sections["accounts"]["/etc/group"].values()
        return frozenset(int(line.split(":")[2]) for lines in groups for line in lines if line.count(":") >= 3)

    @cached_property
    def homes(self) -> list[str]:
        """The homes of the baseline's people."""
        return homes_of(self.sections)

    @property
    def keys_file(self) -> str:
        """Where sshd looks for the lease's keys."""
        return f"{LEASE_KEYS}/{self.login}"


def of(args: dict[str, Any]) -> Scope:
    """The scope of an order to clean. Raises Refused when it does not fit this host."""
    login, uid, sections = args["login"], args["uid"], args["baseline"]["sections"]
    if not _LEASE_LOGIN.fullmatch(login) or uid not in UIDS:
        raise Refused(f"{login} with uid {uid} is no login of a lease")
    known = accounts.users(sections["accounts"]["/etc/passwd"])
    if any(user.name == login or user.uid == uid for user in known):
        raise Refused(f"{login} or uid {uid} is in the baseline: it is not a tenant's")
    user = accounts.find_user(login)
    if user is not None and user.uid != uid:
        raise Refused(f"{login} has uid {user.uid} on this host, and the order says {uid}")
    _refuse_while_another_lease_is_open(login)
    gid = accounts.find_gid(login)
    home = user.home if user is not None else f"/home/{login}"
    scope = Scope(args["lease_id"], login, uid, uid if gid is None else gid, home, sections)
    _refuse_a_home_that_is_not_its_own(scope)
    return scope


def _refuse_while_another_lease_is_open(login: str) -> None:
    """A late order must not hit the next tenant, whose account would look like one that was added."""
    for user in accounts.users():
        other = _LEASE_LOGIN.fullmatch(user.name) and user.name != login
        if other and read_text(f"{LEASE_KEYS}/{user.name}") and not accounts.is_expired(user.name):
            raise Refused(f"{user.name} is open on this host: {login} cannot be cleaned while another lease is active")


def _refuse_a_home_that_is_not_its_own(scope: Scope) -> None:
    home = os.path.normpath(scope.home)
    if home.count("/") < 2 or any(f"{other}/".startswith(f"{home}/") for other in scope.homes):
        raise Refused(f"the home of {scope.login} is {scope.home}, which is not only its own")
