"""`init`: make what a portal needs before its first start, and nothing that is there already.

Secrets, the key that signs reclaim reports, the portal's SSH key, the CA and the certificate: all 0600 in the instance
folder. Running it again is harmless; it never replaces a secret.
"""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from portal import settings as settings_module
from portal.integrations import ca, login_key_files
from portal.settings import Settings


def run(args: argparse.Namespace) -> None:  # noqa: ARG001 - it takes none
    """The command."""
    settings = init()
    print(f"{settings.instance_dir}: secrets, keys and certificate for {settings.public_url} are there.")


def init() -> Settings:
    """Make what is missing and return the settings that now load."""
    instance = Path(os.environ.get("INSTANCE_DIR") or "instance").absolute()
    instance.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in settings_module.SECRET_FILES:
        file = instance / "secrets" / name
        if not file.exists():
            ca.write_private(file, secrets.token_urlsafe(48).encode())
    settings = settings_module.load()
    _ensure_signing_key(settings.signing_key_file)
    login_key_files.ensure(settings.ssh_key_file)
    ca.ensure(settings)
    return settings


def _ensure_signing_key(file: Path) -> None:
    if file.exists():
        return
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    ca.write_private(file.with_suffix(".pub.pem"), public)
    ca.write_private(
        file,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
