"""The pipelines: what network.sh calls in which order, and that both CI files are what they say.

`pulumi` and the portal are stand-ins here: what is tested is the script between them.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from remotegpu_network import settings
from tests.network.export import name, sealed

ROOT = Path(__file__).parents[2]
CI = ROOT / "pulumi" / "ci"
TOKEN = "marker-of-the-portals-token"
ENGINE = """#!/bin/sh
echo "pulumi $*" >>"$LOG"
case "$1 $2" in
  "stack output") cat "$ANSWERS/outputs.json" ;;
  "stack export") cat "$ANSWERS/state.json" ;;
  "config set") case $3 in remotegpu:export) echo "$4" >"$ANSWERS/export" ;; esac ;;
  preview*) case "$*" in *--json*) cat "$ANSWERS/preview.json" ;; *expect-no-changes*) exit "${DRIFT:-0}" ;; esac ;;
  up*) echo "applied $(cat "$ANSWERS/export")" >>"$LOG" ;;
esac
"""


class Portal(BaseHTTPRequestHandler):
    """Answers the export, and what was applied last if there is any; keeps what is posted."""

    export: dict[str, Any]
    applied: dict[str, Any] | None
    posted: list[bytes]
    seen: set[str | None]

    def do_GET(self) -> None:
        self.seen.add(self.headers["Authorization"])
        answer = self.applied if "/applied" in self.path else self.export
        self.send_response(404 if answer is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_POST(self) -> None:
        self.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def portal() -> Iterator[type[Portal]]:
    kind = type("One", (Portal,), {"export": {}, "applied": None, "posted": [], "seen": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield kind
    server.shutdown()
    server.server_close()


class Pipeline:
    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url, self.log = folder, url, folder / "log"
        for part in ("ci", "remotegpu_network"):
            shutil.copytree(
                ROOT / "pulumi" / part, folder / "pulumi" / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        stack = ROOT / "pulumi" / "Pulumi.production-cloudflare.example.yaml"
        shutil.copy(stack, folder / "pulumi" / "Pulumi.prod.yaml")
        engine = folder / "bin" / "pulumi"
        engine.parent.mkdir()
        engine.write_text(ENGINE)
        engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
        self.answer(outputs={}, state={"deployment": {}}, preview={"steps": []})

    def answer(self, **files: Any) -> None:
        for file, content in files.items():
            (self.folder / f"{file}.json").write_text(json.dumps(content))

    def run(self, word: str, **environment: str) -> tuple[int, str, list[str]]:
        self.log.write_text("")
        done = subprocess.run(
            [self.folder / "pulumi" / "ci" / "network.sh", word, "prod"],
            env={
                **os.environ, "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PORTAL_URL": self.url, "PORTAL_TOKEN": TOKEN, "LOG": str(self.log), "ANSWERS": str(self.folder),
                **environment,
            },
            capture_output=True,
            text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def pipeline(tmp_path: Path, portal: type[Portal]) -> Pipeline:
    return Pipeline(tmp_path, portal.url)  # type: ignore[attr-defined]


ADDRESS = name("m1.address", "gpu-01", "A", "203.0.113.1")


def test_the_first_apply_looks_for_what_is_open_previews_applies_and_tells_the_portal(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    portal.export = sealed(ADDRESS)
    code, told, calls = pipeline.run("apply")
    assert code == 0, told
    verbs = [call.split(" --")[0] for call in calls]
    assert verbs == [
        "pulumi stack export", "pulumi stack output", "pulumi config set remotegpu:export export.json",
        "pulumi config set remotegpu:applied first", "pulumi preview", "pulumi up", "applied export.json",
        "pulumi stack output",
    ]  # fmt: skip
    assert portal.posted == [b"{}"]
    assert portal.seen == {f"Bearer {TOKEN}"}
    assert TOKEN not in told


def test_what_one_apply_cannot_do_is_done_in_two(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.applied = sealed(ADDRESS, name("m1.address6", "gpu-01", "AAAA", "2001:db8::1"))
    portal.export = sealed(name("m1.address", "gpu-01", "CNAME", "edge.example.org"), generation=8)
    pipeline.answer(outputs={"network": {"generation": 7, "counts": {"machines": 1, "names": 2, "openings": 0}}})
    code, told, calls = pipeline.run("apply")
    assert code == 0, told
    assert [call for call in calls if call.startswith("applied")] == ["applied step.json", "applied export.json"]
    assert len(portal.posted) == 2


def test_an_operation_left_open_stops_everything(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    urn = "urn:pulumi:prod::remotegpu::cloudflare:index/dnsRecord:DnsRecord::n1"
    pipeline.answer(state={"deployment": {"pending_operations": [{"type": "creating", "resource": {"urn": urn}}]}})
    code, told, calls = pipeline.run("apply")
    assert (code, "was cut off" in told) == (1, True)
    assert calls == ["pulumi stack export --stack prod"]


def test_a_preview_that_would_delete_a_zone_is_not_applied(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    zone = "urn:pulumi:prod::remotegpu::cloudflare:index/zone:Zone::zone.cf"
    pipeline.answer(preview={"steps": [{"op": "delete", "urn": zone}]})
    code, told, calls = pipeline.run("apply")
    assert (code, "takes every name in it" in told, any("pulumi up" in call for call in calls)) == (1, True, False)


@pytest.mark.parametrize("export", [{}, {"problem": "503"}])
def test_a_broken_export_reaches_no_engine(pipeline: Pipeline, portal: type[Portal], export: dict[str, Any]) -> None:
    portal.export = export
    code, _, calls = pipeline.run("preview")
    assert (code, calls) == (1, [])


def test_a_preview_leaves_the_plan_for_the_comment(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    code, told, calls = pipeline.run("preview")
    assert code == 0, told
    assert "1 to create; 0 stay as they are." in (pipeline.folder / "pulumi" / "plan.md").read_text()
    assert not any("pulumi up" in call for call in calls)


def test_drift_is_an_error(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    assert pipeline.run("drift")[0] == 0
    assert pipeline.run("drift", DRIFT="1")[0] == 1


def test_github_locks_each_stack_cuts_nothing_off_and_gives_forks_nothing() -> None:
    flow = yaml.safe_load((CI / "github-actions.yml").read_text())
    job = flow["jobs"]["network"]
    assert job["concurrency"] == {"group": "network-${{ matrix.stack }}", "cancel-in-progress": False}
    assert "head.repo.full_name == github.repository" in job["if"]
    triggers = flow[True]  # YAML 1.1 reads `on` as yes
    assert {"pull_request", "push", "schedule", "repository_dispatch"} <= set(triggers)
    assert "pull_request_target" not in triggers
    runs = [(step.get("if", ""), step.get("run", "")) for step in job["steps"]]
    assert [word for word in ("preview", "drift", "apply") for _, run in runs if f"network.sh {word}" in run] == [
        "preview", "drift", "apply",
    ]  # fmt: skip
    assert any(condition == "cancelled()" and "pulumi cancel" in run for condition, run in runs)


def test_gitlab_locks_each_stack_cuts_nothing_off_and_gives_forks_nothing() -> None:
    flow = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
    assert (flow[".network"]["resource_group"], flow[".network"]["interruptible"]) == ("network-$STACK", False)
    assert "$CI_MERGE_REQUEST_SOURCE_PROJECT_ID == $CI_PROJECT_ID" in flow["network-preview"]["rules"][0]["if"]
    for job in ("preview", "apply", "drift"):
        assert f'pulumi/ci/network.sh {job} "$STACK"' in flow[f"network-{job}"]["script"]
    assert "canceled" in flow[".network"]["after_script"][0]


@pytest.mark.parametrize("file", sorted((ROOT / "pulumi").glob("Pulumi.*.yaml")), ids=lambda file: file.name)
def test_an_example_stack_file_has_only_settings_that_are_read_and_no_secret(file: Path) -> None:
    settings.from_stack_file(file)
    config = yaml.safe_load(file.read_text())["config"]
    assert not any("token" in key.lower() or "secret" in key.lower() for key in config)


def test_a_setting_means_the_same_as_a_text_and_as_yaml(tmp_path: Path) -> None:
    """The runbook says `pulumi config set remotegpu:max-loss-percent 100`: that writes a text."""
    written, typed = tmp_path / "Pulumi.set.yaml", tmp_path / "Pulumi.typed.yaml"
    written.write_text(
        "config:\n  remotegpu:environment: production\n  remotegpu:clouds: '[\"aws\"]'\n  remotegpu:may-lose: '3'\n"
        "  remotegpu:max-loss-percent: '100'\n  remotegpu:aws-egress: 'false'\n  remotegpu:adopt: '{\"a\": \"1\"}'\n"
        "  remotegpu:aws-account: '012345678901'\n"
    )
    typed.write_text(
        "config:\n  remotegpu:environment: production\n  remotegpu:clouds: [aws]\n  remotegpu:may-lose: 3\n"
        "  remotegpu:max-loss-percent: 100\n  remotegpu:aws-egress: false\n  remotegpu:adopt: {a: '1'}\n"
        "  remotegpu:aws-account: '012345678901'\n"
    )
    told = settings.from_stack_file(written)
    assert told == settings.from_stack_file(typed)
    assert (told.clouds, told.max_loss_percent, told.may_lose, told.aws_egress, told.adopt, told.aws_account) == (
        ("aws",), 100.0, 3, False, {"a": "1"}, "012345678901",
    )  # fmt: skip


@pytest.mark.parametrize(("key", "text"), [("max-loss-percent", "NaN"), ("may-lose", "Infinity"), ("clouds", "aws")])
def test_a_setting_of_another_kind_is_refused_by_name(key: str, text: str) -> None:
    given = {"environment": "production", "clouds": ["aws"], key: text}
    with pytest.raises(settings.BadSettings, match=f"remotegpu:{key}"):
        settings.read(given.get)


def test_every_setting_of_a_stack_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "network.md").read_text()
    missing = [key for key in map(settings.key_of, settings.Settings.__dataclass_fields__) if f"`{key}`" not in guide]
    assert missing == []


def test_every_report_has_its_place_in_the_guide_and_in_a_test() -> None:
    guide = (ROOT / "docs" / "network.md").read_text()
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for number in range(1, 26):
        assert f"| P{number} |" in guide
        assert f"def test_p{number}_" in tests


def test_the_pins_of_the_stacks_are_those_of_the_tests() -> None:
    project = tomllib.loads((ROOT / "pulumi" / "pyproject.toml").read_text())["project"]
    wanted = {pin for extra in project["optional-dependencies"].values() for pin in extra} | set(
        project["dependencies"]
    )
    there = {
        line
        for file in ("requirements.txt", "requirements-dev.txt", "requirements-network.txt")
        for line in (ROOT / file).read_text().splitlines()
    }
    assert wanted - there == set()


def test_the_folder_does_not_hide_the_library_of_its_name() -> None:
    import pulumi

    assert pulumi.__file__ is not None
    assert "site-packages" in pulumi.__file__
    assert not (ROOT / "pulumi" / "__init__.py").exists()
    told = subprocess.run(
        [sys.executable, "-c", "import pulumi; print(pulumi.Output)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.stdout == "<class 'pulumi.output.Output'>\n", told.stderr
