"""Users: the people who sign in, from the random first password to the disabled account.

Customers and staff (admin, operator) are two doors: what makes or changes a customer can never yield one of the staff.
Which tenants they belong to is in tenants.py, their sign-ins in sessions.py, their keys in keys.py.
"""

from __future__ import annotations

import re
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Forbidden, Invalid, NotFound
from portal.models import Membership, Tenant, User
from portal.services import audit, events, keys, passwords, sessions, tenants, texts
from portal.services.actors import STAFF, Actor

USERNAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,63}")
LINES = {"display_name": 100, "full_name": 100, "phone": 40}  # how long each may be
LONGEST_MAIL = 254
PROFILE = ("email", *LINES, "locale")
LOCALES = ("en", "zh_CN")
CUSTOMERS = ("customer",)


def create_customer(
    username: str, *, by: Actor, tenant: Tenant | None = None, member_role: str = "member", **profile: str | None
) -> tuple[User, str]:
    """Create a customer, as a member of `tenant` if one is named; returns the one-time password, never seen again.

    Raises Invalid for a name that is none, Conflict for one that is taken.
    """
    return _create(username, "customer", by, profile, tenant=tenant, member_role=member_role)


def create_staff(username: str, role: str, *, by: Actor, **profile: str | None) -> tuple[User, str]:
    """Create an admin or operator; returns the one-time password. Forbidden, unless an admin or the system asks."""
    if role not in STAFF:
        raise Invalid({"role": [f"Choose from {', '.join(STAFF)}."]})
    if by.kind != "system" and by.role != "admin":
        raise Forbidden("Only an admin makes staff.")
    return _create(username, role, by, profile)


def _create(
    username: str,
    role: str,
    by: Actor,
    profile: dict[str, str | None],
    *,
    tenant: Tenant | None = None,
    member_role: str = "member",
) -> tuple[User, str]:
    username = username.strip().lower()
    if not USERNAME.fullmatch(username):
        raise Invalid(
            {"username": ["Use 2 to 64 of a-z, 0-9, dot, dash and underscore; begin with a letter or digit."]}
        )
    _check_profile(profile)
    password = passwords.random_password()
    password_hash = passwords.hash_of(password)
    try:
        with atomic():
            user = User.create(
                username=username, role=role, password_hash=password_hash, must_change_password=True, **profile
            )
            audit.record("user.created", user, by=by, username=username, role=role)
            if tenant is not None:
                tenants.add_member(tenant, user, member_role, by=by)
    except peewee.IntegrityError:
        raise Conflict(f"There is a user called {username} already.", code="name_taken") from None
    return user, password


def _check_profile(profile: dict[str, str | None]) -> None:
    """Raises Invalid that names every faulty field; None is none."""
    faults = {name: _faults(name, text) for name, text in profile.items() if text is not None}
    if any(faults.values()):
        raise Invalid({name: texts for name, texts in faults.items() if texts})


def _faults(name: str, text: str) -> list[str]:
    if name == "email":
        return texts.faults_of_mail(text, LONGEST_MAIL)
    if name == "locale":
        return [] if text in LOCALES else [f"Choose from {', '.join(LOCALES)}."]
    return texts.faults_of_line(text, LINES[name]) if name in LINES else []


def get(user_id: int, *, roles: tuple[str, ...]) -> User:
    """The user, if of one of `roles`. Raises NotFound."""
    user = User.get_or_none((User.id == user_id) & (User.role << roles))
    if user is None:
        raise NotFound("There is no such user.")
    return user


def get_customer(username: str) -> User:
    """The customer with this name. Raises Invalid, for somebody of the staff as well."""
    user = find(username)
    if user is None or user.role != "customer":
        raise Invalid({"username": ["There is no customer with this name."]})
    return user


def find(username: str) -> User | None:
    return User.get_or_none(User.username == username.strip().lower())


def search(
    *,
    roles: tuple[str, ...],
    keyword: str | None = None,
    disabled: bool | None = None,
    tenant_id: int | None = None,
) -> peewee.ModelSelect[User]:
    """Users of these roles, by name. `keyword` is looked for in the names and the mail address."""
    found = User.select().where(User.role << roles).order_by(User.username)
    if keyword:
        columns = (User.username, User.email, User.display_name, User.full_name)
        matches: Any = columns[0].contains(keyword)
        for column in columns[1:]:
            matches |= column.contains(keyword)
        found = found.where(matches)
    if disabled is not None:
        found = found.where(User.disabled_at.is_null(not disabled))
    if tenant_id is not None:
        found = found.where(User.id << Membership.select(Membership.user).where(Membership.tenant == tenant_id))
    return found


def edit(user: User, *, by: Actor, **profile: str | None) -> User:
    """Change fields of the profile: None clears one, an absent one stays.

    Raises Invalid, and ValueError for any other field.
    """
    unknown = set(profile) - set(PROFILE)
    if unknown:
        raise ValueError(f"not of the profile: {sorted(unknown)}")
    _check_profile(profile)
    changed = {name: value for name, value in profile.items() if getattr(user, name) != value}
    if changed:
        with atomic():
            User.update(**changed).where(User.id == user.id).execute()
            audit.record("user.edited", user, by=by, changed=changed)
    return _reload(user)


def change_password(user: User, *, old: str, new: str, by: Actor) -> User:
    """Replace the password and end every sign-in; returns the user as it is now. Raises Invalid.

    The hash that was checked is part of the condition: of two changes at once, one is refused.
    """
    if not passwords.matches(old, user.password_hash):
        raise Invalid({"old_password": ["This is not your password."]})
    problems = passwords.problems_of(new, username=user.username)
    if new == old:
        problems.append("It is the old one.")
    if problems:
        raise Invalid({"new_password": problems})
    changes = {"password_hash": passwords.hash_of(new), "must_change_password": False}
    with atomic():
        unchanged = (User.id == user.id) & (User.password_hash == user.password_hash)
        if not User.update(**changes).where(unchanged).execute():
            raise Conflict("The password was changed just now by another request.", code="password_raced")
        sessions.end_all(user, "password_changed")
        audit.record("user.password_changed", user, by=by)
    return _reload(user)


def reset_password(user: User, *, by: Actor) -> str:
    """Give the user a random one-time password and end every sign-in; returns it, never seen again."""
    password = passwords.random_password()
    password_hash = passwords.hash_of(password)
    with atomic():
        User.update(password_hash=password_hash, must_change_password=True).where(User.id == user.id).execute()
        sessions.end_all(user, "password_reset")
        audit.record("user.password_reset", user, by=by)
    return password


def disable(user: User, *, by: Actor) -> User:
    """Shut somebody out now: every sign-in ends, the keys leave every host, and end what they had open there.

    Raises Conflict.
    """
    if user.id == by.id:
        raise Conflict("You cannot disable yourself; ask another admin.", code="own_account")
    with keys.carrying(of=user):
        if not User.update(disabled_at=utcnow()).where((User.id == user.id) & User.disabled_at.is_null()).execute():
            raise Conflict(f"{user.username} is disabled already.", code="wrong_state")
        sessions.end_all(user, "disabled")
        _tell("user.disabled", user, by)
    return _reload(user)


def enable(user: User, *, by: Actor) -> User:
    """Let somebody sign in again, with the password they had. Raises Conflict."""
    with keys.carrying(of=user):
        again = User.update(disabled_at=None).where((User.id == user.id) & User.disabled_at.is_null(False))
        if not again.execute():
            raise Conflict(f"{user.username} is not disabled.", code="wrong_state")
        _tell("user.enabled", user, by)
    return _reload(user)


def _tell(action: str, user: User, by: Actor) -> None:
    audit.record(action, user, by=by, username=user.username)
    events.write(action, resource_id=user.id)


def _reload(user: User) -> User:
    return User.get_by_id(user.id)
