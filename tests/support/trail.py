"""Watches that no row moves from a state to the next without an audit entry, in the same transaction, that names it."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from portal.db import db
from portal.models import Table
from portal.services import audit, transitions


class Watch:
    """`untold` are the transitions that were committed without an entry about their row."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.untold: list[str] = []
        self._of_thread = threading.local()
        self._move, self._record = transitions.move, audit.record
        for name, module in list(sys.modules.items()):
            if name.startswith("portal.") and getattr(module, "move", None) is self._move:
                patch.setattr(module, "move", self._watched_move)
        patch.setattr(audit, "record", self._watched_record)

    def _watched_move(self, row: Table, **given: Any) -> None:
        self._move(row, **given)
        self._notes()[0].append((row, given["enter"]))
        db.after_commit(self._compare)

    def _watched_record(self, action: str, resource: Table | None, **given: Any) -> None:
        self._record(action, resource, **given)
        named = {(f"{type(resource).__name__.lower()}_id", resource.id)} if resource is not None else set()
        self._notes()[1].update(named, ((key, value) for key, value in given.items() if key.endswith("_id")))
        db.after_commit(self._compare)

    def _notes(self) -> tuple[list[tuple[Table, str]], set[tuple[str, Any]]]:
        if not hasattr(self._of_thread, "notes"):
            self._of_thread.notes = ([], set())
        notes: tuple[list[tuple[Table, str]], set[tuple[str, Any]]] = self._of_thread.notes
        return notes

    def _compare(self) -> None:
        moved, told = self._notes()
        del self._of_thread.notes
        for row, state in moved:
            noun = type(row).__name__.lower()
            kept: Any = type(row).get_by_id(row.id)
            if (f"{noun}_id", row.id) not in told and kept.state == state:
                self.untold.append(f"{noun} {row.id} → {state}")
