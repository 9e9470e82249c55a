"""One action from a page: done and said, or refused and said why. Where it leads afterwards is the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flask import flash, request
from peewee import ModelSelect

from portal.api.paging import MAX_PAGE, page_of
from portal.errors import Error, Invalid
from portal.web.frame import told

PAGE_SIZE = 20


@dataclass
class Outcome:
    """True once the action is done, False if a rule refused it."""

    is_done: bool = False

    def __bool__(self) -> bool:
        return self.is_done


@contextmanager
def acting(done: str) -> Iterator[Outcome]:
    """Say `done` when the block ends well, or the reason when a rule refuses it."""
    outcome = Outcome()
    try:
        yield outcome
    except Error as error:
        texts = [text for texts in error.fields.values() for text in texts] if isinstance(error, Invalid) else []
        flash(" ".join(told(text) for text in texts or [error.message]), "danger")
    else:
        outcome.is_done = True
        flash(done, "success")


@dataclass(frozen=True)
class Page:
    """A page of a list with the filters it was asked with, for the links to its neighbours."""

    items: list[Any]
    page: int
    page_size: int
    total: int
    filters: dict[str, str]


def page_asked(query: ModelSelect[Any], *filters: str) -> Page:
    """The page of `query` that the address asks for."""
    found = page_of(query, {"page": number_asked(), "page_size": PAGE_SIZE})
    kept = {name: request.args[name] for name in filters if request.args.get(name)}
    return Page(**found, filters=kept)


def number_asked() -> int:
    """The number of the page that the address asks for; nonsense is the first one."""
    asked = request.args.get("page", "1")
    return min(max(int(asked), 1), MAX_PAGE) if asked.isascii() and asked.isdigit() else 1
