"""Backup and restore: everything comes back as it was, on either database, and nothing damaged or by accident."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from portal import backup as backup_module
from portal import db as database_module
from portal.backup import MANIFEST, backup, restore
from portal.db import utcnow
from portal.errors import Conflict, Invalid
from portal.migrate import migrate
from portal.models import TABLES, Attempt, Lease, LogRange, Machine, NamedLock, Setting, Task, User
from portal.services import runs, sessions
from portal.services.actors import SYSTEM
from tests.factories import make_tenant, make_user
from tests.support.runs import make_machine


def fill() -> None:
    """A row of every kind that is stored in a special way: times, JSON, bytes, references to oneself."""
    user = make_user("customer", tenant=make_tenant(), full_name="Ünïcode ☃")
    machine = make_machine(labels={"rack": {"n": [1, None, "x"]}}, generation=7)
    now, tenant = utcnow(), make_tenant()
    first = Lease.create(machine=machine, tenant=tenant, state="ended", starts_at=now, ends_at=now)
    lease = Lease.create(machine=machine, tenant=tenant, state="ended", starts_at=now, ends_at=now, continues=first)
    task = Task.create(lease=lease, created_by=user, name="t", command="c", state="succeeded")
    attempt = Attempt.create(task=task, number=1, state="succeeded")
    LogRange.create(attempt=attempt, offset=0, data=bytes(range(256)))
    Setting.create(key="k", value={"a": 1})
    runs.queue("verify", [machine], by=SYSTEM)
    NamedLock.create(name="sweeper", token="t", expires_at=now)


def content() -> dict[str, list[Any]]:
    """All rows of the database, but for who holds a lock, and how often somebody's sign-ins were ended."""
    found: dict[str, list[Any]] = {}
    for table in TABLES:
        if table is not NamedLock:
            kept = [field for field in table._meta.sorted_fields if field is not User.generation]
            rows: Any = table.select(*kept).order_by(table._meta.primary_key).tuples()
            found[table.__name__] = [tuple(bytes(v) if isinstance(v, memoryview) else v for v in row) for row in rows]
    return found


def open_empty(url: str) -> None:
    database_module.connect(url)
    migrate()


def test_everything_comes_back_in_another_database(database: Any, tmp_path: Path) -> None:
    fill()
    before = content()
    rows = backup(tmp_path / "backup.tar")
    assert rows["machine"] == 1
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600
    open_empty(f"sqlite:///{tmp_path / 'other.db'}")
    restore(tmp_path / "backup.tar")
    assert content() == before
    assert NamedLock.select().count() == 0


def test_a_backup_of_sqlite_comes_back_in_the_database_it_is_given(database: Any, tmp_path: Path) -> None:
    here = database
    open_empty(f"sqlite:///{tmp_path / 'other.db'}")
    fill()
    before = content()
    backup(tmp_path / "backup.tar")
    database_module.db.initialize(here)
    restore(tmp_path / "backup.tar")
    assert content() == before
    assert make_machine("gpu-2").id > Machine.get(Machine.name == "gpu-1").id, "ids go on where they were"


@pytest.mark.postgresql
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_backup_on_a_slow_disk_is_no_program_that_hangs(
    database: Any, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "STALLED_S", 0.2)
    database_module.connect(database_url)
    fill()
    other, real = psycopg2.connect(database_url), backup_module._write_table

    def slowly(*given: Any) -> Any:
        other.cursor().execute("SELECT pg_sleep(0.5)")  # longer than a transaction may say nothing
        return real(*given)

    monkeypatch.setattr(backup_module, "_write_table", slowly)
    monkeypatch.setattr(backup_module, "KEPT", (Machine, User))
    assert backup(tmp_path / "backup.tar") == {"machine": 1, "user": 1}
    other.close()


def test_a_database_with_rows_is_not_overwritten_by_accident(database: Any, tmp_path: Path) -> None:
    fill()
    backup(tmp_path / "backup.tar")
    before = content()
    extra = make_user("admin", username="late")
    with pytest.raises(Conflict, match="not empty"):
        restore(tmp_path / "backup.tar")
    assert User.select().where(User.id == extra.id).exists()
    restore(tmp_path / "backup.tar", force=True)
    assert content() == before


def test_a_backup_of_another_schema_is_refused_whatever_is_forced_and_taken_by_that_schema(
    database: Any, tmp_path: Path
) -> None:
    """As an upgrade leaves it: the ledger has one more. An empty database of before the upgrade takes it."""
    fill()
    before = content()
    backup(tmp_path / "backup.tar")
    late = make_user("admin", username="late")
    database.execute_sql("INSERT INTO schema_migration (id, name, applied) VALUES (99, '9999', CURRENT_TIMESTAMP)")
    with pytest.raises(Conflict, match=r"into an empty database with the version that made it") as refused:
        restore(tmp_path / "backup.tar", force=True)
    assert refused.value.code == "other_schema"
    assert User.select().where(User.id == late.id).exists(), "nothing was deleted"
    open_empty(f"sqlite:///{tmp_path / 'other.db'}")
    restore(tmp_path / "backup.tar")
    assert content() == before


def test_one_changed_byte_is_noticed_and_nothing_is_restored(database: Any, tmp_path: Path) -> None:
    fill()
    good, bad = tmp_path / "good.tar", tmp_path / "bad.tar"
    backup(good)
    with tarfile.open(good) as source, tarfile.open(bad, "w") as target:
        for member in source:
            data = source.extractfile(member).read()  # type: ignore[union-attr]  # all members are files
            if member.name == "user.jsonl":
                data = data.replace(b'"customer"', b'"admin"   ')
            target.addfile(member, io.BytesIO(data))
    before = content()
    with pytest.raises(Invalid, match="damaged"):
        restore(bad, force=True)
    assert content() == before


def test_what_is_no_backup_is_refused(database: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(MANIFEST))
    for name in ("text", "empty.tar", "absent"):
        with pytest.raises(Invalid, match="no backup"):
            restore(tmp_path / name)


def test_a_backup_replaces_no_file(database: Any, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("precious")
    with pytest.raises(Conflict, match="never replaces"):
        backup(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "precious"


def test_what_was_ended_after_the_backup_does_not_come_to_life_again(
    client: Any, operator: User, sign_in: Any, tmp_path: Path
) -> None:
    """A sign-in that somebody ended since, and a token of a generation that was given out since."""
    left = sign_in(operator)
    backup(tmp_path / "backup.tar")
    assert left.post("/auth/logout").status_code == 204
    sessions.sign_out_everywhere(operator, by=SYSTEM)
    later = sign_in(operator)
    assert later.get("/auth/me").status_code == 200
    restore(tmp_path / "backup.tar", force=True)
    assert [each.get("/auth/me").status_code for each in (left, later)] == [401, 401]
    again = sign_in(operator)
    assert again.get("/auth/me").status_code == 200
    sessions.sign_out_everywhere(operator, by=SYSTEM)
    sign_in(operator)
    assert later.get("/auth/me").status_code == 401, "not even when family and generation are counted up to its own"
