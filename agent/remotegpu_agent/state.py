"""What the portal wants, kept on disk so that the host carries on without it; and when not to believe it.

A generation lower than the one seen, or another epoch, means that the portal came back from a backup: it may have
forgotten leases that are running here. Then the host is frozen: nothing is opened, closed or cleaned (leases still
end at their own time) until an operator thaws it. Here is no network and no host.
"""

import logging
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remotegpu_agent.files import find_json, is_full, write_json
from remotegpu_agent.protocol import Command, Desired, ProtocolError, read_desired

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """The desired state this host goes by. `epoch` is None before the first contact."""

    epoch: str | None = None
    generation: int = 0
    desired: Desired | None = None
    frozen: str | None = None  # why, or None


@dataclass(frozen=True)
class Answer:
    """What a sync answered: where the portal stands and, when that differs from us, what it wants; and what we had
    said.
    """

    epoch: str
    generation: int
    desired: Desired | None
    asked_epoch: str | None
    asked_generation: int


def judge(held: Held, answer: Answer, *, machine_id: int, thaws_done: frozenset[int] = frozenset()) -> Held:
    """What this host goes by after the answer. Raises ProtocolError when it is meant for another machine or
    contradicts itself.
    """
    desired = answer.desired
    if desired is not None and desired.machine_id != machine_id:
        raise ProtocolError(f"desired.machine_id: {desired.machine_id}, but this is machine {machine_id}")
    if desired is not None and (desired.epoch, desired.generation) != (answer.epoch, answer.generation):
        raise ProtocolError("desired: its epoch and generation are not those of the answer around it")
    if answer.asked_epoch != held.epoch:
        return held  # asked before a thaw or an enrolment: it speaks of a time that is over
    doubt = held.frozen or _doubt(answer)
    if doubt is None:
        if desired is None:
            return replace(held, epoch=answer.epoch)
        if held.desired is not None and answer.generation <= held.generation:
            return held  # the other connection was faster
        return Held(epoch=answer.epoch, generation=answer.generation, desired=desired)
    if desired is not None and find_thaw(desired, done=thaws_done) is not None:
        return Held(epoch=answer.epoch, generation=answer.generation, desired=desired)
    return replace(held, frozen=doubt)


def _doubt(answer: Answer) -> str | None:
    """Measured against what we told the portal in this very call: two connections may overtake each other."""
    if answer.asked_epoch is not None and answer.epoch != answer.asked_epoch:
        return (
            f"the portal is at epoch {answer.epoch}, this host at {answer.asked_epoch}: "
            "was the portal restored or replaced?"
        )
    if answer.generation < answer.asked_generation:
        return (
            f"the portal is at generation {answer.generation}, this host at {answer.asked_generation}: "
            "was the portal restored from a backup?"
        )
    return None


def find_thaw(desired: Desired, *, done: frozenset[int]) -> Command | None:
    """The operator's word that this very desired state is to be believed."""
    for command in desired.commands:
        if command.kind == "thaw" and command.command_id not in done:
            args = command.args
            if (args["machine_id"], args["epoch"]) == (desired.machine_id, desired.epoch) and args[
                "generation"
            ] <= desired.generation:
                return command
    return None


class State:
    """The held state and its file. Any thread may ask; changes are one at a time and on disk before they are seen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._held = self._load()
        self._unwritten: dict[str, Any] | None = None  # what is wanted, where the disk had no room for it

    @property
    def held(self) -> Held:
        return self._held

    def adopt(
        self, answer: Answer, raw: dict[str, Any] | None, *, machine_id: int, thaws_done: frozenset[int] = frozenset()
    ) -> tuple[Held, Held]:
        """Judge the answer, keep the outcome on disk, and say what was held before and what is now. Raises
        ProtocolError.
        """
        with self._lock:
            before = self._held
            after = judge(before, answer, machine_id=machine_id, thaws_done=thaws_done)
            if after != before:
                kept = raw if after.desired is not before.desired else self._raw()
                try:
                    self._write(after, kept)
                    self._unwritten = None
                except OSError as error:
                    if not is_full(error):
                        raise
                    # A tenant that has filled the disk must not be out of reach by that. After a restart the file
                    # tells of an older generation, and the portal sends this one again.
                    log.error("the disk is full: generation %d is held in memory only", after.generation)
                    self._unwritten = kept
                self._held = after
            return before, after

    def begin(self, epoch: str) -> None:
        """A fresh enrolment: nothing is wanted yet, and nothing of before counts."""
        with self._lock:
            held = Held(epoch=epoch)
            self._write(held, None)
            self._held = held

    def _write(self, held: Held, raw: dict[str, Any] | None) -> None:
        value = {"epoch": held.epoch, "generation": held.generation, "frozen": held.frozen, "desired": raw}
        write_json(self.path, value)

    def _raw(self) -> dict[str, Any] | None:
        if self._unwritten is not None:
            return self._unwritten
        value = find_json(self.path)
        return value["desired"] if value else None

    def _load(self) -> Held:
        value = find_json(self.path)
        if value is None:
            return Held()
        desired = read_desired(value["desired"]) if value["desired"] is not None else None
        return Held(value["epoch"], value["generation"], desired, value["frozen"])
