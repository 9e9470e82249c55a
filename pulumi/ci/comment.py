#!/usr/bin/env python3
"""Puts plan.md under the change that it is about, as one comment a stack, written anew by every run.

Where, and on which change, is read from what GitHub Actions and GitLab CI set for their jobs. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAN = Path(__file__).resolve().parents[1] / "plan.md"
PAGE = 100  # comments that both answer at once


@dataclass(frozen=True)
class Change:
    """Where its comments are listed and added, where one is written anew, and whose are ours: somebody else who begins
    a comment like we do is not given the plan to keep."""

    headers: dict[str, str]
    comments: str
    one: Callable[[int], str]
    method: str  # that writes one anew
    is_ours: Callable[[dict[str, Any]], bool]


def main() -> int:
    if not PLAN.exists():
        print("There is no plan: the step that makes it did not begin.")
        return 0
    body = PLAN.read_text()
    try:
        change = _on_github() if "GITHUB_EVENT_PATH" in os.environ else _on_gitlab()
        write(change, body)
    except (urllib.error.URLError, KeyError) as error:
        print(f"The comment was not written: {error}", file=sys.stderr)
        return 1
    return 0


def write(change: Change, body: str) -> None:
    """Its first line, a remark that nobody sees, says which of our comments is this stack's."""
    first = body.partition("\n")[0]
    for comment in _comments(change):
        if change.is_ours(comment) and comment["body"].partition("\n")[0].strip() == first:
            _ask(change.headers, change.method, change.one(comment["id"]), {"body": body})
            return
    _ask(change.headers, "POST", change.comments, {"body": body})


def _comments(change: Change) -> Iterator[dict[str, Any]]:
    page = 1
    while found := _ask(change.headers, "GET", f"{change.comments}?per_page={PAGE}&page={page}"):
        yield from found
        page += 1


def _on_github() -> Change:
    number = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text())["number"]
    issues = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/issues"
    return Change(
        headers={"Authorization": f"Bearer {os.environ['GH_TOKEN']}", "Accept": "application/vnd.github+json"},
        comments=f"{issues}/{number}/comments",
        one=lambda comment: f"{issues}/comments/{comment}",
        method="PATCH",
        is_ours=lambda comment: comment["user"]["login"] == "github-actions[bot]",  # whose token the job has
    )


def _on_gitlab() -> Change:
    api = os.environ["CI_API_V4_URL"]
    headers = {"PRIVATE-TOKEN": os.environ["GITLAB_COMMENT_TOKEN"]}
    notes = f"{api}/projects/{os.environ['CI_PROJECT_ID']}/merge_requests/{os.environ['CI_MERGE_REQUEST_IID']}/notes"
    us = _ask(headers, "GET", f"{api}/user")["id"]
    return Change(
        headers=headers,
        comments=notes,
        one=lambda comment: f"{notes}/{comment}",
        method="PUT",
        is_ours=lambda comment: comment["author"]["id"] == us,
    )


def _ask(headers: dict[str, str], method: str, url: str, content: dict[str, Any] | None = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    asked = urllib.request.Request(  # noqa: S310 - the address is the CI's own
        url, data, {**headers, "Content-Type": "application/json", "User-Agent": "RemoteGPU"}, method=method
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310 - the same
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
