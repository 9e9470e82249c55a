"""Every text of a page is there in each language, with the same placeholders; so is every sentence of a service.

After a change: `pybabel extract -F portal/web/babel.cfg -k lazy_gettext -k pgettext:1c,2 portal` shows what there is.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.frontend import parse_mapping_cfg
from babel.messages.pofile import read_po

PORTAL = Path(__file__).parents[2] / "portal"
WEB = PORTAL / "web"
KEYWORDS = {"_": None, "gettext": None, "lazy_gettext": None, "ngettext": (1, 2), "pgettext": ((1, "c"), 2)}
PLACEHOLDER = re.compile(r"%\((\w+)\)s")


def texts_of_the_pages() -> set[str]:
    with (WEB / "babel.cfg").open() as file:
        methods, options = parse_mapping_cfg(file)  # type: ignore[no-untyped-call]  # Babel has no types here
    found = extract_from_dir(str(PORTAL), methods, options, keywords=KEYWORDS)
    return {first(message) for _file, _line, message, _notes, _context in found}


def catalogue(locale: str) -> Catalog:
    with (WEB / "translations" / locale / "LC_MESSAGES" / "messages.po").open("rb") as file:
        return read_po(file, locale=locale)


def first(text: str | tuple[str, ...] | list[str] | None) -> str:
    return text if isinstance(text, str) else (text or [""])[0]


@pytest.mark.parametrize("locale", ["zh_Hans_CN"])
def test_every_text_of_a_page_is_translated_and_no_other_is_kept(locale: str) -> None:
    translated = {first(message.id) for message in catalogue(locale) if message.id and first(message.string)}
    assert sorted(translated ^ texts_of_the_pages()) == []


@pytest.mark.parametrize("locale", ["zh_Hans_CN"])
def test_a_translation_has_the_placeholders_of_its_text(locale: str) -> None:
    wrong = [
        first(message.id)
        for message in catalogue(locale)
        if message.id and set(PLACEHOLDER.findall(first(message.id))) != set(PLACEHOLDER.findall(first(message.string)))
    ]
    assert wrong == []
