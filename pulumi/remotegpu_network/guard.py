"""An export that lost much, or all, is more likely a fault than a wish: it stops here, with an explanation.

An outage or a restored backup of the portal must not delete the names of a whole fleet. Deleting on purpose is still
possible: raise remotegpu:max-loss-percent for that one run. Only what lies in the stack's clouds is counted: what
another stack loses is that one's matter, and must not hide in its size. What belonged to a lease that has ended is no
loss, however many end at once: but only the export's own word says that one has, a lease that it does not know is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remotegpu_network import document as documents
from remotegpu_network.document import BadDocument, Document
from remotegpu_network.settings import FIRST, Settings


class Refused(Exception):
    """This export is not applied. The message says what is lost and how to go on if that is meant."""


NAMES, OPENINGS = "names", "openings"
BOTH = "names and openings"


@dataclass(frozen=True)
class Baseline:
    """What the stack's clouds had at the last apply: how many of each kind, and which (key → lease), where an export
    tells it."""

    generation: int
    counts: Mapping[str, int]
    rows: Mapping[str, Mapping[str, str | None]]


def baseline(text: bytes | str, settings: Settings) -> Baseline:
    """From the export that was applied last, or from `pulumi stack output --json`. Raises BadDocument."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise BadDocument([f"the last applied export is no JSON document: {error}"]) from None
    if isinstance(raw, dict) and isinstance(raw.get("network"), dict):
        return _of_outputs(raw["network"])
    return of_document(documents.parse(raw), settings)


def of_document(document: Document, settings: Settings) -> Baseline:
    return Baseline(document.generation, own_counts(document, settings), _own(document, settings))


def own_counts(document: Document, settings: Settings) -> dict[str, int]:
    """What of the document is this stack's, in numbers; stack.py writes them into the outputs."""
    return {kind: len(found) for kind, found in _own(document, settings).items()}


def _own(document: Document, settings: Settings) -> dict[str, dict[str, str | None]]:
    """Key → lease of what lies in zones and groups of the stack's clouds."""
    clouds, zones, groups = settings.clouds, document.zones, document.groups
    return {
        NAMES: {each.key: each.lease for each in document.names if zones[each.zone].cloud in clouds},
        OPENINGS: {each.key: each.lease for each in document.openings if groups[each.group].cloud in clouds},
    }


def _of_outputs(network: Mapping[str, Any]) -> Baseline:
    """Outputs from before `own` say how much was whose only for names and openings together."""
    try:
        if "own" in network:
            counts = {kind: int(network["own"][kind]) for kind in (NAMES, OPENINGS)}
        else:
            all_of_them = sum(int(network["counts"][kind]) for kind in (NAMES, OPENINGS))
            counts = {BOTH: all_of_them - sum(map(int, network.get("left_out", {}).values()))}
        return Baseline(int(network["generation"]), counts, {})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadDocument(["the outputs of the last apply have no generation and counts"]) from None


def check(document: Document, settings: Settings, before: Baseline | None) -> None:
    """`before` None: nothing was ever applied, and the stack says so by remotegpu:applied = first. Raises Refused."""
    if problems := list(_problems(document, settings, before)):
        problems.append("Nothing was changed.")
        raise Refused("\n".join(problems))


def _problems(document: Document, settings: Settings, before: Baseline | None) -> Iterator[str]:
    is_empty = not document.machines and not document.names and not document.openings
    if is_empty and (before is None or any(before.counts.values())):
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
    own = _own(document, settings)
    for kind, had in before.counts.items():
        if kind in before.rows:
            gone = {key: lease for key, lease in before.rows[kind].items() if key not in own[kind]}
            lost = sorted(key for key, lease in gone.items() if lease not in document.ended)
            yield from _loss(kind, had - len(gone) + len(lost), len(lost), lost, settings)
        else:
            has = sum(map(len, own.values())) if kind == BOTH else len(own[kind])
            yield from _loss(kind, had, max(0, had - has), [], settings)


def _loss(kind: str, had: int, count: int, lost: Sequence[str], settings: Settings) -> Iterator[str]:
    """`lost`: the keys, where they are known."""
    if not is_too_much(count, had, settings):
        return
    some = f" ({', '.join(lost[:5])}{', …' if len(lost) > 5 else ''})" if lost else ""
    yield (
        f"{count} of {had} {kind} are gone since the last apply, {count * 100 / had:.0f} %{some}; {way_out(settings)}"
    )


def is_too_much(count: int, had: int, settings: Settings) -> bool:
    """Whether `count` of what there was may go at once; the gate asks the same."""
    return count > settings.may_lose and count * 100 > settings.max_loss_percent * had


def way_out(settings: Settings) -> str:
    return (
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
    return baseline(text, settings)
