"""The XIDs that the driver told of each GPU, until it is loaded again or the machine boots.

An XID is an event, told once, to whoever listens just then. Those who listen come and go (gpu_child.py), and so does
the agent: what they heard is kept here, in a file below /run, which no tenant can fill. Of a reset nobody is told: who
resets a card removes the file, with the agent stopped (docs/operator.md). What these numbers mean is the portal's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remotegpu_agent.facts import boot_id, driver_load
from remotegpu_agent.files import find_json, write_json
from remotegpu_agent.protocol import ProtocolError, format_time, now, parse_time

log = logging.getLogger(__name__)

MOST_XIDS = 16  # of one GPU: as the protocol has it


@dataclass(frozen=True)
class Told:
    """By GPU: each XID with its last time, in the order of these. `driver` is which loading of it told them."""

    driver: int | None = None
    gpus: dict[str, dict[int, str]] = field(default_factory=dict)


class Xids:
    """One thread hears, any may ask."""

    def __init__(self, file: Path | None = None) -> None:
        """Without a file they are forgotten together with this object."""
        self._file = file
        self._told = self._find() or Told()

    def of(self, uuid: str) -> list[dict[str, Any]]:
        """As the protocol has them."""
        return [{"xid": xid, "last_at": at} for xid, at in sorted(self._told.gpus.get(uuid, {}).items())]

    def hear(self, uuid: str, xid: int) -> None:
        """The driver has just told of it."""
        self.settle()
        others = [(each, at) for each, at in self._told.gpus.get(uuid, {}).items() if each != xid]
        newest = dict([*others, (xid, format_time(now()))][-MOST_XIDS:])
        self._keep(Told(self._told.driver, {**self._told.gpus, uuid: newest}))

    def settle(self, *, is_reloaded: bool = False) -> None:
        """Forget what an earlier loading of the driver told. `is_reloaded` counts where the kernel says nothing."""
        before, driver = self._told.driver, driver_load()
        is_another = is_reloaded if driver is None or before is None else driver != before
        told = Told(before if driver is None else driver, {} if is_another else self._told.gpus)
        if told != self._told:
            self._keep(told)

    def _keep(self, told: Told) -> None:
        self._told = told
        if self._file is None:
            return
        try:
            write_json(self._file, {"boot_id": boot_id(), "driver": told.driver, "gpus": told.gpus})
        except OSError as error:  # they are told all the same, until the agent starts again
            log.warning("%s: %s", self._file, error)

    def _find(self) -> Told | None:
        try:
            kept = find_json(self._file) if self._file is not None else None
            if kept is None or kept["boot_id"] != boot_id():
                return None
            return Told(kept["driver"], {uuid: _by_number(xids) for uuid, xids in kept["gpus"].items()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ProtocolError) as error:
            log.warning("%s cannot be read, and the XIDs of before are forgotten: %s", self._file, error)
            return None


def _by_number(xids: dict[str, str]) -> dict[int, str]:
    return {int(xid): format_time(parse_time(at)) for xid, at in xids.items()}
