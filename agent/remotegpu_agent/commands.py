"""One-off operations that the portal orders: each is carried out once, its result kept until the portal has it.

The list is closed: baseline, clean, rotate_credential, thaw. An order interrupted by a restart is taken up again,
three times at most: each of them is safe to repeat. The guard before cleaning is here; the cleaning itself is in
cleaning/.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from remotegpu_agent import progress
from remotegpu_agent.credential import Credential
from remotegpu_agent.files import find_json, write_json
from remotegpu_agent.journal import Journal
from remotegpu_agent.leases import Entry, Leases
from remotegpu_agent.observe.tools import ToolFailed
from remotegpu_agent.progress import Progress
from remotegpu_agent.protocol import Command, Desired
from remotegpu_agent.state import State
from remotegpu_agent.tasks import Tasks

log = logging.getLogger(__name__)

Outcome = tuple[bool, str | None, dict[str, Any] | None]  # ok, message, result

MOST_STARTS = 3
SMALL_BYTES = 64 * 1024  # a result like this is not what makes a report too large
_LEFT_OUT = ["the evidence is left out: the portal, or a proxy before it, took no report with it"]
UNSENT_WAIT_S = 60.0  # since the portal last took any of it


class Refusal(Exception):
    """The order is not carried out; says why."""


class Commands:
    def __init__(self, directory: Path, operations: "Operations", *, on_result: Callable[[], None]) -> None:
        self._directory = directory
        self._operations = operations
        self._on_result = on_result
        self._lock = threading.Lock()
        self._queue: list[tuple[str, Command]] = []
        self._is_working = False
        self._at_work: tuple[str, int, Progress] | None = None
        self._version = 0
        self._cached: tuple[int, list[dict[str, Any]]] = (-1, [])
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def consider(self, desired: Desired) -> None:
        """Take up every order that has no result yet; forget those that the portal no longer names."""
        named = set()
        with self._lock:
            for command in desired.commands:
                path = self._path(desired.epoch, command.command_id)
                named.add(path.name)
                is_queued = (desired.epoch, command) in self._queue
                if command.kind != "thaw" and not is_queued and (find_json(path) or {}).get("result") is None:
                    self._queue.append((desired.epoch, command))
            for path in self._directory.glob("*.json"):
                if path.name not in named and (find_json(path) or {}).get("acked"):
                    path.unlink()
                    self._version += 1
            if self._queue and not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work, name="commands", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._is_working = False
                    return
                epoch, command = self._queue[0]
            try:
                self._carry_out(epoch, command)
            except OSError:  # its result could not be kept: it has none, so it is taken up again
                log.exception("command %d", command.command_id)
            with self._lock:
                self._queue.pop(0)

    def _carry_out(self, epoch: str, command: Command) -> None:
        path = self._path(epoch, command.command_id)
        starts = (find_json(path) or {"starts": 0})["starts"] + 1
        record = {
            "epoch": epoch,
            "command_id": command.command_id,
            "kind": command.kind,
            "starts": starts,
            "result": None,
        }
        try:
            self._write(path, record)
        except OSError as error:  # a full disk: cleaning makes room, and an order that was not counted may be repeated
            log.error("command %d: its start cannot be noted: %s", command.command_id, error)
        log.info("command %d: %s", command.command_id, command.kind)
        if starts > MOST_STARTS:
            outcome: Outcome = (False, f"interrupted {MOST_STARTS} times; look at the agent's log on the host", None)
        else:
            self._at_work = (epoch, command.command_id, Progress())
            outcome = self._try(command)
            self._at_work = None
        self._keep(path, record, outcome)

    def _try(self, command: Command) -> Outcome:
        try:
            return True, None, self._operations.carry_out(command)
        except Refusal as refusal:
            return False, str(refusal), None
        except Exception as error:  # whatever went wrong, the portal must hear of it
            log.exception("command %d failed", command.command_id)
            return False, f"{type(error).__name__}: {error}", None

    def _keep(self, path: Path, record: dict[str, Any], outcome: Outcome) -> None:
        ok, message, result = outcome
        kept = {"command_id": record["command_id"], "ok": ok, "message": message and message[:2000], "result": result}
        self._write(path, record | {"result": kept})
        self._on_result()

    def note_thaw(self, epoch: str, command: Command) -> None:
        """The thaw took effect when its desired state was adopted; this is its result."""
        record = {"epoch": epoch, "command_id": command.command_id, "kind": "thaw", "starts": 1}
        self._keep(self._path(epoch, command.command_id), record, (True, None, None))

    def thaws_done(self, epoch: str) -> frozenset[int]:
        records = self._records(epoch)
        return frozenset(record["command_id"] for record in records if record["kind"] == "thaw")

    def at_work(self, epoch: str | None) -> dict[str, int] | None:
        """The order that is being carried out and how far it has come, as `command_at_work`."""
        now = self._at_work
        if now is None or now[0] != epoch:
            return None
        return {"command_id": now[1], "progress": now[2].value()}

    def results(self, epoch: str | None) -> list[dict[str, Any]]:
        """Results that the portal has not acknowledged, as `command_result`."""
        return [record["result"] for record in self._records(epoch) if record["result"] and not record.get("acked")][
            :100
        ]

    def shorten(self, epoch: str | None) -> bool:
        """The portal takes no report with these results: whether there is less of them to tell now.

        A cleaning first loses its evidence; what is too large without any has failed. Its verdict is never changed.
        """
        large = [
            record
            for record in self._records(epoch)
            if record["result"] and not record.get("acked") and len(json.dumps(record["result"])) > SMALL_BYTES
        ]
        for record in large:
            self._write(
                self._path(record["epoch"], record["command_id"]), record | {"result": _shorter(record["result"])}
            )
        return bool(large)

    def acknowledge(self, epoch: str | None, ids: Iterable[int]) -> None:
        """The portal holds these results: never send them again, never carry them out again."""
        for command_id in ids:
            path = self._path(epoch or "", command_id)
            record = find_json(path)
            if record is not None and record["result"] is not None:
                self._write(path, record | {"acked": True, "result": {"command_id": command_id}})

    def _records(self, epoch: str | None) -> list[dict[str, Any]]:
        return [record for record in self._read_all() if record["epoch"] == epoch]

    def _read_all(self) -> list[dict[str, Any]]:
        """Every record; read again only after a change, since the reporter asks several times a second."""
        version = self._version
        if self._cached[0] != version:
            found = [find_json(path) for path in sorted(self._directory.glob("*.json"))]
            self._cached = (version, [record for record in found if record is not None])
        return self._cached[1]

    def _write(self, path: Path, record: dict[str, Any]) -> None:
        write_json(path, record)
        self._version += 1

    def _path(self, epoch: str, command_id: int) -> Path:
        """A portal restored from a backup counts on from an old number: the same id under another epoch is another
        order.
        """
        return self._directory / f"{hashlib.sha256(epoch.encode()).hexdigest()[:12]}-{command_id}.json"


def _shorter(told: dict[str, Any]) -> dict[str, Any]:
    steps = (told["result"] or {}).get("steps")
    if steps and any(step["acted"] != _LEFT_OUT for step in steps):
        bare = [step | {"before": None, "acted": _LEFT_OUT, "after": None} for step in steps]
        return told | {"result": told["result"] | {"steps": bare}}
    return told | {
        "ok": False,
        "message": "its result is larger than the portal, or a proxy before it, takes",
        "result": None,
    }


class Operations:
    """What the orders do."""

    def __init__(
        self,
        credential: Credential,
        state: State,
        leases: Leases,
        tasks: Tasks,
        journal: Journal,
        *,
        unsent_wait_s: float = UNSENT_WAIT_S,
    ) -> None:
        self._credential = credential
        self._state = state
        self._leases = leases
        self._tasks = tasks
        self._journal = journal
        self._unsent_wait_s = unsent_wait_s

    def carry_out(self, command: Command) -> dict[str, Any] | None:
        """Do it and answer its result. Raises Refusal."""
        if command.args["machine_id"] != self._credential.machine_id:
            raise Refusal(
                f"the order is for machine {command.args['machine_id']}, this is machine {self._credential.machine_id}"
            )
        if command.kind == "baseline":
            return self._baseline()
        if command.kind == "clean":
            return self.clean(command.args)
        if command.kind == "rotate_credential":
            self._credential.rotate(command.args["credential"], command.args["credential_id"])
            return None
        raise Refusal(f"{command.kind} is not an order of its own")

    def _baseline(self) -> dict[str, Any]:
        from remotegpu_agent import baseline

        if refusal := refuse_baseline(self._leases.entries()):
            raise Refusal(refusal)
        return baseline.take()

    def clean(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Remove what the lease left on this machine: the `clean_result`. Raises Refusal."""
        from remotegpu_agent import cleaning

        held = self._state.held
        refusal = (
            "the host is frozen"
            if held.frozen
            else refuse_clean(args, self._credential.machine_id, held.desired, self._leases.entries())
        )
        if refusal:
            raise Refusal(refusal)
        lease_id = args["lease_id"]
        try:
            self._leases.close(lease_id, "it is to be cleaned")
        except ToolFailed as error:  # cleaning does all of it once more, and looks what is left
            log.warning("lease %d: %s", lease_id, error)
        self._wait_until_sent(lease_id)
        self._journal.record("lease.cleaning", lease_id=lease_id)
        self._tasks.forget_lease(lease_id)
        result: dict[str, Any] = cleaning.clean(dict(args))
        why = f"lease {lease_id} was cleaned from this host; a lease that has been cleaned is not opened again"
        self._leases.disown(lease_id, why, is_cleaned=result["passed"])
        self._leases.reserve.keep()
        self._journal.record("lease.cleaned", lease_id=lease_id, detail={"passed": result["passed"]})
        return result

    def _wait_until_sent(self, lease_id: int) -> None:
        """The end of a log must reach the portal before it is removed here: waited for as long as any of it arrives.

        That ends: nothing of the lease writes any more.
        """
        arrived = self._tasks.acknowledged_bytes(lease_id)
        deadline = time.monotonic() + self._unsent_wait_s
        while unsent := self._tasks.unsent(lease_id):
            if time.monotonic() > deadline:
                self._journal.record("lease.logs_lost", lease_id=lease_id, detail={"attempts": unsent})
                return
            time.sleep(0.1)
            # Fewer than before: the portal was restored, and is being told again.
            if (now := self._tasks.acknowledged_bytes(lease_id)) != arrived:
                arrived, deadline = now, time.monotonic() + self._unsent_wait_s
                progress.tick()  # so that the portal goes on waiting for the cleaning


def refuse_baseline(entries: Iterable[Entry]) -> str | None:
    """Why no baseline may be taken now: what a tenant left must not become the machine's normal state."""
    for entry in entries:
        return f"lease {entry.lease_id} has not been cleaned from this host: reclaim the machine, or install it anew"
    return None


def refuse_clean(
    args: Mapping[str, Any], machine_id: int, desired: Desired | None, entries: Iterable[Entry]
) -> str | None:
    """Why this cleaning must not happen; None when it may. A late or repeated order must never meet the next tenant."""
    lease_id = args["lease_id"]
    if args["machine_id"] != machine_id:
        return f"the order is for machine {args['machine_id']}, this is machine {machine_id}"
    for lease in desired.leases if desired else ():
        if lease.is_open and lease.lease_id == lease_id:
            return f"lease {lease_id} is wanted open: close it first"
        if lease.is_open:
            return f"lease {lease.lease_id} is wanted open on this machine: it must end first"
    for entry in entries:
        if entry.lease_id != lease_id and not entry.is_closed:
            return f"lease {entry.lease_id} is open on this machine: it must end first"
        if entry.lease_id == lease_id and (entry.login, entry.uid) != (args["login"], args["uid"]):
            said = f"{args['login']} (UID {args['uid']})"
            return f"lease {lease_id} is {entry.login} (UID {entry.uid}) here, the order says {said}"
        if entry.lease_id != lease_id and (entry.login == args["login"] or entry.uid == args["uid"]):
            return f"{args['login']} (UID {args['uid']}) is lease {entry.lease_id}'s here, not lease {lease_id}'s"
    return None
