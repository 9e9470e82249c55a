"""What dpkg's own lists say of the files that packages have brought."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from remotegpu_agent.observe.tools import read_text

INFO = "/var/lib/dpkg/info"
STATUS = "/var/lib/dpkg/status"
_CONFFILE = re.compile(r" (/.+) ([0-9a-f]{32})( obsolete| remove-on-upgrade)*")


def listings(kind: str) -> Iterator[str]:
    """The lists of one kind, `list` or `md5sums`, of every package that is installed."""
    return (os.fsdecode(path.read_bytes()) for path in Path(INFO).glob(f"*.{kind}"))


def digests(listing: str) -> Iterator[tuple[str, str]]:
    """From a list of kind `md5sums`: each path as its package spells it, and the MD5 of its content."""
    return ((f"/{line[34:]}", line[:32]) for line in listing.split("\n") if line)


def merged(path: str) -> str:
    """The spelling of a path where /usr is merged: packages name some of theirs by the one of before."""
    return "/usr" + path if path.startswith(("/bin/", "/sbin/", "/lib/", "/lib64/")) else path


def conffiles(status: str | None = None) -> dict[str, str]:
    """The settings that packages bring, each with the MD5 of the content that it came with."""
    found, is_among = {}, False
    for line in (status if status is not None else read_text(STATUS) or "").split("\n"):
        is_among = line == "Conffiles:" or (is_among and line.startswith(" "))
        if is_among and (conffile := _CONFFILE.fullmatch(line)):
            found[conffile[1]] = conffile[2]
    return found
