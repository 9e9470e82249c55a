"""API tokens: for CI and the inventory plugin. A token acts as its owner, on the routes that name one of its scopes.

Only the SHA-256 is kept: the token itself is random enough (256 bits) that nothing slower is needed. Sign-ins of people
are in sessions.py, credentials of agents in agents.py.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Forbidden, Invalid, NotFound, NotSignedIn
from portal.models import ApiToken, User
from portal.services import audit, texts
from portal.services.actors import Actor

PREFIX = "rgt_"
SCOPES = {
    "alerts": "deliver alerts as Alertmanager does",
    "inventory": "read the machines as the inventory plugin does",
    "network": "read the network's export and tell what was applied, as a pipeline does",
    "prometheus": "read targets, rules and metrics as Prometheus does",
    "read": "read lists and details",
    "admin": "change machines, leases and runs",
}
MAX_LIFE = timedelta(days=366)
LONGEST_NAME = 64
_USED_GRAIN = timedelta(minutes=1)  # `last_used_at` is for people: once a minute is enough


def create(owner: User, *, name: str, scopes: list[str], expires_at: datetime, by: Actor) -> tuple[ApiToken, str]:
    """Make a token and return it with its secret, which is never seen again. Raises Invalid."""
    _check(owner, name, scopes, expires_at)
    secret = PREFIX + secrets.token_urlsafe(32)
    with atomic():
        token = ApiToken.create(
            user=owner, name=name, scopes=sorted(set(scopes)), token_sha256=_sha256(secret), expires_at=expires_at
        )
        audit.record("api_token.created", token, by=by, name=name, scopes=token.scopes, expires_at=expires_at)
    return token, secret


def _check(owner: User, name: str, scopes: list[str], expires_at: datetime) -> None:
    if faults := texts.faults_of_line(name, LONGEST_NAME):
        raise Invalid({"name": faults})
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise Invalid({"scopes": [f"Choose from {', '.join(SCOPES)}."]})
    if owner.role == "customer" and set(scopes) != {"read"}:
        raise Invalid({"scopes": ["A customer's token can only read."]})
    if not utcnow() < expires_at <= utcnow() + MAX_LIFE:
        raise Invalid({"expires_at": ["Choose a time from now on, at most a year ahead."]})


def list_of(owner: User) -> peewee.ModelSelect[ApiToken]:
    """The tokens of `owner` that are not revoked, newest first."""
    return ApiToken.select().where((ApiToken.user == owner) & ApiToken.revoked_at.is_null()).order_by(-ApiToken.id)


def get_of(owner: User, token_id: int) -> ApiToken:
    token = list_of(owner).where(ApiToken.id == token_id).first()
    if token is None:
        raise NotFound("You have no such API token.")
    return token  # type: ignore[no-any-return]  # peewee's `first` is untyped


def revoke(token: ApiToken, *, by: Actor) -> None:
    with atomic():
        ended = ApiToken.update(revoked_at=utcnow()).where((ApiToken.id == token.id) & ApiToken.revoked_at.is_null())
        if ended.execute():
            audit.record("api_token.revoked", token, by=by, name=token.name)


def user_of(secret: str, *, scope: str | None) -> User:
    """The owner of a token that may be used for `scope` now.

    Raises NotSignedIn for a token that is unknown, expired or revoked, or whose owner is disabled; Forbidden where the
    route takes no token (`scope` None) or the token lacks the scope.
    """
    found: Any = (
        ApiToken.select(ApiToken, User)
        .join(User)
        .where((ApiToken.token_sha256 == _sha256(secret)) & ApiToken.revoked_at.is_null() & User.disabled_at.is_null())
        .first()
    )
    if found is None or found.expires_at <= utcnow():
        raise NotSignedIn("The API token is not valid, or no longer.", code="token_refused")
    if scope is None or scope not in found.scopes:
        needed = "a signed-in person" if scope is None else f"the scope {scope}"
        raise Forbidden(f"This API token may not do that: it needs {needed}.", code="scope_missing")
    _note_use(found)
    return found.user  # type: ignore[no-any-return]  # joined above


def _note_use(token: ApiToken) -> None:
    now = utcnow()
    if token.last_used_at is None or now - token.last_used_at > _USED_GRAIN:
        with atomic():
            ApiToken.update(last_used_at=now).where(ApiToken.id == token.id).execute()


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
