"""A host's clock and how long the host has run, which pass, are set and begin anew as a test says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from types import ModuleType

import pytest

from remotegpu_agent import clock


@dataclass
class HostTime:
    wall: datetime
    run_s: float = 1000.0
    boots: int = 1

    def in_place_of(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> HostTime:
        """Of the real one, in these modules of the agent too."""
        for module in (clock, *modules):
            monkeypatch.setattr(module, "now", lambda: self.wall)
        monkeypatch.setattr(clock, "_run_s", lambda: self.run_s)
        monkeypatch.setattr(clock, "boot_id", lambda: f"boot-{self.boots}")
        return self

    def passes(self, time: timedelta) -> None:
        self.wall += time
        self.run_s += time.total_seconds()

    def is_set(self, by: timedelta) -> None:
        self.wall += by

    def boots_anew(self, *, after: timedelta) -> None:
        self.wall += after
        self.run_s, self.boots = 5.0, self.boots + 1
