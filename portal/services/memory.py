"""What a process remembers of the database between two calls of agents, for as long as it would hear of a change.

Nothing here is the truth. A value is used only while the poller of integrations/wake.py has been looking without a gap
since the value was read; a change drops it through its event, at the latest after one look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from portal.integrations.wake import wake

KEEP_S = 60.0

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memory(Generic[K, V]):
    """Values by key. Safe for threads: every step is one operation on a dict."""

    def __init__(self) -> None:
        self._values: dict[K, tuple[float, V]] = {}
        self._being_read: dict[K, object] = {}

    def find(self, key: K) -> V | None:
        """The value, if it can still be relied on."""
        found = self._values.get(key)
        if found is None or time.monotonic() - found[0] > KEEP_S or not wake.would_have_told(found[0]):
            return None
        return found[1]

    def read(self, key: K, load: Callable[[], V]) -> V:
        """The value from the database, remembered unless it was dropped while it was being read."""
        wake.keep_listening(KEEP_S)
        began, token = time.monotonic(), object()
        self._being_read[key] = token
        try:
            value = load()
        finally:
            undisturbed = self._being_read.pop(key, None) is token
        if undisturbed:
            self._values[key] = (began, value)
        return value

    def drop(self, key: K) -> None:
        self._being_read.pop(key, None)
        self._values.pop(key, None)

    def drop_where(self, is_meant: Callable[[V], bool]) -> None:
        """Drop every value that is meant. What is being read at this moment is not remembered."""
        self._being_read.clear()
        for key, (_, value) in list(self._values.items()):
            if is_meant(value):
                self._values.pop(key, None)

    def clear(self) -> None:
        self._being_read.clear()
        self._values.clear()
