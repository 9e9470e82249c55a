"""The verdict on a host: what counts as a yes, and that nothing else does."""

from __future__ import annotations

import base64
import importlib.util
import json
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from portal.integrations import protocol
from portal.services import reclaims
from portal.settings import Settings
from tests.support import rendering

ROLE = Path(__file__).parents[2] / "roles/verify"


def _load(name: str, path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


judge = _load("verify_verdict", ROLE / "filter_plugins/verdict.py")
port_scan = _load("verify_port_scan", ROLE / "library/port_scan.py")


def scanned(*ports: int, **changes: Any) -> dict[str, Any]:
    return {"address": "192.0.2.1", "open": list(ports), "closed": 0, "unreachable": 0, "seconds": 1.0, **changes}


def said(*checks: dict[str, Any], passed: bool | None = None, **changes: Any) -> dict[str, Any]:
    """The registered result of a host that answers these checks."""
    good = all(check.get("result") in ("passed", "not_applicable") for check in checks)
    answer = {"schema": 1, "passed": good if passed is None else passed, "checks": list(checks)}
    return {"rc": 0 if good else 1, "stdout": json.dumps(answer), "stderr": "", **changes}


def check(result: str = "passed", **changes: Any) -> dict[str, Any]:
    return {"id": "accounts", "result": result, "reason": None, "evidence": {"n": 1}, "duration_s": 0.5, **changes}


# -- ports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scan", "result", "reason"),
    [
        ({"scans": [scanned(22)]}, "passed", None),
        ({"scans": [scanned(22, 9100)]}, "passed", None),
        ({"scans": [scanned(22, 6666)]}, "failed", "not allowed: 6666"),
        ({"scans": [scanned(22), scanned(6666, address="2001:db8::1")]}, "failed", "not allowed: 6666"),
        ({"scans": [scanned()]}, "unknown", "not even the SSH port 22"),
        ({"scans": [scanned(9100)]}, "unknown", "not even the SSH port 22"),
        ({"scans": [scanned(22), scanned(unreachable=65535, address="2001:db8::1")]}, "unknown", "2001:db8::1"),
        ({"scans": []}, "unknown", "the scan failed"),
        ({"failed": True, "msg": "host.example has no address"}, "unknown", "has no address"),
    ],
)
def test_a_port_may_be_open_only_where_it_is_allowed(scan: dict[str, Any], result: str, reason: str | None) -> None:
    judged = judge.ports_check(scan, [22, 9100], 22)
    assert judged["result"] == result
    assert (reason is None and judged["reason"] is None) or reason in judged["reason"]
    assert judge.verdict([judged], "gpu-1", "", "")["passed"] is (result == "passed")


def test_an_address_that_nobody_can_be_asked_at_from_here_stands_in_the_evidence() -> None:
    judged = judge.ports_check({"scans": [scanned(22)], "no_way": ["2001:db8::1"]}, [22], 22)
    assert (judged["result"], judged["evidence"]["no_way"]) == ("passed", ["2001:db8::1"])


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_scan_sees_the_one_open_port_among_the_closed(listener: int) -> None:
    first = max(1, listener - 500)
    found = port_scan.scan("127.0.0.1", range(first, listener + 1), 1.0, room=64)
    assert listener in found.open
    assert len(found.open) + found.closed + found.unreachable == listener + 1 - first


def test_a_port_without_an_answer_is_closed_when_its_time_is_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        waiting = []
        for _ in range(4):  # a full queue drops what comes next, as a firewall does
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(address)
            waiting.append(each)
        started = time.monotonic()
        found = port_scan.scan("127.0.0.1", [address[1]], 0.3, room=8)
        assert time.monotonic() - started < 5
        for each in waiting:
            each.close()
    assert (found.open, found.closed) == ([], 1)


def test_an_address_that_cannot_be_asked_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: port_scan.errno.ENETUNREACH)
    found = port_scan.scan("192.0.2.1", range(1, 11), 0.1, room=4)
    assert (found.open, found.closed, found.unreachable) == ([], 0, 10)


# -- the login --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "result"),
    [
        ({"rc": 255, "stderr": "lease17@192.0.2.1: Permission denied (publickey)."}, "passed"),
        ({"rc": 0, "stderr": ""}, "failed"),
        ({"rc": 1, "stderr": "This account is currently not available."}, "failed"),
        ({"rc": 255, "stderr": "Connection refused"}, "unknown"),
        ({"rc": 255, "stderr": "Host key verification failed."}, "unknown"),
        ({"rc": 255, "stderr": "Connection timed out"}, "unknown"),
        ({"rc": 255, "stderr": ""}, "unknown"),
        ({"msg": "no ssh here"}, "unknown"),
    ],
)
def test_only_a_real_no_is_a_refused_login(attempt: dict[str, Any], result: str) -> None:
    assert judge.login_check(attempt, "lease17")["result"] == result


# -- whom the agent serves ---------------------------------------------------------------------------------------------

OLD, NEW, LEFT = (
    f"-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n" for name in ("old", "new", "left")
)
JSON_FILE = {"exists": True, "isreg": True, "mode": "0600", "uid": 0, "gid": 0, "checksum": "a1"}
CA_FILE = {"exists": True, "isreg": True, "mode": "0644", "uid": 0, "gid": 0, "checksum": "b1"}
ENTRY = {"type": "file", "mode": 0o600, "uid": 0, "gid": 0, "sha256": "a1"}


def told(*, anew: bool, trusts: str, portals: str, json_file: Any = None, ca_file: Any = None) -> dict[str, Any]:
    """What the tasks registered: whether the settings would be written anew, whom the host trusts, and should."""
    return {
        "anew": {"changed": anew},
        "kept": {"results": [{"stat": JSON_FILE | (json_file or {})}, {"stat": CA_FILE | (ca_file or {})}]},
        "trusts": {"content": base64.b64encode(trusts.encode()).decode()},
        "ca_pem": portals,
    }


def question(*, settings: str = "a1", trusts: str = OLD) -> dict[str, Any]:
    content = base64.b64encode(zlib.compress(trusts.encode())).decode()
    sections = {judge.AGENT_JSON: ENTRY | {"sha256": settings}, judge.CA_PEM: {"content": content}}
    return {"baseline": {"sections": {"agent_settings": sections}}}


@pytest.mark.parametrize(
    "seen",
    [
        told(anew=False, trusts=OLD, portals=OLD),
        told(anew=True, trusts=OLD, portals=OLD + NEW),  # of the portal's new authority it was not told yet
        told(anew=False, trusts=OLD + NEW, portals=OLD + NEW, json_file={"checksum": "a2"}),
        told(anew=True, trusts=NEW + OLD, portals=NEW),  # the last step of a new authority, before it is told
        told(anew=False, trusts="", portals="", ca_file={"exists": False}),  # a public authority's
    ],
)
def test_an_agent_serves_whom_the_portal_says_or_said_when_the_baseline_was_taken(seen: dict[str, Any]) -> None:
    judged = judge.settings_check(seen, question())
    assert (judged["id"], judged["result"], judged["reason"]) == ("agent_settings", "passed", None)


SERVES_ANOTHER = told(anew=True, trusts=OLD, portals=OLD, json_file={"checksum": "a2"})


@pytest.mark.parametrize(
    ("seen", "named"),
    [
        (SERVES_ANOTHER, judge.AGENT_JSON),
        (told(anew=True, trusts=OLD, portals=OLD, json_file={"mode": "0666"}), judge.AGENT_JSON),
        (told(anew=True, trusts=OLD, portals=OLD, json_file={"uid": 20017}), judge.AGENT_JSON),
        (told(anew=True, trusts=OLD, portals=OLD, json_file={"isreg": False}), judge.AGENT_JSON),
        (told(anew=False, trusts=OLD + LEFT, portals=OLD), judge.CA_PEM),
        (told(anew=False, trusts=LEFT, portals=NEW), judge.CA_PEM),
        (told(anew=False, trusts=OLD, portals=OLD, ca_file={"mode": "0664"}), judge.CA_PEM),
        (told(anew=False, trusts=OLD, portals=OLD, ca_file={"uid": 20017}), judge.CA_PEM),
        (told(anew=False, trusts="", portals=OLD, ca_file={"isreg": False}), judge.CA_PEM),
    ],
)
def test_an_agent_that_serves_or_trusts_somebody_else_fails_by_the_file(seen: dict[str, Any], named: str) -> None:
    judged = judge.settings_check(seen, question())
    assert (judged["result"], judged["evidence"]["strange"]) == ("failed", [named])
    assert judged["reason"] == f"{named}: not what the portal would write, and not what the baseline has"


def test_where_the_baseline_is_too_old_to_tell_what_differs_is_said_and_no_failure() -> None:
    older: dict[str, Any] = {"baseline": {"sections": {}}}
    judged = judge.settings_check(SERVES_ANOTHER, older)
    assert (judged["result"], "too old to tell" in judged["reason"]) == ("not_applicable", True)
    assert judge.settings_check(told(anew=False, trusts=OLD, portals=OLD), older)["result"] == "passed"


@pytest.mark.parametrize(
    "seen",
    [
        {},
        {"anew": {"failed": True, "msg": "no python"}},
        {"anew": {"changed": False, "unreachable": True, "msg": "gone"}},
        told(anew=False, trusts=OLD, portals=OLD) | {"kept": {"results": [{"unreachable": True}, {}]}},
        told(anew=False, trusts=OLD, portals=OLD) | {"trusts": {"skipped": True}},
    ],
)
def test_settings_that_could_not_be_seen_are_unknown(seen: dict[str, Any]) -> None:
    judged = judge.settings_check(seen, question())
    assert (judged["result"], judged["reason"].startswith("it could not be seen")) == ("unknown", True)


# -- the host's own answer ---------------------------------------------------------------------------------------------


def test_what_the_host_found_is_taken_over() -> None:
    answer = said(check(), check("failed", id="cron", reason="a crontab of lease17"), check("not_applicable", id="gpu"))
    judged = judge.host_checks(answer, ["accounts"])
    assert [(each["id"], each["result"]) for each in judged] == [
        ("accounts", "passed"),
        ("cron", "failed"),
        ("gpu", "not_applicable"),
    ]
    assert judge.reasons(judge.verdict(judged, "gpu-1", "", "")) == "cron failed: a crontab of lease17"


@pytest.mark.parametrize(
    "answer",
    [
        {"unreachable": True, "msg": "no route"},
        {"rc": 124, "stdout": "", "stderr": ""},
        {"rc": 127, "stdout": "", "stderr": "not found"},
        {"msg": "no python"},
        {"rc": 0, "stdout": ""},
        {"rc": 0, "stdout": "ok"},
        {"rc": 0, "stdout": "[]"},
        {"rc": 0, "stdout": "null"},
        {"rc": 0, "stdout": '{"passed": true}'},
        {"rc": 0, "stdout": '{"passed": true, "checks": 7}'},
        {"rc": 0, "stdout": '{"passed": true, "checks": "passed"}'},
        {"rc": 0, "stdout": '{"passed": true, "checks": [null]}'},
        {"rc": 0, "stdout": '{"passed": true, "checks": [{}]}'},
        said(),
        said(check("fine")),
        said(check(id="Accounts")),
        said(check(id=7)),
        said(check(duration_s="long")),
        said(check("failed"), passed=True),
        said(check(), passed=False),
        said(check(), passed=None, rc=2),
    ],
)
def test_an_answer_that_is_none_is_never_a_yes(answer: dict[str, Any]) -> None:
    judged = judge.host_checks(answer, ["accounts"])
    assert judged
    assert not judge.verdict(judged, "gpu-1", "", "")["passed"]
    assert "unknown" in [each["result"] for each in judged]


def test_a_check_that_ran_out_of_time_names_the_variable_that_gives_it_more() -> None:
    [each] = judge.host_checks({"rc": 124, "stdout": "", "stderr": ""}, [])
    assert (each["id"], each["result"]) == ("host", "unknown")
    assert "no answer within verify_host_timeout" in each["reason"]
    limit = yaml.safe_load((ROLE / "defaults/main.yml").read_text())["verify_host_timeout"]
    assert 1800 <= limit < Settings.run_timeout_s, "the run of the portal must not be the first to end"


def test_a_check_that_the_host_does_not_speak_of_is_unknown() -> None:
    judged = judge.host_checks(said(check()), ["swap", "accounts", "mounts"])
    assert [(each["id"], each["result"]) for each in judged] == [
        ("accounts", "passed"),
        ("swap", "unknown"),
        ("mounts", "unknown"),
    ]
    whole = judge.verdict(judged, "gpu-1", "", "")
    assert whole["passed"] is False
    assert "swap unknown: the host's answer says nothing of it; an older agent does not know it: upgrade it" in (
        judge.reasons(whole)
    )


def test_the_role_requires_what_the_protocol_says() -> None:
    assert rendering.evaluate("{{ __verify_required }}", "verify", "bookworm") == list(protocol.words("host_check"))


def test_what_the_role_looks_at_from_outside_is_what_the_portal_wants_to_hear_of() -> None:
    made = (
        judge.ports_check({"scans": []}, [22], 22),
        judge.login_check({}, "lease17"),
        judge.settings_check({}, {}),
    )
    assert tuple(each["id"] for each in made) == reclaims.FROM_OUTSIDE


def test_a_host_that_was_lost_before_the_question_is_unknown() -> None:
    (only,) = judge.host_checks(
        {"unreachable": True, "msg": "gone"}, ["accounts"], {"unreachable": True, "msg": "gone"}
    )
    assert only["result"] == "unknown"
    assert "cannot be reached" in only["reason"]


PORTS = judge.ports_check({"scans": [scanned(22)]}, [22], 22)
LOGIN = judge.login_check({"rc": 255, "stderr": "Permission denied (publickey)."}, "lease17")
HOST = judge.host_checks(said(check()), [])


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        ([PORTS, LOGIN, *HOST], "gpu-1 is clean: 3 checks passed"),
        ([PORTS, *HOST], "gpu-1 is clean: 2 checks passed; no login was tried (verify_probe_login)"),
    ],
)
def test_a_host_that_was_asked_is_clean(checks: list[dict[str, Any]], told: str) -> None:
    assert judge.conclusion(judge.verdict(checks, "gpu-1", "", "")) == told


@pytest.mark.parametrize(("checks", "no_login"), [([PORTS], True), ([PORTS, LOGIN], False)])
def test_a_host_that_was_asked_from_outside_alone_is_not_called_clean(
    checks: list[dict[str, Any]], no_login: bool
) -> None:
    """As from a shell, where nobody has the baseline: what was not asked is named."""
    judged = judge.verdict(checks, "gpu-1", "", "")
    told = judge.conclusion(judged)
    assert judged["passed"]
    assert "clean" not in told
    assert "the host itself was not asked (verify_request)" in told
    assert ("no login was tried" in told) == no_login


def test_nothing_checked_is_nothing_proven() -> None:
    judged = judge.verdict([], "gpu-1", "2026-11-25T12:00:00Z", "2026-11-25T12:00:09Z")
    assert judged["passed"] is False
    assert judge.reasons(judged) == "nothing was checked"
