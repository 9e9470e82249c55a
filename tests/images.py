"""Build the images that hosts start from, before the lanes need them: `python -m tests.images`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IMAGES = Path(__file__).parent.parent / "molecule" / "image"
SUITES = ("bookworm", "trixie")


def main() -> int:
    for step in ("build", "prepared"):
        code = subprocess.run([IMAGES / step, *SUITES]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
