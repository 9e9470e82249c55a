"""The files of the portal's own SSH key: made once, replaced by a new one while the old one still opens doors.

`FILE` is the key that is used, `FILE.previous` the one before it: it is there while a rotation goes on, and that is
what makes it go on. Whenever a process ends in the middle, `FILE` is a whole key, and the next call goes on from there.
Which host takes which key is in services/login_keys.py.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from portal.integrations import ca

COMMENT = "remotegpu-portal"


def ensure(file: Path) -> None:
    """Make a key where there is none."""
    if not file.exists():
        _generate(file)


def previous(file: Path) -> Path:
    """Where the key before this one lies while some host may know no other."""
    return file.with_name(f"{file.name}.previous")


def find_line(file: Path) -> str | None:
    """The public half as authorized_keys has it, from the private one; None where there is no such key."""
    if not file.exists():
        return None
    key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"{public.decode()} {COMMENT}"


def replace(file: Path) -> bool:
    """Put a new key in its place and keep this one as the previous; False when there is a previous one already.

    A call that was cut off after it had kept the old key is finished by the next one.
    """
    old, draft = previous(file), file.with_name(f"{file.name}.next")
    with _alone(file):
        if old.exists() and find_line(old) != find_line(file):
            return False
        _generate(draft)
        if not old.exists():
            os.link(file, old)
        _public(file).unlink(missing_ok=True)  # first: ssh believes the public half that lies beside a key
        draft.replace(file)
        _public(draft).replace(_public(file))
        _sync(file.parent)
    return True


def forget_previous(file: Path) -> None:
    """Nobody needs it any more."""
    with _alone(file):
        previous(file).unlink(missing_ok=True)
        _sync(file.parent)


def _public(file: Path) -> Path:
    return file.with_name(f"{file.name}.pub")


def _generate(file: Path) -> None:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    ca.write_private(_public(file), public + f" {COMMENT}\n".encode())
    ca.write_private(file, private)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process and thread at a time, on this machine: the kernel lets go when the holder dies."""
    descriptor = os.open(file.with_name(f"{file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
