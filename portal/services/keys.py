"""SSH keys of people: read strictly, stored in canonical form, carried to every machine that their tenants lease.

What a lease opens with them is in grants.py; the host's authorized_keys file is the agent's. A private key is never
here, nor is anything of the line but its type and its key: no option, no comment.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import peewee
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from portal.db import atomic, db, one_at_a_time, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.integrations.host_keys import fingerprint
from portal.models import Grant, Lease, Machine, Membership, SshKey, Tenant, User
from portal.models.states import LEASE_OPEN
from portal.services import audit, events, texts
from portal.services.actors import Actor

TYPES = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 16384  # OpenSSH reads no larger one
MAX_KEYS = 50  # of one user; the host gets them all
MAX_LINE = 16384
LONGEST_NAME = 64
_APPLICATION = re.compile(rb"ssh:[!-~]{0,200}")
_ROLES_THAT_LOG_IN = ("owner", "member")  # tenants.RIGHTS: those with `use`; a test compares the two


@dataclass(frozen=True)
class PublicKey:
    """A key that was read. `line` is `type base64`, the only form that is stored or sent."""

    type: str
    bits: int
    line: str
    fingerprint: str


@dataclass(frozen=True)
class Presence:
    """Whether a leased machine has a key: True, False, or None where the host has not said yet."""

    machine: Machine
    present: bool | None


def parse(text: str) -> PublicKey:
    """Read one public key line. Raises Invalid that says what is wrong with it."""
    line = text.strip()
    if len(line) > MAX_LINE:
        raise _refused("The key is too long to be one.")
    if "PRIVATE KEY" in line:
        raise _refused("This is a private key. Keep it, and paste the public one, from the file that ends in .pub.")
    if not line.replace("\t", " ").isprintable():
        raise _refused("Paste exactly one line.")
    kind, _, rest = line.partition(" ")
    if kind not in TYPES:
        raise _refused(f"Begin with the type of the key, no options before it: one of {', '.join(TYPES)}.")
    encoded = rest.split(maxsplit=1)[0] if rest.strip() else ""
    blob = _decode(encoded)
    bits = _bits_of_security_key(kind, blob) if kind.startswith("sk-") else _bits_of(kind, blob)
    canonical = f"{kind} {base64.b64encode(blob).decode()}"
    return PublicKey(kind, bits, canonical, fingerprint(blob))


def _decode(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise _refused("The key is damaged: its second part is not base64.") from None


def _bits_of(kind: str, blob: bytes) -> int:
    """The size of a plain key. Whoever writes the key in any but the one canonical way is refused."""
    line = f"{kind} {base64.b64encode(blob).decode()}".encode()
    try:
        key = load_ssh_public_key(line)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _refused("The key is damaged: it cannot be read.") from None
    if key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) != line:
        raise _refused("The key is damaged: it is not in canonical form.")
    if isinstance(key, rsa.RSAPublicKey):
        if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            raise _refused(f"The RSA key has {key.key_size} bits; use {MIN_RSA_BITS} or more, or an Ed25519 key.")
        return key.key_size
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.curve.key_size
    if isinstance(key, ed25519.Ed25519PublicKey):
        return 256
    raise _refused("Keys of this type are not taken.")


def _bits_of_security_key(kind: str, blob: bytes) -> int:
    """The size of a key that lives in a FIDO token: the plain key's fields, then the application."""
    fields = _fields_of(blob)
    plain = "ssh-ed25519" if kind.startswith("sk-ssh-ed25519") else "ecdsa-sha2-nistp256"
    if len(fields) != (3 if plain == "ssh-ed25519" else 4) or fields[0] != kind.encode():
        raise _refused("The key is damaged: it cannot be read.")
    if not _APPLICATION.fullmatch(fields[-1]):
        raise _refused("The security key was made for something other than SSH.")
    return _bits_of(plain, _blob_of([plain.encode(), *fields[1:-1]]))


def _fields_of(blob: bytes) -> list[bytes]:
    fields = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            raise _refused("The key is damaged: it ends too early.")
        fields.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return fields


def _blob_of(fields: list[bytes]) -> bytes:
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _refused(why: str) -> Invalid:
    return Invalid({"key": [why]})


def add(user: User, *, name: str, line: str, by: Actor) -> SshKey:
    """Take a key and send it to every machine that the user may log in to. Raises Invalid, Conflict."""
    if faults := texts.faults_of_line(name, LONGEST_NAME):
        raise Invalid({"name": faults})
    key = parse(line)
    try:
        with carrying(of=user):
            one_at_a_time(f"keys of {user.id}")
            if list_of(user).count() >= MAX_KEYS:
                raise Conflict(f"You have {MAX_KEYS} keys; remove one first.", code="too_many_keys")
            row = SshKey.create(
                user=user, name=name, type=key.type, bits=key.bits, line=key.line, fingerprint=key.fingerprint
            )
            audit.record("key.added", row, by=by, name=name, fingerprint=key.fingerprint)
    except peewee.IntegrityError:
        raise Conflict(f"You have this key already ({key.fingerprint}).", code="key_exists") from None
    return row


def list_of(user: User) -> peewee.ModelSelect[SshKey]:
    """The user's keys, newest first."""
    return SshKey.select().where((SshKey.user == user) & SshKey.removed_at.is_null()).order_by(SshKey.id.desc())


def get_of(user: User, key_id: int) -> SshKey:
    key = list_of(user).where(SshKey.id == key_id).first()
    if key is None:
        raise NotFound("You have no such key.")
    return key  # type: ignore[no-any-return]  # peewee's `first` is untyped


def remove(key: SshKey, *, by: Actor) -> None:
    """Take a key away from the user and from every host. Raises NotFound if somebody was first."""
    with carrying(of=key.user):
        removed = SshKey.update(removed_at=utcnow()).where((SshKey.id == key.id) & SshKey.removed_at.is_null())
        if not removed.execute():
            raise NotFound("You have no such key.")
        audit.record("key.removed", key, by=by, name=key.name, fingerprint=key.fingerprint)


def of_lease(lease: Lease) -> list[SshKey]:
    """The keys that open this lease: those of the tenant's owners and members who are not disabled, each once."""
    rows = (
        SshKey.select(SshKey)
        .join(User)
        .join(Membership, on=(Membership.user == User.id))
        .where(
            (Membership.tenant == lease.tenant_id)
            & (Membership.role << _ROLES_THAT_LOG_IN)
            & User.disabled_at.is_null()
            & SshKey.removed_at.is_null()
        )
        .order_by(SshKey.id)
    )
    return list({row.fingerprint: row for row in reversed(list(rows))}.values())[::-1]


@contextmanager
def carrying(of: User | Tenant) -> Iterator[None]:
    """A transaction that changes whose keys count: it wakes the agent of every machine that `of` has leased.

    A lease that opens at the same moment is invisible from inside, as our change is to its agent; so we look again
    after the commit, unless a caller's transaction goes on (a new user, who has no keys yet).
    """
    with atomic():
        yield
        told = _wake(_leased_by(of))
    if not db.in_transaction() and (late := _leased_by(of) - told):
        with atomic():
            _wake(late)


def _leased_by(of: User | Tenant) -> set[int]:
    """The machines with an open lease of the tenant, or of any of the user's tenants."""
    leases = Lease.select(Lease.machine).where(Lease.state << LEASE_OPEN)
    if isinstance(of, User):
        leases = leases.join(Membership, on=(Membership.tenant == Lease.tenant)).where(Membership.user == of)
    else:
        leases = leases.where(Lease.tenant == of)
    return {lease.machine_id for lease in leases}


def _wake(machine_ids: set[int]) -> set[int]:
    """In the order of the ids: two of these at once must not wait for each other."""
    for machine_id in sorted(machine_ids):
        events.desired_changed(machine_id)
    return machine_ids


def presence_of(user: User) -> dict[str, list[Presence]]:
    """Fingerprint → on which of the user's leased machines the host has it, by the hosts' last reports."""
    rows = (
        Grant.select(Grant, Lease, Machine)
        .join(Lease)
        .join(Machine)
        .switch(Lease)
        .join(Membership, on=(Membership.tenant == Lease.tenant))
        .where(
            (Membership.user == user)
            & (Membership.role << _ROLES_THAT_LOG_IN)
            & (Lease.state == "active")
            & (Grant.kind == "keys")
        )
        .order_by(Machine.name)
    )
    grants = list(rows)
    return {
        key.fingerprint: [Presence(grant.lease.machine, _has(grant, key.fingerprint)) for grant in grants]
        for key in list_of(user)
    }


def _has(grant: Grant, fingerprint: str) -> bool | None:
    if grant.observed_at is None or grant.observed == "unknown":
        return None
    return fingerprint in (grant.detail or {}).get("fingerprints", [])
