"""What the stacks have applied, as CI tells it: one row for each word, and the view of each cloud that follows.

A stack posts its outputs after every apply; the document is known by its checksum, since the portal has written it
(network_export.py). What that means for the leases is in network_posts.py. Nothing here speaks to a cloud: what
somebody changed there by hand, only the stack's own drift check sees.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.errors import Conflict, Invalid, NotFound
from portal.models import AppliedNetwork, NetworkExport
from portal.models.states import DNS_CLOUDS
from portal.services import audit, config, events, network, network_export
from portal.services.actors import Actor

STACK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")
MOST_BYTES = 256 * 1024  # of the outputs of one stack
MOST_AHEAD = 1_000_000  # generations that a restored portal may be behind a stack
KEEP_COUNT = 500  # words of one stack
NOTHING = -1  # instead of a generation
FOR_PEOPLE = ("reason", "ends_at", "purpose", "previous_keys")  # of a row; no cloud has them


# Take in


def note(
    stack: str,
    outputs: Mapping[str, Any],
    *,
    by: Actor,
    outcome: str = "applied",
    reason: str | None = None,
    now: datetime | None = None,
) -> tuple[AppliedNetwork, bool]:
    """Write down what a stack says, and whether that is news: the same word said again changes nothing.

    Raises Invalid, or Conflict for an apply that came after a later one: its pipeline was overtaken.
    """
    told = _checked(stack, outputs, outcome)
    with atomic():
        network.hold()
        before = newest(stack)
        if outcome == "failed" and before is not None:  # before it had an export: the stack stands where it stood
            told["generation"] = told["generation"] or before.generation
        if before is not None and _is_same(before, told, outcome) and not _has_failed_since(before):
            return before, False
        if before is not None and told["generation"] < before.generation:
            raise Conflict(
                f"{stack} has applied generation {before.generation} already; {told['generation']} came late.",
                code="stale_apply",
            )
        was = _hindmost()
        export = network_export.find(told["checksum"]) if outcome == "applied" else None
        row = AppliedNetwork.create(
            stack=stack,
            outputs=dict(outputs),
            outcome=outcome,
            reason=reason,
            export=export,
            at=now or utcnow(),
            posted_by=by.user,
            **told,
        )
        network.catch_up(told["generation"])
        if outcome == "applied":
            _count_hindmost(was, row.at)
        audit.record(
            f"network.{outcome}", row, by=by, stack=stack, generation=told["generation"], is_known=export is not None,
            reason=reason,
        )  # fmt: skip
        events.write("network.applied", resource_id=row.id)
    return row, True


def _count_hindmost(was: int, at: datetime) -> None:
    now_at = _hindmost()
    if now_at != was:
        network.applied(is_everything=now_at in (NOTHING, network.state().generation), at=at)


def _is_same(before: AppliedNetwork, told: Mapping[str, Any], outcome: str) -> bool:
    said = (before.outcome, before.generation, before.checksum, sorted(before.clouds))
    return said == (outcome, told["generation"], told["checksum"], sorted(told["clouds"]))


def _has_failed_since(before: AppliedNetwork) -> bool:
    """Then the same apply is news: the failure is over."""
    later = (AppliedNetwork.stack == before.stack) & (AppliedNetwork.id > before.id)
    return bool(AppliedNetwork.select().where(later).exists())


def _checked(stack: str, outputs: Mapping[str, Any], outcome: str) -> dict[str, Any]:
    """The columns of what a stack said."""
    faults: dict[str, list[str]] = {}
    if not STACK.fullmatch(stack):
        faults["stack"] = ["Name the stack: letters, digits, '.', '_' and '-'."]
    if len(json.dumps(outputs, ensure_ascii=False).encode()) > MOST_BYTES:
        faults["body"] = [f"The outputs of a stack are at most {MOST_BYTES} bytes."]
    said = outputs.get("network") or {}
    if outcome == "applied" and not CHECKSUM.fullmatch(str(said.get("checksum") or "")):
        faults["network.checksum"] = ["Post the outputs of the stack as `pulumi stack output --json` prints them."]
    if outcome == "applied" and not said.get("clouds"):
        faults["network.clouds"] = ["A stack tells of which clouds it is; this one is older than that. Update pulumi/."]
    ours = config.current().network_environment
    if said.get("environment", ours) != ours:
        faults["network.environment"] = [f"This portal is of {ours}. Post to the portal that wrote the export."]
    if int(said.get("generation") or 0) > network.state().generation + MOST_AHEAD:
        faults["network.generation"] = ["No export of this portal can have had this generation."]
    unknown = sorted(set(said.get("clouds") or ()) - set(DNS_CLOUDS))
    if unknown:
        faults["network.clouds"] = [f"Choose from {', '.join(DNS_CLOUDS)}."]
    if faults:
        raise Invalid(faults)
    return {
        "environment": ours,
        "clouds": sorted(set(said.get("clouds") or ())),
        "generation": int(said.get("generation") or 0),
        "checksum": said.get("checksum"),
        "counts": said.get("counts") or {},
    }


# Taken down


def forget(stack: str, *, by: Actor, reason: str, although_wanted: bool = False) -> AppliedNetwork:
    """It was taken down (`pulumi destroy`): nothing that it made is there any more, and no apply of it is waited for.

    What it applies later makes it known again. Raises Invalid, NotFound, and Conflict where names or openings are
    wanted in a cloud that no other stack has, unless they are to wait for one.
    """
    if not reason.strip():
        raise Invalid({"reason": ["Say how you know; the trail keeps it."]})
    with atomic():
        network.hold()
        there = {row.stack: row for row in last_words()}
        if stack not in there:
            raise NotFound(f"There is no stack {stack}.")
        before, was = newest(stack), _hindmost()
        clouds = (before or there[stack]).clouds
        if not although_wanted:
            _refuse_wanted(stack, clouds)
        row: AppliedNetwork = AppliedNetwork.create(
            stack=stack,
            environment=config.current().network_environment,
            clouds=clouds,
            generation=there[stack].generation,
            outcome="applied",
            reason=reason.strip(),
            posted_by=by.user,
        )
        _count_hindmost(was, row.at)
        audit.record("network.stack_gone", row, by=by, stack=stack, clouds=clouds, reason=reason)
        events.write("network.stack_gone", resource_id=row.id)
    return row


def _refuse_wanted(stack: str, clouds: Sequence[str]) -> None:
    others = {cloud for row in newest_of_each() if row.stack != stack for cloud in row.clouds}
    wanted = contents_of(network_export.body(utcnow()).rows).rows
    counts = {cloud: sum(len(rows) for (_, place), rows in wanted.items() if place == cloud) for cloud in clouds}
    needed = sorted(cloud for cloud, count in counts.items() if count and cloud not in others)
    if needed:
        listed, count = ", ".join(needed), sum(counts[cloud] for cloud in needed)
        raise Conflict(
            f"No other stack has {listed}, where {count} names and openings are wanted. Remove them first, or say that "
            "they are to wait for another stack.",
            code="stack_needed",
        )


# Look


def newest(stack: str) -> AppliedNetwork | None:
    """What it has applied last."""
    of_stack = AppliedNetwork.select().where(AppliedNetwork.stack == stack, AppliedNetwork.outcome == "applied")
    row: AppliedNetwork | None = of_stack.order_by(AppliedNetwork.id.desc()).first()
    return row


def newest_id() -> int:
    """Of all words of all stacks; 0 where none was ever told."""
    found: int | None = AppliedNetwork.select(peewee.fn.MAX(AppliedNetwork.id)).scalar()
    return found or 0


def newest_export(stack: str) -> NetworkExport:
    """What this stack has applied last, for its next guard and plan. Raises NotFound where it is not known."""
    row = newest(stack)
    if row is None or row.is_gone:
        raise NotFound(f"{stack} has never told what it applied.")
    export: NetworkExport | None = NetworkExport.get_or_none(NetworkExport.id == row.export_id)
    if export is None:
        raise NotFound(f"{stack} has applied a document that is not kept: a step between two exports, or an old one.")
    return export


def newest_of_each() -> list[AppliedNetwork]:
    """The last apply of every stack that is there, by its name."""
    return [row for row in _last_of_each(AppliedNetwork.outcome == "applied") if not row.is_gone]


def last_words() -> list[AppliedNetwork]:
    """What every stack that is there has told last, by its name: also one that has only failed so far."""
    return [row for row in _last_of_each() if not row.is_gone]


def _last_of_each(*where: Any) -> list[AppliedNetwork]:
    ours = AppliedNetwork.environment == config.current().network_environment
    last = AppliedNetwork.select(peewee.fn.MAX(AppliedNetwork.id)).where(ours, *where).group_by(AppliedNetwork.stack)
    return list(AppliedNetwork.select().where(AppliedNetwork.id << last).order_by(AppliedNetwork.stack))


def _hindmost() -> int:
    """The oldest generation that some cloud is at, by the stack that has it now; NOTHING where no stack has any."""
    rows = sorted(newest_of_each(), key=lambda row: row.id)
    of_cloud: dict[str, int] = {cloud: row.generation for row in rows for cloud in row.clouds}
    return min(of_cloud.values(), default=NOTHING)


def search(*, stack: str | None = None) -> peewee.ModelSelect[AppliedNetwork]:
    """What was told, newest first."""
    rows = AppliedNetwork.select().order_by(AppliedNetwork.id.desc())
    return rows if stack is None else rows.where(AppliedNetwork.stack == stack)


# The view of each cloud


@dataclass(frozen=True)
class Contents:
    """What a document says, by what is asked of it: (kind, cloud, lease's key) → words, (kind, cloud) → key and row."""

    of_leases: Mapping[tuple[str, str, str], frozenset[str]]
    rows: Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class View:
    """What a cloud was last brought to, and by which stack. `contents` None: a document that is not known.

    `is_gone`: that stack was taken down, and no other has the cloud; nothing is there.
    """

    cloud: str
    stack: str
    generation: int
    at: datetime
    contents: Contents | None
    is_gone: bool = False

    def words_of(self, kind: str, lease_key: str) -> frozenset[str] | None:
        """Of its rows; None where it is not known what was applied."""
        if self.contents is None:
            return None
        return self.contents.of_leases.get((kind, self.cloud, lease_key), frozenset())


def views() -> dict[str, View]:
    """Cloud → what the stack that has it applied last; one that is gone has only what no other has."""
    found: dict[str, View] = {}
    rows = _last_of_each(AppliedNetwork.outcome == "applied")
    for row in sorted(rows, key=lambda each: (not each.is_gone, each.id)):
        contents = None if row.export_id is None else _contents(row.checksum)
        if row.is_gone:
            contents = Contents({}, {})
        for cloud in row.clouds:
            found[cloud] = View(cloud, row.stack, row.generation, row.at, contents, row.is_gone)
    return found


@lru_cache(maxsize=8)
def _contents(checksum: str) -> Contents:
    """What has this checksum never changes, so it is read once."""
    return contents_of(network_export.content_of(NetworkExport.get(NetworkExport.checksum == checksum)))


def contents_of(document: Mapping[str, Any]) -> Contents:
    of_leases: dict[tuple[str, str, str], set[str]] = {}
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for kind, cloud, row in _placed(document):
        rows.setdefault((kind, cloud), {})[row["key"]] = row
        if row["lease"] is not None:
            of_leases.setdefault((kind, cloud, row["lease"]), set()).add(word_of(row))
    return Contents({place: frozenset(words) for place, words in of_leases.items()}, rows)


def word_of(row: Mapping[str, Any]) -> str:
    """A word for the row and all that a cloud has of it: its key, which never changes, and what does."""
    told = json.dumps(of_clouds(row), sort_keys=True, ensure_ascii=False)
    return f"{row['key']} {hashlib.sha256(told.encode()).hexdigest()[:16]}"


def key_in(word: str) -> str:
    return word.partition(" ")[0]


def of_clouds(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a stack makes of it."""
    return {name: value for name, value in row.items() if name not in FOR_PEOPLE}


def _placed(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every name and opening with the grant that it stands for and its cloud."""
    for kind, entries, place, places in (
        ("name", "names", "zone", "zones"),
        ("security_group", "openings", "group", "groups"),
    ):
        clouds = {each["key"]: each["cloud"] for each in document[places]}
        for row in document[entries]:
            yield kind, clouds[row[place]], row


def prune() -> int:
    """Forget old words of each stack; returns how many."""
    gone = 0
    for row in list(AppliedNetwork.select(AppliedNetwork.stack).distinct()):
        stack = row.stack
        kept = AppliedNetwork.select(AppliedNetwork.id).where(AppliedNetwork.stack == stack)
        ids: Sequence[int] = [row.id for row in kept.order_by(AppliedNetwork.id.desc()).limit(KEEP_COUNT)]
        last = newest(stack)
        old = (AppliedNetwork.stack == stack) & AppliedNetwork.id.not_in([*ids, last.id if last else 0])
        with atomic():
            gone += int(AppliedNetwork.delete().where(old).execute())
    return gone
