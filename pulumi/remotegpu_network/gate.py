"""Between preview and apply: a look at what the engine says it would do, before it does it.

`pulumi preview --json` knows what the plan here cannot: a new provider that wants to replace every record, and what
somebody changed in the cloud by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from remotegpu_network import desired
from remotegpu_network.settings import Settings

REPLACES = ("replace", "create-replacement", "delete-replaced", "discard-replaced")
GUARDED = tuple(desired.ZONE_TOKENS.values())
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


def problems(preview: Mapping[str, Any], settings: Settings) -> list[str]:
    """Sentences; none if the apply may go on. `preview` is what `pulumi preview --json` printed."""
    return list(_problems(preview, settings))


def _problems(preview: Mapping[str, Any], settings: Settings) -> Iterator[str]:
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


def _type_of(urn: str) -> str:
    return urn.split("::", 3)[2].rpartition("$")[2]


def _name_of(urn: str) -> str:
    return urn.split("::", 3)[3]
