"""Users: the people who sign in, from the first random password to the disabled account.

Which tenants they belong to is in tenants.py, their sign-ins in sessions.py, their keys in keys.py.
"""

from __future__ import annotations

from portal.db import atomic
from portal.errors import Invalid
from portal.models import User
from portal.services import audit, passwords, sessions
from portal.services.actors import Actor


def change_password(user: User, *, old: str, new: str, by: Actor) -> User:
    """Replace the password and end every sign-in; returns the user as it is now. Raises Invalid."""
    if not passwords.matches(old, user.password_hash):
        raise Invalid({"old_password": ["This is not your password."]})
    problems = passwords.problems_of(new, username=user.username)
    if new == old:
        problems.append("It is the old one.")
    if problems:
        raise Invalid({"new_password": problems})
    password_hash = passwords.hash_of(new)
    with atomic():
        User.update(password_hash=password_hash, must_change_password=False).where(User.id == user.id).execute()
        sessions.end_all(user, "password_changed")
        audit.record("user.password_changed", user, by=by)
    return User.get_by_id(user.id)  # type: ignore[no-any-return]  # peewee's getters are untyped
