"""Every refusal becomes one form: `application/problem+json` (RFC 9457) with a real status and a stable `code`.

Errors of the rules (portal/errors.py), of Flask, of the JWT, CSRF and limiter extensions, of marshmallow and of the
database all pass here. For addresses outside /api the pages answer instead: `portal/web` puts a function into
`app.extensions["error_page"]`, which gets the Problem and returns a response.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import jwt
import marshmallow as ma
import peewee
from flask import Flask, Response, current_app, request
from flask_jwt_extended import exceptions as jwt_exceptions
from flask_limiter import RateLimitExceeded
from playhouse.pool import MaxConnectionsExceeded
from werkzeug.exceptions import HTTPException

from portal import errors
from portal.db import AWAY, db, is_sqlite

log = logging.getLogger("portal.problems")

LOCKED = ("database is locked", "due to lock timeout", "deadlock detected")  # as SQLite says it, and PostgreSQL

CODES = {
    400: "malformed",
    401: "not_signed_in",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    411: "length_required",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid",
    429: "too_many_requests",
    500: "internal",
    503: "unavailable",
}


@dataclass(frozen=True)
class Problem:
    """What went wrong, ready to be told. `detail` is a sentence for people, `code` a word for programs."""

    status: int
    code: str
    detail: str
    errors: Mapping[str, list[str]] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return HTTPStatus(self.status).phrase

    def as_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "type": f"urn:remotegpu:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.errors:
            told["errors"] = dict(self.errors)
        if self.info:
            told["info"] = dict(self.info)
        return told


def install(app: Flask) -> None:
    """Answer every error of `app`. Call it last: the extensions install handlers of their own."""
    app.register_error_handler(Exception, _answer)
    for own in (errors.Error, HTTPException, ma.ValidationError, peewee.PeeweeException, jwt.PyJWTError):
        app.register_error_handler(own, _answer)
    for name in vars(jwt_exceptions).values():
        if isinstance(name, type) and issubclass(name, Exception):
            app.register_error_handler(name, _answer)
    # Flask-JWT-Extended registered each of these by its own class, which Flask would prefer to the base above.
    for theirs in list(app.error_handler_spec[None][None]):
        app.register_error_handler(theirs, _answer)


def _answer(error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.code is not None and error.code < 400:
        return error.get_response()  # type: ignore[return-value]  # a redirect is no problem
    problem = of(error)
    page = current_app.extensions.get("error_page")
    if page is not None and not request.path.startswith(("/api/", "/metrics")):
        answer: Response = page(problem)
    else:
        answer = response(problem)
    return answer


def response(problem: Problem) -> Response:
    body = json.dumps(problem.as_dict(), ensure_ascii=False, default=str)
    return Response(body, problem.status, dict(problem.headers), mimetype="application/problem+json")


def of(error: Exception) -> Problem:
    """What to tell about `error`. Texts of libraries and of the database stay in the log."""
    if isinstance(error, errors.Error):
        return _of_rule(error)
    if isinstance(error, jwt_exceptions.CSRFError):
        return Problem(
            403, "csrf", "The CSRF token is missing or wrong. Send the cookie csrf_access_token as X-CSRF-TOKEN."
        )
    if isinstance(error, jwt_exceptions.JWTExtendedException | jwt.PyJWTError):
        return _of_token(error)
    if isinstance(error, RateLimitExceeded):
        wait_s = error.limit.limit.get_expiry() if error.limit is not None else 60
        return Problem(
            429,
            CODES[429],
            f"Too many requests: {error.description}. Try again later.",
            headers={"Retry-After": str(wait_s)},
        )
    if isinstance(error, ma.ValidationError):
        return _invalid(error.messages)
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, peewee.IntegrityError):
        return _of_integrity(error)
    if isinstance(error, OverflowError | peewee.DataError):
        log.info("refused by the database: %s", error)
        return Problem(422, CODES[422], "A number or a text is larger than what can be kept.")
    if _is_busy(error):
        log.warning("the database is busy: %s", error)
        return Problem(503, CODES[503], "The database is busy. Try again.", headers={"Retry-After": "1"})
    if isinstance(error, AWAY) and not is_sqlite():
        log.error("%s %s: the database does not answer, or is a standby: %s", request.method, request.path, error)
        _let_go_of_connection()
        detail = "The database does not answer at the moment. Try again."
        return Problem(503, CODES[503], detail, headers={"Retry-After": "5"})
    return _unexpected(error)


def _of_rule(error: errors.Error) -> Problem:
    if error.status >= 500:
        log.error("%s: %s", error.code, error.message)
    headers = {}
    info = {key: value for key, value in error.details.items() if key != "fields"}
    if "retry_after_s" in info:
        headers["Retry-After"] = str(int(info["retry_after_s"]))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    fields = error.fields if isinstance(error, errors.Invalid) else {}
    return Problem(error.status, error.code, error.message, fields, info, headers)


def _of_token(error: Exception) -> Problem:
    if isinstance(error, jwt.ExpiredSignatureError):
        code, detail = "token_expired", "The token has expired. Refresh it, or sign in again."
    elif isinstance(error, jwt_exceptions.NoAuthorizationError):
        code, detail = CODES[401], "Sign in first: POST /api/v1/auth/login."
    else:
        code, detail = "token_refused", "The token is not valid, or no longer. Sign in again."
    return Problem(401, code, detail, headers={"WWW-Authenticate": "Bearer"})


def _invalid(messages: Any) -> Problem:
    fields = dict(flatten(messages))
    name, texts = next(iter(fields.items()), ("", ["is not valid"]))
    more = f" (and {len(fields) - 1} more)" if len(fields) > 1 else ""
    return Problem(422, CODES[422], f"{name}: {texts[0]}{more}", fields)


def flatten(messages: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """marshmallow's nested messages as pairs of a dotted field name and its texts."""
    if isinstance(messages, Mapping):
        for key, value in messages.items():
            name = "" if key == ma.exceptions.SCHEMA else str(key)
            yield from flatten(value, f"{path}.{name}".strip("."))
    else:
        texts = messages if isinstance(messages, list) else [messages]
        yield path or "body", [str(text) for text in texts]


def _of_http(error: HTTPException) -> Problem:
    status = error.code or 500
    if status == 422:
        by_location = getattr(error, "data", {}).get("messages", {})
        return _invalid({key: text for part in by_location.values() for key, text in _fields(part)})
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
    detail = {
        400: "The body is not valid JSON." if getattr(error, "data", None) else "The request is malformed.",
        404: "There is nothing at this address.",
        413: "The body is larger than this address takes.",
    }.get(status, str(error.description))
    return Problem(status, CODES.get(status, "http_" + str(status)), detail, headers=headers)


def _fields(part: Any) -> list[tuple[str, Any]]:
    return list(part.items()) if isinstance(part, Mapping) else [("body", part)]


def _of_integrity(error: peewee.IntegrityError) -> Problem:
    """A rule that only the database can keep against a parallel request: said the same on both databases."""
    log.info("refused by the database: %s", error)
    state = getattr(error.__cause__ or error.__context__, "pgcode", None)  # psycopg2's error, which Peewee wraps
    text = str(error)
    if state == "23505" or "UNIQUE constraint failed" in text:
        return Problem(409, "already_exists", "Something with this name or value exists already.")
    if state == "23503" or "FOREIGN KEY constraint failed" in text:
        return Problem(409, "in_use", "Something else still refers to this, or what it refers to is gone.")
    return _unexpected(error)


def _is_busy(error: Exception) -> bool:
    """Every connection of the pool is taken, or another writer held what we wanted for too long."""
    is_locked = isinstance(error, peewee.OperationalError) and any(words in str(error) for words in LOCKED)
    return is_locked or isinstance(error, MaxConnectionsExceeded)


def _unexpected(error: Exception) -> Problem:
    """Nothing of the error leaves the house but a number, under which the log tells the rest."""
    incident = errors.incident()
    log.error("incident %s: %s %s", incident, request.method, request.path, exc_info=error)
    _let_go_of_connection()
    return Problem(
        500,
        CODES[500],
        f"Something went wrong here. The log has it as incident {incident}.",
        info={"incident": incident},
    )


def _let_go_of_connection() -> None:
    """A connection that was in the middle of something is not given to the next request."""
    if db.obj is not None and not db.is_closed() and not db.in_transaction():
        db.close()
