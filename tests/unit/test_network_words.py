"""The words of the stacks' code about names and records are those that the pages know how to translate."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from portal.web import network_words

PACKAGE = Path(__file__).parents[2] / "pulumi" / "remotegpu_network"
REFUSALS = {"BadName", "BadRecord"}


def said_in(file: Path) -> Iterator[str]:
    """Every sentence with which something is refused there, without the names of its values."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS:
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


def test_every_word_about_a_name_or_a_record_can_be_translated() -> None:
    said = {sentence for name in ("names.py", "records.py") for sentence in said_in(PACKAGE / name)}
    assert len(said) > 20
    assert {re.sub(r"%\(\w+\)s", "{}", known) for known in network_words.SENTENCES} == said
