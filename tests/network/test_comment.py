"""The comment on a change: what it says, and that a change has one of each stack, at GitHub and at GitLab.

Both are servers of this test here: they keep comments, and answer as their documentation says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from remotegpu_network import comment, desired, plan
from tests.network.export import name, resources

SCRIPT = Path(__file__).parents[2] / "pulumi" / "ci" / "comment.py"
RECORD = f"urn:pulumi:prod::remotegpu::{desired.CLOUDFLARE_RECORD}::"
TOKEN = "marker-of-the-comments-token"


def told(**given: Any) -> str:
    return comment.markdown("prod", **{"refused": "", "preview": {"steps": []}, "planned": None, **given})


def test_a_change_of_code_that_the_exports_do_not_show_is_in_the_comment() -> None:
    steps = [
        {"op": "refresh", "urn": f"{RECORD}m1.address"},
        {"op": "create-replacement", "urn": f"{RECORD}m1.address", "detailedDiff": {"type": {}, "content": {}}},
        {"op": "delete-replaced", "urn": f"{RECORD}m1.address"},
        {"op": "same", "urn": f"{RECORD}m2.address"},
        {"op": "delete", "urn": f"{RECORD}n1"},
        {"op": "update", "urn": f"{RECORD}n2", "diffReasons": ["ttl"]},
    ]
    nothing = plan.compare([], [])
    said = told(preview={"steps": steps}, planned=("production, generation 7", nothing))
    assert "1 to delete, 1 to replace, 1 to change" in said
    kind = desired.CLOUDFLARE_RECORD
    assert [line for line in said.splitlines() if line[:1] in "-±~+=" and kind in line] == [
        f"- n1  {kind}  (delete)",
        f"± m1.address  {kind}  (replace)  content, type",
        f"~ n2  {kind}  (change)  ttl",
    ]
    assert "Export of production, generation 7**: Nothing to do" in said


def test_a_refusal_is_the_first_thing_in_the_comment() -> None:
    said = told(refused="The zone cf would be deleted.\n2 of 3 names are gone.", preview=None)
    assert said.startswith(
        "<!-- remotegpu-network prod -->\n\n### Network, stack prod\n\n**This would not be applied**\n\n"
        "```\nThe zone cf would be deleted.\n2 of 3 names are gone.\n```\n"
    )
    assert "did not run, or not to its end" in said


def test_what_the_engine_complains_of_is_in_the_comment() -> None:
    said = told(preview={"diagnostics": [{"severity": "error", "message": "no such zone"}, {"severity": "info"}]})
    assert "no such zone" in said


def test_no_value_is_in_the_engines_part() -> None:
    step = {
        "op": "update",
        "urn": f"{RECORD}n",
        "detailedDiff": {"content": {}},
        "newState": {"inputs": {"content": TOKEN}},
    }
    assert TOKEN not in told(preview={"steps": [step]})


def test_it_is_never_longer_than_a_comment_may_be() -> None:
    made = plan.compare([], resources(*(name(f"n{i}", f"n{i}", "A", "203.0.113.1") for i in range(2000))))
    steps = [{"op": "create", "urn": f"{RECORD}n{i}"} for i in range(2000)]
    said = told(refused="x\n" * 20_000, preview={"steps": steps}, planned=("production", made))
    assert len(said) < 65_536
    assert said.count("2000 to create") == 2


def test_a_text_cannot_leave_its_fence() -> None:
    evil = "```\u0020</details> @everyone"
    made = plan.compare([], resources(name("n", "t", "TXT", evil)))
    preview = {"steps": [], "diagnostics": [{"severity": "error", "message": evil}]}
    said = told(refused=evil, preview=preview, planned=("production", made))
    assert said.count("```") == 6


# -- where it is put


@dataclass
class Forge:
    """GitHub's or GitLab's part for comments: `rows` are id, author and body."""

    style: str
    url: str = ""
    rows: list[tuple[int, str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def shown(self, row: tuple[int, str, str]) -> dict[str, Any]:
        who = {"user": {"login": row[1]}} if self.style == "github" else {"author": {"id": row[1]}}
        return {"id": row[0], "body": row[2], **who}

    def answer(self, method: str, path: str, body: str | None) -> Any:
        parts = urlsplit(path)
        lists = {"github": "/repos/acme/net/issues/7/comments", "gitlab": "/projects/3/merge_requests/7/notes"}[
            self.style
        ]
        one = {"github": "/repos/acme/net/issues/comments/", "gitlab": f"{lists}/"}[self.style]
        if (method, parts.path) == ("GET", "/user"):
            return {"id": "us"}
        if (method, parts.path) == ("GET", lists):
            page, size = (int(parse_qs(parts.query)[key][0]) for key in ("page", "per_page"))
            return [self.shown(row) for row in self.rows[(page - 1) * size : page * size]]
        if (method, parts.path) == ("POST", lists):
            ours = "github-actions[bot]" if self.style == "github" else "us"
            self.rows.append((len(self.rows) + 1, ours, str(body)))
            return self.shown(self.rows[-1])
        assert method == {"github": "PATCH", "gitlab": "PUT"}[self.style]
        assert parts.path.startswith(one)
        index = int(parts.path.removeprefix(one)) - 1
        self.rows[index] = (index + 1, self.rows[index][1], str(body))
        return self.shown(self.rows[index])


@pytest.fixture(params=["github", "gitlab"])
def forge(request: pytest.FixtureRequest) -> Iterator[Forge]:
    forge = Forge(request.param)

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            forge.tokens.add(self.headers["Authorization"] or self.headers["PRIVATE-TOKEN"])
            length = int(self.headers["Content-Length"] or 0)
            body = json.loads(self.rfile.read(length))["body"] if length else None
            answer = json.dumps(forge.answer(self.command, self.path, body)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = do_PUT = do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    forge.url = f"http://127.0.0.1:{server.server_port}"
    yield forge
    server.shutdown()
    server.server_close()


@pytest.fixture
def put(forge: Forge, tmp_path: Path) -> Any:
    script = tmp_path / "pulumi" / "ci" / "comment.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text())
    event = tmp_path / "event.json"
    event.write_text('{"number": 7}')
    github = {"GITHUB_EVENT_PATH": str(event), "GITHUB_API_URL": forge.url, "GITHUB_REPOSITORY": "acme/net"}
    gitlab = {"CI_API_V4_URL": forge.url, "CI_PROJECT_ID": "3", "CI_MERGE_REQUEST_IID": "7"}
    given = {"github": {**github, "GH_TOKEN": TOKEN}, "gitlab": {**gitlab, "GITLAB_COMMENT_TOKEN": TOKEN}}[forge.style]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("GITHUB_", "CI_", "GITLAB_"))}

    def put(text: str | None) -> str:
        if text is not None:
            (tmp_path / "pulumi" / "plan.md").write_text(text)
        done = subprocess.run([sys.executable, script], env={**clean, **given}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    return put


def test_each_stack_has_one_comment_that_every_run_writes_anew(forge: Forge, put: Any) -> None:
    for text in ("one, first", "two, first", "one, second", "two, second"):
        stack, _, _ = text.partition(",")
        put(f"{comment.marker(stack)}\n{text}\n")
    assert [row[2].splitlines()[1] for row in forge.rows] == ["one, second", "two, second"]
    assert len(forge.tokens) == 1
    assert TOKEN in str(forge.tokens)


def test_a_comment_of_somebody_else_is_never_written_anew(forge: Forge, put: Any) -> None:
    theirs = f"{comment.marker('prod')}\nlooks like ours, and its author can change it after us"
    forge.rows = [(i, "mallory", theirs) for i in range(1, 151)]
    put(f"{comment.marker('prod')}\nours\n")
    put(f"{comment.marker('prod')}\nours again\n")
    assert [row[2] for row in forge.rows[:150]] == [theirs] * 150
    assert [row[2].splitlines()[1] for row in forge.rows[150:]] == ["ours again"], "found on the second page"


def test_without_a_plan_nothing_is_written(forge: Forge, put: Any) -> None:
    assert "no plan" in put(None)
    assert forge.rows == []
