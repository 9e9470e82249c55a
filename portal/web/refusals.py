"""What the rules say, in the language of the page. Services speak English and know of no language.

A service's sentence is its own key, as a text of a page is: `sentences_in` reads the sentences of `portal/services` out
of their source into the catalogue (`babel.cfg` names it), values as placeholders: `There is no machine %(machine_id)s.`
A sentence that was said is recognised by its words, and its values are carried over. One that nobody translated is
shown as it was said; a test finds it first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from babel.messages.mofile import read_mo
from flask_babel import get_babel, get_locale

CONTEXT = "refusal"  # keeps them apart from the texts of the pages
PLACEHOLDER = re.compile(r"%\((\w+)\)s")
END = re.compile(r"\.$|\w: %\(\w+\)s$")  # a reason may follow a colon as the last thing
ANY, ONE_SENTENCE = r"(.+?)", r"((?:(?!\. [A-Z]).)+?)"  # what a value may be
NOT_FOR_PEOPLE = ("log.", "RuntimeError", "re.")  # calls whose texts nobody reads on a page

# -- said on a page


def in_language(sentence: str, words: Mapping[str, Any] | None = None) -> str:
    """The sentence in the reader's language. `words` are the words for states, which stand in it as values."""
    for known in _known(str(get_locale())):
        if (values := known.values_in(sentence)) is not None:
            return known.translated % {name: _value(name, text, words or {}) for name, text in values.items()}
    return _piecewise(sentence, words)


def _piecewise(text: str, words: Mapping[str, Any] | None) -> str:
    """Several reasons in one message, as `CannotAllocate` has them: each by itself."""
    pieces = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    return text if len(pieces) == 1 else " ".join(in_language(piece, words) for piece in pieces)


def _value(name: str, text: str, words: Mapping[str, Any]) -> str:
    if is_nested(name):
        return in_language(text, words)
    if name.endswith("roles"):
        return "、".join(str(words.get(word, word)) for word in text.split(" and "))
    return (
        str(words.get(text, text))
        if name.endswith(("state", "enter", "seen", "role", "noun", "kind", "part"))
        else text
    )


def is_nested(name: str) -> bool:
    """Whether the value with this name is a sentence itself."""
    return any(word in name for word in ("reason", "message", "why", "said"))


@dataclass(frozen=True)
class Known:
    """A sentence of the catalogue, and how to recognise it."""

    pattern: re.Pattern[str]
    names: tuple[str, ...]
    translated: str

    @classmethod
    def of(cls, source: str, translated: str) -> Known:
        parts = PLACEHOLDER.split(source)  # text, name, text, name, …, text
        parts[::2] = [re.escape(text.replace("%%", "%")) for text in parts[::2]]
        names = tuple(parts[1::2])
        parts[1::2] = [ANY if is_nested(name) else ONE_SENTENCE for name in names]
        return cls(re.compile("".join(parts), re.DOTALL), names, translated)

    def values_in(self, sentence: str) -> dict[str, str] | None:
        found = self.pattern.fullmatch(sentence)
        return None if found is None else dict(zip(self.names, found.groups(), strict=True))


@cache
def _known(locale: str) -> tuple[Known, ...]:
    """The sentences of this language, those with the most words of their own first."""
    known = []
    contexts = (CONTEXT, CONTEXT.encode())  # Babel 2.18 leaves it as bytes
    for folder in get_babel().translation_directories:
        file = Path(folder) / locale / "LC_MESSAGES" / "messages.mo"
        if file.exists():
            with file.open("rb") as content:
                known += [entry for entry in read_mo(content) if entry.id and entry.context in contexts]
    known.sort(key=lambda entry: len(PLACEHOLDER.sub("", str(entry.id))), reverse=True)
    return tuple(Known.of(str(entry.id), str(entry.string)) for entry in known)


# -- read out of the services


def sentences_in(file: IO[bytes], *_how: Any, **_options: Any) -> Iterator[tuple[int, str, Any, list[str]]]:
    """Babel's extraction method: every sentence in a Python file that a person may get to read."""
    tree = ast.parse(file.read())
    unspoken = {id(node) for node in _unspoken(tree)}
    for node in _spoken(tree, unspoken):
        text = _text_of(node)
        if _is_sentence(text):
            yield node.lineno, "pgettext", (CONTEXT, text), []


def _spoken(node: ast.AST, unspoken: set[int]) -> Iterator[ast.Constant | ast.JoinedStr]:
    """The string literals, each whole, in the order of the file."""
    if id(node) in unspoken:
        return
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _spoken(child, unspoken)


def _unspoken(tree: ast.AST) -> Iterator[ast.AST]:
    """Docstrings, the log, and errors of the programmer."""
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith(NOT_FOR_PEOPLE)):
            yield node


def _text_of(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value).replace("%", "%%")
    return "".join(
        f"%({_name_of(part.value)})s" if isinstance(part, ast.FormattedValue) else _text_of(part)
        for part in node.values
        if isinstance(part, (ast.FormattedValue, ast.Constant))  # it holds nothing else
    )


def _name_of(expression: ast.expr) -> str:
    """`machine.name` → `machine_name`."""
    return "_".join(re.findall(r"[A-Za-z]\w*", ast.unparse(expression)))[:40]


def _is_sentence(text: str) -> bool:
    """With a beginning and an end, and more words in it than values."""
    words = re.findall(r"[A-Za-z']+", PLACEHOLDER.sub("", text))
    return len(words) > 1 and (text[0].isupper() or text[0] == "%") and END.search(text) is not None
