"""The pipelines: what network.sh calls in which order, and that both CI files are what they say.

`pulumi` and the portal are stand-ins here: what is tested is the script between them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import tomllib
import yaml

from remotegpu_network import desired, settings
from tests.network.export import name, opening, sealed
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
CI = ROOT / "pulumi" / "ci"
TOKEN = "marker-of-the-portals-token"
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("GITHUB_", "CI_"))}
ENGINE = """#!/bin/sh
echo "pulumi $*" >>"$LOG"
case "$1 $2" in
  "stack output") cat "$ANSWERS/outputs.json" ;;
  "stack export") cat "$ANSWERS/state.json" ;;
  "config set") case $3 in remotegpu:export) echo "$4" >"$ANSWERS/export" ;; esac ;;
  preview*) case "$*" in *--json*) cat "$ANSWERS/preview.json" ;; *expect-no-changes*) exit "${DRIFT:-0}" ;; esac ;;
  up*) export=$(cat "$ANSWERS/export"); [ "$export" != "${BREAKS:-}" ] || exit 255; echo "applied $export" >>"$LOG" ;;
esac
"""


class Portal(BaseHTTPRequestHandler):
    """Answers the export, what was applied last if there is any, and documents by their checksum; keeps what is posted,
    and its query."""

    export: dict[str, Any] | None
    applied: dict[str, Any] | None
    kept: tuple[dict[str, Any], ...] = ()
    posted: list[bytes]
    queries: list[dict[str, str]]
    seen: set[str | None]

    def do_GET(self) -> None:
        self.seen.add(self.headers["Authorization"])
        is_applied = "/applied" in self.path
        answer = self.applied if is_applied else self.export
        if checksum := dict(parse_qsl(urlsplit(self.path).query)).get("checksum"):
            answer = next((each for each in self.kept if each["checksum"] == checksum), None)
        etag = f'"{(answer or {}).get("checksum")}"'
        is_known = self.headers["If-None-Match"] == etag
        self.send_response((404 if is_applied else 409) if answer is None else 304 if is_known else 200)
        self.send_header("ETag", etag)
        self.end_headers()
        if not is_known:
            self.wfile.write(json.dumps(answer).encode())

    def do_POST(self) -> None:
        self.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.queries.append(dict(parse_qsl(urlsplit(self.path).query)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def portal() -> Iterator[type[Portal]]:
    kind = type("One", (Portal,), {"export": {}, "applied": None, "posted": [], "queries": [], "seen": set()})
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
        script = self.start(word, **environment)
        told, _ = script.communicate()
        return script.returncode, told, self.calls()

    def start(self, word: str, **environment: str) -> subprocess.Popen[str]:
        """As a CI does: the step's own process, which leads a group and ignores no signal, as under `nohup`."""
        self.log.write_text("")
        return subprocess.Popen(
            ["env", "--default-signal=HUP,INT,TERM", self.folder / "pulumi" / "ci" / "network.sh", word, "prod"],
            env={
                **CLEAN, "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PORTAL_URL": self.url, "PORTAL_TOKEN": TOKEN, "LOG": str(self.log), "ANSWERS": str(self.folder),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def pipeline(tmp_path: Path, portal: type[Portal]) -> Pipeline:
    return Pipeline(tmp_path, portal.url)  # type: ignore[attr-defined]


def outputs_of(export: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """As `pulumi stack output --json` prints them when this was applied, or begun to be."""
    told = {"generation": export["generation"], "checksum": export["checksum"], "counts": export["counts"]}
    return {"network": {**told, **fields}, "groups": {}}


def changing(calls: list[str]) -> list[str]:
    """What looks into the clouds or changes something."""
    return [call for call in calls if not call.startswith(("pulumi stack output", "pulumi stack export"))]


RECORD = desired.CLOUDFLARE_RECORD
ADDRESS = name("m1.address", "gpu-01", "A", "203.0.113.1")
CNAME = name("m1.address", "gpu-01", "CNAME", "edge.example.org")


def test_the_first_apply_looks_for_what_is_open_previews_applies_and_tells_the_portal(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    portal.export = sealed(ADDRESS)
    code, told, calls = pipeline.run("apply")
    assert code == 0, told
    verbs = [call.split(" --")[0] for call in calls]
    assert verbs == [
        "pulumi stack output", "pulumi config set remotegpu:applied first", "pulumi stack export",
        "pulumi config set remotegpu:export export.json", "pulumi preview", "pulumi up", "applied export.json",
        "pulumi stack output",
    ]  # fmt: skip
    assert portal.posted == [b"{}"]
    assert portal.queries == [{"stack": "prod"}]
    assert portal.seen == {f"Bearer {TOKEN}"}
    assert TOKEN not in told


def test_what_is_applied_is_refreshed_as_what_was_let_through(pipeline: Pipeline, portal: type[Portal]) -> None:
    """Else a record that somebody deleted by hand is shown as to be made, and is not made."""
    portal.export = sealed(ADDRESS)
    _, _, calls = pipeline.run("apply")
    for verb in ("preview", "up"):
        (call,) = [call for call in calls if call.startswith(f"pulumi {verb} ")]
        assert "--refresh" in call.split(), call


@pytest.fixture
def in_two(portal: type[Portal], pipeline: Pipeline) -> None:
    """What one apply cannot do: A and AAAA become a CNAME."""
    portal.applied = sealed(ADDRESS, name("m1.address6", "gpu-01", "AAAA", "2001:db8::1"))
    portal.export = sealed(CNAME, generation=8)
    pipeline.answer(outputs=outputs_of(portal.applied))


def applied_by(calls: list[str]) -> list[str]:
    return [call.removeprefix("applied ") for call in calls if call.startswith("applied ")]


@pytest.mark.usefixtures("in_two")
def test_what_one_apply_cannot_do_is_done_in_two_and_each_is_looked_at_before(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    code, told, calls = pipeline.run("apply")
    assert code == 0, told
    assert applied_by(calls) == ["step.json", "export.json"]
    assert [call.split()[1] for call in calls if call.startswith(("pulumi preview", "pulumi up"))] == [
        "preview", "up", "preview", "up",
    ]  # fmt: skip
    assert portal.queries == [{"stack": "prod"}], "the step is no export of the portal's: it would know nothing by it"


@pytest.mark.usefixtures("in_two")
def test_an_apply_that_broke_between_its_two_steps_is_taken_up_by_the_next_run(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    code, _, calls = pipeline.run("apply", BREAKS="export.json")
    assert (code, applied_by(calls)) == (255, ["step.json"])
    assert [query["outcome"] for query in portal.queries] == ["failed"]
    assert pipeline.run("waiting")[1] == "yes\n", "a poll comes back to it"
    step = json.loads((pipeline.folder / "pulumi" / "applied.json").read_text())
    assert step["names"][0]["type"] == "A"
    pipeline.answer(outputs=outputs_of(step))
    code, told, calls = pipeline.run("apply")
    assert code == 0, told
    assert applied_by(calls) == ["step.json", "export.json"]
    assert portal.queries[1:] == [{"stack": "prod"}]


@pytest.mark.usefixtures("in_two")
def test_two_steps_of_which_the_portal_was_not_told_are_not_done_again(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    """The first one would put the address back in the CNAME's place: the name would be gone twice."""
    assert portal.export is not None
    pipeline.answer(outputs=outputs_of(portal.export))
    code, told, calls = pipeline.run("apply")
    assert code == 0, told
    assert applied_by(calls) == ["export.json"]
    assert portal.queries == [{"stack": "prod"}], "and now the portal knows"


@pytest.mark.usefixtures("in_two")
def test_an_apply_of_which_the_portal_was_not_told_is_where_the_next_one_begins(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    assert portal.export is not None
    portal.kept = (portal.export,)
    pipeline.answer(outputs=outputs_of(portal.export))
    portal.export = sealed(CNAME, name("n1", "www", "A", "203.0.113.7"), generation=9)
    code, told, calls = pipeline.run("apply")
    assert code == 0, told
    assert (applied_by(calls), "1 to create; 1 stay as they are." in told) == (["export.json"], True), told
    portal.export = sealed(ADDRESS, name("m1.address6", "gpu-01", "AAAA", "2001:db8::1"), generation=10)
    code, told, calls = pipeline.run("apply")
    assert (code, "1 to replace, 1 to create" in told) == (0, True), told


def test_an_apply_that_nobody_knows_any_more_is_counted_by_its_own_numbers(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    """Restored from a backup, compared and thawed: the portal knows less than was applied."""
    many = sealed(*(name(f"n{i}", f"n{i}", "A", "203.0.113.1") for i in range(20)), generation=9)
    portal.applied, portal.export = sealed(ADDRESS, generation=7), sealed(ADDRESS, generation=1010)
    pipeline.answer(outputs=outputs_of(many))
    code, told, calls = pipeline.run("apply")
    assert (code, applied_by(calls)) == (0, ["export.json"]), told
    assert "pulumi config set remotegpu:applied outputs.json --stack prod" in calls, "the guard in the program counts"


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("generation", [9, 8])
@pytest.mark.parametrize("word", ["apply", "preview"])
def test_a_portal_that_was_put_back_without_a_word_deletes_nothing(
    pipeline: Pipeline, portal: type[Portal], word: str, generation: int, is_told: bool
) -> None:
    """Its export and its word of the last apply are both from before: they agree."""
    since = sealed(ADDRESS, name("n1", "www", "A", "203.0.113.7"), generation=9)
    portal.export = sealed(ADDRESS, generation=generation)
    portal.applied = sealed(ADDRESS, generation=7) if is_told else None
    pipeline.answer(outputs=outputs_of(since))
    code, told, calls = pipeline.run(word)
    assert (code, changing(calls)) == (1, []), told
    assert f"of generation {generation}, but by its own outputs prod has been brought to another one" in told
    assert "python -m portal freeze" in told
    if word == "apply":
        assert "python -m portal freeze" in portal.queries[0]["reason"]
        assert json.loads(portal.posted[0])["network"]["generation"] == generation, "it counts on from no other one"


@pytest.mark.parametrize("outputs", [{}, outputs_of(sealed(ADDRESS, generation=5))])
def test_a_state_that_knows_less_than_the_portal_makes_nothing_a_second_time(
    pipeline: Pipeline, portal: type[Portal], outputs: dict[str, Any]
) -> None:
    portal.applied = sealed(ADDRESS)
    portal.export = sealed(ADDRESS, generation=8)
    pipeline.answer(outputs=outputs)
    for environment in ({}, {"BELIEVE_STATE": "another"}):
        code, told, calls = pipeline.run("apply", **environment)
        assert (code, changing(calls)) == (1, []), told
        assert "PULUMI_BACKEND_URL" in told
        assert "BELIEVE_STATE=prod ci/network.sh apply prod" in portal.queries[-1]["reason"]
    code, told, calls = pipeline.run("apply", BELIEVE_STATE="prod")
    assert (code, applied_by(calls), portal.queries[-1]) == (0, ["export.json"], {"stack": "prod"}), told


def test_a_failed_apply_is_told_with_its_reason_and_where_its_log_is(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    code, told, _ = pipeline.run("apply", BREAKS="export.json", CI_JOB_URL="https://ci.example.org/jobs/7")
    assert code == 255
    (query,), (body,) = portal.queries, portal.posted
    assert query == {
        "stack": "prod", "outcome": "failed", "reason": "The engine's apply failed. https://ci.example.org/jobs/7",
    }  # fmt: skip
    assert json.loads(body) == {"network": {"environment": "production", "generation": 7}}
    assert TOKEN not in told


@pytest.mark.parametrize("export", [None, {}, {"problem": "503"}])
def test_an_apply_without_an_export_is_told_as_well(
    pipeline: Pipeline, portal: type[Portal], export: dict[str, Any] | None
) -> None:
    portal.export = export
    code, _, calls = pipeline.run("apply")
    assert (code != 0, changing(calls)) == (True, [])
    assert ([query["outcome"] for query in portal.queries], portal.posted) == (["failed"], [b"{}"])


def test_a_reason_of_any_length_and_script_is_told(pipeline: Pipeline, portal: type[Portal]) -> None:
    zones = [f"urn:pulumi:prod::remotegpu::cloudflare:index/zone:Zone::zone.机器{i}" for i in range(200)]
    portal.export = sealed(ADDRESS)
    pipeline.answer(preview={"steps": [{"op": "delete", "urn": urn} for urn in zones]})
    assert pipeline.run("apply")[0] == 1
    assert portal.queries[0]["reason"].startswith("The zone zone.机器0 would be deleted or replaced")
    assert len(portal.queries[0]["reason"]) == 1000


LONG = """
under_way() { # until it is let go, whatever it is told; then it writes its state
  for signal in HUP INT TERM; do trap "echo heard $signal >>\\"$LOG\\"" "$signal"; done
  echo "under way $$" >>"$LOG"
  until [ -e "$ANSWERS/let-go" ]; do sleep 0.05; done
  echo "state written" >>"$LOG"
  exit "$ENDS"
}
[ "$1" != "$LONG" ] || under_way
"""


class Cancelled:
    """An apply whose engine is in the middle of `verb`."""

    def __init__(self, pipeline: Pipeline, verb: str, ends: int = 255, **environment: str) -> None:
        self.pipeline = pipeline
        engine = pipeline.folder / "bin" / "pulumi"
        call = 'echo "pulumi $*" >>"$LOG"\n'
        engine.write_text(ENGINE.replace(call, call + LONG))
        self.script = pipeline.start("apply", LONG=verb, ENDS=str(ends), **environment)
        self.engine = int(until(lambda: self.said("under way"), "the engine", also=pipeline.calls)[0])

    def said(self, words: str) -> list[str]:
        return [line.removeprefix(f"{words} ") for line in self.pipeline.calls() if line.startswith(words)]

    def end(self) -> tuple[int, str, list[str]]:
        """What it ended with, what it said, and what the engine had heard by then."""
        (self.pipeline.folder / "let-go").touch()
        told, _ = self.script.communicate(timeout=60)
        return self.script.returncode, told, self.said("heard")


@pytest.mark.parametrize("verb", ["preview", "up"])
@pytest.mark.parametrize(("sent", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_cancelled_run_asks_the_engine_once_waits_for_its_state_and_then_tells_the_portal(
    pipeline: Pipeline, portal: type[Portal], verb: str, sent: str, code: int
) -> None:
    portal.export = sealed(ADDRESS)
    run = Cancelled(pipeline, verb, CI_JOB_URL="https://ci.example.org/jobs/7")
    run.script.send_signal(signal.Signals[f"SIG{sent}"])
    until(lambda: run.said("heard"), "the engine's signal", also=pipeline.calls)
    assert (run.script.poll(), portal.queries) == (None, []), "the engine goes on: nobody knows yet how it ends"
    done, told, heard = run.end()
    assert (done, heard) == (code, ["INT"]), told
    assert pipeline.calls()[-1] == "state written", "and nothing is begun after it"
    assert [query["reason"] for query in portal.queries] == [
        "The run was cut off. The engine was told to end, and has ended. https://ci.example.org/jobs/7"
    ]


def test_a_cancelled_run_begins_nothing_more_even_if_the_engine_came_to_its_end(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    portal.export = sealed(ADDRESS)
    run = Cancelled(pipeline, "preview", ends=0)
    run.script.send_signal(signal.SIGINT)
    code, told, _ = run.end()
    assert (code, pipeline.calls()[-1]) == (130, "state written"), told
    assert [query["outcome"] for query in portal.queries] == ["failed"]


def test_a_second_signal_of_the_ci_does_not_reach_the_engine(pipeline: Pipeline, portal: type[Portal]) -> None:
    """GitHub sends another one after 7.5 seconds; the engine would drop what it has begun."""
    portal.export = sealed(ADDRESS)
    run = Cancelled(pipeline, "up")
    run.script.send_signal(signal.SIGINT)
    until(lambda: run.said("heard"), "the engine's signal", also=pipeline.calls)
    for _ in range(2):
        run.script.send_signal(signal.SIGTERM)
    _, told, heard = run.end()
    assert (heard, len(portal.queries)) == (["INT"], 1), told


def test_a_signal_to_the_whole_group_is_one_to_the_engine(pipeline: Pipeline, portal: type[Portal]) -> None:
    """GitLab's shell runner and a terminal send it to the group."""
    portal.export = sealed(ADDRESS)
    run = Cancelled(pipeline, "up")
    assert os.getpgid(run.script.pid) == run.script.pid
    os.killpg(run.script.pid, signal.SIGTERM)
    until(lambda: run.said("heard"), "the engine's signal", also=pipeline.calls)
    code, told, heard = run.end()
    assert (code, heard) == (143, ["INT"]), told


def test_an_engine_that_the_runner_has_told_itself_is_not_told_again(pipeline: Pipeline, portal: type[Portal]) -> None:
    """In a container GitLab's runner sends TERM to every process, from the youngest on."""
    portal.export = sealed(ADDRESS)
    run = Cancelled(pipeline, "up", CI_DISPOSABLE_ENVIRONMENT="true")
    os.kill(run.engine, signal.SIGTERM)
    until(lambda: run.said("heard"), "the engine's signal", also=pipeline.calls)
    run.script.send_signal(signal.SIGTERM)
    code, told, heard = run.end()
    assert (code, heard) == (143, ["TERM"]), told
    assert portal.queries[0]["reason"].startswith("The run was cut off.")


def test_a_run_that_is_cancelled_before_the_engine_changes_anything_never_starts_it(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    portal.export = sealed(ADDRESS)
    run = Cancelled(pipeline, "config", ends=0)  # a setting of the stack file, in the foreground
    run.script.send_signal(signal.SIGTERM)
    code, told, heard = run.end()
    assert (code, heard) == (143, []), told
    assert not [call for call in pipeline.calls() if call.startswith(("pulumi preview", "pulumi up"))]
    assert [query["outcome"] for query in portal.queries] == ["failed"]


def test_an_operation_left_open_stops_everything(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    urn = "urn:pulumi:prod::remotegpu::cloudflare:index/dnsRecord:DnsRecord::n1"
    pipeline.answer(state={"deployment": {"pending_operations": [{"type": "creating", "resource": {"urn": urn}}]}})
    code, told, calls = pipeline.run("apply")
    assert (code, "was cut off" in told) == (1, True)
    assert not any(call.startswith(("pulumi preview", "pulumi up")) for call in calls)
    assert "was cut off" in portal.queries[0]["reason"]


def test_a_preview_that_would_delete_a_zone_is_not_applied(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    zone = "urn:pulumi:prod::remotegpu::cloudflare:index/zone:Zone::zone.cf"
    pipeline.answer(preview={"steps": [{"op": "delete", "urn": zone}]})
    code, told, calls = pipeline.run("apply")
    assert (code, "takes every name in it" in told, any("pulumi up" in call for call in calls)) == (1, True, False)
    assert "takes every name in it" in portal.queries[0]["reason"]


def test_a_cloud_that_is_gone_from_the_stack_file_is_not_deleted_with_all_that_is_in_it(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    """Neither the export nor what was applied differs: only the engine's preview shows it."""
    rules = [opening(f"o{i}", f"10.0.{i}.0/24") for i in range(9)]
    portal.applied = portal.export = sealed(ADDRESS, *rules)
    pipeline.answer(outputs=outputs_of(portal.applied))
    gone = ["aws:ec2/securityGroup:SecurityGroup::group.g-aws", "pulumi:providers:aws::aws-eu-central-1"]
    gone += [f"{desired.AWS_INGRESS}::g-aws.in.tcp.22.10.0.{i}.0-24" for i in range(9)]
    preview = {"steps": [{"op": "delete", "urn": f"urn:pulumi:prod::remotegpu::{each}"} for each in gone]}
    pipeline.answer(preview=preview)
    code, told, calls = pipeline.run("apply")
    assert (code, any("pulumi up" in call for call in calls)) == (1, False), told
    assert "10 of 10 resources in aws would be deleted, 100 %" in portal.queries[0]["reason"]
    assert "pulumi config set remotegpu:max-loss-percent 100" in told
    stack = pipeline.folder / "pulumi" / "Pulumi.prod.yaml"
    stack.write_text(stack.read_text().replace("max-loss-percent: 20", "max-loss-percent: 100"))
    assert applied_by(pipeline.run("apply")[2]) == ["export.json"], "where it is meant"


@pytest.mark.parametrize("export", [{}, {"problem": "503"}])
def test_a_broken_export_reaches_no_engine(pipeline: Pipeline, portal: type[Portal], export: dict[str, Any]) -> None:
    portal.export = export
    code, _, calls = pipeline.run("preview")
    assert (code, changing(calls)) == (1, [])


def test_a_preview_leaves_the_plan_for_the_comment(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS)
    pipeline.answer(preview={"steps": [{"op": "update", "urn": f"urn:pulumi:prod::remotegpu::{RECORD}::m1.address"}]})
    code, told, calls = pipeline.run("preview")
    assert code == 0, told
    comment = (pipeline.folder / "pulumi" / "plan.md").read_text()
    assert comment.startswith("<!-- remotegpu-network prod -->\n")
    assert "1 to create; 0 stay as they are." in comment, "the portal's"
    assert "1 to change" in comment, "the engine's"
    assert "not be applied" not in comment
    assert (any("pulumi up" in call for call in calls), portal.posted) == (False, [])


def test_a_preview_that_is_refused_says_so_in_the_comment(pipeline: Pipeline, portal: type[Portal]) -> None:
    """By the gate, by the guard, and by a broken export: that is when somebody has to read it."""
    plan = pipeline.folder / "pulumi" / "plan.md"
    portal.export = sealed(ADDRESS)
    zone = "urn:pulumi:prod::remotegpu::cloudflare:index/zone:Zone::zone.cf"
    pipeline.answer(preview={"steps": [{"op": "delete", "urn": zone}]})
    assert pipeline.run("preview")[0] == 1
    assert "takes every name in it" in plan.read_text()
    assert "1 to delete" in plan.read_text()

    portal.applied = sealed(*(name(f"n{i}", f"n{i}", "A", "203.0.113.1") for i in range(10)))
    pipeline.answer(outputs=outputs_of(portal.applied), preview={"steps": []})
    portal.export = sealed(ADDRESS, generation=8)
    assert pipeline.run("preview")[0] == 1
    assert "10 of 10 names are gone" in plan.read_text()

    portal.export = {}
    assert pipeline.run("preview")[0] == 1
    assert "would not be applied" in plan.read_text()


def test_a_poll_asks_only_the_portal_whether_anything_waits(pipeline: Pipeline, portal: type[Portal]) -> None:
    portal.export = sealed(ADDRESS, generation=8)
    assert pipeline.run("waiting") == (0, "yes\n", []), "nothing was ever applied"
    portal.applied = sealed(ADDRESS, generation=7)
    assert pipeline.run("waiting") == (0, "yes\n", [])
    portal.applied = portal.export
    assert pipeline.run("waiting") == (0, "no\n", [])
    portal.export = None
    code, told, calls = pipeline.run("waiting")
    assert (code != 0, "yes" in told, calls) == (True, False, []), "a portal that gives none is no reason to apply"


def test_drift_is_an_error_and_a_change_that_waits_for_its_apply_is_none(
    pipeline: Pipeline, portal: type[Portal]
) -> None:
    portal.applied = sealed(ADDRESS)
    portal.export = sealed(generation=8)
    code, told, calls = pipeline.run("drift")
    assert (code, "waits for its apply: that is no drift" in told) == (0, True), told
    (look,) = [call for call in calls if call.startswith("pulumi preview")]
    assert {"--refresh", "--expect-no-changes"} <= set(look.split())
    assert (pipeline.folder / "export").read_text() == "applied.json\n"
    assert "pulumi config set remotegpu:applied applied.json --stack prod" in calls
    assert pipeline.run("drift", DRIFT="1")[0] == 1
    assert portal.posted == []


def test_an_apply_beside_it_is_no_drift(pipeline: Pipeline, portal: type[Portal]) -> None:
    """At GitHub it may go on at the same time: the state has moved when the check has ended."""
    portal.applied = portal.export = sealed(ADDRESS)
    engine = pipeline.folder / "bin" / "pulumi"
    moves = '*expect-no-changes*) ! grep -q one "$ANSWERS/state.json" || { echo {} >"$ANSWERS/state.json"; exit 1; }'
    pipeline.answer(state={"deployment": {}, "serial": "one"})
    engine.write_text(ENGINE.replace('*expect-no-changes*) exit "${DRIFT:-0}"', moves))
    code, told, calls = pipeline.run("drift")
    assert (code, told.count("looking again")) == (0, 1), told
    assert sum(call.startswith("pulumi preview") for call in calls) == 2


def test_drift_says_where_there_is_nothing_to_compare_with(pipeline: Pipeline, portal: type[Portal]) -> None:
    code, told, _ = pipeline.run("drift")
    assert (code, "Nothing was ever applied" in told) == (0, True)
    pipeline.answer(outputs={"network": {"generation": 7}})
    code, told, _ = pipeline.run("drift")
    assert (code, "no longer knows" in told) == (1, True)


# -- the files of the CIs


@pytest.fixture(scope="module")
def github() -> dict[Any, Any]:
    flow: dict[Any, Any] = yaml.safe_load((CI / "github-actions.yml").read_text())
    return flow


@pytest.fixture(scope="module")
def gitlab() -> dict[str, Any]:
    flow: dict[str, Any] = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
    return flow


def evaluated(text: str, **values: str) -> str:
    """A value of a workflow with its expressions filled in."""
    for key, value in values.items():
        text = text.replace("${{ " + key.replace("__", ".") + " }}", value)
    return text


@pytest.mark.parametrize(
    ("event", "cron", "word"),
    [
        ("pull_request", "", "preview"),
        ("push", "", "apply"),
        ("repository_dispatch", "", "apply"),
        ("workflow_dispatch", "", "apply"),
        ("schedule", "2-57/5 * * * *", "apply"),
        ("schedule", "17 3 * * *", "drift"),
    ],
)
def test_github_does_for_each_event_what_the_file_says(
    github: dict[Any, Any], pipeline: Pipeline, portal: type[Portal], event: str, cron: str, word: str
) -> None:
    assert cron in ("", *(each["cron"] for each in github[True]["schedule"]))
    assert event in github[True]
    assert github[True]["push"] == {"branches": ["main"], "paths": ["pulumi/**"]}, "what is merged, and nothing else"
    portal.export = portal.applied = sealed(ADDRESS)
    outputs, calls = todo(github, pipeline, event, cron)
    assert outputs["word"] == word
    is_poll = (event, word) == ("schedule", "apply")
    assert outputs["stacks"] == ("[]" if is_poll else github["env"]["STACKS"]), "a poll ends where nothing waits"
    portal.export = sealed(ADDRESS, generation=8)
    assert json.loads(todo(github, pipeline, event, cron)[0]["stacks"]) == json.loads(github["env"]["STACKS"])
    assert calls == []


def todo(github: dict[Any, Any], pipeline: Pipeline, event: str, cron: str) -> tuple[dict[str, str], list[str]]:
    """Runs the first job's own script."""
    (script,) = [step["run"] for step in github["jobs"]["todo"]["steps"] if "run" in step]
    said, log = pipeline.folder / "github-output", pipeline.log
    said.write_text("")
    log.write_text("")
    given = {
        "EVENT": event, "CRON": cron, "STACKS": github["env"]["STACKS"], "GITHUB_OUTPUT": str(said),
        "PORTAL_URL": pipeline.url, "PORTAL_TOKEN": TOKEN, "LOG": str(log), "ANSWERS": str(pipeline.folder),
    }  # fmt: skip
    done = subprocess.run(["bash", "-e", "-c", script], cwd=pipeline.folder, env={**CLEAN, **given})
    assert done.returncode == 0
    return dict(line.split("=", 1) for line in said.read_text().splitlines()), log.read_text().splitlines()


def test_at_github_no_preview_drift_check_or_poll_takes_the_place_of_a_waiting_apply(github: dict[Any, Any]) -> None:
    """GitHub cancels what waits when a newer one of its group comes; in the group of applies are applies alone."""
    assert "concurrency" not in github
    assert "concurrency" not in github["jobs"]["todo"]
    lock = github["jobs"]["network"]["concurrency"]
    assert lock["cancel-in-progress"] is False

    def group(word: str, number: str = "") -> str:
        return evaluated(
            lock["group"],
            needs__todo__outputs__word=word,
            matrix__stack="prod",
            **{"github.event.number && format('-{0}', github.event.number)": number},
        )

    groups = [group("apply"), group("drift"), group("preview", "-7"), group("preview", "-8")]
    assert groups == ["network-apply-prod", "network-drift-prod", "network-preview-prod-7", "network-preview-prod-8"]
    assert github["jobs"]["network"]["if"] == "needs.todo.outputs.stacks != '[]'"


def test_github_gives_forks_nothing_asks_no_reviewer_and_shows_the_plan_when_it_is_refused(
    github: dict[Any, Any],
) -> None:
    assert "head.repo.full_name == github.repository" in github["jobs"]["todo"]["if"]
    assert github["jobs"]["network"]["needs"] == "todo"
    assert "pull_request_target" not in github[True]
    steps = github["jobs"]["network"]["steps"]
    (shown,) = [step for step in steps if step.get("run") == "pulumi/ci/comment.py"]
    assert shown["if"].startswith("${{ !cancelled() && ")
    assert [step for step in steps if "GH_TOKEN" in str(step)] == [shown]
    assert any("cancelled()" in step.get("if", "") and "pulumi cancel" in step["run"] for step in steps)
    head = (CI / "github-actions.yml").read_text()
    assert "no required reviewers" in head, "each lease would wait for a person"


def test_at_github_a_job_gets_the_secrets_of_its_step_and_the_environment_is_that_of_applies(
    github: dict[Any, Any],
) -> None:
    """What may write is a secret of the environment: no other word, least of all a change's own code, runs in it."""
    job = github["jobs"]["network"]
    assert job["environment"] == "${{ needs.todo.outputs.word == 'apply' && 'network' || '' }}"
    assert "environment" not in github["jobs"]["todo"]
    assert "secrets." not in str(github["env"])
    steps = [*github["jobs"]["todo"]["steps"], *job["steps"]]
    given = {
        step["run"].split()[0]: sorted(re.findall(r"secrets\.(\w+)", str(step))) for step in steps if "run" in step
    }
    assert {step: names for step, names in given.items() if names} == {
        "word=apply": ["PORTAL_TOKEN"],
        "exec": ["CLOUDFLARE_API_TOKEN", "PORTAL_TOKEN", "PULUMI_CONFIG_PASSPHRASE"],
    }, "no action and no package that is installed is given any"
    (script,) = [step["run"] for step in steps if "network.sh '" in step.get("run", "")]
    assert script.startswith("exec "), "signals of a cancelled job reach the step's own process alone"


@pytest.mark.parametrize("job", ["preview", "apply", "poll", "drift"])
def test_at_gitlab_only_what_applies_runs_in_the_environment(gitlab: dict[str, Any], job: str) -> None:
    assert "environment" not in gitlab[".network"]
    assert gitlab[f"network-{job}"].get("environment") == ("network" if job in ("apply", "poll") else None)


def test_gitlab_locks_each_stack_and_cuts_nothing_off(gitlab: dict[str, Any]) -> None:
    locked = gitlab[".network"]
    assert (locked["resource_group"], locked["interruptible"]) == ("network-$STACK", False)
    assert gitlab["workflow"]["auto_cancel"]["on_new_commit"] == "none"
    assert gitlab["network-preview"]["resource_group"] == "network-preview-$STACK", "no apply waits for it"
    assert gitlab["network-drift"]["resource_group"] == "network-drift-$STACK", "no apply waits for it"
    assert not any("resource_group" in gitlab[f"network-{job}"] for job in ("apply", "poll")), "both apply"
    assert "canceled" in locked["after_script"][0]


def test_gitlab_does_for_each_event_what_the_file_says(gitlab: dict[str, Any]) -> None:
    rules = {job: [rule["if"] for rule in gitlab[f"network-{job}"]["rules"]] for job in WORD_OF_JOB}
    assert "$CI_MERGE_REQUEST_SOURCE_PROJECT_ID == $CI_PROJECT_ID" in rules["preview"][0], "forks are given nothing"
    assert rules["apply"] == [
        '$CI_PIPELINE_SOURCE == "trigger"', '$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH && $CI_PIPELINE_SOURCE == "push"',
    ], "the portal's call, and what is merged"  # fmt: skip
    head = (CI / "gitlab-ci.yml").read_text().partition("\nworkflow:")[0]
    for job, cron in (("poll", "*/5 * * * *"), ("drift", "17 3 * * *")):
        (rule,) = rules[job]
        assert rule == f'$CI_PIPELINE_SOURCE == "schedule" && $CI_PIPELINE_SCHEDULE_DESCRIPTION == "network-{job}"'
        assert re.search(rf"^#   network-{job} +{re.escape(cron)}(?: |$)", head, re.MULTILINE), (
            "GitLab has it not in a file"
        )
    for job, word in WORD_OF_JOB.items():
        assert gitlab[f"network-{job}"]["script"] == [f'pulumi/ci/network.sh {word} "$STACK"']
    assert gitlab["network-preview"]["after_script"] == ["pulumi/ci/comment.py"], "also where it is refused"


WORD_OF_JOB = {"preview": "preview", "apply": "apply", "poll": "apply", "drift": "drift"}


def test_a_poll_at_gitlab_ends_before_it_installs_anything(
    gitlab: dict[str, Any], pipeline: Pipeline, portal: type[Portal]
) -> None:
    """GitLab runs before_script and script, flattened, in one shell that stops at the first error."""
    job = gitlab["network-poll"]
    lines = [
        line for each in (*job["before_script"], *job["script"]) for line in ([each] if isinstance(each, str) else each)
    ]
    pip = pipeline.folder / "bin" / "pip"
    pip.write_text('#!/bin/sh\necho "pip $*" >>"$LOG"\n')
    pip.chmod(0o755)

    def run() -> list[str]:
        pipeline.log.write_text("")
        given = {
            **CLEAN, "PATH": f"{pipeline.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PORTAL_URL": pipeline.url, "PORTAL_TOKEN": TOKEN, "LOG": str(pipeline.log), "STACK": "prod", "EXTRAS": "",
            "ANSWERS": str(pipeline.folder),
        }  # fmt: skip
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", "\n".join(lines)], cwd=pipeline.folder, env=given)
        assert done.returncode == 0
        return pipeline.log.read_text().splitlines()

    portal.export = portal.applied = sealed(ADDRESS)
    pipeline.answer(outputs=outputs_of(portal.applied))
    assert run() == []
    portal.export = sealed(ADDRESS, generation=8)
    assert (run()[0], portal.queries) == ("pip install ./pulumi", [{"stack": "prod"}])


@pytest.mark.parametrize("file", sorted((ROOT / "pulumi").glob("Pulumi.*.yaml")), ids=lambda file: file.name)
def test_an_example_stack_file_has_only_settings_that_are_read_and_no_secret(file: Path) -> None:
    settings.from_stack_file(file)
    config = yaml.safe_load(file.read_text())["config"]
    assert not any("token" in key.lower() or "secret" in key.lower() for key in config)


def test_of_the_examples_one_keeps_its_secrets_by_passphrase_and_one_by_a_kms() -> None:
    files = sorted((ROOT / "pulumi").glob("Pulumi.*.example.yaml"))
    keepers = [yaml.safe_load(file.read_text()).get("secretsprovider") for file in files]
    assert [None if keeper is None else keeper.partition("://")[0] for keeper in keepers] == [None, "awskms"]


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


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("max-loss-percent", "NaN"), ("may-lose", "Infinity"), ("clouds", "aws"),
        ("aws-account", "12345"), ("aws-account", "１２３４５６７８９０１２"),
    ],
)  # fmt: skip
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
    assert {pin for pin in wanted if not re.fullmatch(r"[\w-]+==[\w.]+", pin)} == set(), "exact"


def test_each_cloud_beside_cloudflare_is_an_extra_of_its_own() -> None:
    told = tomllib.loads((ROOT / "pulumi" / "pyproject.toml").read_text())
    extras = {
        extra: [pin.partition("==")[0] for pin in pins]
        for extra, pins in told["project"]["optional-dependencies"].items()
    }
    assert extras == {
        "aws": ["pulumi-aws"], "alicloud": ["pulumi-alicloud"], "tencent": ["tencentcloud-iac-pulumi"],
        "policy": ["pulumi-policy"],
    }  # fmt: skip
    folders = (ROOT / "pulumi" / "remotegpu_network").rglob("__init__.py")
    packages = {".".join(file.parent.relative_to(ROOT / "pulumi").parts) for file in folders}
    assert set(told["tool"]["setuptools"]["packages"]) == packages


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
