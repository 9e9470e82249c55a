"""The one pair that encrypts and decrypts what the portal must read again: first-contact passwords, probe keys.

Unlocked once at start with the encryption key; nothing here is ever logged or shown.
"""

from __future__ import annotations

import base64

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from portal.errors import Unavailable
from portal.settings import Settings

_fernet: Fernet | None = None


def unlock(settings: Settings) -> None:
    """Take the encryption key; every process that reads secrets calls this once, at start."""
    global _fernet
    derive = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"remotegpu vault")
    _fernet = Fernet(base64.urlsafe_b64encode(derive.derive(settings.encryption_key.encode())))


def encrypt(text: str) -> str:
    """`text` sealed; twice the same text gives two different results."""
    return _open_vault().encrypt(text.encode()).decode()


def decrypt(sealed: str) -> str:
    """What `encrypt` was given. Raises Unavailable if it was sealed with another key, or changed since."""
    try:
        return _open_vault().decrypt(sealed.encode()).decode()
    except InvalidToken:
        raise Unavailable(
            "A stored secret cannot be read: ENCRYPTION_KEY is not the one it was stored with.", code="wrong_key"
        ) from None


def _open_vault() -> Fernet:
    if _fernet is None:
        raise RuntimeError("vault.unlock(settings) was not called in this process")
    return _fernet
