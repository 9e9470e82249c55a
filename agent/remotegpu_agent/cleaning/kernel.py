"""What the kernel has loaded or starts by itself: a module cannot be trusted to have left, so it is only named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remotegpu_agent import baseline
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding, NotApplicable
from remotegpu_agent.observe import modules, special
from remotegpu_agent.observe.tools import find_tool


def look_for_modules(scope: Scope) -> Iterator[Finding]:
    """Modules loaded since the baseline from a file that neither a package nor the baseline vouches for: those of
    packages and of DKMS load when first needed. And what the kernel was told to start since, as root: an older baseline
    tells of none.
    """
    known: dict[str, str] | None = scope.sections.get("kernel_programs")
    for path, text in ({} if known is None else baseline.read_kernel_programs()).items():
        if known is not None and known.get(path) != text:
            yield Finding((path, known.get(path)), f"{path} is not as in the baseline: {text.strip()}")
    if not os.path.exists(modules.LOADED):
        if known is not None:
            return
        raise NotApplicable("this kernel loads no modules")
    yield from (Finding(text, text) for text in _strange_modules(scope.sections))


def _strange_modules(sections: dict[str, Any]) -> Iterator[str]:
    added = [name for name in modules.loaded() if name not in sections["modules"]]
    if not added:
        return
    if find_tool("modinfo") is None:
        raise FileNotFoundError("modinfo is not installed: where new kernel modules come from is unknown")
    known = baseline.module_files(sections)
    origins = {name: modules.files_of(name, known) for name in added}
    packaged = special.as_packaged(path for paths in origins.values() for path in paths)
    for name, paths in origins.items():
        if not paths:
            yield baseline.strange_module(sections, name, None)
        for path in paths:
            is_intact = path in packaged or (path in known and special.sha256(path) == known[path])
            if not is_intact:
                yield baseline.strange_module(sections, name, path)
            elif modules.name_in(path) != name:
                yield f"kernel module {name} comes from no file that is known: {path} is another's"


def put_back_programs(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """A setting gets the text of the baseline, a format that was not in it goes."""
    for path, before in (finding.subject for finding in found if isinstance(finding.subject, tuple)):
        is_format = os.path.dirname(path) == baseline.BINARY_FORMATS
        if before is not None and is_format:
            continue  # the same name for another program: it is named, and an operator decides
        Path(path).write_text("-1" if is_format else before or "\n")
        yield f"put back {path}"
