"""The migrations make the schema that the models say, and what was there before is there afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peewee
import pytest
from playhouse.migrations import Runner

from portal import db
from portal.db import utcnow
from portal.migrate import MIGRATIONS, migrate
from portal.models import TABLES, Attempt, Grant, Lease, LogRange, Machine, NetworkState, Task, User
from tests import postgresql
from tests.conftest import close_database
from tests.roles.rendering import load_file

BEFORE = "0003_operations"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Databases without a table, one after the other."""
    made: list[Any] = []

    def make(name: str) -> Any:
        for each in made:
            close_database(each)
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path / name}.db"
        else:
            server = request.getfixturevalue("postgresql_server")
            postgresql.execute(server, f"CREATE DATABASE {name}_{id(tmp_path)}")
            url = f"{server}/{name}_{id(tmp_path)}"
        made.append(db.connect(url))
        return made[-1]

    yield make
    for each in made:
        close_database(each)


def shape(database: Any) -> dict[str, Any]:
    """Every table of the models as the database has it: columns, indexes, references."""
    found: dict[str, Any] = {}
    for table in TABLES:
        name = table._meta.table_name
        found[name] = {
            "columns": sorted((each.name, each.null, each.primary_key) for each in database.get_columns(name)),
            "indexes": sorted((each.name, tuple(each.columns), each.unique) for each in database.get_indexes(name)),
            "references": sorted((each.column, each.dest_table) for each in database.get_foreign_keys(name)),
        }
    return found


def test_the_migrations_make_the_schema_of_the_models(empty: Any) -> None:
    database = empty("migrated")
    migrate()
    migrated = shape(database)
    database = empty("modelled")
    database.create_tables(TABLES)
    assert migrated == shape(database)


def test_what_was_there_before_is_there_afterwards_and_the_new_kinds_are_taken(empty: Any) -> None:
    database = empty("old")
    Runner(database, directory=str(MIGRATIONS), table_name="schema_migration").up(target=BEFORE)
    no, now = (0 if db.is_sqlite() else False), utcnow().isoformat(sep=" ")
    insert(
        "machine", id=7, name="gpu-7", address="192.0.2.7", ssh_port=22, ssh_user="root", state="leased",
        state_changed_at=now, labels="{}", epoch="e", generation=4, needs_reimage=no, next_uid=20000, leases_above=0,
        created_at=now,
    )  # fmt: skip
    insert("tenant", id=3, name="Acme", created_at=now)
    insert(
        "lease", id=9, machine_id=7, tenant_id=3, state="active", starts_at=now, ends_at=now, retain_s=0, root=no,
        created_at=now, end_forced=no,
    )  # fmt: skip
    told = '{"fingerprints":[]}'
    insert("grant", id=5, lease_id=9, kind="keys", desired="open", observed="open", desired_at=now, detail=told)
    assert migrate() == ["0004_network", "0005_lease_log_bytes", "0006_attempts_above"]
    assert migrate() == []
    grant, machine = Grant.get_by_id(5), Machine.get_by_id(7)
    assert (grant.lease_id, grant.kind, grant.observed, grant.detail) == (9, "keys", "open", {"fingerprints": []})
    assert (machine.generation, machine.gateway_id, machine.hears_openings) == (4, None, False)
    assert NetworkState.select().count() == 0, "a database that was only migrated is empty"
    Grant.create(lease=9, kind="firewall", desired="open")
    with pytest.raises(peewee.IntegrityError), db.atomic():
        Grant.create(lease=9, kind="firewall", desired="open")
    with pytest.raises(peewee.IntegrityError), db.atomic():
        Grant.create(lease=9, kind="nonsense", desired="open")


def test_output_that_is_there_already_is_counted_at_the_lease_that_made_the_login(empty: Any) -> None:
    database = empty("logs")
    Runner(database, directory=str(MIGRATIONS), table_name="schema_migration").up(target="0004_network")
    no, now = (0 if db.is_sqlite() else False), utcnow().isoformat(sep=" ")
    insert(
        "machine", id=7, name="gpu-7", address="192.0.2.7", ssh_port=22, ssh_user="root", state="leased",
        state_changed_at=now, labels="{}", epoch="e", generation=4, needs_reimage=no, next_uid=20000, leases_above=0,
        created_at=now, hears_openings=no,
    )  # fmt: skip
    insert("tenant", id=3, name="Acme", created_at=now)
    user = User.create(username="somebody", role="customer", password_hash="none")
    leases = ((9, "lease9", "ended", None), (19, "lease9", "active", 9), (90, None, "ended", None))
    for id, login, state, continues in leases:
        insert(
            "lease", id=id, machine_id=7, tenant_id=3, state=state, login=login, starts_at=now, ends_at=now, retain_s=0,
            root=no, created_at=now, end_forced=no, continues_id=continues,
        )  # fmt: skip
    insert("lease", id=91, machine_id=7, tenant_id=3, state="ended", login="lease91", starts_at=now, ends_at=now,
           retain_s=0, root=no, created_at=now, end_forced=no)  # fmt: skip
    for lease, size in ((9, 5), (9, 7), (19, 100), (90, 1000)):
        task = Task.create(lease=lease, created_by=user, name="t", command="true")
        attempt = Attempt.create(task=task, number=1, log_bytes=size)
        for offset in range(0, size, 50):
            LogRange.create(attempt=attempt, offset=offset, data=b"\0" * min(50, size - offset))
    forgotten = Attempt.create(task=task, number=2, log_bytes=12345)
    assert migrate() == ["0005_lease_log_bytes", "0006_attempts_above"]
    assert {lease.id: lease.log_bytes for lease in Lease.select()} == {9: 112, 19: 0, 90: 1000, 91: 0}
    assert Attempt.get_by_id(forgotten.id).log_bytes == 12345


@pytest.mark.parametrize("empty", ["sqlite"], indirect=True)  # the other one plans by what the tables hold
def test_all_output_is_read_once_however_many_leases_there_are(empty: Any) -> None:
    database = empty("logs")
    migrate()
    counting = load_file(MIGRATIONS / "0005_lease_log_bytes.py", "counting").COUNTED
    rows = database.execute_sql(f"EXPLAIN QUERY PLAN {counting}").fetchall()
    parents, words = {row[0]: row[1] for row in rows}, {row[0]: row[3] for row in rows}
    (reading,) = [number for number, word in words.items() if "log_range" in word]
    assert words[parents[reading]] == "MATERIALIZE kept"


def insert(table: str, **values: Any) -> None:
    """A row of a schema that no model describes any more."""
    mark = "?" if db.is_sqlite() else "%s"
    columns, marks = ", ".join(values), ", ".join([mark] * len(values))
    sql = f'INSERT INTO "{table}" ({columns}) VALUES ({marks})'  # noqa: S608 - names of our own
    db.db.execute_sql(sql, tuple(values.values()))
