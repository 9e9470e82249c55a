"""Whom this host trusts: the certificates of authorities, where its programs look for them.

They are judged by themselves, not by the files that hold them: an upgrade of ca-certificates renames links, rewrites
the bundle and brings and withdraws certificates, and none of that is a tenant's. A file that the package has changed
without its own word for it (its list of digests) brings nothing.

Programs look into the bundle (most), for the name of a hash (OpenSSL), or into every file of the folder (Go). Java's
own store is not looked at.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from remotegpu_agent.observe import files, packages

STORE = "/etc/ssl/certs"
BUNDLE = f"{STORE}/ca-certificates.crt"
SELECTION = "/etc/ca-certificates.conf"
OFFERED = "/usr/share/ca-certificates"
LOCAL = "/usr/local/share/ca-certificates"
# Where OpenSSL itself begins to look, and where each leads as the distribution has it; not every release has all.
OPENSSL = {
    "/usr/lib/ssl/certs": STORE,
    "/usr/lib/ssl/cert.pem": BUNDLE,
    "/usr/lib/ssl/openssl.cnf": "/etc/ssl/openssl.cnf",
}
LARGEST_BYTES = 8 * 1024 * 1024
_TOO_LARGE = frozenset({f"more than {LARGEST_BYTES // 1024**2} MiB"})
_BY_HASH = re.compile(r"[0-9a-f]{8}\.[0-9]+")

Held = Mapping[str, frozenset[str]]


def fingerprints(text: bytes) -> frozenset[str]:
    """The SHA-256 fingerprints of the certificates in a file: those of `openssl x509 -fingerprint`, without colons.

    What only looks like one has the digest of its text: a program that reads more freely than we do finds nothing that
    is not counted here.
    """
    if len(text) > LARGEST_BYTES:
        return _TOO_LARGE
    found = set()
    for piece in text.split(b"-----BEGIN ")[1:]:
        label, _, rest = piece.partition(b"-----")
        if b"CERTIFICATE" not in label:
            continue
        body = b"".join(rest.partition(b"-----")[0].split())
        try:
            content = base64.b64decode(body, validate=True) if label == b"CERTIFICATE" else label + body
        except binascii.Error:
            content = label + body
        found.add(hashlib.sha256(content).hexdigest())
    return frozenset(found)


def look_at() -> dict[str, frozenset[str]]:
    """What each entry of the store holds, wherever links lead; nothing of what is no file."""
    try:
        paths = [f"{STORE}/{name}" for name in sorted(os.listdir(STORE))]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {path: _of_file(path) for path in paths}


def _of_file(path: str) -> frozenset[str]:
    return fingerprints(_read(path) or b"")


def _read(path: str) -> bytes | None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a link that leads nowhere, or to itself
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read(LARGEST_BYTES + 1)


def take() -> dict[str, list[str]]:
    """For the baseline: what the bundle, the names of hashes and all other entries hold, and what packages offer."""
    found = look_at()
    by_hash = named_by_hash(found)
    others = frozenset().union(*found.values()) - found.get(BUNDLE, frozenset()) - by_hash
    return {
        "bundle": sorted(found.get(BUNDLE, ())),
        "by_hash": sorted(by_hash),
        "others": sorted(others),
        "offered": sorted(offered()),
    }


def named_by_hash(found: Held) -> frozenset[str]:
    """What OpenSSL finds in the folder."""
    return frozenset().union(*(held for path, held in found.items() if _BY_HASH.fullmatch(os.path.basename(path))))


def offered() -> frozenset[str]:
    """The certificates that packages have brought to be trusted and that are still as they brought them."""
    found: set[str] = set()
    for listing in packages.listings("md5sums"):
        for path, digest in digests_of_offered(packages.digests(listing)).items():
            text = _read(path)
            if text is not None and hashlib.md5(text, usedforsecurity=False).hexdigest() == digest:
                found |= fingerprints(text)
    return frozenset(found)


def digests_of_offered(brought: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of what packages have brought, by path and digest, the certificates."""
    return {path: digest for path, digest in brought if path.startswith(f"{OFFERED}/")}


def selected() -> frozenset[str]:
    """The certificates that `update-ca-certificates` would make the host trust now."""
    names = chosen(_read(SELECTION) or b"")
    local = [os.path.join(folder, name) for folder, _, inner in os.walk(LOCAL) for name in inner]
    paths = [*(f"{OFFERED}/{name}" for name in names), *(path for path in local if path.endswith(".crt"))]
    return frozenset().union(*map(_of_file, paths))


def chosen(selection: bytes) -> list[str]:
    """The names in ca-certificates.conf that are not deselected."""
    return [os.fsdecode(line) for line in selection.splitlines() if line and line[:1] not in b"#!"]


# --- what differs from a baseline


def strange(known: Mapping[str, Any], found: Held, offered_now: Callable[[], frozenset[str]]) -> dict[str, list[str]]:
    """By path, the certificates that the baseline did not trust and no package has brought since."""
    trusted = frozenset().union(known["bundle"], known["by_hash"], known["others"])
    if not any(held - trusted for held in found.values()):
        return {}
    trusted |= offered_now() - frozenset(known["offered"])
    return {path: sorted(held - trusted) for path, held in sorted(found.items()) if held - trusted}


def missing(known: Mapping[str, Any], found: Held, selected_now: Callable[[], frozenset[str]]) -> dict[str, list[str]]:
    """By path, the certificates that the baseline trusted and that should still be there.

    What is selected is held to the baseline elsewhere: a certificate that its package has withdrawn is not missed.
    """
    lost = {
        BUNDLE: frozenset(known["bundle"]) - found.get(BUNDLE, frozenset()),
        STORE: frozenset(known["by_hash"]) - named_by_hash(found),
    }
    if not any(lost.values()):
        return {}
    wanted = selected_now()
    return {path: sorted(gone & wanted) for path, gone in lost.items() if gone & wanted}


def in_words(path: str, what: str, certificates: list[str]) -> str:
    """One sentence about some certificates of a file; `what` is "trusts" or "lacks"."""
    count = "a certificate" if len(certificates) == 1 else f"{len(certificates)} certificates"
    where = "that is not in the baseline" if what == "trusts" else "of the baseline"
    more = ", …" if len(certificates) > 3 else ""
    return f"{path} {what} {count} {where} (SHA-256 {', '.join(certificates[:3])}{more})"


# --- the files beside them


def is_left_out(path: str, kind: str, target: str | None) -> bool:
    """Whether an entry is not compared as a file: it comes and goes with packages and is judged by what it holds.

    `kind` is the type of an entry (`files.look_at`), `target` that of a link. The bundle and what is moved into its
    place are files; a link in their place, or one that leads out of the three folders, is somebody's.
    """
    if f"{path}/".startswith(f"{STORE}/java/"):
        return True
    if os.path.dirname(path) != STORE:
        return False
    if path.startswith(BUNDLE) or target is None:
        return kind == "file" and path.startswith(BUNDLE)
    return os.path.normpath(os.path.join(STORE, target)).startswith((f"{STORE}/", f"{OFFERED}/", f"{LOCAL}/"))


def read_files(keep: Callable[[str], bool] | None = None) -> files.Snapshot:
    """What somebody has put beside the distribution's own, and the places where programs begin to look."""
    return files.snapshot([STORE, LOCAL, *OPENSSL], skip=_is_left_out_here, keep=keep)


def _is_left_out_here(path: str) -> bool:
    entry = files.look_at(path)
    return entry is not None and is_left_out(path, entry["type"], entry.get("target"))


def to_compare(before: files.Snapshot, now: files.Snapshot) -> list[str]:
    """The paths; a way of OpenSSL's that leads where the distribution has it is right, whether or not it was there."""
    return sorted(path for path in {*before, *now} if not _is_the_distributions(path, now.get(path)))


def _is_the_distributions(path: str, entry: files.Entry | None) -> bool:
    return entry is not None and path in OPENSSL and entry.get("target") == OPENSSL[path]


def is_told_of(path: str) -> bool:
    """Whether it is one of the places that are looked at here."""
    return path in OPENSSL or f"{path}/".startswith((f"{STORE}/", f"{LOCAL}/"))
