"""The journal: what happened on this host, kept until the portal has it, each record once.

A line is a record or an acknowledgement. Other processes (the timer at a lease's end, the guard at boot) append too,
so every write is under a lock and every read looks whether the file changed. Here is no knowledge of events.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remotegpu_agent.files import is_full, locked, sync_directory, write_atomic
from remotegpu_agent.protocol import format_time, now

log = logging.getLogger(__name__)

COMPACT_AT_BYTES = 256 * 1024


class Journal:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = path.with_suffix(".lock")
        self._stamp: tuple[int, int] | None = None
        self._waiting: dict[str, dict[str, Any]] = {}

    def record(
        self,
        event: str,
        *,
        lease_id: int | None = None,
        attempt_id: int | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        """Note what is now true. On the disk when this returns, unless that is full: what happened must not fail
        because nobody will hear of it.
        """
        entry = {
            "id": str(uuid.uuid4()),
            "at": format_time(now()),
            "event": event,
            "lease_id": lease_id,
            "attempt_id": attempt_id,
            "detail": detail or {},
        }
        try:
            self._append([entry])
        except OSError as error:
            if not is_full(error):
                raise
            log.error("the disk is full, so this is told here only: %s", json.dumps(entry))

    def pending(self, limit: int = 500) -> list[dict[str, Any]]:
        """The oldest records that the portal has not acknowledged."""
        self._load()
        return list(self._waiting.values())[:limit]

    def acknowledge(self, ids: Iterable[str]) -> None:
        """The portal holds these: never send them again."""
        self._load()
        known = [record_id for record_id in ids if record_id in self._waiting]
        if known:
            self._append([{"acked": known}])
            self._compact()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        with locked(self._lock):
            is_new = not self._path.exists()
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not is_new and not self._ends_with_newline(descriptor):
                    data = b"\n" + data  # a power cut tore the last line: do not glue ours to it
                os.write(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                sync_directory(self._path.parent)

    @staticmethod
    def _ends_with_newline(descriptor: int) -> bool:
        size = os.fstat(descriptor).st_size
        return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"

    def _load(self) -> None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._waiting, self._stamp = {}, None
            return
        if (found.st_ino, found.st_size) == self._stamp:
            return
        waiting: dict[str, dict[str, Any]] = {}
        for line in self._path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # torn by a power cut: it was never promised to anybody
            for record_id in entry.get("acked", ()):
                waiting.pop(record_id, None)
            if "id" in entry:
                waiting[entry["id"]] = entry
        self._waiting, self._stamp = waiting, (found.st_ino, found.st_size)

    def _compact(self) -> None:
        """Rewrite without what was acknowledged, once that is worth it."""
        with locked(self._lock):
            self._load()
            if self._path.stat().st_size < COMPACT_AT_BYTES and self._waiting:
                return
            lines = (json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in self._waiting.values())
            write_atomic(self._path, b"".join(lines))
            self._load()
