"""An export that lost much, or all, is more likely a fault than a wish: it stops here, with an explanation.

An outage or a restored backup of the portal must not delete the names of a whole fleet. Deleting on purpose is still
possible: raise remotegpu:max-loss-percent for that one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remotegpu_network import document as documents
from remotegpu_network.document import BadDocument, Document
from remotegpu_network.settings import FIRST, Settings


class Refused(Exception):
    """This export is not applied. The message says what is lost and how to go on if that is meant."""


@dataclass(frozen=True)
class Baseline:
    """What the last apply had: what kind → keys. Of the outputs of a stack only the numbers are known, and no keys."""

    generation: int
    keys: Mapping[str, frozenset[str]]
    counts: Mapping[str, int]
    machines: int


def baseline(text: bytes | str) -> Baseline:
    """From the export that was applied last, or from `pulumi stack output --json`. Raises BadDocument."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise BadDocument([f"the last applied export is no JSON document: {error}"]) from None
    if isinstance(raw, dict) and isinstance(raw.get("network"), dict):
        return _of_outputs(raw["network"])
    return of_document(documents.parse(raw))


def of_document(document: Document) -> Baseline:
    keys = {
        "names": frozenset(each.key for each in document.names),
        "openings": frozenset(each.key for each in document.openings),
    }
    return Baseline(
        document.generation, keys, {kind: len(found) for kind, found in keys.items()}, len(document.machines)
    )


def _of_outputs(network: Mapping[str, Any]) -> Baseline:
    try:
        counts = network["counts"]
        return Baseline(
            int(network["generation"]), {}, {k: int(counts[k]) for k in ("names", "openings")}, int(counts["machines"])
        )
    except (KeyError, TypeError, ValueError):
        raise BadDocument(["the outputs of the last apply have no generation and counts"]) from None


def check(document: Document, settings: Settings, before: Baseline | None) -> None:
    """`before` None: nothing was ever applied, and the stack says so by remotegpu:applied = first. Raises Refused."""
    if problems := list(_problems(document, settings, before)):
        problems.append("Nothing was changed.")
        raise Refused("\n".join(problems))


def _problems(document: Document, settings: Settings, before: Baseline | None) -> Iterator[str]:
    if not document.machines and not document.names and not document.openings:
        yield (
            "The export is empty. A portal that was reset, or whose database was not restored, looks like this. "
            "If the fleet is really gone, use `pulumi destroy`."
        )
    if before is None:
        return
    if document.generation < before.generation:
        yield (
            f"The export is of generation {document.generation}, the last apply was of {before.generation}: an older "
            f"pipeline run came late, or the portal was restored from a backup. Take a new export."
        )
    for kind in ("names", "openings"):
        yield from _loss(kind, document, settings, before)


def _loss(kind: str, document: Document, settings: Settings, before: Baseline) -> Iterator[str]:
    had = before.counts[kind]
    now = {each.key for each in (document.names if kind == "names" else document.openings)}
    lost = sorted(before.keys[kind] - now) if kind in before.keys else []
    count = len(lost) if kind in before.keys else max(0, had - len(now))
    if count <= settings.may_lose or count * 100 <= settings.max_loss_percent * had:
        return
    some = f" ({', '.join(lost[:5])}{', …' if len(lost) > 5 else ''})" if lost else ""
    yield (
        f"{count} of {had} {kind} are gone since the last apply, {count * 100 / had:.0f} %{some}; "
        f"remotegpu:max-loss-percent is {settings.max_loss_percent:g}. If that is meant, raise it for this one run: "
        f"pulumi config set remotegpu:max-loss-percent 100"
    )


def last_applied(settings: Settings, folder: Path) -> Baseline | None:
    """Raises Refused, if the file that the stack names is not there: not knowing is no reason to go on."""
    if settings.applied == FIRST:
        return None
    file = folder / settings.applied
    try:
        text = file.read_bytes()
    except OSError as error:
        raise Refused(
            f"remotegpu:applied names {settings.applied}, which cannot be read ({error.strerror}). Fetch the last "
            f"applied export, or the output of `pulumi stack output --json`; for the first apply set it to {FIRST}."
        ) from None
    return baseline(text)
