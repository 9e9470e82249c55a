"""Every text of a page is there in each language, with the same placeholders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

WEB = Path(__file__).parents[2] / "portal" / "web"
METHODS = [("**.py", "python"), ("templates/**.html", "jinja2")]
KEYWORDS = {"_": None, "gettext": None, "lazy_gettext": None, "ngettext": (1, 2)}
PLACEHOLDER = re.compile(r"%\((\w+)\)s")


def texts_of_the_pages() -> set[str]:
    found = extract_from_dir(str(WEB), METHODS, keywords=KEYWORDS)
    return {message[0] if isinstance(message, tuple) else message for _file, _line, message, _notes, _context in found}


def catalogue(locale: str) -> Catalog:
    with (WEB / "translations" / locale / "LC_MESSAGES" / "messages.po").open("rb") as file:
        return read_po(file, locale=locale)


def first(text: str | tuple[str, ...] | list[str]) -> str:
    return text if isinstance(text, str) else text[0]


@pytest.mark.parametrize("locale", ["zh_Hans_CN"])
def test_every_text_of_a_page_is_translated_and_no_other_is_kept(locale: str) -> None:
    translated = {first(message.id) for message in catalogue(locale) if message.id and first(message.string)}
    assert translated == texts_of_the_pages()


@pytest.mark.parametrize("locale", ["zh_Hans_CN"])
def test_a_translation_has_the_placeholders_of_its_text(locale: str) -> None:
    wrong = [
        first(message.id)
        for message in catalogue(locale)
        if message.id and set(PLACEHOLDER.findall(first(message.id))) != set(PLACEHOLDER.findall(first(message.string)))
    ]
    assert wrong == []
