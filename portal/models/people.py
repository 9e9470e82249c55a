"""Who: users, their sign-ins and tokens, tenants, memberships, SSH keys."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import JsonField, Table, UtcDateTimeField, one_of
from portal.models.states import MEMBER_ROLES, USER_ROLES


class User(Table):
    """A person who signs in. `generation` is in every token; raising it ends all of them at the next request."""

    username = pw.CharField(64, unique=True)  # lower case
    email = pw.CharField(254, null=True)
    display_name = pw.CharField(100, null=True)
    full_name = pw.CharField(100, null=True)
    phone = pw.CharField(40, null=True)
    role = pw.CharField(16, constraints=[one_of("role", USER_ROLES)])
    password_hash = pw.CharField(255)
    must_change_password = pw.BooleanField(default=False)
    disabled_at = UtcDateTimeField(null=True)
    generation = pw.IntegerField(default=1)
    locale = pw.CharField(10, null=True)
    created_at = UtcDateTimeField(default=utcnow)
    last_sign_in_at = UtcDateTimeField(null=True)


class Tenant(Table):
    name = pw.CharField(100, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    archived_at = UtcDateTimeField(null=True)


class Membership(Table):
    tenant = pw.ForeignKeyField(Tenant, backref="memberships", on_delete="RESTRICT")
    tenant_id: int
    user = pw.ForeignKeyField(User, backref="memberships", on_delete="RESTRICT")
    user_id: int
    role = pw.CharField(16, constraints=[one_of("role", MEMBER_ROLES)])
    created_at = UtcDateTimeField(default=utcnow)

    class Meta:
        indexes = ((("tenant", "user"), True),)


class SshKey(Table):
    user = pw.ForeignKeyField(User, backref="keys", on_delete="RESTRICT")
    user_id: int
    name = pw.CharField(64)
    type = pw.CharField(64)
    bits = pw.IntegerField()
    line = pw.TextField()  # canonical: type and base64, no comment, no options
    fingerprint = pw.CharField(80)  # SHA256:…
    created_at = UtcDateTimeField(default=utcnow)
    removed_at = UtcDateTimeField(null=True)


SshKey.add_index(
    SshKey.user, SshKey.fingerprint, unique=True, where=SshKey.removed_at.is_null(), name="ssh_key_once_per_user"
)


class RefreshFamily(Table):
    """One sign-in. `current_jti` is the only refresh token that may be used; use of an older one ends the family."""

    user = pw.ForeignKeyField(User, on_delete="RESTRICT")
    user_id: int
    current_jti = pw.CharField(64, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    rotated_at = UtcDateTimeField(default=utcnow)
    expires_at = UtcDateTimeField(index=True)
    ended_at = UtcDateTimeField(null=True)
    end_reason = pw.CharField(40, null=True)
    address = pw.CharField(64, null=True)
    user_agent = pw.CharField(300, null=True)


class ApiToken(Table):
    """For CI and the inventory plugin. Only the SHA-256 of the token is kept."""

    user = pw.ForeignKeyField(User, on_delete="RESTRICT")
    user_id: int
    name = pw.CharField(64)
    scopes = JsonField()  # list of words, see services/tokens.py
    token_sha256 = pw.CharField(64, unique=True)
    created_at = UtcDateTimeField(default=utcnow)
    expires_at = UtcDateTimeField()
    last_used_at = UtcDateTimeField(null=True)
    revoked_at = UtcDateTimeField(null=True)


class SignInFailure(Table):
    """Sign-ins that failed, by account and by address: what the throttle counts, whichever process saw them."""

    username = pw.CharField(64, index=True)
    address = pw.CharField(64, index=True)
    at = UtcDateTimeField(default=utcnow, index=True)
