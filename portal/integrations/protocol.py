"""The protocol with the agents, as the portal reads and writes it: bytes in, checked dicts out, and times both ways.

The one source is agent/protocol/protocol.schema.json; each definition is compiled once, at first use. What a message
means is told in services/agents.py. Here is no table and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import fastjsonschema
import orjson

from portal.errors import Invalid

VERSION = 1
SCHEMA_FILE = Path(__file__).parents[2] / "agent" / "protocol" / "protocol.schema.json"
NUL = b"\\u0000"  # legal in JSON, refused by PostgreSQL's text


@cache
def schema() -> dict[str, Any]:
    """The whole schema document."""
    document: dict[str, Any] = json.loads(SCHEMA_FILE.read_bytes())
    return document


def words(definition: str) -> tuple[str, ...]:
    """The closed list of words that a definition is, e.g. `cleaning_step`."""
    return tuple(schema()["definitions"][definition]["enum"])


def read(body: bytes, definition: str) -> dict[str, Any]:
    """The message in `body`, checked against `definition` (e.g. `sync_request`).

    Raises Invalid, which names the faulty field.
    """
    checked: dict[str, Any] = check(_parse(body), definition)
    return checked


def _parse(body: bytes) -> Any:
    try:
        message = orjson.loads(body)  # measured: a third of the time of json.loads
    except orjson.JSONDecodeError:
        message = _parse_forgivingly(body)
    return _storable(message) if NUL in body else message


def _parse_forgivingly(body: bytes) -> Any:
    """Half surrogate pairs alone are let through: what runs on a host may print them. Raises Invalid for all else."""
    try:
        return _storable(json.loads(body.decode(), parse_constant=_refuse_constant))
    except ValueError as error:
        raise Invalid({"body": [f"is not JSON in UTF-8: {error}"]}) from None


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON; an unknown value is null")


def _storable(value: Any) -> Any:
    """The same with what no database column takes replaced: NUL characters and half surrogate pairs.

    Replaced, not refused: the text comes from whatever runs on the host, and a report that is refused for ever would
    cut the host off.
    """
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return value


def check(message: Any, definition: str) -> Any:
    """`message` itself, when it matches the definition. Raises Invalid, which names the faulty field."""
    try:
        _validator(definition)(message)
    except fastjsonschema.JsonSchemaValueException as error:
        path, reason = _innermost(error)
        raise Invalid({path or "body": [reason]}) from None
    return message


@cache
def _validator(definition: str) -> Callable[[Any], Any]:
    # Without $id, so that the references stay inside this document. Defaults would write into the message.
    # A copy, because fastjsonschema puts what a reference leads to in its place.
    whole = {"definitions": deepcopy(schema()["definitions"]), "$ref": f"#/definitions/{definition}"}
    validate: Callable[[Any], Any] = fastjsonschema.compile(whole, use_default=False)
    return validate


def _innermost(error: fastjsonschema.JsonSchemaValueException) -> tuple[str, str]:
    """The field and the reason. "One of these or null" hides the reason: what is not null is asked again."""
    path = ".".join(error.path[1:])
    titles = [option.get("title") for option in error.rule_definition] if error.rule == "anyOf" else []
    definitions = [title for title in titles if title in schema()["definitions"]]
    if len(definitions) == 1 and error.value is not None:
        try:
            _validator(definitions[0])(error.value)
        except fastjsonschema.JsonSchemaValueException as inner:
            deeper, reason = _innermost(inner)
            return ".".join(part for part in (path, deeper) if part), reason
    return path, error.message.removeprefix(error.name).strip()


def parse_time(text: str) -> datetime:
    """A time of the protocol as an aware one. Raises Invalid for a date that no calendar has."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError as error:
        raise Invalid({"time": [f"{text!r}: {error}"]}) from None


def parse_time_or_none(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text)


def format_time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def size(part: Any) -> int:
    """How many bytes this takes in an answer."""
    return len(orjson.dumps(part))


def standalone(definition: str) -> dict[str, Any]:
    """A definition with everything it refers to written out, for the description of the API."""

    def written_out(part: Any) -> Any:
        if isinstance(part, dict) and "$ref" in part:
            return written_out(schema()["definitions"][part["$ref"].rsplit("/", 1)[-1]])
        if isinstance(part, dict):
            return {
                key: written_out(value)
                for key, value in part.items()
                if not (key == "title" and isinstance(value, str))
            }
        if isinstance(part, list):
            return [written_out(each) for each in part]
        return part

    document: dict[str, Any] = written_out(schema()["definitions"][definition])
    return document
