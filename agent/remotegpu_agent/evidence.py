"""What a report has room for: lines whose names a tenant chose, within bounds that hold however he chose them."""

from __future__ import annotations

import json

from remotegpu_agent.observe.tools import printable

REASON_CHARS = 2000
_LINES, _CHARS = 500, 1000
_BYTES = 64 * 1024  # as JSON, where one character may take twelve: all lists of a report are below the portal's limit


class Told:
    """Lines in words, as far as there is room; the rest is counted and forgotten."""

    def __init__(self) -> None:
        self.count = 0
        self.lines: list[str] = []
        self._left = _BYTES

    def add(self, text: str) -> None:
        """One more; the first that finds no room is the end of them."""
        self.count += 1
        if self._left <= 0 or len(self.lines) == _LINES:
            return
        line = printable(text[:_CHARS])[:_CHARS]
        self._left -= len(json.dumps(line)) + 1
        if self._left >= 0:
            self.lines.append(line)

    def with_rest(self, *, last: str | None = None) -> list[str]:
        """The lines and how many more there were, where nothing beside them says so; `last` is never left out."""
        ends = [] if last is None else [printable(last)[:_CHARS]]
        kept = self.lines[: _LINES - len(ends)]
        if len(kept) < self.count:
            kept = kept[: _LINES - len(ends) - 1]
            ends.insert(0, f"… and {self.count - len(kept)} more")
        return kept + ends
