"""Build the images that hosts start from, before the lanes need them: `python -m tests.images`, and `… site`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IMAGES = Path(__file__).parent.parent / "molecule" / "image"
SUITES = ("bookworm", "trixie")
HOSTS = (("build", *SUITES), ("prepared", *SUITES))
SITE = (("site", "cards", *SUITES), ("site", "control", "trixie"))


def main(which: list[str]) -> int:
    for program, *arguments in SITE if which == ["site"] else HOSTS:
        code = subprocess.run([IMAGES / program, *arguments]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
