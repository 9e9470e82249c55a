"""The program that runs one playbook: `python -m portal.worker.executor DIRECTORY`, started by integrations/runner.py.

It knows no database. It reads `job.json` in the private directory, calls ansible-runner, and writes one JSON object a
line to its standard output: `child` (which process ansible-playbook is), `event`s, and `end` with the exit code.

It must not outlive the worker that holds the run. Standard input is its lifeline: each line there says that the lock
was renewed; at its end, or after `fence_s` without a line, or on SIGTERM (which the kernel sends when the worker dies),
it ends every process of the run, removes the directory and exits. So by the time another worker may take the run over,
nothing of it is left, on whatever machine it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from portal.integrations import processes, ssh_masters
from portal.integrations.processes import ENDED_WITH_WORKER, LEASH, STOP_GRACE_S

MAX_STDOUT_CHARS = 65_536  # of one event; a longer one is cut, and says so
MAX_MESSAGE_CHARS = 4_000
FAILURES = ("runner_on_failed", "runner_on_unreachable", "runner_item_on_failed")


def main(directory: Path) -> int:
    os.umask(0o077)
    os.environ.pop("PYTHONPATH", None)  # it led here; what the playbook starts has no use for the portal's modules
    job = json.loads((directory / "job.json").read_text())
    out = Messages(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # whatever prints lands in the log, not among the messages
    done = threading.Event()
    lifeline = Lifeline(directory, job["mark"], job["fence_s"])
    signal.signal(signal.SIGTERM, lambda *_: lifeline.cut.set())
    lifeline.start()
    threading.Thread(target=report_child, args=(out, done), name="child", daemon=True).start()
    try:
        code, status = run(job, directory, out)
    finally:
        done.set()
    lifeline.give_way()
    out.put({"type": "end", "rc": code, "status": status})
    out.close()
    return 0


class Messages:
    """To the worker, through a thread of its own: the event handler returns at once, however slow the reader is."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, name="messages", daemon=True)
        self._thread.start()

    def put(self, message: dict[str, Any]) -> None:
        self._waiting.put(message)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the worker is gone; the lifeline says so too
            while (message := self._waiting.get()) is not None:
                self._stream.write(json.dumps(message) + "\n")
                if self._waiting.empty():
                    self._stream.flush()
            self._stream.flush()


class Lifeline:
    """Ends the run when the worker does, or when it could not renew its lock."""

    def __init__(self, directory: Path, mark: str, fence_s: float) -> None:
        self.cut = threading.Event()
        self._directory, self._mark, self._fence_s = directory, mark, fence_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give_way(self) -> None:
        """Let it end this process, if it is about to: a playbook that it has ended came to no end of its own."""
        if self._ending.is_set():
            self._thread.join()

    def _watch(self) -> None:
        ends_at = time.monotonic() + self._fence_s
        while not self.cut.is_set() and time.monotonic() < ends_at:
            readable, _, _ = select.select([0], [], [], 0.2)
            if not readable:
                continue
            if not os.read(0, 4096):
                break
            ends_at = time.monotonic() + self._fence_s
        self._end_all()

    def _end_all(self) -> None:
        self._ending.set()
        main_process = processes.child_of(os.getpid())
        processes.end(self._mark, main_process, grace_s=STOP_GRACE_S, spare=[os.getpid()])
        ssh_masters.end(self._directory)
        shutil.rmtree(self._directory, ignore_errors=True)
        os._exit(ENDED_WITH_WORKER)


def report_child(out: Messages, done: threading.Event) -> None:
    """Say which process ansible-playbook is, as soon as there is one: the only one that this program starts."""
    while not done.wait(0.02):
        if child := processes.child_of(os.getpid()):
            out.put({"type": "child", **child.as_dict()})
            return


def run(job: dict[str, Any], directory: Path, out: Messages) -> tuple[int | None, str]:
    from ansible_runner.interface import init_runner  # half a second: after the lifeline is held

    def on_event(event: dict[str, Any]) -> bool:
        with contextlib.suppress(Exception):  # a handler that raises ends ansible-runner, and nobody would know
            out.put(trim(event))
        return False  # keep no file of it

    runner = init_runner(
        private_data_dir=str(directory),
        ident="run",
        playbook=job["playbook"],
        project_dir=job["project_dir"],
        inventory=job["inventory"],
        limit=job["limit"],
        tags=job["tags"] or None,
        cmdline="--check --diff" if job["check"] else None,
        quiet=True,
        event_handler=on_event,
        cancel_callback=lambda: False,  # the worker cancels by itself; without one, runner takes our signal handlers
    )
    runner.config.command = [*LEASH, *runner.config.command]
    status, code = runner.run()
    return code, str(status)


def trim(event: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an event: what people read, and which task on which host. Results stay out: they are large."""
    kind, about = str(event.get("event")), event.get("event_data") or {}
    result: dict[str, Any] = about["res"] if isinstance(about.get("res"), dict) else {}
    data = {name: about.get(name) for name in ("play", "role", "duration") if about.get(name)}
    if result.get("changed"):
        data["changed"] = True
    if kind in FAILURES and result.get("msg"):
        data["message"] = str(result["msg"])[:MAX_MESSAGE_CHARS]
    if about.get("ignore_errors"):
        data["ignored"] = True
    kept = {
        "type": "event",
        "kind": kind,
        "at": event.get("created"),
        "host": about.get("host"),
        "task": about.get("task"),
        "stdout": _cut(str(event.get("stdout") or "").replace("\r\n", "\n")),
        "data": data or None,
    }
    if kind == "playbook_on_stats":
        kept["stats"] = stats_of(about)
    return kept


def _cut(text: str) -> str:
    if len(text) <= MAX_STDOUT_CHARS:
        return text
    return f"{text[:MAX_STDOUT_CHARS]}\n… {len(text) - MAX_STDOUT_CHARS} characters left out"


def stats_of(about: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Host → how many tasks were ok, changed, failed, unreachable, skipped, rescued, ignored."""
    names = {
        "ok": "ok",
        "changed": "changed",
        "failures": "failed",
        "dark": "unreachable",
        "skipped": "skipped",
        "rescued": "rescued",
        "ignored": "ignored",
    }
    hosts = sorted(about.get("processed") or {})
    return {host: {ours: int((about.get(name) or {}).get(host, 0)) for name, ours in names.items()} for host in hosts}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
