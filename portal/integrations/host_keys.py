"""Ask a host for its SSH host keys. An operator sees them and confirms a fingerprint; nothing here trusts one."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import subprocess

from portal.db import release_connection
from portal.errors import Invalid, Unavailable

TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")  # best first
NAME = re.compile(r"(?!-)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*\.?", re.IGNORECASE)


def scan(address: str, port: int, timeout_s: float = 5) -> list[dict[str, str]]:
    """The keys that answer at `address`:`port`, best type first: [{type, line, fingerprint}]. Meanwhile no database
    connection is held.

    Raises Invalid if the address or port cannot be one, Unavailable if nothing answers as SSH within `timeout_s`.
    """
    host = _checked(address, port)
    wait = max(1, round(timeout_s))
    argv = ["ssh-keyscan", "-T", str(wait), "-p", str(port), "-t", "ed25519,ecdsa,rsa", "--", host]
    release_connection()
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, timeout=wait * 4 + 5, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{host} port {port} did not answer within {wait} s.", code="host_unreachable") from None
    keys = parse(answer.stdout)
    if not keys:
        raise Unavailable(
            f"No SSH server answered at {host} port {port} within {wait} s. Check the address and the port.",
            code="host_unreachable",
        )
    return keys


def _checked(address: str, port: int) -> str:
    if isinstance(port, bool) or not 1 <= port <= 65535:
        raise Invalid({"ssh_port": [f"{port} is not a port; write 1 to 65535."]})
    host = address.strip().strip("[]")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not NAME.fullmatch(host):
        raise Invalid({"address": ["Not a host name or an IP address, e.g. gpu-1.example.org or 192.0.2.11."]})
    return host.lower()


def parse(text: str) -> list[dict[str, str]]:
    """The keys in the output of ssh-keyscan, checked; what is no key of a known type is left out."""
    keys = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 3 or line.startswith("#") or fields[1] not in TYPES:
            continue
        kind, blob = fields[1], _decoded(fields[2])
        # The type stands inside the key as well: a line that says otherwise is not one.
        if blob is None or blob[4 : 4 + int.from_bytes(blob[:4], "big")] != kind.encode():
            continue
        keys[kind] = {"type": kind, "line": f"{kind} {fields[2]}", "fingerprint": fingerprint(blob)}
    return [keys[kind] for kind in TYPES if kind in keys]


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def fingerprint(blob: bytes) -> str:
    """As `ssh-keygen -l` shows it: SHA256:… without padding."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
