"""The whole database as one file, for either database: JSON lines in a tar, with a checksum of each table.

Secrets are no part of it: what is encrypted stays encrypted, and needs the `secrets/` of the instance it came from.
Generations and epochs come back as they were, on purpose: a host that has seen a newer generation freezes and asks,
one that has not goes on by itself once it has said so (services/frozen.py).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peewee

from portal.db import atomic, connection, db, is_sqlite, utcnow
from portal.errors import Conflict, Invalid
from portal.models import TABLES, NamedLock, Table
from portal.models.base import UtcDateTimeField
from portal.services import frozen, network, sessions

FORMAT = 1
MANIFEST = "manifest.json"
KEPT = tuple(table for table in TABLES if table is not NamedLock)  # who holds a lock is of this moment only
ROWS = 100  # in one INSERT


def backup(file: Path) -> dict[str, int]:
    """Write every table to `file` (0600), all as of one moment; returns table → rows. Never replaces a file."""
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Conflict(f"{file} is there already; a backup never replaces a file.", code="file_exists") from None
    with os.fdopen(handle, "wb") as stream, TemporaryDirectory(dir=file.absolute().parent) as scratch:
        rows, sums = {}, {}
        with connection(), _snapshot():
            ledger = _ledger()
            for table in KEPT:
                name = _name(table)
                rows[name], sums[name] = _write_table(table, Path(scratch) / name)
        manifest = {"format": FORMAT, "made_at": utcnow().isoformat(), "ledger": ledger, "rows": rows, "sha256": sums}
        with tarfile.open(fileobj=stream, mode="w") as tar:
            text = json.dumps(manifest, indent=1).encode()
            about = tarfile.TarInfo(MANIFEST)
            about.size = len(text)
            tar.addfile(about, io.BytesIO(text))
            for name in rows:
                tar.add(Path(scratch) / name, f"{name}.jsonl", filter=_anonymous)
    return rows


def restore(file: Path, *, force: bool = False) -> dict[str, int]:
    """Fill the database, which must be migrated, from a backup; returns table → rows.

    All or nothing; and what was decided since stays decided, as far as that can be known (`settle`).
    Raises Conflict if there are rows already (unless `force`, which deletes them) or if the backup is
    of another schema, Invalid if the file is no backup or is damaged.
    """
    with TemporaryDirectory() as scratch, connection():
        manifest = _unpack(file, Path(scratch))
        if manifest["ledger"] != _ledger():
            raise Conflict(
                "The backup is of another schema. Restore it into an empty database with the version that made it, then"
                " migrate.",
                code="other_schema",
            )
        with atomic():
            _make_room(force)
            for table in KEPT:
                _read_table(table, Path(scratch) / _name(table))
            _reset_sequences()
            settle(f"The portal was restored from a backup of {manifest['made_at'][:16]} UTC.")
    return {name: int(count) for name, count in manifest["rows"].items()}


def settle(reason: str) -> int:
    """The rows are those of an earlier time: what was decided since must neither come to life again nor be overruled.

    Every sign-in ends, no host is told anything before it has spoken, and no stack before an operator has compared.
    Part of the transaction that restores, or one of its own after another restored; returns how many hosts that are.
    """
    sessions.end_everybodys("restored")
    network.freeze(reason)
    return frozen.freeze_all(reason)


def _name(table: type[Table]) -> str:
    return str(table._meta.table_name)


@contextmanager
def _snapshot() -> Iterator[None]:
    """One moment for all tables: a read transaction on SQLite, a repeatable one on PostgreSQL."""
    with db.atomic():
        if not is_sqlite():
            db.execute_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            db.execute_sql("SET LOCAL idle_in_transaction_session_timeout = 0")  # a slow disk is no program that hangs
        yield


def _ledger() -> list[str]:
    return [str(row[0]) for row in db.execute_sql("SELECT name FROM schema_migration ORDER BY name").fetchall()]


def _write_table(table: type[Table], file: Path) -> tuple[int, str]:
    fields, count, digest = table._meta.sorted_fields, 0, hashlib.sha256()
    with file.open("wb") as stream:
        for row in _rows(table):
            values = {field.column_name: _plain(value) for field, value in zip(fields, row, strict=True)}
            line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            stream.write(line)
            count += 1
    return count, digest.hexdigest()


def _rows(table: type[Table]) -> Iterator[tuple[Any, ...]]:
    """All rows by primary key, some at a time: a table of logs is larger than memory."""
    key = table._meta.primary_key
    place = table._meta.sorted_fields.index(key)
    query: Any = table.select().order_by(key).limit(ROWS).tuples()
    rows = list(query)
    while rows:
        yield from rows
        rows = list(query.where(key > rows[-1][place]))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    return value


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def _unpack(file: Path, folder: Path) -> dict[str, Any]:
    """Every table of the backup as a file in `folder`, checked before anything is written."""
    try:
        with tarfile.open(file) as tar:
            _extract(tar, MANIFEST, folder / MANIFEST)
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            for table in KEPT:
                name = _name(table)
                if _extract(tar, f"{name}.jsonl", folder / name) != manifest["sha256"][name]:
                    raise Invalid({"file": [f"{file}: the table {name} is damaged."]})
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise Invalid({"file": [f"{file} is no backup of this portal: {error}"]}) from None
    if manifest.get("format") != FORMAT:
        raise Invalid({"file": [f"{file} has the format {manifest.get('format')}, not {FORMAT}."]})
    return manifest


def _extract(tar: tarfile.TarFile, name: str, to: Path) -> str:
    """Copy one member to a file of our own naming; returns its SHA-256."""
    member = tar.extractfile(name)
    if member is None:
        raise ValueError(f"{name} is no file")
    digest = hashlib.sha256()
    with to.open("wb") as stream:
        while part := member.read(1024 * 1024):
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()


def _make_room(force: bool) -> None:
    filled = [_name(table) for table in KEPT if table.select().exists()]
    if filled and not force:
        raise Conflict(
            f"The database is not empty ({', '.join(filled[:5])}). With --force its rows are deleted first.",
            code="database_not_empty",
        )
    for table in reversed(TABLES):
        for field in table._meta.sorted_fields:
            if isinstance(field, peewee.ForeignKeyField) and field.rel_model is table:
                table.update({field: None}).execute()  # a row that points at another of its table holds it
        table.delete().execute()


def _read_table(table: type[Table], file: Path) -> None:
    fields = {field.column_name: field for field in table._meta.sorted_fields}
    batch = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            batch.append({fields[name]: _value(fields[name], value) for name, value in json.loads(line).items()})
            if len(batch) == ROWS:
                table.insert_many(batch).execute()
                batch = []
    if batch:
        table.insert_many(batch).execute()


def _value(field: Any, plain: Any) -> Any:
    if plain is None:
        return None
    if isinstance(field, UtcDateTimeField):
        return datetime.fromisoformat(plain)
    if isinstance(field, peewee.BlobField):
        return base64.b64decode(plain)
    return plain


def _reset_sequences() -> None:
    """PostgreSQL counts ids beside the table: the next one must be above those that came with the backup."""
    if is_sqlite():
        return
    for table in KEPT:
        key = table._meta.primary_key
        if isinstance(key, peewee.AutoField):
            name, column = _name(table), key.column_name
            db.execute_sql(
                f"SELECT setval(pg_get_serial_sequence('\"{name}\"', '{column}'),"  # noqa: S608 - our own names
                f' COALESCE((SELECT MAX("{column}") FROM "{name}"), 0) + 1, false)'
            )
