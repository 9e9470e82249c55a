"""What may be written down about a machine: each field checked, normalised, and the credential encrypted.

What becomes of it is in machines.py; nothing here reads or writes a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from portal.errors import Invalid
from portal.services import addresses, vault

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
NOT_NAMES = frozenset({"all", "ungrouped", "localhost", "127.0.0.1"})  # words that Ansible takes for something else
SSH_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
LABEL_KEY = re.compile(r"[a-z]([a-z0-9_.-]{0,61}[a-z0-9])?")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Credential(TypedDict, total=False):
    """What opens a host at first contact. Encrypted at rest, forgotten once the portal's own key works."""

    password: str
    private_key: str
    become_password: str


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The columns for what was given, normalised. Raises Invalid with every faulty field."""
    columns: dict[str, Any] = {}
    faults: dict[str, list[str]] = {}
    for field, value in given.items():
        try:
            columns["first_contact" if field == "credential" else field] = CHECKS[field](value)
        except ValueError as error:
            faults[field] = [str(error)]
    if faults:
        raise Invalid(faults)
    return columns


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("Use 1 to 63 of a-z, 0-9, '.' and '-', with a letter or digit at both ends.")
    if value in NOT_NAMES:
        raise ValueError(f"{value!r} means something else to Ansible; choose another name.")
    return value


def _address(value: str) -> str:
    return addresses.normalise(value)


def _optional_address(value: str | None) -> str | None:
    return addresses.normalise(value) if value and value.strip() else None


def _port(value: int) -> int:
    if isinstance(value, bool) or not 1 <= value <= 65535:
        raise ValueError("A port is a number from 1 to 65535.")
    return value


def _ssh_user(value: str) -> str:
    if not SSH_USER.fullmatch(value):
        raise ValueError("Use a login of the host: a-z, 0-9, '_' and '-', a letter first.")
    return value


def _line(value: str | None) -> str | None:
    if value is None or not value.strip():
        return None
    if len(value) > 64 or CONTROL.search(value):
        raise ValueError("Use one line of at most 64 characters.")
    return value.strip()


def _remark(value: str | None) -> str | None:
    if value is not None and (len(value) > 4000 or "\0" in value):
        raise ValueError("Use at most 4000 characters.")
    return value or None


def _labels(value: Mapping[str, str] | None) -> dict[str, str]:
    labels = dict(value or {})
    for key, text in labels.items():
        if not LABEL_KEY.fullmatch(key):
            raise ValueError(f"{key[:70]!r}: a label's name is 1 to 63 of a-z, 0-9, '_', '.' and '-', a letter first.")
        if not isinstance(text, str) or len(text) > 200 or CONTROL.search(text):
            raise ValueError(f"{key}: a label's value is one line of at most 200 characters.")
    if len(labels) > 32:
        raise ValueError("A machine has at most 32 labels.")
    return labels


def _credential(value: Mapping[str, str] | None) -> str | None:
    """Encrypted; an answer never contains it again."""
    kept = {key: text for key, text in (value or {}).items() if text}
    if not kept:
        return None
    for key in ("password", "become_password"):
        text = str(kept.get(key, ""))
        if len(text) > 1024 or CONTROL.search(text):
            raise ValueError(f"{key}: use one line of at most 1024 characters.")
    if "private_key" in kept:
        kept["private_key"] = _private_key(str(kept["private_key"]))
    return vault.encrypt(json.dumps(kept))


def _private_key(text: str) -> str:
    try:
        load_ssh_private_key(text.strip().encode() + b"\n", password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("private_key: not an OpenSSH private key without a passphrase.") from None
    return text.strip() + "\n"


CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "name": _name,
    "address": _address,
    "public_address": _optional_address,
    "ssh_port": _port,
    "ssh_user": _ssh_user,
    "region": _line,
    "rack": _line,
    "remark": _remark,
    "labels": _labels,
    "credential": _credential,
}
