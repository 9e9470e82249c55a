"""Sync: what the agent of a machine is told, and what it says. One call, two uses.

`hold` brings the desired state down the moment it changes; `report` takes what the host observed and answers what is
kept. Both may be repeated. A report that has nothing new but its heartbeat touches no table here: the process remembers
what it needs (memory.py) and writes heartbeats together (heartbeats.py). Everything else is committed, then answered.

Who may call is asked in agents.py. What observed leases, attempts and results mean is told in their own modules.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from portal import db
from portal.db import utcnow
from portal.errors import Conflict, Invalid
from portal.integrations import protocol
from portal.integrations.wake import Heard, wake
from portal.models import Attempt, Command, Lease, Machine, Task
from portal.services import (
    agents,
    audit,
    commands,
    desired,
    events,
    frozen,
    heartbeats,
    journal,
    leases,
    logs,
    machines,
    provisioning,
    tasks,
)
from portal.services.actors import of_agent
from portal.services.heartbeats import Heartbeat
from portal.services.memory import Memory

Message = Mapping[str, Any]
NOTHING: dict[str, list[Any]] = {"attempts": [], "command_results": [], "journal": []}


class NotYours(Conflict):
    """The report speaks of something that is not this machine's. Nothing of it was kept."""

    code = "not_yours"


@dataclass(slots=True)
class Known:
    """What the process remembers of a machine. The last fields are what was taken in already from its reports."""

    epoch: str
    generation: int
    applied_generation: int | None
    frozen_reason: str | None
    frozen_generation: int | None
    host_generation: int | None
    is_thawing: bool
    has_said_so: bool  # the last report that is kept says `frozen`
    boot_id: str | None  # and which boot it is from
    leases: Any = None
    holes: Any = None
    gpu_uuids: list[str] | None = None
    facts: Any = field(default=None)

    def is_current(self, request: Message) -> bool:
        """Whether the agent holds what we would send."""
        return bool(request["epoch"] == self.epoch and request["generation"] == self.generation)

    def may_be_told(self) -> bool:
        """A frozen host gets no orders, but the one that ends it."""
        return self.frozen_reason is None or self.is_thawing

    def awaits_its_word(self) -> bool:
        """The portal was restored, and the host has not yet said whether it knows more."""
        return self.frozen_generation is not None and self.host_generation is None


_known: Memory[int, Known] = Memory()


def _on_event(heard: Heard) -> None:
    if heard.machine_id is not None:
        _known.drop(heard.machine_id)


wake.on_event(_on_event)


def _know(machine_id: int) -> Known:
    """From memory, or from the database."""
    known = _known.find(machine_id)
    if known is None:
        with db.connection():
            known = _known.read(machine_id, lambda: _load(machine_id))
    return known


def _load(machine_id: int) -> Known:
    machine = machines.get(machine_id)
    report = machines.find_report(machine)
    return Known(
        epoch=machine.epoch,
        generation=machine.generation,
        applied_generation=machine.applied_generation,
        frozen_reason=machine.frozen_reason,
        frozen_generation=machine.frozen_generation,
        host_generation=machine.host_generation,
        is_thawing=machine.frozen_reason is not None and _is_thawing(machine_id),
        has_said_so=report is not None and report.frozen,
        boot_id=None if report is None else report.boot_id,
    )


def _is_thawing(machine_id: int) -> bool:
    return bool(commands.queued(machine_id, "thaw").exists())


# The held call


def hold(agent: agents.Agent, request: Message, *, check: Callable[[], agents.Agent]) -> dict[str, Any]:
    """Answer as soon as the machine is wanted otherwise than the agent knows, at the latest after `wait_s`.

    No database connection is held meanwhile. `check` authenticates again after waiting: a credential that has ended
    is told nothing more.
    """
    give_up_at = time.monotonic() + request["wait_s"]
    machine_id = agent.machine_id
    _mind_the_past(machine_id, request)
    with wake.listen(("machine.generation", machine_id), ("credential.ended", machine_id)) as ear:
        while True:
            known = _know(machine_id)
            remaining_s = give_up_at - time.monotonic()
            if remaining_s <= 0 or (known.may_be_told() and not known.is_current(request)):
                return _answer(agent, request, known, NOTHING)
            ear.wait(remaining_s)
            check()


def _answer(agent: agents.Agent, request: Message, known: Known, acks: Mapping[str, Any]) -> dict[str, Any]:
    wanted = None
    epoch, generation = known.epoch, known.generation
    if not known.may_be_told() and known.frozen_generation is not None:
        generation = known.frozen_generation  # whatever was counted here since, to the host we are behind
    if known.may_be_told() and not known.is_current(request):
        with db.connection():
            agents.refuse_ended(agent)  # asked of the database: what this process remembers may be a moment old
            machine = machines.get(agent.machine_id)
            is_frozen = machine.frozen_reason is not None and not known.is_thawing  # by another process, just now
            if not is_frozen and not _is_behind(machine.epoch, machine.generation, request):
                wanted = desired.desired_of(machine)
        epoch, generation = machine.epoch, machine.generation
    return {
        "protocol": protocol.VERSION,
        "now": protocol.format_time(utcnow()),
        "epoch": epoch,
        "generation": generation,
        "desired": wanted,
        "acks": acks,
    }


# Frozen: the portal and the host disagree about the past


def _is_behind(epoch: str, generation: int, request: Message) -> bool:
    """Whether the host has seen a later state of the same epoch than ours: we come from an older backup."""
    return bool(request["epoch"] == epoch and request["generation"] > generation)


def _mind_the_past(machine_id: int, request: Message) -> None:
    """Nothing is sent to a host that knows more than we do, until an operator has compared the two.

    A portal that was restored compares with what it was then: what it counted on since says nothing of the past.
    """
    known, generation = _know(machine_id), int(request["generation"])
    if known.is_thawing and request["epoch"] == known.epoch:
        return
    if known.frozen_reason is None:
        if _is_behind(known.epoch, known.generation, request):
            with db.connection():
                machine = machines.get(machine_id)  # what we remember may be older than what it was told elsewhere
                if _is_behind(machine.epoch, machine.generation, request):
                    frozen.freeze(machine, generation)
            _known.drop(machine_id)
    elif known.awaits_its_word():
        other_epoch = request["epoch"] not in (None, known.epoch)
        if other_epoch or generation > (known.frozen_generation or 0):
            with db.connection():
                frozen.freeze(machines.get(machine_id), generation)
            _known.drop(machine_id)
    elif min(generation, frozen.MOST_GENERATIONS) > (known.host_generation or 0):
        with db.connection():
            frozen.note_generation(machine_id, generation)
        _known.drop(machine_id)


# The report


def report(agent: agents.Agent, request: Message) -> dict[str, Any]:
    """Take in what the host observed; the answer says what is kept, and may be dropped there.

    Raises NotYours for a report that names another machine's lease, attempt or command: nothing of it is kept.
    """
    told = request["report"]
    received_at = utcnow()
    heartbeat = _heartbeat(agent.machine_id, told, received_at)
    _mind_the_past(agent.machine_id, request)
    known = _know(agent.machine_id)
    acks: Mapping[str, Any] = NOTHING
    if known.awaits_its_word() and request["epoch"] == known.epoch and not told["frozen"]:
        with db.connection():
            frozen.believe(machines.get(agent.machine_id))
        _known.drop(agent.machine_id)
        known = _know(agent.machine_id)
    if not _is_news(told, known):
        pass
    elif _is_deaf(request, told, known):
        with db.connection():
            _note_frozen(agent.machine_id, request, known, heartbeat)
    else:
        with db.connection():
            acks = _take_in(agent.machine_id, request, heartbeat, known)
    heartbeats.note(heartbeat)
    return _answer(agent, request, _know(agent.machine_id), acks)


def _heartbeat(machine_id: int, told: Message, received_at: datetime) -> Heartbeat:
    sent_at = protocol.parse_time(told["sent_at"])
    return Heartbeat(
        machine_id=machine_id,
        received_at=received_at,
        clock_offset_s=round((sent_at - received_at).total_seconds(), 3),
        agent_version=told["agent_version"],
        boot_id=told["boot_id"],
        seq=int(told["seq"]),
        frozen=told["frozen"],
        metrics=told["metrics"],
        gpu=told["gpu"],
        leases=told["leases"],
    )


def _is_news(told: Message, known: Known) -> bool:
    """Whether there is more in it than a heartbeat."""
    if told["attempts"] or told["logs"] or told["command_results"] or told["journal"] or told.get("command_at_work"):
        return True
    if told["frozen"] or known.frozen_reason is not None or told["applied_generation"] != known.applied_generation:
        return True
    if told["facts"] is not None and told["facts"] != known.facts:
        return True
    is_same = told["leases"] == known.leases and _holes(told) == known.holes
    return not is_same or _uuids(told) not in (None, known.gpu_uuids)


def _holes(told: Message) -> tuple[Any, Any]:
    """What it says of openings and forwards; None: it is older than they are."""
    return told.get("openings"), told.get("forwards")


def _uuids(told: Message) -> list[str] | None:
    gpu = told["gpu"]
    return None if gpu is None else [each["uuid"] for each in gpu["gpus"]]


def _is_deaf(request: Message, told: Message, known: Known) -> bool:
    """Of a host that is frozen, here or there, or lives in another past, only its heartbeat is heard.

    What it says of leases and tasks may be of a past that we have lost: no id is looked at, so none can be wrong.
    """
    other_epoch = request["epoch"] not in (None, known.epoch)
    is_frozen = told["frozen"] or not known.may_be_told()
    return bool(is_frozen or other_epoch or _is_behind(known.epoch, known.generation, request))


def _note_frozen(machine_id: int, request: Message, known: Known, heartbeat: Heartbeat) -> None:
    """That it is frozen is kept at once: whoever thaws it relies on what it says of its leases."""
    is_new = known.frozen_reason is None or known.awaits_its_word()
    if not heartbeat.frozen or known.is_thawing or (known.has_said_so and not is_new):
        return
    if is_new:
        reason = "The host has frozen itself: what the portal said did not follow what it knew."
        frozen.freeze(machines.get(machine_id), int(request["generation"]), reason=reason)
    heartbeats.note(heartbeat)
    heartbeats.flush()
    _known.drop(machine_id)


def _take_in(machine_id: int, request: Message, heartbeat: Heartbeat, known: Known) -> dict[str, Any]:
    """Each kind in a transaction of its own, and attempts before leases: a lease has ended when nothing of it runs."""
    machine, told = machines.get(machine_id), request["report"]
    _refuse_foreign(machine, told)
    _note_applied(machine, request, told)
    acks = {
        "attempts": _take_attempts(machine, told, heartbeat, known),
        "command_results": _take_results(machine, told["command_results"]),
        "journal": journal.take(machine, told["journal"]),
    }
    if at_work := told.get("command_at_work"):
        commands.note_progress(machine, at_work["command_id"], at_work["progress"])
    if told["command_results"]:
        _known.drop(machine_id)  # one of them may have ended the freeze
    leases.observed(machine, told["leases"])
    _note_hears(machine, told)
    leases.holes_observed(machine, told)
    _take_hardware(machine, told, known)
    if not (told["attempts"] or told["command_results"]):
        # Taken in, and the same again is no news, until an event of this machine drops what is remembered.
        known.leases, known.applied_generation = told["leases"], machine.applied_generation
        known.holes = _holes(told)
    return acks


def _refuse_foreign(machine: Machine, told: Message) -> None:
    """Look at every id that the report carries before anything of it is used."""
    leases_named = {entry["lease_id"] for entry in told["leases"]}
    attempts_named = {entry["attempt_id"] for part in ("attempts", "logs") for entry in told[part]}
    results_named = {entry["command_id"] for entry in told["command_results"]}
    own_leases = _own_leases(machine, leases_named | {record["lease_id"] for record in told["journal"]})
    own_attempts = _own_attempts(machine, attempts_named | {record["attempt_id"] for record in told["journal"]})
    own_commands = _own_commands(machine, results_named)
    logins = {entry["lease_id"] for entry in told["leases"] if entry["login"] != f"lease{entry['lease_id']}"}
    foreign = {
        "leases": sorted((leases_named - own_leases) | logins),
        "attempts": sorted(attempts_named - own_attempts),
        "command_results": sorted(results_named - own_commands),
        "journal": sorted(
            record["id"]
            for record in told["journal"]
            if record["lease_id"] not in own_leases | {None} or record["attempt_id"] not in own_attempts | {None}
        ),
    }
    if any(foreign.values()):
        with db.atomic():
            audit.record("report.refused", machine, by=of_agent(machine), outcome="refused", items=foreign)
        raise NotYours(f"The report names what was never {machine.name}'s. Nothing of it was kept.", items=foreign)


def _own_leases(machine: Machine, ids: Iterable[int | None]) -> set[int]:
    return _found(Lease.select(Lease.id).where(Lease.machine == machine), Lease.id, ids)


def _own_attempts(machine: Machine, ids: Iterable[int | None]) -> set[int]:
    return _found(Attempt.select(Attempt.id).join(Task).join(Lease).where(Lease.machine == machine), Attempt.id, ids)


def _own_commands(machine: Machine, ids: Iterable[int | None]) -> set[int]:
    return _found(Command.select(Command.id).where(Command.machine == machine), Command.id, ids)


def _found(own: Any, column: Any, ids: Iterable[int | None]) -> set[int]:
    wanted = [each for each in ids if each is not None]
    return {row[0] for row in own.where(column << wanted).tuples()} if wanted else set()


def _note_applied(machine: Machine, request: Message, told: Message) -> None:
    applied = int(told["applied_generation"])
    if request["epoch"] == machine.epoch and applied != machine.applied_generation:
        _write(machine, applied_generation=applied)
        machine.applied_generation = applied


def _note_hears(machine: Machine, told: Message) -> None:
    """Whether it may be told of openings: it reports them, so it knows the field. What waited for that is sent now."""
    hears = "openings" in told
    if hears != machine.hears_openings:
        with db.atomic():
            Machine.update(hears_openings=hears).where(Machine.id == machine.id).execute()
            events.desired_changed(machine.id)
        machine.hears_openings = hears


def _write(machine: Machine, **columns: Any) -> None:
    """What the host says about itself; no audit entry, since nobody decided it."""
    with db.atomic():
        Machine.update(**columns).where(Machine.id == machine.id).execute()


def _take_attempts(machine: Machine, told: Message, heartbeat: Heartbeat, known: Known) -> list[dict[str, Any]]:
    held: dict[int, logs.Held] = {}
    _take_states(machine, told["attempts"], heartbeat, known)
    by_attempt: dict[int, list[Message]] = {}
    for entry in told["logs"]:
        by_attempt.setdefault(int(entry["attempt_id"]), []).append(entry)
    for attempt_id, ranges in by_attempt.items():
        held[attempt_id] = _take_log(attempt_id, ranges)
    reported = {int(entry["attempt_id"]): entry["state"] for entry in told["attempts"]}
    return [_attempt_ack(attempt_id, reported, held) for attempt_id in sorted(reported.keys() | held.keys())]


def _take_states(machine: Machine, entries: list[Message], heartbeat: Heartbeat, known: Known) -> None:
    """Of a host that has booted: what ended before, then the boot itself, then what runs since.

    Whoever looks in between (tasks.lose_gone) takes neither for something that the boot has ended.
    """
    since = [entry for entry in entries if entry["boot_id"] == heartbeat.boot_id]
    for entry in entries:
        if entry["boot_id"] != heartbeat.boot_id:
            tasks.attempt_reported(machine, entry)
    if since and heartbeat.boot_id != known.boot_id:
        heartbeats.write(heartbeat)
        known.boot_id = heartbeat.boot_id
    for entry in since:
        tasks.attempt_reported(machine, entry)


def _take_log(attempt_id: int, ranges: list[Message]) -> logs.Held:
    before = logs.of(attempt_id)
    with db.atomic():
        for entry in ranges:
            held = logs.append(attempt_id, offset=int(entry["offset"]), data=_bytes(entry["data"]), end=entry["end"])
        if held != before:
            attempt = tasks.get_any_attempt(attempt_id)
            logs.announce(attempt_id, task_id=attempt.task_id, tenant_id=attempt.task.lease.tenant_id)
    return held


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise Invalid({"report.logs.data": [f"is not base64: {error}"]}) from None


def _attempt_ack(attempt_id: int, reported: Mapping[int, str], held: Mapping[int, logs.Held]) -> dict[str, Any]:
    log = held.get(attempt_id) or logs.of(attempt_id)
    state = reported.get(attempt_id) or Attempt.select(Attempt.state).where(Attempt.id == attempt_id).scalar()
    return {"attempt_id": attempt_id, "state": state, "log_offset": log.offset, "log_complete": log.complete}


def _take_results(machine: Machine, results: list[Message]) -> list[int]:
    for result in results:
        commands.finished(machine, result)
    return [int(result["command_id"]) for result in results]


def _take_hardware(machine: Machine, told: Message, known: Known) -> None:
    facts, uuids = told["facts"], _uuids(told)
    if facts is not None and facts != known.facts:
        if facts != machine.facts:
            _write(machine, facts=facts)
        known.facts = facts
    if uuids is not None and uuids != known.gpu_uuids:
        provisioning.seen_gpus(machine, told["gpu"]["gpus"])
        known.gpu_uuids = uuids
