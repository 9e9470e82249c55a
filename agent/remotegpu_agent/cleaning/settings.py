"""The step `etc`: the rest of /etc, and our own settings. How a file is put back is in `restored.py`."""

from __future__ import annotations

from collections.abc import Iterator

from remotegpu_agent import baseline
from remotegpu_agent.cleaning import restored
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding
from remotegpu_agent.observe.files import Snapshot


def look_for_settings(scope: Scope) -> Iterator[Finding]:
    """The rest of /etc, and our own settings as provisioning left them; an older baseline does not tell of those."""
    yield from restored.look_for_changes("etc")(scope)
    before: Snapshot | None = scope.sections.get("own_settings")
    if before is None:
        return
    now = baseline.read_own_settings()
    for path in sorted({*before, *now}):
        yield from restored.difference(path, before, now)
