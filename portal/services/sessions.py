"""Sign-ins: from the password to the last refresh.

A sign-in is a family of refresh tokens. Each refresh names the only token that may be used next; a token that was
used already is a stolen one, and its use ends the family. Access tokens name their family and their user's generation:
both are looked up on each request, so that the end of either acts on the next one. Signing and reading of the tokens
themselves is the API's affair (api/auth.py).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import peewee

from portal.db import atomic, one_at_a_time, utcnow
from portal.errors import NotFound, NotSignedIn, TooMany
from portal.models import RefreshFamily, SignInFailure, User
from portal.services import audit, passwords
from portal.services.actors import Actor, of_user

FAILURE_WINDOW = timedelta(minutes=5)
GENERATIONS_SET_ASIDE = 1000  # more than anybody's sign-ins were ended between a backup and its restoration
MAX_FAILURES_ACCOUNT = 10
MAX_FAILURES_ADDRESS = 50  # an office behind one address mistypes more often than one person


@dataclass(frozen=True)
class Session:
    """A sign-in and the refresh token that is valid for it now."""

    user: User
    family: RefreshFamily
    jti: str


@dataclass(frozen=True)
class Caller:
    """Where a sign-in comes from."""

    address: str
    user_agent: str | None = None
    request: str | None = None


def sign_in(username: str, password: str, *, caller: Caller, life_s: int) -> Session:
    """Check the password and open a family that lives `life_s` without a refresh.

    Raises NotSignedIn with the same words, after the same work, for an unknown name, a wrong password and a disabled
    user; TooMany when the account or the address has failed too often.
    """
    username = username.strip().lower()
    _count_attempt(username, caller.address)
    user = User.get_or_none(User.username == username)
    if user is None:
        passwords.waste_time_on(password)
    elif passwords.matches(password, user.password_hash) and user.disabled_at is None:
        return _open_family(user, caller, life_s)
    _record_refusal(username, user, caller)
    raise NotSignedIn("User name or password is wrong.", code="wrong_credentials")


def start(user: User, *, caller: Caller, life_s: int) -> Session:
    """Open a family for somebody whose identity was proven otherwise (just now, by the old password)."""
    with atomic():
        return _create_family(user, caller, life_s)


def _count_attempt(username: str, address: str) -> None:
    """Count it as failed before the password is looked at, so that parallel guesses count each other."""
    since = utcnow() - FAILURE_WINDOW
    with atomic():
        one_at_a_time(f"sign-in of {username}", f"sign-in from {address}")
        for column, value, limit in (
            (SignInFailure.username, username[:64], MAX_FAILURES_ACCOUNT),
            (SignInFailure.address, address, MAX_FAILURES_ADDRESS),
        ):
            failures = SignInFailure.select().where((column == value) & (SignInFailure.at > since))
            if failures.count() >= limit:
                raise TooMany(
                    "Too many failed sign-ins. Wait a few minutes and try again.",
                    retry_after_s=int(FAILURE_WINDOW.total_seconds()),
                )
        SignInFailure.create(username=username[:64], address=address)


def _open_family(user: User, caller: Caller, life_s: int) -> Session:
    with atomic():
        SignInFailure.delete().where(SignInFailure.username == user.username).execute()
        User.update(last_sign_in_at=utcnow()).where(User.id == user.id).execute()
        session = _create_family(user, caller, life_s)
        audit.record("user.signed_in", user, by=_actor(user, caller))
    return session


def _create_family(user: User, caller: Caller, life_s: int) -> Session:
    jti = secrets.token_urlsafe(24)
    family = RefreshFamily.create(
        user=user,
        current_jti=jti,
        expires_at=utcnow() + timedelta(seconds=life_s),
        address=caller.address,
        user_agent=(caller.user_agent or "")[:300] or None,
    )
    return Session(user, family, jti)


def _record_refusal(username: str, user: User | None, caller: Caller) -> None:
    """Only the name of a user is kept: what else was typed there may be a password."""
    name = "unknown" if user is None else username
    by = Actor("user", name, None if user is None else user.id, None, caller.address, caller.request)
    with atomic():
        audit.record("user.sign_in_refused", user, by=by, outcome="refused")


def _actor(user: User, caller: Caller) -> Actor:
    return of_user(user, address=caller.address, request=caller.request)


def find_user(claims: dict[str, Any]) -> User | None:
    """The user of a token, if its family and generation are still the valid ones. What lacks one is of no sign-in."""
    try:
        user_id, family_id, generation = (int(claims[name]) for name in ("sub", "family", "generation"))
    except (KeyError, TypeError, ValueError):
        return None
    if max(user_id, family_id, generation) >= 2**31:
        return None
    return (  # type: ignore[no-any-return]  # peewee's `first` is untyped
        User.select()
        .join(RefreshFamily, on=(RefreshFamily.user == User.id))
        .where(
            (User.id == user_id)
            & (User.generation == generation)
            & User.disabled_at.is_null()
            & (RefreshFamily.id == family_id)
            & RefreshFamily.ended_at.is_null()
        )
        .first()
    )


def refresh(claims: dict[str, Any], *, caller: Caller, life_s: int) -> Session:
    """Exchange a refresh token for the next one.

    Of two uses at the same moment exactly one wins: the other saw a valid token and came too late, so it is refused
    and the family lives on. Use of a token that had been exchanged before is theft: it ends the family. Raises
    NotSignedIn.
    """
    user = find_user(claims)
    family = RefreshFamily.get_or_none(RefreshFamily.id == claims["family"])
    if user is None or family is None or family.expires_at <= utcnow():
        raise NotSignedIn("This sign-in has ended. Sign in again.", code="session_ended")
    if family.current_jti != claims["jti"]:
        _end_as_stolen(family, user, caller)
        raise NotSignedIn("This refresh token was used before; the sign-in has ended.", code="refresh_reused")
    jti = secrets.token_urlsafe(24)
    with atomic():
        won = (
            RefreshFamily.update(current_jti=jti, rotated_at=utcnow(), expires_at=utcnow() + timedelta(seconds=life_s))
            .where(
                (RefreshFamily.id == family.id)
                & (RefreshFamily.current_jti == claims["jti"])
                & RefreshFamily.ended_at.is_null()
            )
            .execute()
        )
    if not won:
        raise NotSignedIn("Another request has just refreshed this sign-in.", code="refresh_raced")
    return Session(user, family, jti)


def _end_as_stolen(family: RefreshFamily, user: User, caller: Caller) -> None:
    with atomic():
        if _end(RefreshFamily.id == family.id, "reused"):
            audit.record("session.reuse_detected", user, by=_actor(user, caller), outcome="refused")


def open_of(user: User) -> peewee.ModelSelect[RefreshFamily]:
    """The sign-ins that this person could still use, the last used first."""
    is_open = RefreshFamily.ended_at.is_null() & (RefreshFamily.expires_at > utcnow())
    return (
        RefreshFamily.select().where((RefreshFamily.user == user) & is_open).order_by(RefreshFamily.rotated_at.desc())
    )


def get_open_of(user: User, family_id: int) -> RefreshFamily:
    family: RefreshFamily | None = open_of(user).where(RefreshFamily.id == family_id).first()
    if family is None:
        raise NotFound("You have no such sign-in, or it has ended.")
    return family


def sign_out(family_id: int, *, by: Actor) -> None:
    """End this sign-in."""
    with atomic():
        if _end(RefreshFamily.id == family_id, "signed_out"):
            audit.record("user.signed_out", by.user, by=by)


def sign_out_everywhere(user: User, *, by: Actor) -> None:
    with atomic():
        end_all(user, "signed_out_everywhere")
        audit.record("user.signed_out_everywhere", user, by=by)


def end_all(user: User, reason: str) -> None:
    """End every sign-in of `user` and make every access token void. Part of a caller's transaction."""
    User.update(generation=User.generation + 1).where(User.id == user.id).execute()
    _end(RefreshFamily.user == user, reason)


def end_everybodys(reason: str) -> None:
    """End every sign-in there is: the portal comes from a backup, and what was ended since must not come to life again.

    Generations go on beyond those that may have been given out since. Part of a caller's transaction.
    """
    User.update(generation=User.generation + GENERATIONS_SET_ASIDE).execute()
    _end(RefreshFamily.id > 0, reason)


def prune() -> int:
    """Forget families that have expired and failures that no throttle counts any more; returns how many rows."""
    now = utcnow()
    with atomic():
        families = RefreshFamily.delete().where(RefreshFamily.expires_at < now).execute()
        failures = SignInFailure.delete().where(SignInFailure.at < now - FAILURE_WINDOW).execute()
    return int(families) + int(failures)


def _end(which: Any, reason: str) -> int:
    ended = RefreshFamily.update(ended_at=utcnow(), end_reason=reason)
    return int(ended.where(which & RefreshFamily.ended_at.is_null()).execute())
