"""The GPUs as this host last saw them. A hung driver makes the numbers old, never the agent slow.

One child (gpu_child.py) speaks with NVML; a thread of its own waits for it. At most one probe is in flight. A probe
that is overdue leaves the last sample as `stale`; a child that stays away is asked to end (TERM, long grace), and
only then replaced. What a child hears of XIDs it says before it looks at anything that may hang (xids.py keeps it).
"""

import contextlib
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remotegpu_agent.protocol import format_time, now
from remotegpu_agent.xids import Xids

PROBE_DEADLINE_S = 10.0
PATIENCE_S = 60.0  # how long an overdue child may take before it is asked to end
GRACE_S = 60.0  # ... and how long it has for that: killing an NVML client outright has frozen GPUs
STOP_S = 2.0  # a child that hangs in the kernel outlives us by its own
LARGEST_ANSWER_BYTES = 1024 * 1024


class GpuProbe:
    """Samples on demand, read at any time."""

    def __init__(
        self, argv: Sequence[str], *, deadline_s: float = PROBE_DEADLINE_S, xids_file: Path | None = None
    ) -> None:
        """`argv` starts the child; without one nobody is asked, where no GPU is looked for."""
        self._argv = list(argv)
        self._deadline_s = deadline_s
        self._xids = Xids(xids_file)
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._fresh = threading.Event()
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._sample: dict[str, Any] | None = None
        self._asked_at: float | None = None  # monotonic: when the probe in flight was asked
        self._terminated_at: float | None = None
        self._thread: threading.Thread | None = None
        self._buffer = b""

    def start(self) -> None:
        if not self._argv:
            return
        self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
        self._thread.start()

    def ask(self, *, wait_s: float = 0) -> None:
        """Want a new sample; wait for it no longer than this."""
        self._fresh.clear()
        self._wanted.set()
        if wait_s and self._thread is not None:
            self._fresh.wait(wait_s)

    def report(self) -> dict[str, Any]:
        """The last sample as the protocol's `gpu_report`, marked stale when a newer one is overdue."""
        if not self._argv:
            return _unknown("no_library", "this host is a gateway: no GPU is looked for")
        with self._lock:
            sample, asked_at = self._sample, self._asked_at
        overdue_s = time.monotonic() - asked_at if asked_at is not None else 0.0
        if overdue_s > self._deadline_s:
            sample = _stale(sample, f"NVML has not answered for {overdue_s:.0f} s")
        sample = sample or _unknown("stale", "no sample yet")
        return sample | {"gpus": [gpu | {"xids": self._xids.of(gpu["uuid"])} for gpu in sample["gpus"]]}

    def stop(self) -> None:
        """Let go of the GPUs: no NVML client of ours is left when this returns, unless the driver hangs."""
        self._stopping.set()
        self._wanted.set()
        ends_at = time.monotonic() + STOP_S
        child = self._child
        if child is not None:
            child.terminate()
        if self._thread is not None:
            self._thread.join(STOP_S)
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, ends_at - time.monotonic()))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if not self._stopping.is_set():
                self._probe()
        self._reap()

    def _probe(self) -> None:
        """Ask and wait for the answer, however long that takes; nobody else waits with us."""
        try:
            answer = self._ask_child() or self._ask_child()
            if answer is None:
                raise EOFError("the driver is replaced again and again")
            self._terminated_at = None  # it answered after all: a later end is another matter
            if answer["state"] == "ok":
                self._xids.settle()
            elif answer["state"] == "mismatch":
                self._reap()  # it ends after that
            self._accept(answer | {"sampled_at": format_time(now())})
        except (OSError, ValueError, EOFError) as error:
            has_hung = self._terminated_at is not None
            self._reap()
            if not self._stopping.is_set():
                self._accept(self._old() if has_hung else _unknown("error", f"the NVML process ended: {error}"))

    def _ask_child(self) -> dict[str, Any] | None:
        """Its answer; None where it spoke for a driver that is replaced, and left the answer to the next one."""
        child = self._running_child()
        with self._lock:
            self._asked_at = time.monotonic()
        os.write(child.stdin.fileno(), b"probe\n")  # type: ignore[union-attr]  # Popen was given PIPE
        while "state" not in (said := json.loads(self._read_line(child))):
            if "xid" in said:
                self._xids.hear(said["uuid"], said["xid"])
            elif "reloaded" in said:
                self._xids.settle(is_reloaded=True)
            elif "outdated" in said:
                self._reap()
                return None
        return dict(said)

    def _old(self) -> dict[str, Any]:
        """A child that had to be ended took nothing along: which GPUs there are, and when that was seen, holds."""
        return _stale(self._sample, "NVML did not answer and its process was ended")

    def _running_child(self) -> "subprocess.Popen[bytes]":
        if self._child is not None and self._child.poll() is not None:
            self._reap()
        if self._child is None:
            self._buffer = b""
            self._terminated_at = None
            self._child = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, cwd="/"
            )
        return self._child

    def _read_line(self, child: "subprocess.Popen[bytes]") -> bytes:
        while b"\n" not in self._buffer:
            descriptor = child.stdout.fileno()  # type: ignore[union-attr]  # Popen was given PIPE
            if select.select([descriptor], [], [], 1.0)[0]:
                data = os.read(descriptor, 65536)
                if not data:
                    raise EOFError(f"exit status {child.poll()}")
                self._buffer += data
                if len(self._buffer) > LARGEST_ANSWER_BYTES:
                    raise ValueError("its answer is too long")
            self._lose_patience(child)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _lose_patience(self, child: "subprocess.Popen[bytes]") -> None:
        waited_s = time.monotonic() - (self._asked_at or 0)
        if waited_s > PATIENCE_S and self._terminated_at is None:
            self._terminated_at = time.monotonic()
            child.terminate()
        elif self._terminated_at is not None and time.monotonic() - self._terminated_at > GRACE_S:
            child.kill()

    def _accept(self, sample: dict[str, Any]) -> None:
        for gpu in sample["gpus"]:
            gpu["processes"] = _true_processes(gpu["processes"])
        with self._lock:
            self._sample, self._asked_at = sample, None
        self._fresh.set()

    def _reap(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        if child.poll() is None:
            child.terminate()
            threading.Thread(target=_see_off, args=(child,), name="gpu-reaper", daemon=True).start()


def _see_off(child: "subprocess.Popen[bytes]") -> None:
    """Until a child that was asked to end is gone: one that takes no notice would stay for ever, beside the next."""
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _unknown(state: str, message: str) -> dict[str, Any]:
    return {
        "state": state,
        "message": message[:400],
        "sampled_at": None,
        "driver_version": None,
        "nvml_version": None,
        "gpus": [],
    }


def _stale(sample: dict[str, Any] | None, what: str) -> dict[str, Any]:
    """The last sample, said to be old, and since when: nobody shall take its numbers for those of now."""
    seen_at = sample["sampled_at"] if sample else None
    since = f"the last values are of {seen_at}" if seen_at else "there are no values yet"
    message = f"{what}; {since}: the driver hangs, a reboot may be needed"
    return (sample or _unknown("stale", message)) | {"state": "stale", "message": message}


def _true_processes(listed: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Early R535 drivers write longer entries than the binding reads: a pid counts only if it exists and holds a GPU
    open.
    """
    if listed is None:
        return None
    return [process | {"uid": _uid_of(process["pid"])} for process in listed if holds_gpu(process["pid"])]


def holds_gpu(pid: int, *, find_target: Callable[[str], str] = os.readlink) -> bool:
    """The process has an open /dev/nvidia*."""
    folder = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(folder)
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if find_target(f"{folder}/{descriptor}").startswith("/dev/nvidia"):
                return True
        except OSError:
            continue
    return False


def _uid_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
