"""A test on PostgreSQL may have the database of the test before: it must not be able to tell."""

from __future__ import annotations

from typing import Any

import psycopg2
import pytest

from tests import postgresql
from tests.postgresql import Databases

pytestmark = pytest.mark.postgresql

ADD_A_TENANT = "INSERT INTO tenant (name, created_at) VALUES ('Acme', now()) RETURNING id"


@pytest.fixture(scope="module")
def databases(postgresql_server: str) -> Databases:
    return Databases(postgresql_server, template="template", prefix="again")


def ask(url: str, *statements: str) -> Any:
    with postgresql.session(url) as cursor:
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchone()[0]


def oid(url: str) -> Any:
    return ask(url, "SELECT oid FROM pg_database WHERE datname = current_database()")


def test_the_next_has_neither_rows_nor_numbers_nor_the_name_of_the_one_before(databases: Databases) -> None:
    with databases.one() as first:
        same, number = oid(first), ask(first, ADD_A_TENANT)
        left_open = psycopg2.connect(first)
        left_open.cursor().execute("LOCK TABLE tenant")
    with databases.one() as second:
        assert oid(second) == same
        assert ask(second, "SELECT count(*) FROM tenant") == 0
        assert ask(second, "SELECT count(*) FROM schema_migration") > 0
        assert ask(second, ADD_A_TENANT) == number
        with pytest.raises(psycopg2.OperationalError):
            left_open.cursor().execute("SELECT 1")
        with pytest.raises(psycopg2.OperationalError, match="does not exist"):
            psycopg2.connect(first)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE tenant RENAME COLUMN name TO title",
        "ALTER TABLE tenant ADD CHECK (name <> 'Bolt')",
        "DROP INDEX tenant_name",
        "CREATE TABLE left_behind (id int)",
        "ALTER DATABASE {name} SET timezone = 'Asia/Shanghai'",
        "DELETE FROM schema_migration",
    ],
)
def test_nobody_has_one_again_whose_tables_settings_or_ledger_were_changed(databases: Databases, change: str) -> None:
    with databases.one() as first:
        same = oid(first)
        ask(first, change.format(name=first.rsplit("/", 1)[1]), "SELECT 1")
    with databases.one() as second:
        assert oid(second) != same
