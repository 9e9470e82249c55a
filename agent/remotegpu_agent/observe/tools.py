"""Running the host's own programs, and reading its small files.

Programs are found on a fixed path only: a tenant may have left something in /usr/local/bin.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT: Mapping[str, str] = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", "HOME": "/root"}


class ToolFailed(RuntimeError):
    """A program of the host did not answer as it must; what it would have told is unknown."""


def find_tool(name: str) -> str | None:
    """The full path of a program of the system, or None where it is not installed."""
    return shutil.which(name, path=SYSTEM_PATH)


def run(
    argv: Sequence[str], *, stdin: str | None = None, timeout_s: float = 30, ok: Sequence[int] = (0,), cwd: str = "/"
) -> str:
    """The program's output. Raises ToolFailed when it is missing, cannot start, is too slow, or exits with a code
    outside `ok`.
    """
    program = find_tool(argv[0])
    if program is None:
        raise ToolFailed(f"{argv[0]} is not installed")
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            input=stdin.encode() if stdin is not None else None,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout_s,
            env=dict(_ENVIRONMENT),
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(f"{argv[0]} gave no answer within {timeout_s:.0f} s") from error
    except OSError as error:  # a tenant may have taken the last process number, or the last of the memory
        raise ToolFailed(f"{argv[0]} could not be started: {error.strerror}") from error
    if done.returncode not in ok:
        said = printable(done.stderr.strip() or done.stdout.strip())[:400]
        raise ToolFailed(f"{argv[0]} exited with {done.returncode}: {said}")
    return os.fsdecode(done.stdout)


def read_text(path: str) -> str | None:
    """The file's text (undecodable bytes kept as surrogates), or None where there is no such file."""
    try:
        return os.fsdecode(Path(path).read_bytes())
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None


def printable(name: str | bytes) -> str:
    """A name that a tenant chose, fit for a report: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
