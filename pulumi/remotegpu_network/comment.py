"""The comment on a change, one a stack: what stops it, what the engine would do, what the portal's export changes.

The engine's part is what a change of this folder does (a provider's new version, a setting); the plan compares two
exports by the code of the change, and so shows only what the portal's people did. Fields are named, values are not:
a comment is read by more people than the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from remotegpu_network import plan
from remotegpu_network.plan import SIGNS, Plan, What

AT_MOST = 20_000  # characters of each part: a comment may have 65,536
NO_PREVIEW = "its preview did not run, or not to its end: the log of the run says why"
OPERATIONS = {
    "delete": What.DELETE,
    "replace": What.REPLACE,
    "create-replacement": What.REPLACE,
    "delete-replaced": What.REPLACE,
    "discard-replaced": What.REPLACE,
    "update": What.CHANGE,
    "create": What.CREATE,
    "import": What.ADOPT,
    "import-replacement": What.ADOPT,
}  # what else there is (same, refresh, read) changes nothing in the cloud


def markdown(stack: str, *, refused: str, preview: Any, planned: tuple[str, Plan] | None) -> str:
    """`refused` is empty where nothing stops it, `preview` what `pulumi preview --json` printed, if it is whole;
    `planned` the title and the plan, if there is one."""
    parts = [marker(stack), f"### Network, stack {stack}"]
    if refused:
        parts.append("**This would not be applied**\n\n" + _fenced(refused))
    parts.append(_folded("Engine, refreshed from the cloud", *_engine(preview)))
    if planned is not None:
        title, made = planned
        parts.append(_folded(f"Export of {title}", plan.summary(made), plan.text(made)))
    return "\n\n".join(parts) + "\n"


def marker(stack: str) -> str:
    """The first line: by it a later run finds the comment that it has to write anew."""
    return f"<!-- remotegpu-network {stack} -->"


def _folded(title: str, summary: str, body: str) -> str:
    """The sum in sight, the lines below it."""
    if not body.strip():
        return f"**{title}**: {summary}"
    return f"**{title}**: {summary}\n\n<details><summary>lines</summary>\n\n{_fenced(body)}\n\n</details>"


def _fenced(text: str) -> str:
    """As it is, whatever it says: nobody is called by it, and it is never longer than a comment may be."""
    text = text.replace("```", "'''")
    if len(text) > AT_MOST:
        text = text[:AT_MOST].rsplit("\n", 1)[0] + "\n…"
    return f"```\n{text}\n```"


def _engine(preview: Any) -> tuple[str, str]:
    steps = preview.get("steps") if isinstance(preview, dict) else None
    if not isinstance(steps, list):
        return NO_PREVIEW, "\n".join(_errors(preview))
    found: dict[str, tuple[What, list[str]]] = {}
    for step in steps:
        what = OPERATIONS.get(step["op"])
        if what is not None and step["urn"] not in found:
            fields = sorted(step.get("detailedDiff") or step.get("diffReasons") or ())
            found[step["urn"]] = (what, [] if what is What.CREATE else fields)
    places = list(What)
    rows = sorted(found.items(), key=lambda row: (places.index(row[1][0]), row[0]))
    counts = Counter(what for what, _ in found.values())
    told = ", ".join(f"{counts[what]} to {what.value}" for what in What if counts[what])
    lines = [_line(urn, what, fields) for urn, (what, fields) in rows]
    return told or "nothing to do", "\n".join([*lines, *_errors(preview)])


def _line(urn: str, what: What, fields: list[str]) -> str:
    _, _, kinds, name = urn.split("::", 3)
    kind = kinds.rpartition("$")[2]
    return f"{SIGNS[what]} {name}  {kind}  ({what.value})" + (f"  {', '.join(fields)}" if fields else "")


def _errors(preview: Any) -> Iterator[str]:
    said: list[Mapping[str, Any]] = preview.get("diagnostics") or [] if isinstance(preview, dict) else []
    yield from (str(each.get("message", "")).strip() for each in said if each.get("severity") == "error")
