"""From what was seen to a verdict: plain functions, no host and no Ansible in them.

Each `…_check` takes what a task registered and answers checks in the protocol's shape: id, result, reason, evidence,
duration_s. What went wrong while looking is "unknown", and unknown is failed: only what was seen to be right counts.

The host's own answer is text of a host that may not be ours any more: every check of it is taken apart and put together
again, and what does not fit is unknown, never passed over.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Check = dict[str, Any]
GOOD = ("passed", "not_applicable")
PORTS, LOGIN = "ports_from_outside", "login_from_outside"  # all that is seen from outside
SETTINGS = "agent_settings"  # seen over SSH: what the agent should have been told, it cannot know itself
AGENT_JSON, CA_PEM = "/etc/remotegpu/agent.json", "/etc/remotegpu/ca.pem"
RESULTS = (*GOOD, "failed", "unknown")
ID = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
REASON_LIMIT = 2000
OLDER_AGENT = "the host's answer says nothing of it; an older agent does not know it: upgrade it, then try again"
TIMED_OUT = 124  # what timeout(1) says
MORE_TIME = (
    "its disks are large, or hang; say more seconds in inventory/group_vars/gpu_hosts.yml, fewer than RUN_TIMEOUT_S"
)
REFUSED = re.compile(r"Permission denied \(publickey")


def ports_check(scan: Mapping[str, Any], allowed: Sequence[int], ssh_port: int) -> Check:
    """Nothing is open from outside but what may be. The SSH port has to be seen, or the scan saw nothing at all."""
    scans = scan.get("scans") or []
    found = {int(port) for each in scans for port in each["open"]}
    unexpected = sorted(found - {int(port) for port in allowed})
    blind = [each["address"] for each in scans if each["unreachable"]]
    reason, result = None, "passed"
    if unexpected:
        reason, result = f"open from outside, and not allowed: {', '.join(map(str, unexpected))}", "failed"
    elif not scans:
        reason, result = f"the scan failed: {_message(scan)}", "unknown"
    elif ssh_port not in found:
        reason, result = f"not even the SSH port {ssh_port} was seen open, so the scan proves nothing", "unknown"
    elif blind:
        reason, result = f"could not be asked from here: {', '.join(blind)}", "unknown"
    left_out = list(scan.get("no_way") or [])  # addresses that this worker has no route to
    evidence = {"allowed": sorted(int(port) for port in allowed), "scans": scans, "no_way": left_out}
    return _check(PORTS, result, reason, evidence, sum(each["seconds"] for each in scans))


def login_check(attempt: Mapping[str, Any], login: str) -> Check:
    """The lease's key is refused. Only a real "no" counts: a host that hangs or another host key refuses nobody."""
    code = attempt.get("rc")
    said = str(attempt.get("stderr") or "").strip()
    reason, result = None, "passed"
    if code is None:
        reason, result = f"the login could not be tried: {_message(attempt)}", "unknown"
    elif code != 255:
        reason, result = f"the key of the lease still opens {login} (exit {code})", "failed"
    elif not REFUSED.search(said):
        reason, result = f"the login was neither accepted nor refused: {said or 'no message'}", "unknown"
    evidence = {"login": login, "exit": code, "said": said[:REASON_LIMIT]}
    return _check(LOGIN, result, reason, evidence, _duration_s(attempt))


def settings_check(told: Mapping[str, Any], question: Mapping[str, Any]) -> Check:
    """The agent serves and trusts whom the portal would tell it to, or whom it did when the baseline was taken.

    Both, since hosts are told of a new address or authority one after the other, while leases go on. A baseline that
    is older tells nothing: then what differs is said, and is no failure.
    """
    result, reason, evidence = "passed", None, None
    try:
        for step in (told.get("anew", {}), told.get("kept", {}), told.get("trusts", {})):
            if step.get("unreachable") or step.get("failed"):
                raise ValueError(_message(step))
        known = question["baseline"]["sections"].get("agent_settings")
        strange = list(_strange_settings(told, known or {}))
        evidence = {"strange": strange, "is_in_baseline": known is not None}
        if strange:
            result = "not_applicable" if known is None else "failed"
            reason = f"{' and '.join(strange)}: not what the portal would write, and " + (
                "the baseline is too old to tell what it was" if known is None else "not what the baseline has"
            )
    except (ValueError, KeyError, TypeError) as error:
        result, reason = "unknown", f"it could not be seen whom the agent serves: {error}"
    return _check(SETTINGS, result, reason, evidence, 0)


def _strange_settings(told: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    settings, authorities = (each["stat"] for each in told["kept"]["results"])
    if told["anew"]["changed"] and not _is_as_known(settings, known.get(AGENT_JSON)):
        yield AGENT_JSON
    if authorities["exists"] and _trusts_others(authorities, told, known.get(CA_PEM)):
        yield CA_PEM


def _is_as_known(now: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
    """Whether the module stat saw the file that the baseline has."""
    if known is None or not now.get("isreg"):
        return False
    seen = (int(now["mode"], 8), now["uid"], now["gid"], now["checksum"])
    return seen == (known["mode"], known["uid"], known["gid"], known["sha256"])


def _trusts_others(now: Mapping[str, Any], told: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
    if not now["isreg"] or now["uid"] != 0 or int(now["mode"], 8) & 0o022:
        return True
    before = zlib.decompress(base64.b64decode(known["content"])) if known and "content" in known else b""
    trusted = _certificates(str(told["ca_pem"]).encode()) | _certificates(before)
    return not _certificates(base64.b64decode(told["trusts"]["content"])) <= trusted


def _certificates(text: bytes) -> set[bytes]:
    return {b"".join(each.partition(b"-----END")[0].split()) for each in text.split(b"-----BEGIN ")[1:]}


def host_checks(
    answer: Mapping[str, Any], required: Sequence[str], room: Mapping[str, Any] | None = None
) -> list[Check]:
    """What `remotegpu-agent verify --json` found, or one check that says why there is no answer.

    Each id of `required` that the answer lacks is a check of its own, and unknown. `room` is what became of the
    question's folder: without it the question was never asked.
    """
    for step in (room or {}, answer):
        if step.get("unreachable"):
            return [_silent(f"the host cannot be reached over SSH: {_message(step)}", step)]
    if answer.get("rc") == TIMED_OUT:
        return [_silent(f"the host gave no answer within verify_host_timeout: {MORE_TIME}", answer)]
    if answer.get("rc") not in (0, 1):
        return [_silent(f"the host gave no answer: {_message(answer)}", answer)]
    try:
        said = json.loads(str(answer.get("stdout", "")))
        checks = [_taken_apart(each) for each in said["checks"]]
        passed = said["passed"]
    except (ValueError, KeyError, TypeError) as error:
        return [_silent(f"the host's answer is not what the protocol says: {error!r}", answer)]
    if not checks:
        return [_silent("the host's answer holds no check", answer)]
    if passed is not all(each["result"] in GOOD for each in checks):
        checks.append(_silent("the host's answer contradicts its own checks", answer))
    known = {each["id"] for each in checks}
    return checks + [_check(name, "unknown", OLDER_AGENT, None, 0) for name in required if name not in known]


def _taken_apart(each: Any) -> Check:
    """One check as the host says, in our own shape. Raises ValueError, KeyError or TypeError."""
    if not isinstance(each["id"], str) or not ID.match(each["id"]):
        raise ValueError(f"a check's id is {each['id']!r}")
    if each["result"] not in RESULTS:
        raise ValueError(f"result of {each['id']} is {each['result']!r}")
    reason = None if each["reason"] is None else str(each["reason"])
    return _check(each["id"], each["result"], reason, each["evidence"], float(each.get("duration_s", 0)))


def verdict(checks: Sequence[Check], host: str, started_at: str, ended_at: str) -> dict[str, Any]:
    """All of it. No check at all is no proof."""
    passed = bool(checks) and all(each["result"] in GOOD for each in checks)
    return {
        "schema": 1,
        "host": host,
        "passed": passed,
        "checks": list(checks),
        "started_at": started_at,
        "ended_at": ended_at,
    }


def reasons(judged: Mapping[str, Any]) -> str:
    """Why a verdict is not good, in one line."""
    bad = [
        f"{each['id']} {each['result']}: {each['reason']}" for each in judged["checks"] if each["result"] not in GOOD
    ]
    return "; ".join(bad) or "nothing was checked"


def conclusion(judged: Mapping[str, Any]) -> str:
    """What a good verdict proves, in one line. Clean is a host that was itself asked; what was not asked is named."""
    known = {each["id"] for each in judged["checks"]}
    host, count = judged["host"], len(judged["checks"])
    no_login = "" if LOGIN in known else "; no login was tried (verify_probe_login)"
    if known - {PORTS, LOGIN, SETTINGS}:
        return f"{host} is clean: {count} checks passed{no_login}"
    return (
        f"nothing was found open on {host} that may not be, and that is all: the host itself was not asked "
        f"(verify_request), which only a run of the portal does{no_login}"
    )


def _check(name: str, result: str, reason: str | None, evidence: Any, duration_s: float) -> Check:
    short = None if reason is None else reason[:REASON_LIMIT]
    return {"id": name, "result": result, "reason": short, "evidence": evidence, "duration_s": round(duration_s, 3)}


def _silent(reason: str, step: Mapping[str, Any]) -> Check:
    evidence = {"exit": step.get("rc"), "said": str(step.get("stdout") or "")[:REASON_LIMIT]}
    return _check("host", "unknown", reason, evidence, _duration_s(step))


def _message(step: Mapping[str, Any]) -> str:
    said = str(step.get("stderr") or "").strip() or str(step.get("msg") or "").strip()
    return said or (f"exit {step['rc']}" if "rc" in step else "no message")


def _duration_s(step: Mapping[str, Any]) -> float:
    """From the start and end that Ansible's command module reports; 0 where it did not get so far."""
    try:
        start, end = (datetime.datetime.fromisoformat(str(step[name])) for name in ("start", "end"))
    except (KeyError, ValueError):
        return 0.0
    return (end - start).total_seconds()


class FilterModule:
    """What Ansible calls."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "verify_ports_check": ports_check,
            "verify_login_check": login_check,
            "verify_settings_check": settings_check,
            "verify_host_checks": host_checks,
            "verify_verdict": verdict,
            "verify_reasons": reasons,
            "verify_conclusion": conclusion,
        }
