"""Between preview and apply: a look at what the engine says it would do, before it does it.

`pulumi preview --json` knows what the plan here cannot: a new provider that wants to replace every record, a line that
is gone from the stack file or the code and takes a whole cloud along, and what somebody changed there by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from remotegpu_network import desired, guard
from remotegpu_network.desired import Resource
from remotegpu_network.settings import Settings

REPLACES = ("replace", "create-replacement", "delete-replaced", "discard-replaced")
GUARDED = tuple(desired.ZONE_TOKENS.values())
CLOUD_OF = {token.partition(":")[0]: cloud for cloud, token in desired.ZONE_TOKENS.items()}  # package → cloud
NO_CLOUD = "pulumi"  # the stack itself, and providers: they hold nothing
MAY_DIFFER = {
    "comment",
    "remark",
    "description",
    "ttl",
    "proxied",
    "tags",
    "tagsAll",
    "settings",
}  # and it is the same record still


def problems(
    preview: Mapping[str, Any],
    settings: Settings,
    *,
    wanted: Iterable[Resource] = (),
    meant: Collection[tuple[str, str]] = (),
) -> list[str]:
    """Sentences; none if the apply may go on. `preview` is what `pulumi preview --json` printed, `wanted` what the
    stack then has, `meant` type and name of what the export itself takes away: the guard has let that through."""
    return list(_problems(preview, settings, wanted, meant))


def _problems(
    preview: Mapping[str, Any], settings: Settings, wanted: Iterable[Resource], meant: Collection[tuple[str, str]]
) -> Iterator[str]:
    steps = preview.get("steps")
    if not isinstance(steps, list):
        yield "The preview has no steps: it did not run to its end."
        return
    replaced = {step["urn"] for step in steps if step["op"] in REPLACES}
    deleted = {step["urn"] for step in steps if step["op"] == "delete"}
    yield from _other_records(steps)
    if len(replaced) > settings.replaces_at_most:
        kinds = Counter(_type_of(urn) for urn in replaced)
        most = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common(3))
        yield (
            f"{len(replaced)} resources would be replaced ({most}); remotegpu:replaces-at-most is "
            f"{settings.replaces_at_most}. A new major of a provider does that: apply it alone, reviewed."
        )
    for urn in sorted(deleted | replaced):
        if _type_of(urn) in GUARDED:
            yield f"The zone {_name_of(urn)} would be deleted or replaced: that takes every name in it."
    yield from _losses(steps, settings, wanted, meant)


def _losses(
    steps: Sequence[Mapping[str, Any]],
    settings: Settings,
    wanted: Iterable[Resource],
    meant: Collection[tuple[str, str]],
) -> Iterator[str]:
    """In each cloud by itself, and by the guard's limits: a small one must not hide in the size of another."""
    made = Counter(_cloud_of(urn) for urn in {step["urn"] for step in steps if step["op"] in ("create", "import")})
    kept = Counter(each.cloud for each in wanted) - made  # what is not made now was there
    lost: dict[str, list[str]] = {}
    for urn in sorted({step["urn"] for step in steps if step["op"] == "delete"}):
        if _cloud_of(urn) != NO_CLOUD and (_type_of(urn), _name_of(urn)) not in meant:
            lost.setdefault(_cloud_of(urn), []).append(_name_of(urn))
    for cloud, names in lost.items():
        had = kept[cloud] + len(names)
        if guard.is_too_much(len(names), had, settings):
            yield (
                f"{len(names)} of {had} resources in {cloud} would be deleted, {len(names) * 100 / had:.0f} % "
                f"({', '.join(names[:5])}{', …' if len(names) > 5 else ''}), and no change of the export says so: the "
                f"stack file (remotegpu:clouds) or the code has them no longer. {guard.way_out(settings)}"
            )


def _other_records(steps: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The engine imports what has the id and then makes it what is wanted, whatever it was before."""
    imported: set[str] = set()
    for step in steps:
        if step["op"] == "import":
            imported.add(step["urn"])
        elif step["urn"] in imported and step["op"] in ("update", *REPLACES):
            changed = sorted(set(step.get("diffReasons") or ()) - MAY_DIFFER)
            if changed or step["op"] in REPLACES:
                what = ", ".join(changed) or "whole"
                yield (
                    f"{_name_of(step['urn'])} would be imported and its {what} changed: the id in remotegpu:adopt is "
                    f"that of something else. Correct it, or make it what is wanted by hand first."
                )
                imported.discard(step["urn"])


def pending(state: Mapping[str, Any]) -> list[str]:
    """Operations that a cancelled run left open, from `pulumi stack export`: nothing is applied before they are
    looked at."""
    operations = (state.get("deployment") or {}).get("pending_operations") or []
    return [
        f"{each.get('type')} of {each.get('resource', {}).get('urn')} was cut off: see whether the cloud has it, then "
        f"`pulumi refresh` (it asks about each), or `pulumi refresh --clear-pending-creates` if the cloud has none."
        for each in operations
    ]


def _cloud_of(urn: str) -> str:
    package = _type_of(urn).partition(":")[0]
    return CLOUD_OF.get(package, package)


def _type_of(urn: str) -> str:
    return urn.split("::", 3)[2].rpartition("$")[2]


def _name_of(urn: str) -> str:
    return urn.split("::", 3)[3]
