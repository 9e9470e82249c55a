"""The world that every test starts from: settings, an empty database of each kind, an application, and a small cast.

`database` comes twice, as SQLite and as PostgreSQL (marker `postgresql`); what uses it, the application or anybody of
the cast included, is tried on both. The cast: `admin` and `operator` run the house; `customer` owns `tenant`, `member`
belongs to it, `viewer` only looks; `stranger` owns `other_tenant`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import settings as examples
from werkzeug.test import TestResponse

from portal import db as database_module
from portal import start
from portal.api import auth
from portal.app import build, config_of
from portal.integrations.wake import wake
from portal.migrate import migrate
from portal.models import Tenant, User
from portal.services import config, heartbeats, passwords, sessions, vault
from portal.services.sessions import Caller
from portal.settings import Settings
from tests import postgresql
from tests.factories import make_tenant, make_user
from tests.hosts import owner

API = "/api/v1"
examples.register_profile("beside_other_lanes", deadline=None)
examples.load_profile("beside_other_lanes")


def pytest_configure() -> None:
    owner.begin_run()


@pytest.fixture(scope="session", autouse=True)
def cheap_hashes() -> Iterator[None]:
    """Passwords are hashed with the least work that argon2 allows; test_passwords.py looks at the real work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "_hasher", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts() -> Iterator[None]:
    """Databases of this process are not synced to the disk; test_db.py looks at what the product does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database_module, "SYNCHRONOUS", "off")
        yield


@pytest.fixture(autouse=True)
def one_umask() -> Iterator[None]:
    """A start of the portal makes its process a private one, which this one must not stay for other tests."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a portal that lives in a temporary folder. The database's address is put in by `database`."""
    return settings_in(tmp_path)


def settings_in(folder: Path) -> Settings:
    return Settings(
        instance_dir=folder / "instance",
        database_url=f"sqlite:///{folder / 'instance' / 'remotegpu.db'}",
        public_url="http://localhost",
        bind="127.0.0.1:0",
        people_limit="1000000 per minute",
        secret_key="test " + "0123456789abcdef" * 3,
        jwt_secret_key="test " + "123456789abcdef0" * 3,
        encryption_key="test " + "23456789abcdef01" * 3,
    )


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file; each test gets a copy."""
    file = tmp_path_factory.mktemp("template") / "remotegpu.db"
    database = database_module.connect(f"sqlite:///{file}")
    migrate()
    database.close()
    return file


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The address of a server that holds a migrated database called `template`."""
    with postgresql.server() as url:
        postgresql.execute(url, "CREATE DATABASE template")
        database = database_module.connect(f"{url}/template")
        migrate()
        database.close_all()  # type: ignore[attr-defined]  # the pool's
        yield url


@pytest.fixture(scope="session")
def postgresql_databases(postgresql_server: str) -> postgresql.Databases:
    return postgresql.Databases(postgresql_server, template="template")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a fresh, migrated database."""
    if request.param == "sqlite":
        file = tmp_path / "instance" / "remotegpu.db"
        file.parent.mkdir(exist_ok=True)
        shutil.copy(request.getfixturevalue("sqlite_template"), file)
        yield f"sqlite:///{file}"
        return
    with request.getfixturevalue("postgresql_databases").one() as url:
        yield url


@pytest.fixture
def database(database_url: str, settings: Settings) -> Iterator[Any]:
    """The portal's database, bound and empty; `settings` know its address, and the vault is open."""
    object.__setattr__(settings, "database_url", database_url)  # settings are frozen for everybody else
    database = database_module.connect(database_url)
    config.use(settings)
    vault.unlock(settings)
    yield database
    wake.stop()  # what waits or writes in the background belongs to this database
    heartbeats.buffer.stop()
    close_database(database_module.db.obj)


def close_database(database: Any) -> None:
    """Close every connection of this process, in whichever thread it was opened."""
    if hasattr(database, "close_all"):
        database.close_all()
    database.close()


@pytest.fixture(scope="session")
def built_app(tmp_path_factory: pytest.TempPathFactory) -> Flask:
    """Routes, schemas and the description take a tenth of a second: built once, for all tests."""
    application = build(settings_in(tmp_path_factory.mktemp("app")))
    application.testing = True
    return application


@pytest.fixture
def app(built_app: Flask, database: Any, settings: Settings) -> Flask:
    """The application, on this test's database and settings."""
    return lend(built_app, settings)


def lend(application: Flask, settings: Settings) -> Flask:
    """An application that was built once, with the settings of one test."""
    start.bind(settings)
    application.config.from_mapping(config_of(settings))
    return application


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A browser or program that is not signed in."""
    return app.test_client()


@dataclass
class SignedIn:
    """Somebody at the API: `sign_in(operator).post("/admin/machines", {…})`. Paths are below /api/v1."""

    user: User
    client: FlaskClient
    headers: dict[str, str]

    def get(self, path: str, **kwargs: Any) -> TestResponse:
        return self.open("GET", path, **kwargs)

    def post(self, path: str, json: Any = None, **kwargs: Any) -> TestResponse:
        return self.open("POST", path, json={} if json is None else json, **kwargs)

    def put(self, path: str, json: Any = None, **kwargs: Any) -> TestResponse:
        return self.open("PUT", path, json={} if json is None else json, **kwargs)

    def patch(self, path: str, json: Any = None, **kwargs: Any) -> TestResponse:
        return self.open("PATCH", path, json={} if json is None else json, **kwargs)

    def delete(self, path: str, **kwargs: Any) -> TestResponse:
        return self.open("DELETE", path, **kwargs)

    def open(self, method: str, path: str, **kwargs: Any) -> TestResponse:
        headers = {**self.headers, **kwargs.pop("headers", {})}
        return self.client.open(API + path, method=method, headers=headers, **kwargs)


@pytest.fixture
def sign_in(app: Flask) -> Callable[[User], SignedIn]:
    """Sign somebody in with a bearer token, without the work of a password."""

    def of(user: User) -> SignedIn:
        session = sessions.start(User.get_by_id(user.id), caller=Caller("192.0.2.10"), life_s=3600)
        with app.app_context():
            access, _ = auth.tokens_of(session)
        return SignedIn(user, app.test_client(), {"Authorization": f"Bearer {access}"})

    return of


@pytest.fixture
def admin(database: Any) -> User:
    return make_user("admin", username="root")


@pytest.fixture
def operator(database: Any) -> User:
    return make_user("operator", username="olga")


@pytest.fixture
def tenant(database: Any) -> Tenant:
    return make_tenant("Acme")


@pytest.fixture
def other_tenant(database: Any) -> Tenant:
    return make_tenant("Bolt")


@pytest.fixture
def customer(tenant: Tenant) -> User:
    """Owner of `tenant`."""
    return make_user("customer", tenant=tenant, member_role="owner", username="carol")


@pytest.fixture
def member(tenant: Tenant) -> User:
    return make_user("customer", tenant=tenant, member_role="member", username="max")


@pytest.fixture
def viewer(tenant: Tenant) -> User:
    """Of the same tenant as `customer`, and only looks."""
    return make_user("customer", tenant=tenant, member_role="viewer", username="vera")


@pytest.fixture
def stranger(other_tenant: Tenant) -> User:
    """Owner of another tenant."""
    return make_user("customer", tenant=other_tenant, member_role="owner", username="stan")
