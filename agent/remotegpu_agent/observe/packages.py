"""What dpkg's own lists say of the files that packages have brought."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

INFO = "/var/lib/dpkg/info"


def listings(kind: str) -> Iterator[str]:
    """The lists of one kind, `list` or `md5sums`, of every package that is installed."""
    return (os.fsdecode(path.read_bytes()) for path in Path(INFO).glob(f"*.{kind}"))


def digests(listing: str) -> Iterator[tuple[str, str]]:
    """From a list of kind `md5sums`: each path as its package spells it, and the MD5 of its content."""
    return ((f"/{line[34:]}", line[:32]) for line in listing.split("\n") if line)


def merged(path: str) -> str:
    """The spelling of a path where /usr is merged: packages name some of theirs by the one of before."""
    return "/usr" + path if path.startswith(("/bin/", "/sbin/", "/lib/", "/lib64/")) else path
