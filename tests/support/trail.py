"""Watches that nothing is written behind the audit trail's back.

`Watch`: no row moves from a state to the next without an entry, in the same transaction, that names it. `Requests`: no
request that was granted has changed a row and left no entry. What agents report is not of people: it is told where it
moves a row, which `Watch` sees.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peewee
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from portal.db import db
from portal.models import Table
from portal.services import audit, transitions

WRITE = re.compile(r'(?:INSERT INTO|UPDATE|DELETE FROM) "(?P<table>\w+)"')
HOLD = re.compile(r'UPDATE "(\w+)" SET "(\w+)" = "\1"\."\2" WHERE')  # takes the row first, and changes nothing
OF_AGENTS = "/api/v1/agent/"
NO_NEWS = ("audit_entry", "event")  # the trail itself, and what wakes those who listen
# Routes that may change a row and say nothing, with the reason.
SILENT = {
    "POST /api/v1/auth/refresh": "each sign-in does it every few minutes; its beginning, end and misuse are told",
    "POST /api/v1/alerts/webhook": "Alertmanager repeats itself every few minutes; what is news moves an alert",
}


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


@dataclass
class Request:
    """What one request has committed."""

    written: set[str] = field(default_factory=set)
    told: list[str] = field(default_factory=list)


class Requests:
    """`untold` are the requests to change something that were granted (2xx, 3xx), did it, and left no entry.

    What only reads may note that it did: when a token was used last, which document a stack was given.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.untold: list[str] = []
        self._of_thread = threading.local()
        self._open: Callable[..., TestResponse] = FlaskClient.open
        self._execute: Callable[..., Any] = peewee.Database.execute_sql
        self._record = audit.record
        patch.setattr(FlaskClient, "open", lambda client, *given, **named: self._watched_open(client, *given, **named))
        patch.setattr(peewee.Database, "execute_sql", lambda database, *given: self._watched_execute(database, *given))
        patch.setattr(audit, "record", self._watched_record)

    def _watched_open(self, client: FlaskClient, *given: Any, **named: Any) -> TestResponse:
        before, request = self._request(), Request()  # one that is redirected is open while the next is answered
        self._of_thread.request = request
        try:
            answer = self._open(client, *given, **named)
        finally:
            self._of_thread.request = before
        if request.written and not request.told and answer.status_code < 400 and answer.request.method != "GET":
            self._note(client, answer, request)
        return answer

    def _note(self, client: FlaskClient, answer: TestResponse, request: Request) -> None:
        method, path = answer.request.method, answer.request.path
        rule = client.application.url_map.bind("").match(path, method, return_rule=True)[0].rule
        route = f"{method} {rule}"
        if route not in SILENT and not path.startswith(OF_AGENTS):
            self.untold.append(f"{route} changed {', '.join(sorted(request.written))}")

    def _watched_execute(self, database: peewee.Database, sql: str, *given: Any) -> Any:
        cursor = self._execute(database, sql, *given)
        request, write = self._request(), WRITE.match(sql)
        if request and write and write["table"] not in NO_NEWS and not HOLD.match(sql) and cursor.rowcount > 0:
            db.after_commit(lambda: request.written.add(write["table"]))
        return cursor

    def _watched_record(self, action: str, *given: Any, **named: Any) -> None:
        self._record(action, *given, **named)
        if request := self._request():
            db.after_commit(lambda: request.told.append(action))

    def _request(self) -> Request | None:
        """The one that this thread answers."""
        return getattr(self._of_thread, "request", None)
