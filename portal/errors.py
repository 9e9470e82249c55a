"""What can go wrong, as the rules say it. One place (`api/problems.py`, `web/`) turns it into an answer.

Each error carries a stable `code` for programs and a sentence for people: the thing, the reason and the way out.
"""

from __future__ import annotations

import uuid
from typing import Any


class Error(Exception):
    """Base of every refusal. `status` is the HTTP status it becomes."""

    status = 500
    code = "internal"

    def __init__(self, message: str, *, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.details = details


class Invalid(Error):
    """The input is wrong. `fields` maps each faulty field to its messages."""

    status = 422
    code = "invalid"

    def __init__(self, fields: dict[str, list[str]], message: str = "") -> None:
        first = next(iter(fields.items()), ("", [""]))
        super().__init__(message or f"{first[0]}: {first[1][0]}", fields=fields)
        self.fields = fields


class NotSignedIn(Error):
    status = 401
    code = "not_signed_in"


class Forbidden(Error):
    status = 403
    code = "forbidden"


class NotFound(Error):
    """It does not exist, or it is somebody else's: the answer is the same."""

    status = 404
    code = "not_found"


class Conflict(Error):
    """Right request, wrong moment: the state it needs is not the state there is."""

    status = 409
    code = "conflict"


class TooMany(Error):
    status = 429
    code = "too_many_requests"


class Unavailable(Error):
    status = 503
    code = "unavailable"


def incident() -> str:
    """A number under which the log tells of a fault of ours, whose words are for no page and no API."""
    return uuid.uuid4().hex[:12]
