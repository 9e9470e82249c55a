"""What drift.yml has found on each host: every task that would change something, with the difference.

The playbook is gpu_hosts.yml in check mode, so what "differs" is said by the roles themselves. This plugin listens, and
at the end says it in a few lines and, with `output`, in a JSON file for each host. A host that could not be looked at,
or not wholly, is "unknown" unless something was found: silence is not agreement.

No secret is in it. A file's content is shown only if everybody on the host may read it; what looks like a password in
such a file is masked; what a task hides (`no_log`, `diff: false`) it hides here as well. Next door: who may see it is
the portal's. Never here: a change of anything.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: drift
type: notification
short_description: What drift.yml has found on each host
description:
  - Says at the end of drift.yml what would be changed on each host, and writes it down. Silent in every other playbook.
options:
  output:
    description: A folder for one JSON file a host. Without it the finding is only said.
    type: path
    env: [{name: REMOTEGPU_DRIFT_OUTPUT}]
"""

PLAYBOOK = "drift.yml"
MOST_CHANGES = 100  # of one host
MOST_DIFF_CHARS = 4_000  # of one change
MOST_CHARS = 20_000  # of all differences of one host
MOST_REASON_CHARS = 500
EVERYBODY_READS = 0o004
HIDDEN = "its content is not shown: not everybody on the host may read it"
CENSORED = "what it is about is a secret"
TOO_MUCH = "left out: there is too much of it"
NOT_SHOWN = (HIDDEN, CENSORED, TOO_MUCH)  # in the place of a difference: the portal's pages have words for each
MASK = "•••"
WHOLE = "remotegpu_drift_is_whole"  # the fact that the last play of all sets
CUT_SHORT = "not all of it was looked at: the run was over before, by what failed on other hosts"

# No two repetitions meet the same characters unbounded: a host's file may be one line of a megabyte.
_SECRET_LINE = re.compile(
    r"(?i)((?:passw(?:or)?d|passphrase|secret|token|credential|api[_-]?key|private[_-]?key)[\w.-]{0,200}"
    r"[\"']?\s*[:=]\s{0,40})(?!\s*$).+"
)
_IN_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]{0,40}://)[^\s/@]*@")
_BEARER = re.compile(r"(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)

Result = Mapping[str, Any]


def masked(text: str) -> str:
    """The text without what looks like a secret."""
    text = _PEM.sub(MASK, text)
    text = _IN_ADDRESS.sub(rf"\1{MASK}@", text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    return _SECRET_LINE.sub(rf"\1{MASK}", text)


def change_of(role: str | None, task: str, arguments: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """One task that would change something, as it is shown."""
    path = result.get("dest") or result.get("path") or arguments.get("dest") or arguments.get("path")
    label = result.get("_ansible_item_label", result.get("item"))
    return {
        "role": role,
        "task": task,
        "item": label[:200] if isinstance(label, str) and label != path else None,
        "path": path if isinstance(path, str) else None,
        "diff": _difference(arguments, result),
    }


def _difference(arguments: Mapping[str, Any], result: Result) -> str | None:
    """`-` is what the host has, `+` what it should have; None where the task tells nothing."""
    if "censored" in result:
        return CENSORED
    found = result.get("diff") or []
    parts = [_part(each, arguments, result) for each in (found if isinstance(found, list) else [found])]
    text = "\n".join(part for part in parts if part)
    if len(text) > MOST_DIFF_CHARS:
        text = f"{text[:MOST_DIFF_CHARS]}\n… {len(text) - MOST_DIFF_CHARS} characters left out"
    return text or None


def _part(diff: Any, arguments: Mapping[str, Any], result: Result) -> str:
    if not isinstance(diff, dict):
        return ""
    before, after = diff.get("before"), diff.get("after")
    if isinstance(before, dict) and isinstance(after, dict):
        # Mode, owner, state: what the file module and its like tell of, never the content.
        names = sorted({*before, *after} - {"path", "path_content"})
        told = {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
        return masked("\n".join(f"{name}: {old} → {new}" for name, (old, new) in told.items()))
    if "prepared" in diff or before is not None or after is not None:
        if not _everybody_reads(arguments, result):
            return HIDDEN
        return masked(str(diff["prepared"]) if "prepared" in diff else "\n".join(_lines(before, after)))
    return ""


def _everybody_reads(arguments: Mapping[str, Any], result: Result) -> bool:
    """By the mode that the file has and by the one that it should have; unknown is no."""
    modes = [mode for mode in (result.get("mode"), arguments.get("mode")) if mode is not None]
    return bool(modes) and all(_is_readable(mode) for mode in modes)


def _is_readable(mode: Any) -> bool:
    text = str(mode)
    return bool(re.fullmatch(r"0?o?[0-7]{3,4}", text)) and bool(int(text.replace("o", ""), 8) & EVERYBODY_READS)


def _lines(before: Any, after: Any) -> list[str]:
    old, new = (str(each or "").splitlines() for each in (before, after))
    return list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]


def noted(changes: list[dict[str, Any]], change: dict[str, Any]) -> list[dict[str, Any]]:
    """The changes with one more. A task that only asked about a file makes room for the one that changes it."""
    asked = [each for each in changes if each["path"] and each["path"] == change["path"] and not each["diff"]]
    return [*(each for each in changes if each not in asked), change]


def verdict(
    changes: list[dict[str, Any]], *, failed: str | None, unreachable: str | None, whole: bool
) -> dict[str, Any]:
    """What is known of one host. It is "none" only if all of it was looked at, to the last task."""
    reason = unreachable or failed or (None if whole else CUT_SHORT)
    state = "drifted" if changes else "unknown" if reason else "none"
    return {"state": state, "reason": reason and masked(reason)[:MOST_REASON_CHARS], "changes": _bounded(changes)}


def _bounded(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many as one can look at; of those that follow the difference is left out, then the change."""
    left, kept = MOST_CHARS, []
    for change in changes[:MOST_CHANGES]:
        size = len(change["diff"] or "")
        kept.append(change if size <= left else {**change, "diff": TOO_MUCH})
        left -= min(size, left)
    if len(changes) > MOST_CHANGES:
        more = f"and {len(changes) - MOST_CHANGES} more"
        kept.append({"role": None, "task": more, "item": None, "path": None, "diff": None})
    return kept


class CallbackModule(CallbackBase):  # type: ignore[misc] # Ansible has no types
    """What Ansible calls."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "drift"
    CALLBACK_NEEDS_ENABLED = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._changes: dict[str, list[dict[str, Any]]] = {}
        self._failed: dict[str, str] = {}
        self._unreachable: dict[str, str] = {}
        self._whole: set[str] = set()

    def v2_playbook_on_start(self, playbook: Any) -> None:
        self.disabled = Path(str(playbook._file_name)).name != PLAYBOOK

    def v2_runner_on_ok(self, result: Any) -> None:
        if WHOLE in (result.result.get("ansible_facts") or {}):
            self._whole.add(result.host.get_name())
        if not result.task.loop:  # its items have told already
            self._note(result)

    def v2_runner_item_on_ok(self, result: Any) -> None:
        self._note(result)

    def _note(self, result: Any) -> None:
        if result.result.get("changed"):
            role = result.task._role
            name = None if role is None else role.get_name()
            change = change_of(name, str(result.task.name), result.task.args, result.result)
            host = result.host.get_name()
            self._changes[host] = noted(self._changes.get(host, []), change)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            said = result.result.get("msg") or result.result.get("stderr") or "failed"
            self._failed[result.host.get_name()] = f"{result.task.name}: {said}"

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._unreachable[result.host.get_name()] = str(result.result.get("msg") or "it cannot be reached")

    def v2_playbook_on_stats(self, stats: Any) -> None:
        for host in sorted({*stats.processed, *stats.dark}):
            found = verdict(
                self._changes.get(host, []),
                # One that was rescued is no failure.
                failed=self._failed.get(host) if stats.failures.get(host) else None,
                unreachable=self._unreachable.get(host) if stats.dark.get(host) else None,
                whole=host in self._whole,
            )
            self._say(host, found)
            if folder := self.get_option("output"):
                _write(Path(folder) / f"{host}.json", found)

    def _say(self, host: str, found: Mapping[str, Any]) -> None:
        count = len(found["changes"])
        said = {"none": "no drift", "unknown": "unknown", "drifted": f"{count} difference{'s' * (count != 1)}"}
        because = f": {found['reason']}" if found["reason"] else ""
        self._display.display(f"drift: {host}: {said[found['state']]}{because}")
        for change in found["changes"]:
            where = " ".join(word for word in (change["role"], change["path"] or change["item"]) if word)
            self._display.display(f"drift: {host}:   {where or '-'}: {change['task']}")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
