"""What the kernel has loaded: a module cannot be trusted to have left, so it is only named."""

from __future__ import annotations

import os
from collections.abc import Iterator

from remotegpu_agent import baseline
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding, NotApplicable
from remotegpu_agent.observe import special
from remotegpu_agent.observe.tools import find_tool, run


def look_for_modules(scope: Scope) -> Iterator[Finding]:
    """Modules loaded since the baseline that come from no package; those of packages load when first needed."""
    if not os.path.exists("/proc/modules"):
        raise NotApplicable("this kernel loads no modules")
    added = [name for name in baseline.read_modules() if name not in scope.sections["modules"]]
    if not added:
        return
    if find_tool("modinfo") is None:
        raise FileNotFoundError("modinfo is not installed: where new kernel modules come from is unknown")
    packaged = special.packaged_paths()
    for name in added:
        path = run(["modinfo", "-n", name], ok=(0, 1)).strip()
        if f"/usr{path}" not in packaged and path not in packaged:
            yield Finding(name, f"kernel module {name} comes from no package")
