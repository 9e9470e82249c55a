"""This host's clock, and why it is not to be believed: what is open here ends by it.

Told in order: what the portal says, the doubt, what is known of the time without that clock. That is the portal's last
word, or else the latest that the clock itself has said, and how long the machine has run since, which nobody sets. It
is kept on disk: the next process knows it too, and after a boot it is the earliest that it can be. What follows from a
doubt is openings.py's and forwards.py's.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from remotegpu_agent.facts import boot_id
from remotegpu_agent.files import find_json, write_json
from remotegpu_agent.protocol import ProtocolError, format_time, now, parse_time

log = logging.getLogger(__name__)

TOLERANCE_S = 60.0
KEPT_EVERY_S = 60.0  # so much of it a boot forgets
STEP_S = 1.0  # less is the way from the portal to here


@dataclass(frozen=True)
class Known:
    """A moment at which the machine had run for so long, by its boot."""

    at: datetime
    run_s: float
    boot_id: str
    is_portals: bool  # it was that moment; else it may have been later, and was not earlier

    def is_followed_by(self, later: Known) -> bool:
        """Whether that says no more than how long the machine has run since."""
        if (self.boot_id, self.is_portals) != (later.boot_id, later.is_portals):
            return False
        return abs((later.at - self.at).total_seconds() - (later.run_s - self.run_s)) < STEP_S


class Clock:
    """Any thread may ask."""

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir / "clock.json"
        self._lock = threading.Lock()
        self._known: Known | None = None
        self._kept: Known | None = None  # as it is on disk
        self.offset_s: float | None = None  # how far the portal's was ahead when it was last heard

    def heard(self, portals: datetime) -> None:
        """The portal has just said how late it is."""
        with self._lock:
            self.offset_s = (portals - now()).total_seconds()
            self._note(Known(portals, _run_s(), boot_id(), is_portals=True))

    def doubt(self) -> str | None:
        """Why this clock is not to be believed: by it something would be open too long. None: no reason is known.

        To be asked again and again: what has been in between is noticed then.
        """
        with self._lock:
            known = self._look()
            self._note(known)
        behind_s = (known.at - now()).total_seconds()
        if behind_s > TOLERANCE_S or (known.is_portals and behind_s < -TOLERANCE_S):
            whose = "the portal's" if known.is_portals else "what it was before"
            minutes = max(1, round(abs(behind_s) / 60))  # the same words for the same fault, whenever it is looked at
            return f"nothing is opened: this host's clock is {minutes} min off {whose}: mend its time"
        return None

    def _look(self) -> Known:
        """What is known now."""
        known, run_s, boot = self._known or self._find(), _run_s(), boot_id()
        if known is None:
            return Known(now(), run_s, boot, is_portals=False)
        since_s = run_s - known.run_s if known.boot_id == boot else 0.0
        is_portals = known.is_portals and known.boot_id == boot
        known = Known(known.at + timedelta(seconds=since_s), run_s, boot, is_portals)
        return known if is_portals else replace(known, at=max(known.at, now()))

    def _note(self, known: Known) -> None:
        self._known = known
        kept = self._kept
        if kept is not None and kept.is_followed_by(known) and known.run_s - kept.run_s < KEPT_EVERY_S:
            return
        self._kept = known  # also where it cannot be written: not again at every look
        line = {"at": format_time(known.at), "run_s": known.run_s, "boot_id": known.boot_id}
        try:
            write_json(self._file, {**line, "is_portals": known.is_portals})
        except OSError as error:  # a full disk stops nothing that is to be closed
            log.warning("%s: %s", self._file, error)

    def _find(self) -> Known | None:
        try:
            line = find_json(self._file)
            if line is None:
                return None
            self._kept = Known(parse_time(line["at"]), float(line["run_s"]), line["boot_id"], line["is_portals"])
        except (OSError, ValueError, LookupError, TypeError, ProtocolError) as error:
            log.warning("%s cannot be read, and the clock is believed: %s", self._file, error)
            return None
        return self._kept


def _run_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
