"""Kernel modules: which are loaded, and which files they come from.

A file goes by the place where it really lies: `modinfo` and packages spell it by links, each in its own way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from remotegpu_agent.observe import files, special
from remotegpu_agent.observe.tools import read_text, run

LOADED = "/proc/modules"
ROOT = "/lib/modules"
_FILE = re.compile(r".+\.ko(\.(gz|xz|zst))?")


def loaded() -> list[str]:
    """The names of those that the kernel has loaded."""
    return sorted(line.split()[0] for line in (read_text(LOADED) or "").splitlines())


def read_unpackaged() -> dict[str, str]:
    """The files of all kernels' modules that no package answers for, loaded or not, with their SHA-256.

    DKMS has built them on this host, a package has put them together here, or they are an operator's own.
    """
    below = files.below(os.path.realpath(ROOT))
    found = {os.path.realpath(path) for path in below if _FILE.fullmatch(os.path.basename(path))}
    digests = {path: special.sha256(path) for path in sorted(found - special.answered_for(found))}
    return {path: digest for path, digest in digests.items() if digest is not None}


def files_of(name: str, known: Iterable[str]) -> list[str]:
    """The files that a loaded module comes from, as the host tells it; none where nothing tells.

    `modinfo` looks for the name of a file. Debian's NVIDIA driver is in files of another name (`nvidia-current-uvm.ko`
    is the module nvidia_uvm), so among those in `known` it is looked for by the name that is in the file.
    """
    said = run(["modinfo", "-n", "--", name], ok=(0, 1)).splitlines()
    named = [os.path.realpath(path) for path in said if path.startswith("/")]  # else it says "(builtin)"
    found = [path for path in named if os.path.isfile(path)]
    if found:
        return found
    here = os.path.realpath(os.path.join(ROOT, os.uname().release))
    among = [path for path in known if path.startswith(f"{here}/") and os.path.realpath(path) == path]
    return [path for path in among if os.path.isfile(path) and name_in(path) == name]


def name_in(path: str) -> str:
    """The name under which the kernel lists what it has loaded from this file."""
    return run(["modinfo", "-F", "name", "--", path], ok=(0, 1)).strip()
