"""Where a stack stands: what its own outputs say of it, beside what the portal says.

The outputs are the engine's, and name the newest export whose apply was begun. The portal hears of an apply when it is
done, or, where that fails, not at all, and its database can be put back to an older day; but the documents are its own.
So the outputs say which export it was, the portal what stood in it. Where one cannot be true if the other is, nothing
is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from remotegpu_network.document import BadDocument
from remotegpu_network.guard import Refused


class At(Enum):
    """What was applied last: nothing ever; what the portal says, or a step that leads on from there; the newest export
    itself; another document, which the portal may know by its checksum."""

    FIRST = "first"
    TOLD = "told"
    EXPORT = "export"
    OTHER = "other"


class Mark(NamedTuple):
    """By what a document is known. Outputs of long ago have no checksum."""

    generation: int
    checksum: str | None


def of_outputs(outputs: Mapping[str, Any]) -> Mark | None:
    """By `pulumi stack output --json`; None where the state is empty. Raises BadDocument."""
    if not outputs:
        return None
    network = outputs.get("network")
    if not isinstance(network, Mapping) or not isinstance(network.get("generation"), int):
        raise BadDocument(["the outputs of the stack do not say what was applied: is the state another program's?"])
    return Mark(network["generation"], network.get("checksum"))


def of_document(raw: Mapping[str, Any]) -> Mark:
    """Of a document as it was fetched, which is checked elsewhere. Raises BadDocument."""
    if not isinstance(raw.get("generation"), int) or not isinstance(raw.get("checksum"), str):
        raise BadDocument(["a document of the portal has no generation or no checksum"])
    return Mark(raw["generation"], raw["checksum"])


def judge(own: Mark | None, told: Mark | None, newest: Mark, *, stack: str, is_believed: bool) -> At:
    """`own` by the outputs, `told` by the portal, None where there is nothing; `newest` is the export. Raises Refused.

    Read in the order told, own, newest each is as new as the one before it, whatever is applied meanwhile.

    `is_believed`: somebody says that the state is right, although the portal knows of more.
    """
    if told is not None and not is_believed and (own is None or own.generation < told.generation):
        raise Refused(_lost_state(own, told, stack))
    if own is None:
        return At.FIRST
    is_step = told is not None and own.generation == told.generation
    is_other = own.checksum is not None and own.checksum != newest.checksum
    if own.generation > newest.generation or (own.generation == newest.generation and is_other and not is_step):
        raise Refused(_put_back(own, newest, stack))
    if own.checksum == newest.checksum:
        return At.EXPORT
    return At.TOLD if told is not None and own.generation <= told.generation else At.OTHER


def _lost_state(own: Mark | None, told: Mark, stack: str) -> str:
    has = "is empty" if own is None else f"is of generation {own.generation}"
    return (
        f"The state of {stack} {has}, but the portal was told that it has applied generation {told.generation}: a "
        f"wrong or lost backend looks like this, and what is not in the state would be made a second time. Set "
        f"PULUMI_BACKEND_URL right, or bring the state back. If it is meant, once and by hand: "
        f"BELIEVE_STATE={stack} ci/network.sh apply {stack}\nNothing was changed."
    )


def _put_back(own: Mark, newest: Mark, stack: str) -> str:
    return (
        f"The export is of generation {newest.generation}, but by its own outputs {stack} has been brought to another "
        f"one, of generation {own.generation}: the portal's database was put back without a word, or PORTAL_URL is "
        f'another portal. What was made since would be deleted. Stop the portal, `python -m portal freeze "restored '
        f'from …"`, start it, compare, thaw: docs/network.md, "The portal was put back".\nNothing was changed.'
    )
