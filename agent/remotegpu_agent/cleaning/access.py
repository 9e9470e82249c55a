"""The lease's door: no login by any key or password, from now on."""

from __future__ import annotations

import os
from collections.abc import Iterator

from remotegpu_agent.cleaning import remove
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding
from remotegpu_agent.observe import accounts
from remotegpu_agent.observe.tools import run


def look_for_door(scope: Scope) -> Iterator[Finding]:
    """A file of keys for the login, or an account that has not expired."""
    if os.path.lexists(scope.keys_file):
        yield Finding("keys", f"{scope.keys_file} exists")
    if accounts.find_user(scope.login) is not None and not accounts.is_expired(scope.login):
        yield Finding("account", f"the account {scope.login} has not expired")


def close_door(scope: Scope, _found: list[Finding]) -> Iterator[str]:
    """Expire the account (a locked password alone would still let keys in), then take the keys away."""
    if accounts.find_user(scope.login) is not None:
        run(["usermod", "--expiredate", "1970-01-01", scope.login])
        yield f"expired {scope.login}"
    yield from remove.remove(scope.keys_file)
