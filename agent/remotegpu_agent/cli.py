"""`remotegpu-agent`: the service, what systemd calls at a lease's end and at boot, and what people ask on the host.

Only words and exit codes here; everything else is imported where it is used, so that closing a lease starts quickly.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from remotegpu_agent import __version__

CLOSE_TRIES = 20
CLOSE_RETRY_S = 3.0
OVERDUE_S = 5.0  # after its end: by then a lease is closed, or something is wrong
EX_FAILED, EX_USAGE = 1, 64


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; answers the exit code (shiv passes it to sys.exit)."""
    parser = argparse.ArgumentParser(prog="remotegpu-agent", description="RemoteGPU's program on a GPU host.")
    parser.add_argument("--version", action="version", version=__version__)
    words = parser.add_subparsers(dest="word", required=True, metavar="COMMAND")
    words.add_parser("run", help="the service: make the host match the portal, and report")
    words.add_parser("lease-guard", help="at boot: end what ended meanwhile, arm the rest")
    close = words.add_parser("close-lease", help="end a lease whose time has come")
    close.add_argument("lease_id", type=int)
    status = words.add_parser("status", help="what this agent knows")
    status.add_argument("--json", action="store_true", help="for programs")
    heard = words.add_parser("heard", help="wait until the portal hears the running agent, of this version")
    heard.add_argument("--within", type=float, default=60, metavar="SECONDS", help="how long to wait at most")
    heard.add_argument("--credential", type=int, metavar="ID", help="... and with this credential")
    words.add_parser("doctor", help="what may be wrong here, and the way out")
    clean = words.add_parser("clean", help="remove what a lease left on this host")
    clean.add_argument("--request", type=Path, required=True, help="JSON file: clean_args of the protocol")
    verify = words.add_parser("verify", help="compare this host with its baseline")
    verify.add_argument("--request", type=Path, required=True, help="JSON file: verify_request of the protocol")
    verify.add_argument("--json", action="store_true", help="for programs")
    baseline = words.add_parser("baseline", help="the host's present state, as a baseline")
    baseline.add_argument("--json", action="store_true", help="for programs")
    nvml_child = words.add_parser("nvml-child", help=argparse.SUPPRESS)
    nvml_child.add_argument("--as-root", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    word: Any = globals()[f"_{options.word.replace('-', '_')}"]
    return int(word(options))


def _load() -> Any:
    from remotegpu_agent import config

    try:
        return config.load()
    except config.ConfigError as error:
        sys.exit(f"remotegpu-agent: {error}")


def _log_to_journal() -> None:
    import logging

    # systemd's journal adds time and unit; <N> is the priority it reads.
    names = {logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>"}

    class Format(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return names.get(record.levelno, "<5>") + super().format(record).replace(
                "\n", "\n" + names.get(record.levelno, "<5>")
            )

    handler = logging.StreamHandler()
    handler.setFormatter(Format("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _run(_: argparse.Namespace) -> int:
    _compile_unpacked()
    from remotegpu_agent.loop import Agent

    config = _load()
    if not config.portal_url:
        sys.exit(
            "remotegpu-agent: /etc/remotegpu/agent.json is missing, or its portal_url is empty: there is nobody to"
            ' speak with; write at least {"portal_url": "https://portal.example:8443"}'
        )
    _log_to_journal()
    Agent(config).run()
    return 0


def _compile_unpacked() -> None:
    """After an installation, have another process compile what was unpacked.

    It takes 10 to 15 MB, in the NVML child too, which a process that then goes on for months would never give back.
    """
    import contextlib
    import importlib.util
    import os
    import subprocess

    root, packages = os.environ.get("SHIV_ROOT"), Path(__file__).parents[1]
    if not root or Path(root) not in packages.parents:
        return
    if not Path(importlib.util.cache_from_source(str(packages / "pynvml.py"))).exists():
        argv = [sys.executable, "-I", "-m", "compileall", "-q", str(packages)]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # then we do it ourselves
            subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False, timeout=120)


def _leases(config: Any) -> Any:
    from remotegpu_agent.clock import Clock
    from remotegpu_agent.journal import Journal
    from remotegpu_agent.leases import Leases
    from remotegpu_agent.observe.tools import ToolFailed
    from remotegpu_agent.openings import Openings
    from remotegpu_agent.protocol import ProtocolError
    from remotegpu_agent.state import State
    from remotegpu_agent.tasks import Tasks

    journal, path = Journal(config.state_dir / "journal.jsonl"), config.state_dir / "desired.json"

    def held() -> Any:
        """Asked late, and one more thing that may resist: a lease ends here whatever that file holds."""
        try:
            return State(path).held
        except (ValueError, LookupError, TypeError, AttributeError, ProtocolError) as error:
            raise ToolFailed(f"{path}: {error}") from error

    openings = Openings(held, Clock(config.state_dir))
    return Leases(config, journal, Tasks(config, journal).stop_lease, openings)


def _close_lease(options: argparse.Namespace) -> int:
    """Called by the timer; works without the agent and without the portal, and does not give up early."""
    import time

    from remotegpu_agent.observe.tools import ToolFailed
    from remotegpu_agent.protocol import now

    leases = _leases(_load())
    for _ in range(CLOSE_TRIES):
        entry = leases.find(options.lease_id)
        if entry is None:
            print(f"lease {options.lease_id} was never opened on this host", file=sys.stderr)
            return EX_FAILED
        if not entry.is_closed and (early_s := (entry.ends_at - now()).total_seconds()) > 0:
            if early_s > 1:
                print(f"lease {options.lease_id} was extended until {entry.ends_at}: it stays open", file=sys.stderr)
                return 0
            time.sleep(early_s)
        try:
            leases.close(options.lease_id, "its end has come")
        except (ToolFailed, OSError) as error:
            print(f"lease {options.lease_id}: {error}", file=sys.stderr)
            time.sleep(CLOSE_RETRY_S)
        else:
            return 0
    return EX_FAILED


def _lease_guard(_: argparse.Namespace) -> int:
    """Before sshd starts: a lease that ended while the host was off is closed, the others get their timer back."""
    from remotegpu_agent.observe.tools import ToolFailed
    from remotegpu_agent.protocol import now

    leases = _leases(_load())
    code = 0
    for entry in leases.entries():
        try:
            if entry.ends_at <= now() or entry.is_closed:
                leases.close(entry.lease_id, "its end came while the host was off")
            else:
                leases.arm_timer(entry.lease_id, entry.ends_at)
        except (ToolFailed, OSError) as error:
            print(f"lease {entry.lease_id}: {error}", file=sys.stderr)
            code = EX_FAILED
    return code


def _status(options: argparse.Namespace) -> int:
    status = read_status(_load())
    if options.json:
        print(json.dumps(status, indent=2))
        return 0
    print(
        f"agent {status['version']}, {'machine ' + str(status['machine_id']) if status['enrolled'] else 'not enrolled'}"
    )
    print(f"last contact {status['last_contact_at'] or 'never'}, generation {status['generation']}")
    if status["frozen"]:
        print(f"FROZEN: {status['frozen_reason']}. An operator thaws it in the portal.")
    print(f"GPUs: {status['gpu']['state']}{', ' + status['gpu']['message'] if status['gpu']['message'] else ''}")
    for lease in status["leases"]:
        print(f"lease {lease['lease_id']}: {lease['login']}, {lease['state']}, ends {lease['ends_at']}")
        if lease["is_overdue"]:
            print(
                "  ITS END HAS PASSED and something resists: see 'journalctl -u remotegpu-agent -u remotegpu-lease-*'"
            )
    for attempt in status["attempts"]:
        print(f"attempt {attempt['attempt_id']}: {attempt['state']}")
    return 0


def read_status(config: Any) -> dict[str, Any]:
    """What lies on the disk and what the running agent last wrote."""
    from remotegpu_agent.credential import Credential
    from remotegpu_agent.files import find_json
    from remotegpu_agent.journal import Journal
    from remotegpu_agent.protocol import format_time, now
    from remotegpu_agent.state import State
    from remotegpu_agent.tasks import Tasks

    credential = Credential(config.credential_file)
    held = State(config.state_dir / "desired.json").held
    running = find_json(config.run_dir / "status.json") or {}
    gpu = running.get("gpu") or {"state": "stale", "message": "the agent is not running"}
    return {
        "version": __version__,
        "enrolled": credential.is_enrolled,
        "machine_id": credential.machine_id if credential.is_enrolled else None,
        "frozen": held.frozen is not None,
        "frozen_reason": held.frozen,
        "epoch": held.epoch,
        "generation": held.generation,
        "last_contact_at": running.get("last_contact_at"),
        "clock_offset_s": running.get("clock_offset_s"),
        "leases": [
            {
                "lease_id": entry.lease_id,
                "login": entry.login,
                "uid": entry.uid,
                "state": "closed" if entry.is_closed else "open",
                "ends_at": format_time(entry.ends_at),
                "is_overdue": not entry.is_closed and (now() - entry.ends_at).total_seconds() > OVERDUE_S,
            }
            for entry in _leases(config).entries()
        ],
        "attempts": [
            {"attempt_id": report["attempt_id"], "state": report["state"], "log_bytes": report["log_bytes"]}
            for report in Tasks(config, Journal(config.state_dir / "journal.jsonl")).reports()
        ],
        "gpu": {name: gpu.get(name) for name in ("state", "message", "sampled_at", "driver_version")}
        | {"gpus": [each["uuid"] for each in gpu.get("gpus", [])]},
    }


def _heard(options: argparse.Namespace) -> int:
    from remotegpu_agent import heard

    why = heard.wait(_load(), within_s=options.within, credential_id=options.credential)
    if why is not None:
        print(f"not heard within {options.within:g} s: {why}", file=sys.stderr)
        return EX_FAILED
    print(f"the portal hears the agent {__version__}")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from remotegpu_agent import doctor

    words = {True: "ok  ", False: "FAIL", None: "-   "}
    code = 0
    for finding in doctor.examine():
        print(f"{words[finding.is_fine]} {finding.subject}: {finding.text}")
        code = EX_FAILED if finding.is_fine is False else code
    return code


def _read_request(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        sys.exit(f"remotegpu-agent: {path}: {error}")
    if not isinstance(value, dict):
        sys.exit(f"remotegpu-agent: {path}: not a JSON object")
    return value


def _clean(options: argparse.Namespace) -> int:
    from remotegpu_agent.clock import Clock
    from remotegpu_agent.commands import Operations, Refusal
    from remotegpu_agent.credential import Credential
    from remotegpu_agent.journal import Journal
    from remotegpu_agent.leases import Leases
    from remotegpu_agent.openings import Openings
    from remotegpu_agent.protocol import ProtocolError, check_args
    from remotegpu_agent.state import State
    from remotegpu_agent.tasks import Tasks

    config, args = _load(), _read_request(options.request)
    try:
        check_args("clean", args, str(options.request))
    except ProtocolError as error:
        sys.exit(f"remotegpu-agent: {error}")
    journal = Journal(config.state_dir / "journal.jsonl")
    tasks = Tasks(config, journal)
    credential, state = Credential(config.credential_file), State(config.state_dir / "desired.json")
    leases = Leases(config, journal, tasks.stop_lease, Openings(lambda: state.held, Clock(config.state_dir)))
    if not credential.is_enrolled:
        sys.exit("remotegpu-agent: this host is not enrolled, so it has no lease to clean")
    # The running agent sends what is left of the logs, not this process: it cannot wait for that.
    operations = Operations(credential, state, leases, tasks, journal, unsent_wait_s=0)
    try:
        result = operations.clean(args)
    except Refusal as refusal:
        sys.exit(f"remotegpu-agent: not cleaned: {refusal}")
    print(json.dumps(result, indent=2))
    for line in told(result["steps"]):
        print(line, file=sys.stderr)
    return 0 if result["passed"] else EX_FAILED


def told(steps: list[dict[str, Any]]) -> list[str]:
    """What a person wants to know of a cleaning: a line for each step that did not pass."""
    bad = [step for step in steps if step["result"] not in ("passed", "not_applicable")]
    lines = [f"{step['result'].upper()} {step['id']}: {step['reason']}" for step in bad]
    if not bad:
        return [f"clean: nothing of the lease is left ({len(steps)} steps)"]
    return [*lines, f"NOT clean: {len(bad)} of {len(steps)} steps. What is named above is still there; run it again"]


def _verify(options: argparse.Namespace) -> int:
    from remotegpu_agent import verify

    answer = verify.verify(_read_request(options.request))
    if options.json:
        print(json.dumps(answer))
    else:
        for check in answer["checks"]:
            print(f"{check['result']}: {check['id']}{': ' + check['reason'] if check['reason'] else ''}")
    return 0 if answer["passed"] else EX_FAILED


def _baseline(_: argparse.Namespace) -> int:
    from remotegpu_agent import baseline

    print(json.dumps(baseline.take()))
    return 0


def _nvml_child(options: argparse.Namespace) -> int:
    from remotegpu_agent import gpu_child

    # The user is the configuration's; the child reads it itself, since root's files are out of reach a line later.
    gpu_child.main(None if options.as_root else _load().nvml_user)
    return 0


if __name__ == "__main__":
    sys.exit(main())
