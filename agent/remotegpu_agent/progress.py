"""How far this process has come with what takes long: a number that grows while something moves, and stands still
while it hangs. What moves says so by `tick`; what another program does for us is seen by the room that it makes.

A file server that is away answers no question about room, and whoever asks waits for ever. So a thread of its own asks.
"""

import os
import threading
from collections.abc import Sequence

PLACES = ("/", "/home", "/tmp", "/var/tmp", "/var/lib/docker")  # noqa: S108 - only looked at
LEAST_BYTES, LEAST_FILES = 64 * 1024 * 1024, 1000  # less than that comes and goes by itself
LOOK_S = 0.5  # how long to wait for what there is of room now; it takes microseconds or hangs

_ticks = 0


def tick() -> None:
    """One thing was looked at, or is gone. Of two at once one may be missed: nobody counts."""
    global _ticks
    _ticks += 1


class Progress:
    """From its making on."""

    def __init__(self, places: Sequence[str] = PLACES) -> None:
        self._places = places
        self._since = _ticks
        self._freed = 0
        self._most: dict[str, tuple[int, int]] = {}
        self._looking: threading.Thread | None = None
        self._look_for_a_moment()

    def value(self) -> int:
        self._look_for_a_moment()
        return _ticks - self._since + self._freed

    def _look_for_a_moment(self) -> None:
        if self._looking is None or not self._looking.is_alive():
            self._looking = threading.Thread(target=self._look, name="room", daemon=True)
            self._looking.start()
        self._looking.join(LOOK_S)

    def _look(self) -> None:
        for place, (room, files) in self._room().items():
            most_room, most_files = self._most.setdefault(place, (room, files))
            if room >= most_room + LEAST_BYTES or files >= most_files + LEAST_FILES:
                self._freed += 1
                self._most[place] = (max(room, most_room), max(files, most_files))

    def _room(self) -> dict[str, tuple[int, int]]:
        """Free bytes and free inodes."""
        found = {}
        for place in self._places:
            try:
                facts = os.statvfs(place)
            except OSError:
                continue
            found[place] = (facts.f_bfree * facts.f_frsize, facts.f_ffree)
        return found
