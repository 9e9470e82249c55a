"""Other versions of the agent, made from the one that is built: what an upgrade brings."""

from __future__ import annotations

import json
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "build" / "remotegpu-agent.pyz"
PACKAGE = "site-packages/remotegpu_agent"
SHEBANG = b"#!/usr/bin/python3 -I\n"


def version(path: Path, wanted: str, *, changes: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """Write the built agent to `path` as version `wanted`; `changes` are module → (text, other text) besides."""
    edits = {"__init__.py": ('__version__ = "', f'__version__ = "{wanted}"  # was "'), **(changes or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(PROGRAM) as built, path.open("wb") as file:
        file.write(SHEBANG)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
            for entry in built.infolist():
                made.writestr(entry, _edited(entry.filename, built.read(entry), edits))
    path.chmod(0o755)
    return path


def _edited(name: str, content: bytes, edits: Mapping[str, tuple[str, str]]) -> bytes:
    if name == "environment.json":  # what it is unpacked under
        return json.dumps(json.loads(content) | {"build_id": uuid.uuid4().hex}).encode()
    folder, _, module = name.rpartition("/")
    if folder != PACKAGE or module not in edits:
        return content
    text, other = edits[module]
    assert text in content.decode(), f"{name} does not say {text!r} any more"
    return content.decode().replace(text, other).encode()
