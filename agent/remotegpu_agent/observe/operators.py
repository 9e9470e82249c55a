"""Operators, as the role base has written them down on this host: whom its keys let in, by name.

The list is root's, and a tenant has no root. All the same nothing is ever let in for being on it: it says which keys
may be put back, and whose account is for an operator to judge.
"""

from __future__ import annotations

import os
import re

from remotegpu_agent.observe import accounts
from remotegpu_agent.observe.tools import read_text
from remotegpu_agent.protocol import UIDS

LIST = "/etc/remotegpu/operator_keys"
SUDO = "/etc/sudoers.d/remotegpu-operators"
_LINE = re.compile(r"(?P<login>\S+) (?P<type>\S+) (?P<key>\S+)( portal)?")


def find_keys() -> dict[str, set[str]] | None:
    """The keys of each login; None on a host without the list, which a release of before has made."""
    text = read_text(LIST)
    if text is None:
        return None
    found: dict[str, set[str]] = {}
    for line in filter(None, map(_LINE.fullmatch, text.splitlines())):
        found.setdefault(line["login"], set()).add(line["key"])
    return found


def names() -> frozenset[str]:
    """The logins of the list that are people's; a lease's uid is nobody else's, whatever the list says."""
    listed = find_keys() or {}
    people = {user.name for user in accounts.users() if user.uid >= accounts.FIRST_PERSON and user.uid not in UIDS}
    return frozenset(people & {*listed})


def keys_of_file(path: str, listed: dict[str, set[str]]) -> set[str]:
    """The listed keys of the login to which this `authorized_keys` belongs; none for any other file."""
    homes = {user.name: os.path.join(os.path.realpath(user.home), ".ssh/authorized_keys") for user in accounts.users()}
    return {key for login, keys in listed.items() if homes.get(login) == path for key in keys}
