"""Programs of the house that ask the portal: Prometheus, Alertmanager. They have one account, which nobody signs in to.

A program has one token, named after it and good for one scope; asking for it again makes another and ends the one of
before. Tokens in general are in tokens.py, people in users.py.
"""

from __future__ import annotations

from datetime import timedelta

from portal.db import atomic, utcnow
from portal.models import ApiToken, User
from portal.services import tokens, users
from portal.services.actors import Actor

OWNER = "control-plane"


def new_token(program: str, *, scope: str, life: timedelta, by: Actor) -> str:
    """The program's only token from now on; it is never seen again. Raises Invalid for an unknown scope."""
    owner = users.find(OWNER) or _make_owner(by)
    with atomic():
        # Nobody signs in to change it, so a one-time password, of the beginning or given by hand, keeps no token out.
        User.update(must_change_password=False).where(User.id == owner.id).execute()
        before = list(tokens.list_of(owner).where(ApiToken.name == program))
        _token, secret = tokens.create(owner, name=program, scopes=[scope], expires_at=utcnow() + life, by=by)
        for token in before:
            tokens.revoke(token, by=by)
    return secret


def _make_owner(by: Actor) -> User:
    """An operator whose password nobody has seen: the one-time password is thrown away."""
    owner, _password = users.create_staff(OWNER, "operator", by=by, full_name="Programs of the control plane")
    return owner
