"""Signed reports: the proof that a machine was cleaned, which anybody can check with the public key alone.

The report is canonical JSON, the signature Ed25519 over exactly these bytes. What is in it is decided in reclaims.py;
`python -m portal verify-report` calls `verify` and needs neither database nor secrets.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from portal.services import config


class NotGenuine(Exception):
    """The file is not what the portal signed. The message says how it can be told."""


@dataclass(frozen=True)
class Signed:
    """A report as it is kept: its canonical text and the signature over it, base64."""

    text: str
    signature: str


def canonical(value: Any) -> str:
    """The one way to write a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical text, hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def sign(content: dict[str, Any]) -> Signed:
    """Write the report canonically and sign these bytes."""
    text = canonical(content)
    return Signed(text, base64.b64encode(_key().sign(text.encode())).decode())


def public_key_pem() -> str:
    """The half that may be given to anybody."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return _key().public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def file_of(signed: Signed) -> str:
    """The file that is handed out. Canonical as a whole, so that no byte of it can change unseen."""
    return _file(json.loads(signed.text), signed.signature, fingerprint(_key().public_key()))


def _file(report: Any, signature: str, key_fingerprint: str) -> str:
    return canonical({"report": report, "signature": signature, "public_key_fingerprint": key_fingerprint}) + "\n"


def fingerprint(key: Ed25519PublicKey) -> str:
    """`SHA256:…` over the DER form of the public key."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "SHA256:" + base64.b64encode(hashlib.sha256(der).digest()).decode().rstrip("=")


def load_public_key(file: Path) -> Ed25519PublicKey:
    """Raises OSError, or ValueError when the file holds no Ed25519 public key in PEM."""
    key = serialization.load_pem_public_key(file.read_bytes())
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{file}: not an Ed25519 public key")
    return key


def verify(data: bytes, key: Ed25519PublicKey) -> dict[str, Any]:
    """The report in the file, if every byte of it is the portal's. Raises NotGenuine."""
    try:
        parsed = json.loads(data)
        report, signature, named_key = (parsed[name] for name in ("report", "signature", "public_key_fingerprint"))
        raw_signature = base64.b64decode(signature, validate=True)
        canonical_signature = base64.b64encode(raw_signature).decode()  # spare bits of base64 must not hide a change
        written_as_signed = _file(report, canonical_signature, named_key).encode() == data
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise NotGenuine("this is no report file of RemoteGPU, or it is damaged") from None
    if named_key != fingerprint(key):
        raise NotGenuine(f"it names the key {named_key}, the public key given is {fingerprint(key)}")
    try:
        key.verify(raw_signature, canonical(report).encode())
    except InvalidSignature:
        raise NotGenuine("the signature does not fit the report: one of them was changed") from None
    if not written_as_signed:
        raise NotGenuine("the file is not written as the portal wrote it: something was changed")
    return dict(report)


@lru_cache
def _load(file: Path) -> Ed25519PrivateKey:
    key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file}: not an Ed25519 key; run `python -m portal init`")
    return key


def _key() -> Ed25519PrivateKey:
    return _load(config.current().signing_key_file)
